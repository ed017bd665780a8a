"""The recorded runs of a subject on its base, which several checks share."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from glm4ft.testing.recording.record import record
from glm4ft.testing.specification.routed_experts import has_experts
from glm4ft.testing.subject import make_plan
from glm4ft.testing.trial.interventions import dropping, without_dropout
from glm4ft.testing.trial.runs import RecordedRun
from glm4ft.testing.trial.same_run import describe_divergence
from glm4ft.testing.trial.subject_on_base import SubjectOnBase

# By whether the base has experts. A dense one needs 36. With experts loss and norm jump whenever a token is given other
# ones, the norm up to 300 times those before it at the dense rate of 5e-3, so they learn at a lower rate that falls to
# 0. Over 5 seeds of GLM-4.5 and of GLM-4.7 the last loss is 0.0024 to 0.0043 then, and no norm more than 16.5 times
# those before it, but for one seed whose loss ends at 0.036 (own trainer, x86-64 CPU, 2026-11-28).
OVERFIT_STEPS = {False: 60, True: 240}
OVERFIT_SETTINGS: dict[bool, dict[str, Any]] = {False: {}, True: {"learning_rate": 3e-3, "schedule": "cosine"}}
RECORDED_STEPS = 8  # two epochs of the short conversations
DROPOUT: dict[str, Any] = {"dropout": 0.1}  # the rate of many LoRA recipes


@dataclass
class SharedRuns(SubjectOnBase):
    """One subject on one base, with the runs that were recorded of it.

    Args:
        standard: The changes of the standard plan that the base needs.
        overfit_steps: The number of steps that suffices to memorise two conversations; by default that of the
            built-in bases.
        keeps_models: Whether every run keeps its model; if False, only the overfit run does, and what is recorded is
            kept on the disk, for bases of which two do not fit into memory.
        left_out: The names of plans that are not run.
        shared: Further results that several checks share, by key.
    """

    standard: Mapping[str, Any] = field(default_factory=dict)
    overfit_steps: int = 0
    keeps_models: bool = True
    left_out: frozenset[str] = frozenset()
    shared: dict[str, Any] = field(default_factory=dict)
    _runs: dict[str, RecordedRun] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.overfit_steps = self.overfit_steps or OVERFIT_STEPS[has_experts(self.base_dir)]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that limits are for: that of the base as stored, or of the autocast that a recorded run used."""
        stored = json.loads((self.base_dir / "config.json").read_text("utf-8")).get("dtype")
        is_half = stored == "bfloat16" or any(run.trace.dtype != torch.float32 for run in self._runs.values())
        return torch.bfloat16 if is_half else torch.float32

    @property
    def overfit(self) -> RecordedRun:
        """A run on the two bundled conversations, long enough to memorise them."""
        settings = OVERFIT_SETTINGS[has_experts(self.base_dir)]
        own = {key: value for key, value in settings.items() if key not in self.standard}
        return self.run("demo", steps=self.overfit_steps, **own)

    @property
    def trained(self) -> RecordedRun:
        """A run that kept its model, for claims about the model after any training."""
        return self.run() if self.keeps_models else self.overfit

    def recorded(self, of: str) -> RecordedRun | None:
        """The longest run with its model that a check has asked for on some data by standard settings; None if none."""
        keys, standard = [(key, *json.loads(key)) for key in self._runs], {"steps", *OVERFIT_SETTINGS[True]}
        runs = [self._runs[key] for key, data, changes in keys if data == of and set(changes) <= standard]
        return max(
            (run for run in runs if run.trace.steps and run.model), key=lambda run: len(run.trace.steps), default=None
        )

    def run(self, of: str = "short", **changes: Any) -> RecordedRun:
        """Record a whole run, or return the one already recorded with the same data and plan.

        Args:
            of: The name of the conversations, a key of ``data``.
            **changes: The changes of the standard plan, and ``dropout``.
        """
        key = json.dumps([of, changes], sort_keys=True)
        if key not in self._runs:
            self.release_models()  # before another is loaded: a check may ask for the runs of all plans
            self._runs[key] = self.run_anew(of, **changes)
        return self._runs[key]

    def run_with_model(self, of: str = "short", **changes: Any) -> RecordedRun:
        """Record a whole run as ``run`` does; again if the model of the recorded one was released."""
        if (run := self.run(of, **changes)).model is None:
            self._runs.pop(json.dumps([of, changes], sort_keys=True))
            return self.run(of, **changes)
        return run

    @functools.cached_property
    def again(self) -> RecordedRun:
        """A second recording of the standard run."""
        run = self.run_anew()
        run.model = run.model if self.keeps_models else None
        return run

    @functools.cached_property
    def noise(self) -> dict[str, Any]:
        """The change that makes a run depend on its random numbers: dropout, so that lost or extra draws show.

        It is empty if two runs with dropout differ, since such runs cannot be compared.
        """
        return {} if describe_divergence(self.run(**DROPOUT), self.run_anew(**DROPOUT)) else DROPOUT

    def run_anew(self, of: str = "short", *, dropout: float = 0.0, **changes: Any) -> RecordedRun:
        """Record a whole run, even if an equal one has been recorded.

        Args:
            of: The name of the conversations, a key of ``data``.
            dropout: The dropout probability that the harness applies to the embeddings in training, in addition to
                any dropout of the subject.
            **changes: The changes of the standard plan.
        Returns:
            The recorded run.
        """
        plan = {"steps": RECORDED_STEPS, "output_dir": str(self.new_folder("run")), **self.standard, **changes}
        plan = make_plan(**plan)
        model = self.subject.build_model(str(self.base_dir), plan["seed"])
        rows, weights = self.weighted_rows(self.data[of])
        kept_in = None if self.keeps_models else self.new_folder("trace")
        # the check that asks for the run may have disabled gradients
        with (
            torch.enable_grad(), record(model, plan["steps"], kept_in) as trace, dropping(model, dropout),
            without_dropout(model) if self.requested_dropout else contextlib.nullcontext(),
        ):  # fmt: skip
            log = self.subject.train(model, self.data[of], plan)
        return RecordedRun(
            plan | self.stated_rates, rows, trace, list(log or []), model, self.reference, dropout, weights
        )

    def release_models(self) -> None:
        """Release the models of the runs that do not keep theirs."""
        for key, run in self._runs.items():
            if not self.keeps_models and json.loads(key) != ["demo", {"steps": self.overfit_steps}]:
                run.model = None
