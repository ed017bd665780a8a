"""The hooks that the plugin calls; a conftest.py or another plugin may implement them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


@pytest.hookspec
def pytest_glm4ft_collected(
    config: pytest.Config, checks: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]]
) -> None:
    """Receive everything that tests attached, once, at the end of the session; under xdist only on the controller.

    Args:
        config: The configuration of the session.
        checks: The results of the conformance suite, in the order in which the checks ended. Each has ``subject``,
            ``check``, ``stage``, ``status``, ``message`` and ``seconds`` as in ``glm4ft check --json``; ``dtype``, ""
            unless the suite runs in several; ``test``, the node id; if the check failed, ``supervised``, a sentence
            on which tokens the subject trains; and, while an adapter of ``glm4ft init`` is as rendered, ``unwired``, a
            sentence that says so.
        runs: The runs recorded by ``glm4ft_record_run``. Each has ``test``, ``name``, and the equally long lists
            ``loss`` and ``grad_norm`` with one entry per optimizer step, None for a value that was not finite.
    """
