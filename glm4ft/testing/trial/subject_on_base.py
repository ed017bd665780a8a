"""A subject on its base: what it states and was asked for, and the rows that it makes of conversations."""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from glm4ft.errors import ConfigError
from glm4ft.model.checkpoint import TINY
from glm4ft.testing.replay.matching import TokenWeights
from glm4ft.testing.specification.lora_spec import LoraSpec, NotSpecified
from glm4ft.testing.specification.reference import LabelledIds, Reference
from glm4ft.testing.specification.routed_experts import require_recent_libraries
from glm4ft.testing.subject import load_subject
from glm4ft.testing.trial.conversations import Conversations, all_conversations
from glm4ft.testing.trial.stages import NotApplicable


@dataclass
class SubjectOnBase:
    """One subject on one base.

    Args:
        subject: The pipeline under test, made on ``base_dir``.
        base_dir: The Hugging Face model folder of the base, written by the harness.
        folder: The folder for the files of checks and subject.
        spec: The subject as ``MODULE:ATTR``, to make it again on another base or in another process; by default its
            class, if that can be imported.
        base: The base as the user named it.
    """

    subject: Any
    base_dir: Path
    folder: Path
    spec: str = ""
    base: str = TINY

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
        except NotSpecified as error:
            raise NotApplicable(str(error)) from error

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
