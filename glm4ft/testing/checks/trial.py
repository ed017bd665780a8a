"""What a check is given: the subject, the base it was made on, and what is worth computing once."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from glm4ft.dataset import DEMO_DATA
from glm4ft.testing.adapter import Adapter
from glm4ft.testing.checks.registry import STAGES, CheckFailed, NotApplicable
from glm4ft.testing.reference import Reference, Row
from glm4ft.testing.replay import Verdict, replay
from glm4ft.testing.subject import make_plan
from glm4ft.testing.trace import Tensors, record

RECORDED_STEPS = 6
OVERFIT_STEPS = 60  # the built-in base needs 36


class Overfit:
    """A run on the two bundled conversations, long enough to learn them by heart.

    Args:
        trial: of the subject that runs.
    """

    def __init__(self, trial: Trial) -> None:
        plan = make_plan(steps=OVERFIT_STEPS, output_dir=str(trial.folder / "overfit"))
        self.model = trial.subject.build_model(str(trial.base_dir), plan["seed"])
        with record(self.model, OVERFIT_STEPS) as self.trace:
            trial.subject.train(self.model, trial.demo, plan)
        if not self.trace.steps:
            raise CheckFailed("no optimiser step changed a trained parameter")
        self.trained: Tensors = self.trace.steps[-1].after
        try:
            self.reference = Reference(trial.base_dir, Adapter.of(vars(self.model.peft_config["default"])))
        except ValueError as error:
            raise NotApplicable(str(error)) from error

    def nll(self, row: Row, adapter: Tensors | None = None) -> list[float]:
        """Loss of each token of a row given what is before it, in nats; 0 for the first."""
        with torch.no_grad():
            return [0.0, *self.reference.nll(row[0], self.trained if adapter is None else adapter).tolist()]


@dataclass
class Trial:
    """One subject on one base.

    Args:
        subject: a pipeline under test, made on ``base_dir``.
        base_dir: Hugging Face model folder that the harness wrote.
        folder: for whatever checks and subject write.
    """

    subject: Any
    base_dir: Path
    folder: Path
    _verdicts: dict[str, Verdict] = field(default_factory=dict)

    @functools.cached_property
    def demo(self) -> list[dict[str, Any]]:
        """The two bundled conversations, as ``train`` takes them."""
        return [json.loads(line) for line in DEMO_DATA.read_text("utf-8").splitlines()]

    @functools.cached_property
    def conversations(self) -> list[dict[str, Any]]:
        """Short conversations of unlike length, so that every way of batching has something to get wrong."""
        return [
            {
                "messages": [
                    {"role": "user", "content": f"question {i} " + "why " * (7 * i % 11)},
                    {"role": "assistant", "content": f"answer {i} " + "so " * (5 * i % 13)},
                ],
                "tools": None,
            }
            for i in range(8)
        ]

    @functools.cached_property
    def overfit(self) -> Overfit:
        """The run on the two bundled conversations, trained once."""
        return Overfit(self)

    def rows(self, conversations: list[dict[str, Any]]) -> list[Row]:
        """What the subject makes of conversations."""
        encoded = [self.subject.encode(c["messages"], c.get("tools")) for c in conversations]
        return [(tuple(row["input_ids"]), tuple(row["labels"])) for row in encoded]

    def takes(self, conversation: dict[str, Any]) -> bool:
        """False if the subject says by ``NotImplementedError`` that it refuses or drops a conversation."""
        try:
            self.rows([conversation])
        except NotImplementedError:
            return False
        except Exception:  # for the check that needs the row to report
            return True
        return True

    def replayed(self, **changes: Any) -> Verdict:
        """Record the first steps of a run and replay them, once for each plan.

        Args:
            **changes: of the standard plan.
        """
        key = json.dumps(changes, sort_keys=True)
        if key not in self._verdicts:
            self._verdicts[key] = self._replay(changes)
        return self._verdicts[key]

    def _replay(self, changes: Mapping[str, Any]) -> Verdict:
        output = self.folder / f"replay-{len(self._verdicts)}"
        plan = make_plan(**{"steps": RECORDED_STEPS, "output_dir": str(output), **changes})
        model = self.subject.build_model(str(self.base_dir), plan["seed"])
        try:
            adapter = Adapter.of(vars(model.peft_config["default"]))
        except ValueError as error:
            raise NotApplicable(str(error)) from error
        with record(model, plan["steps"]) as trace:
            self.subject.train(model, self.conversations, plan)
        return replay(trace, Reference(self.base_dir, adapter), self.rows(self.conversations), plan)

    def require_stage(self, stage: str, **changes: Any) -> None:
        """Fail if the replay of a plan departs at a stage.

        Raises:
            CheckFailed: with the departure.
            NotApplicable: if it departs at an earlier stage, so that this one was not judged.
            NotApplicable: if it departed at an earlier stage, so that this one was not judged.
        """
        departure = self.replayed(**changes).departure
        if departure is None or STAGES.index(departure.stage) > STAGES.index(stage):
            return
        under = " (with " + ", ".join(f"{key}={value}" for key, value in changes.items()) + ")" if changes else ""
        if departure.stage == stage:
            raise CheckFailed(f"{departure}{under}")
        raise NotApplicable(f"not judged: the run departs earlier, at {departure.stage}{under}")
