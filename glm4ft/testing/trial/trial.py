"""What a check is given: the subject, the base it was made on, and runs that are worth recording only once."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from glm4ft.testing.recording.trace import record
from glm4ft.testing.replay.replay import Verdict
from glm4ft.testing.specification.lora_spec import LoraSpec
from glm4ft.testing.specification.reference import LabelledIds, Reference
from glm4ft.testing.subject import load_subject, make_plan
from glm4ft.testing.trial.conversations import Conversations, all_conversations
from glm4ft.testing.trial.runs import RecordedRun
from glm4ft.testing.trial.same_run import describe_divergence
from glm4ft.testing.trial.stages import STAGES, CheckFailed, NotApplicable

LOSS_LIMIT = 0.01  # of two conversations learnt by heart, nats per supervised token
RECORDED_STEPS = 8  # two epochs of the short conversations
DROPOUT: dict[str, Any] = {"dropout": 0.1}  # what many recipes for LoRA have


@dataclass
class Trial:
    """One subject on one base.

    Args:
        subject: a pipeline under test, made on ``base_dir``.
        base_dir: Hugging Face model folder that the harness wrote.
        folder: for whatever checks and subject write.
        spec: ``MODULE:ATTR`` that gives another subject of the kind, on another base or in another process; by default
            the subject's class, if it can be imported.
        standard: changes of the standard plan that a base needs.
        overfit_steps: that suffice to learn two conversations by heart.
        keeps_models: whether every run keeps its model, or only the one that is learnt by heart, where a second one
            does not fit.
        shared: whatever else several checks need.
    """

    subject: Any
    base_dir: Path
    folder: Path
    spec: str = ""
    standard: Mapping[str, Any] = field(default_factory=dict)
    overfit_steps: int = 60  # the built-in base needs 36
    keeps_models: bool = True
    shared: dict[str, Any] = field(default_factory=dict)
    _runs: dict[str, RecordedRun] = field(default_factory=dict)

    @functools.cached_property
    def data(self) -> dict[str, Conversations]:
        """Conversations by what they are for."""
        return all_conversations()

    @property
    def demo(self) -> Conversations:
        """The two bundled conversations."""
        return self.data["demo"]

    @property
    def conversations(self) -> Conversations:
        """Short conversations of unlike length, so that every way of batching has something to get wrong."""
        return self.data["short"]

    @functools.cached_property
    def lora_spec(self) -> LoraSpec:
        """What the user asked for: the subject says so, or else its model's configuration.

        Raises:
            NotApplicable: if the specification does not cover it.
        """
        asked = getattr(self.subject, "lora", None)
        if asked is None:
            configs = getattr(self.subject.build_model(str(self.base_dir), 0), "peft_config", {})
            asked = vars(next(iter(configs.values()))) if configs else None
        if asked is None:
            raise NotApplicable("the subject has no lora, and its model no configuration of peft")
        try:
            return LoraSpec.of(asked)
        except ValueError as error:
            raise NotApplicable(str(error)) from error

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """Of the base as it is stored, and so of the runs on it."""
        stored = json.loads((self.base_dir / "config.json").read_text("utf-8")).get("dtype")
        return torch.bfloat16 if stored == "bfloat16" else torch.float32

    @functools.cached_property
    def base_tokenizer(self) -> Any:
        """As it lies beside the base; a subject may change its own."""
        return AutoTokenizer.from_pretrained(self.base_dir)

    @functools.cached_property
    def reference(self) -> Reference:
        """The specification on this base, on the device where the subject trains."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return Reference(self.base_dir, self.lora_spec, device)

    @property
    def overfit(self) -> RecordedRun:
        """A run on the two bundled conversations, long enough to learn them by heart."""
        return self.run("demo", steps=self.overfit_steps)

    @property
    def trained(self) -> RecordedRun:
        """A run whose model is at hand, for claims about what any training leaves."""
        return self.run() if self.keeps_models else self.overfit

    def recorded(self, of: str) -> RecordedRun | None:
        """The longest run on some data that a check has asked for so far, by the standard plan; None if none has."""
        keys = [(key, *json.loads(key)) for key in self._runs]
        runs = [self._runs[key] for key, data, changes in keys if data == of and set(changes) <= {"steps"}]
        return max(
            (run for run in runs if run.trace.steps and run.model), key=lambda run: len(run.trace.steps), default=None
        )

    def new_folder(self, name: str) -> Path:
        """A folder that nobody has used."""
        number = len(list(self.folder.glob(f"{name}-*")))
        folder = self.folder / f"{name}-{number}"
        folder.mkdir(parents=True)
        return folder

    def rows(self, conversations: Conversations) -> list[LabelledIds]:
        """What the subject makes of conversations."""
        encoded = [self.subject.encode(c["messages"], c.get("tools")) for c in conversations]
        return [(tuple(row["input_ids"]), tuple(row["labels"])) for row in encoded]

    def accepts(self, conversation: dict[str, Any]) -> bool:
        """False if the subject says by ``NotImplementedError`` that it refuses or drops a conversation."""
        try:
            self.rows([conversation])
        except NotImplementedError:
            return False
        except Exception:  # for the check that needs the row to report
            return True
        return True

    def copy_of_base(self, name: str) -> Path:
        """The base in a folder of its own, to be changed there; weights are linked."""
        folder = self.new_folder(name)
        for file in self.base_dir.iterdir():
            if file.suffix == ".safetensors":
                (folder / file.name).symlink_to(file.resolve())
            elif file.is_file():
                shutil.copy(file, folder / file.name)
        return folder

    def subject_on(self, base_dir: Path) -> Any:
        """A subject of the same kind on another base.

        Raises:
            NotApplicable: if it cannot be made.
        """
        try:
            return load_subject(self.importable_spec, base_dir)
        except Exception as error:
            raise NotApplicable(f"no second subject can be made: {error}") from error

    @property
    def importable_spec(self) -> str:
        """``MODULE:ATTR`` of the subject.

        Raises:
            NotApplicable: if it has none.
        """
        kind = type(self.subject)
        if not self.spec and "<locals>" in kind.__qualname__:
            raise NotApplicable("the subject cannot be imported by a name")
        return self.spec or f"{kind.__module__}:{kind.__qualname__}"

    def run(self, of: str = "short", **changes: Any) -> RecordedRun:
        """Record a whole run, once for each data and plan.

        Args:
            of: key of ``data``.
            **changes: of the standard plan, and ``dropout``.
        """
        key = json.dumps([of, changes], sort_keys=True)
        if key not in self._runs:
            self._runs[key] = self.run_anew(of, **changes)
        return self._runs[key]

    @functools.cached_property
    def again(self) -> RecordedRun:
        """The standard run, a second time."""
        return self.run_anew()

    @functools.cached_property
    def noise(self) -> dict[str, Any]:
        """What makes random numbers show that a run spends, loses or draws anew: dropout, where a run with it repeats.

        A run that is never the same twice says nothing of another one, so it is empty for a subject of that kind.
        """
        return {} if describe_divergence(self.run(**DROPOUT), self.run_anew(**DROPOUT)) else DROPOUT

    def run_anew(self, of: str = "short", *, dropout: float = 0.0, **changes: Any) -> RecordedRun:
        """Record a whole run, whether or not there is one like it.

        Args:
            of: key of ``data``.
            dropout: share of the embeddings' entries that the harness drops in training, whatever the subject drops.
            **changes: of the standard plan.
        """
        plan = {"steps": RECORDED_STEPS, "output_dir": str(self.new_folder("run")), **self.standard, **changes}
        plan = make_plan(**plan)
        model = self.subject.build_model(str(self.base_dir), plan["seed"])
        rows = self.rows(self.data[of])
        # a check may ask for the run where it has switched gradients off
        with torch.enable_grad(), record(model, plan["steps"]) as trace, _dropping(model, dropout):
            log = self.subject.train(model, self.data[of], plan)
        return RecordedRun(plan, rows, trace, list(log or []), model, self.reference)

    def release_models(self) -> None:
        """Give back the models that are not kept."""
        for key, run in self._runs.items():
            if not self.keeps_models and json.loads(key) != ["demo", {"steps": self.overfit_steps}]:
                run.model = None

    def replayed(self, **changes: Any) -> Verdict:
        """What the replay of a run on the short conversations finds.

        Args:
            **changes: of the standard plan.
        """
        return self.run(**changes).verdict

    def require_stage(self, stage: str, of: str = "short", **changes: Any) -> RecordedRun:
        """Fail if the replay of a run departs at a stage.

        Returns:
            The run.
        Raises:
            CheckFailed: with the departure.
            NotApplicable: if it departs at an earlier stage, so that this one was not judged.
        """
        run = self.run(of, **changes)
        require_no_departure(run.verdict, stage, changes)
        return run


@contextlib.contextmanager
def _dropping(model: Any, share: float) -> Iterator[None]:
    """Dropout on the embeddings, which every pipeline's own model can have put on from outside."""

    def drop(embedding: torch.nn.Module, _: Any, out: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(out, share, embedding.training)

    embeddings = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)] if share else []
    hooks = [embedding.register_forward_hook(drop) for embedding in embeddings]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def require_no_departure(verdict: Verdict, stage: str, changes: Mapping[str, Any]) -> None:
    """Fail if a verdict departs at a stage.

    Args:
        verdict: of a replay.
        stage: that is judged.
        changes: of the standard plan, for the message.
    Raises:
        CheckFailed: with the departure.
        NotApplicable: if it departs at an earlier stage, so that this one was not judged.
    """
    departure = verdict.departure
    if departure is None or STAGES.index(departure.stage) > STAGES.index(stage):
        return
    under = " (with " + ", ".join(f"{key}={value}" for key, value in changes.items()) + ")" if changes else ""
    if departure.stage == stage:
        raise CheckFailed(f"{departure}{under}")
    raise NotApplicable(f"not judged: the run departs earlier, at {departure.stage}{under}")
