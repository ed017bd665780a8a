"""Finds the checks that can see a fault: those that use a member of the plain loop which the fault overrides.

``reach.json`` lists the members of the plain loop that each check uses, directly or through others, as measured on
the healthy loop. A check that uses none of the overridden members has the same result on the fault as on the healthy
loop, so it need not be run. After a change of checks or loop, measure again: ``python -m glm4ft.testing.faults.reach``.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from glm4ft.files import write_atomically
from glm4ft.model.tiny import write_tiny_base
from glm4ft.testing.checks import all_checks
from glm4ft.testing.subjects.plain_loop import Subject
from glm4ft.testing.trial.registry import Check
from glm4ft.testing.trial.runs import RecordedRun
from glm4ft.testing.trial.stages import STAGES, NotApplicable
from glm4ft.testing.trial.trial import Trial

REACH_FILE = Path(__file__).with_name("reach.json")
LABELS = {"name", "distributed", "architecture"}  # members of every fault and variation that change nothing
used: set[str] = set()


class Watched(Subject):
    """The healthy loop, which adds the name of every member that is accessed to ``used``."""

    def __getattribute__(self, name: str) -> Any:
        """The member; its name is noted as used."""
        used.add(name)
        return super().__getattribute__(name)


def reaching(subject: type[Subject], last_stage: str = STAGES[-1]) -> list[Check]:
    """The checks that can see what a subject changes, in the order of the stages; all checks if it changes nothing.

    Args:
        subject: The plain loop or a subclass of it.
        last_stage: The last stage whose checks are returned.
    """
    members = {name for kind in subject.__mro__ if kind not in Subject.__mro__ for name in vars(kind)}
    changed = {name for name in members - LABELS if not name.startswith("__") or name == "__init__"}
    stages = STAGES[: STAGES.index(last_stage) + 1]
    return [check for check in all_checks() if check.stage in stages and (not changed or _can_see(check, changed))]


def _can_see(check: Check, changed: set[str]) -> bool:
    members = known_reach().get(check.name)
    # a check that used no member was not applicable to the healthy loop: what it would use is not known
    return not members or "__init__" in changed or not changed.isdisjoint(members)


@cache
def known_reach() -> dict[str, list[str]]:
    """The members that each check uses, by the check's name.

    Checks of several processes are missing, since they cannot be watched.
    """
    reach: dict[str, list[str]] = json.loads(REACH_FILE.read_text("utf-8")) if REACH_FILE.exists() else {}
    return reach


class WatchedTrial(Trial):
    """A trial of one check that shares its runs, and the members used to make them, with the trials of other checks."""

    made: ClassVar[dict[str, tuple[RecordedRun, set[str]]]] = {}

    def run(self, of: str = "short", **changes: Any) -> RecordedRun:
        """The run. The members used to make it count as used by this check, even if another check made it."""
        key = json.dumps([of, changes], sort_keys=True)
        if key not in self.made:
            before = set(used)
            used.clear()
            self.made[key] = self.run_anew(of, **changes), set(used)
            used.update(before)
        self._runs[key], members = self.made[key]
        used.update(members)
        return self._runs[key]


def measure_reach() -> dict[str, list[str]]:
    """Run every check on its own on the healthy loop and return the members that each uses."""
    with tempfile.TemporaryDirectory(prefix="glm4ft-reach-") as name:
        base_dir = write_tiny_base(Path(name) / "base")
        checks = [check for check in all_checks() if "distributed" not in check.needs]
        return {check.name: _members(check, base_dir, Path(name) / check.name) for check in checks}


def _members(check: Check, base_dir: Path, folder: Path) -> list[str]:
    trial = WatchedTrial(Watched(str(base_dir)), base_dir, folder)
    used.clear()
    with contextlib.suppress(NotApplicable):
        check.run(trial)
    own = {name for kind in Subject.__mro__ for name in vars(kind) if not name.startswith("__")}
    return sorted(own & used)


if __name__ == "__main__":
    lines = [f" {json.dumps(name)}: {json.dumps(members)}" for name, members in measure_reach().items()]
    write_atomically(REACH_FILE, "{\n" + ",\n".join(lines) + "\n}\n")
