"""What the tests of checks share: a healthy pipeline on trial, whose runs are recorded once."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def healthy(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]  # torch would be loaded
    """The plain loop on the built-in base."""
    from glm4ft.model.tiny import write_tiny_base
    from glm4ft.testing.subjects.plain_loop import Subject
    from glm4ft.testing.trial.trial import Trial

    base_dir = write_tiny_base(tmp_path_factory.mktemp("base"))
    return Trial(Subject(str(base_dir)), base_dir, tmp_path_factory.mktemp("healthy"))


@pytest.fixture
def named_plans_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the combined plans, a third of the time; the test of the own trainer runs all of them."""
    from glm4ft.testing.trial import plans

    monkeypatch.setattr(plans, "PLANS", plans.NAMED)
