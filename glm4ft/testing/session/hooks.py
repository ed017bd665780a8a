"""Hooks that the plugin calls; a conftest.py or another plugin may implement them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


@pytest.hookspec
def pytest_glm4ft_collected(
    config: pytest.Config, checks: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]]
) -> None:
    """Everything that tests attached, once, at the end of the session; under xdist on the controller alone.

    Args:
        config: of the session.
        checks: of the conformance suite, in the order in which they ended: ``subject``, ``check``, ``stage``,
            ``status``, ``message`` and ``seconds`` as ``glm4ft check`` has them, ``dtype`` where the suite runs in
            several, else "", and ``test``, the node id; with one that failed ``supervised``, what the subject trains.
        runs: recorded by ``glm4ft_record_run``: ``test``, ``name``, and the equally long lists ``loss`` and
            ``grad_norm`` with an entry per optimizer step, None where a value was not finite.
    """
