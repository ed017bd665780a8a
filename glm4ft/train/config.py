"""The options of a training run: one typed, validated record, read from YAML and flags."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from glm4ft.data.read_options import ReadOptions, columns_of
from glm4ft.errors import ConfigError
from glm4ft.model.lora_options import LoraOptions

_ABOVE_FLOOR = re.compile(r"floor\s*\+\s*(\d*\.?\d+(?:e-?\d+)?)")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what a run computes.

    Args:
        data: The conversations to train on: a file (JSONL, JSON, CSV, Parquet, compressed), a pattern such as
            ``data/*.jsonl``, a data set of the hub (``org/name:split``), or several of them with commas between, each
            perhaps with ``=2`` or ``=0.5`` behind it, its weight.
        model: The base checkpoint: a folder, a hub id, or ``tiny`` for the built-in base.
        output: The folder for the adapter, trajectory and checkpoints; by default a new one below ``runs``.
        eval_data: The held-out conversations, named in the same way.
        columns: The keys of the records, where they have other names than ours:
            ``prompt=question,completion=answer``; role and content are keys of messages.
        calls_in_content: Whether a call of a declared tool that is written into an answer's text is read as a call;
            else it is refused.
        on_error: What conversations that cannot be used do: stop the run before it begins, or be skipped and counted.
        chat_format: The chat format: ``glm-4-9b-chat``, ``glm-4-0414``, ``glm-z1-0414``, ``glm-4.5`` (and 4.6),
            ``glm-4.7``, or ``template``, what the checkpoint's own chat template writes, for dense Llama-like bases
            (ChatML: Qwen, SmolLM2); by default chosen from the checkpoint.
        force_format: Whether to train a format that the checkpoint's own chat template contradicts.
        reasoning: The turns that carry their reasoning: those that the checkpoint's template gives it by default, all
            (``kept``, where serving can be told so), or none.
        dtype: The dtype of the base; ``auto`` is bf16 on CUDA and fp32 elsewhere. Adapters are always fp32.
        quantise: The base's linear layers in four bits (``nf4``), which takes a quarter of bf16's memory (QLoRA); needs
            the extra ``quantised``. A merge goes into the plain weights, beside which the adapter was not trained.
        max_length: The longest row in tokens; longer conversations lose their oldest turns.
        packing: Whether rows are joined into packs of max_length instead of padded; samples stay isolated.
        train_on: The assistant turns to train: all of them, or the last one only.
        final_stop: The token that ends a conversation: the next role's, or ``<|endoftext|>``.
        allow_nonstop_terminator: Whether an assistant turn may be followed by an assistant or system message, whose
            header is then trained as its end.
        lora: The adapter.
        learning_rate: The peak learning rate; by default 5e-3 for the built-in base and 2e-4 for a real one.
        schedule: The shape of the learning rate after the warm-up.
        warmup_steps: The number of steps over which the learning rate rises from 0.
        weight_decay: The decoupled weight decay of the adapter matrices.
        max_grad_norm: The global L2 norm to which a larger gradient is scaled down; 0 switches clipping off.
        epochs: The number of passes over the data, unless max_steps is given.
        max_steps: The number of optimizer steps in all.
        micro_batch_size: The number of rows (packs, when packing) in one forward pass on one device.
        accumulation: The number of forward passes per optimizer step; the loss is the mean over all their supervised
            tokens.
        gradient_checkpointing: Whether activations are recomputed in the backward pass, which saves memory.
        target_loss: The loss below which training stops; the run fails if no step reaches it. ``floor+0.01`` is that
            much above the lowest loss that the data and the frozen head allow.
        round_trip: Whether every assistant turn is generated after training and compared; the run fails if one differs.
        eval_every: The number of steps between evaluations; the last step is always followed by one.
        keep_best: Whether the adapter is that of the evaluation with the lowest loss, and not that of the last step.
        patience: The number of evaluations in a row without a new lowest loss after which training stops.
        save_every: The number of steps between checkpoints; 0 writes none, so a killed run starts again.
        keep_checkpoints: The number of latest checkpoints that stay on disk.
        seed: The seed of the adapter's weights, the order of the rows and dropout.
        report_to: The experiment trackers, by transformers' names (``tensorboard``, ``wandb``).
    """

    data: str | list[str] | None = None
    model: str = "tiny"
    output: str | None = None
    eval_data: str | list[str] | None = None
    columns: str | dict[str, str] | None = None
    calls_in_content: bool = False
    on_error: Literal["stop", "skip"] = "stop"
    chat_format: str | None = None
    force_format: bool = False
    reasoning: Literal["template", "kept", "none"] = "template"
    dtype: str = "auto"
    quantise: Literal["nf4"] | None = None
    max_length: int = 4096
    packing: bool = False
    train_on: Literal["all", "last"] = "all"
    final_stop: Literal["role", "endoftext"] = "role"
    allow_nonstop_terminator: bool = False
    lora: LoraOptions = field(default_factory=LoraOptions)
    learning_rate: float | None = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    epochs: float = 3.0
    max_steps: int | None = None
    micro_batch_size: int = 2
    accumulation: int = 1
    gradient_checkpointing: bool = False
    target_loss: float | str | None = None
    round_trip: bool = False
    eval_every: int = 100
    keep_best: bool = False
    patience: int | None = None
    save_every: int = 100
    keep_checkpoints: int = 2
    seed: int = 0
    report_to: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("max_length", "micro_batch_size", "accumulation", "eval_every", "keep_checkpoints"):
            self._require(name, at_least=1)
        for name in ("warmup_steps", "save_every", "weight_decay", "max_grad_norm"):
            self._require(name, at_least=0)
        for name in ("learning_rate", "epochs", "target_loss", "max_steps", "patience"):
            if getattr(self, name) is not None and self._is_number(name):
                self._require(name, above=0)
        for name in ("keep_best", "patience"):
            if getattr(self, name) and self.eval_data is None:
                raise ConfigError("there is nothing to evaluate on", where=f"--{name}", fix="give --eval_data")
        _ = self.read_options  # checks the names of columns
        # numpy's and torch's generators take no negative seed, and numpy's none above 32 bits
        self._require("seed", at_least=0, at_most=2**32 - 1)

    @property
    def read_options(self) -> ReadOptions:
        """How conversations are read."""
        return ReadOptions(columns_of(self.columns), self.calls_in_content, self.on_error)

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate after the warm-up, with the default of the base filled in."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 5e-3 if self.model == "tiny" else 2e-4

    @property
    def target(self) -> float | None:
        """The target loss as a number, or None; one that is given by the floor is a number once the floor is known."""
        return None if self.target_loss is None else float(self.target_loss)

    @property
    def target_above_floor(self) -> float | None:
        """How far above the floor the target loss is to be; None if it is not given that way."""
        match = _ABOVE_FLOOR.fullmatch(str(self.target_loss))
        return float(match[1]) if match else None

    def _is_number(self, name: str) -> bool:
        value = getattr(self, name)
        if isinstance(value, str) and self.target_above_floor is None:
            expected = "a number, or floor+0.01"
            raise ConfigError(
                "an option has a value that cannot be used", where=f"--{name}", found=value, expected=expected
            )
        return not isinstance(value, str)

    def _require(
        self, name: str, *, at_least: float = -math.inf, above: float = -math.inf, at_most: float = math.inf
    ) -> None:
        value: Any = getattr(self, name)
        if not (at_least <= value <= at_most and above < value < math.inf):
            bounds = [f"at least {at_least}"] * (at_least > -math.inf) + [f"more than {above}"] * (above > -math.inf)
            bounds += [f"at most {at_most}"] * (at_most < math.inf)
            raise ConfigError(
                "option out of range", where=f"--{name}", found=repr(value), expected=" and ".join(bounds)
            )
