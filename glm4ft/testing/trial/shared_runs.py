"""A subject on its base, and its recorded runs, which several checks share."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from glm4ft.errors import ConfigError
from glm4ft.model.checkpoint import TINY
from glm4ft.testing.recording.record import record
from glm4ft.testing.replay.matching import TokenWeights
from glm4ft.testing.specification.lora_spec import LoraSpec
from glm4ft.testing.specification.reference import LabelledIds, Reference
from glm4ft.testing.specification.routed_experts import has_experts, require_recent_libraries
from glm4ft.testing.subject import load_subject, make_plan
from glm4ft.testing.trial.conversations import Conversations, all_conversations
from glm4ft.testing.trial.interventions import dropping, without_dropout
from glm4ft.testing.trial.runs import RecordedRun
from glm4ft.testing.trial.same_run import describe_divergence
from glm4ft.testing.trial.stages import NotApplicable

# By whether the base has experts. A dense one needs 36. With experts loss and norm jump whenever a token is given other
# ones, the norm up to 300 times those before it at the dense rate of 5e-3, so they learn at a lower rate that falls to
# 0. Over 5 seeds of GLM-4.5 and of GLM-4.7 the last loss is 0.0024 to 0.0043 then, and no norm more than 16.5 times
# those before it, but for one seed whose loss ends at 0.036 (own trainer, x86-64 CPU, 2026-11-28).
OVERFIT_STEPS = {False: 60, True: 240}
OVERFIT_SETTINGS: dict[bool, dict[str, Any]] = {False: {}, True: {"learning_rate": 3e-3, "schedule": "cosine"}}
RECORDED_STEPS = 8  # two epochs of the short conversations
DROPOUT: dict[str, Any] = {"dropout": 0.1}  # the rate of many LoRA recipes


@dataclass
class SharedRuns:
    """One subject on one base, with the runs that were recorded of it.

    Args:
        subject: The pipeline under test, made on ``base_dir``.
        base_dir: The Hugging Face model folder of the base, written by the harness.
        folder: The folder for the files of checks and subject.
        spec: The subject as ``MODULE:ATTR``, to make it again on another base or in another process; by default its
            class, if that can be imported.
        base: The base as the user named it.
        standard: The changes of the standard plan that the base needs.
        overfit_steps: The number of steps that suffices to memorise two conversations; by default that of the
            built-in bases.
        keeps_models: Whether every run keeps its model; if False, only the overfit run does, and what is recorded is
            kept on the disk, for bases of which two do not fit into memory.
        left_out: The names of plans that are not run.
        shared: Further results that several checks share, by key.
    """

    subject: Any
    base_dir: Path
    folder: Path
    spec: str = ""
    base: str = TINY
    standard: Mapping[str, Any] = field(default_factory=dict)
    overfit_steps: int = 0
    keeps_models: bool = True
    left_out: frozenset[str] = frozenset()
    shared: dict[str, Any] = field(default_factory=dict)
    _runs: dict[str, RecordedRun] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.overfit_steps = self.overfit_steps or OVERFIT_STEPS[has_experts(self.base_dir)]

    def require_recent_libraries(self) -> None:
        """Refuse a subject that trains a base with experts by libraries that the specification is not about.

        Raises:
            ModelError: If a library is too old.
        """
        if getattr(self.subject, "build_model", None):  # rows are judged without a model
            require_recent_libraries(self.base_dir)

    @functools.cached_property
    def data(self) -> dict[str, Conversations]:
        """The sets of conversations, by name, without tool calls for a subject that encodes none.

        How a call is written is known of the GLM-4 family's formats only.
        """
        chat_format = str(getattr(self.subject, "chat_format", None) or "")
        if not chat_format:
            return all_conversations(with_tools=False)
        found = all_conversations(chat_format=chat_format)
        call = found["mixed"][0]
        if self.accepts(call):  # what else is wrong with it is for the checks to say
            return found
        return all_conversations(with_tools=False, chat_format=chat_format)

    @property
    def demo(self) -> Conversations:
        """The two bundled conversations."""
        return self.data["demo"]

    @property
    def conversations(self) -> Conversations:
        """Short conversations of different lengths, so that a fault in any way of batching shows."""
        return self.data["short"]

    @functools.cached_property
    def lora_spec(self) -> LoraSpec:
        """The requested adapter, from the subject's ``lora`` or else from its model's configuration.

        Raises:
            NotApplicable: If neither states it, or the specification does not cover it.
        """
        asked = getattr(self.subject, "lora", None)
        if asked is None:
            configs = getattr(self.subject.build_model(str(self.base_dir), 0), "peft_config", {})
            asked = vars(next(iter(configs.values()))) if configs else None
        if asked is None:
            raise NotApplicable("the subject has no lora, and its model has no peft configuration")
        try:
            return LoraSpec.of(asked)
        except ValueError as error:
            raise NotApplicable(str(error)) from error

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that limits are for: that of the base as stored, or of the autocast that a recorded run used."""
        stored = json.loads((self.base_dir / "config.json").read_text("utf-8")).get("dtype")
        is_half = stored == "bfloat16" or any(run.trace.dtype != torch.float32 for run in self._runs.values())
        return torch.bfloat16 if is_half else torch.float32

    @functools.cached_property
    def base_tokenizer(self) -> Any:
        """The tokenizer in the base's folder; the subject's own may be a changed one."""
        return AutoTokenizer.from_pretrained(self.base_dir)

    @functools.cached_property
    def reference(self) -> Reference:
        """The specification on this base, on the GPU if there is one, like the subject."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return Reference(self.base_dir, self.lora_spec, device)

    @property
    def stop_ids(self) -> list[int] | None:
        """The ids at which generation ends, of which a configuration may have a single one; None if none are stated."""
        stated = getattr(self.subject, "stop_ids", None)
        return None if stated is None else [stated] if isinstance(stated, int) else list(stated)

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

    def new_folder(self, name: str) -> Path:
        """Make a new, empty folder."""
        number = len(list(self.folder.glob(f"{name}-*")))
        folder = self.folder / f"{name}-{number}"
        folder.mkdir(parents=True)
        return folder

    def rows(self, conversations: Conversations) -> list[LabelledIds]:
        """The rows that the subject encodes conversations as."""
        return self.weighted_rows(conversations)[0]

    def weighted_rows(self, conversations: Conversations) -> tuple[list[LabelledIds], TokenWeights]:
        """The rows that the subject encodes conversations as, and the weights in the loss that it states for them."""
        encoded = [self.subject.encode(c["messages"], c.get("tools")) for c in conversations]
        rows = [(tuple(row["input_ids"]), tuple(row["labels"])) for row in encoded]
        return rows, {ids: tuple(e["weights"]) for (ids, _), e in zip(rows, encoded, strict=True) if "weights" in e}

    def accepts(self, conversation: dict[str, Any]) -> bool:
        """Whether the subject accepts a conversation; it refuses one by raising ``NotImplementedError``."""
        try:
            self.rows([conversation])
        except NotImplementedError:
            return False
        except Exception:  # reported by the check that needs the row
            return True
        return True

    def copy_of_base(self, name: str) -> Path:
        """Copy the base into a new folder, where it may be changed; the weights are links."""
        folder = self.new_folder(name)
        for file in self.base_dir.iterdir():
            if file.suffix == ".safetensors":
                (folder / file.name).symlink_to(file.resolve())
            elif file.is_file():
                shutil.copy(file, folder / file.name)
        return folder

    def subject_on(self, base_dir: Path) -> Any:
        """Make the subject again, on another base.

        Raises:
            NotApplicable: If it cannot be made.
        """
        try:
            made = load_subject(self.importable_spec, base_dir)
        except Exception as error:
            raise NotApplicable(f"no second subject can be made: {error}") from error
        if made is self.subject:
            raise NotApplicable("the subject is a plain object, not a function of base_dir: it stays on its base")
        return made

    @property
    def importable_spec(self) -> str:
        """The subject as ``MODULE:ATTR``.

        Raises:
            NotApplicable: If it cannot be imported by a name.
        """
        kind = type(self.subject)
        if not self.spec and "<locals>" in kind.__qualname__:
            raise NotApplicable("the subject cannot be imported by a name")
        return self.spec or f"{kind.__module__}:{kind.__qualname__}"

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

    @property
    def stated_rates(self) -> dict[str, Any]:
        """The factors of the learning rate that the subject states, as a setting beside the plan.

        Raises:
            ConfigError: If one of them is not a positive number.
        """
        factors = dict(getattr(self.subject, "learning_rate_factors", None) or {})
        if wrong := [part for part, factor in factors.items() if not 0 < factor < float("inf")]:
            where, found = "learning_rate_factors", f"{wrong[0]}: {factors[wrong[0]]}"
            raise ConfigError("not a factor of the learning rate", where=where, found=found, expected="more than 0")
        return {"learning_rate_factors": factors} if factors else {}

    @property
    def requested_dropout(self) -> float:
        """The dropout probability of the adapters' inputs that the user requested."""
        return float((getattr(self.subject, "lora", None) or {}).get("lora_dropout") or 0.0)

    def release_models(self) -> None:
        """Release the models of the runs that do not keep theirs."""
        for key, run in self._runs.items():
            if not self.keeps_models and json.loads(key) != ["demo", {"steps": self.overfit_steps}]:
                run.model = None
