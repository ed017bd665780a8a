"""Merge an adapter into its base, as a checkpoint that plain transformers, or a server, loads without peft.

The logits of base and adapter are compared with those of the merged weights before anything is written, and the output
folder appears only when it is complete.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel

import glm4ft
from glm4ft.data.conversation import Message
from glm4ft.data.formats import make_format
from glm4ft.data.turn_format import TEMPLATE
from glm4ft.errors import ConfigError, ModelError, RunError
from glm4ft.folders import appearing_whole, only_writer, require_unused
from glm4ft.model.adapter import CONFIG, base_of, load_adapter, require_adapter
from glm4ft.model.architectures import is_llama_like
from glm4ft.model.base_model import Base, load_base
from glm4ft.model.checkpoint import TINY, find_checkpoint, one_line, read_json
from glm4ft.model.model_card import own_body, shown_base, table, write_card
from glm4ft.model.portable import require_same_reading, write_both_names, write_tokenizer
from glm4ft.model.quantisation import quantisation_of_run
from glm4ft.text.markdown_text import code

# Largest difference of a logit between adapter and merged weights, relative to the largest logit. Measured on an AMD
# EPYC, torch 2.13, 2026-11-23, tiny bases of both architectures with random adapters on all targets that move logits by
# 0.02 to 1.2 (relative): fp32 at most 1.4e-6 with 2 layers (60 runs) and 4.3e-6 with 40 (6 runs); bf16 at most 1.9e-2
# and 6.0e-2, which is the rounding of the forward pass: the merged bf16 weights equal, bit for bit, those merged in
# fp32 and rounded once, so merging in fp32 would double the memory for nothing.
TOLERANCES = {"fp32": 1e-4, "bf16": 0.15}

_PROBE = [
    Message("system", "Answer in one sentence."),
    Message("user", "What is the capital of France?"),
    Message("assistant", "It is Paris."),
    Message("user", "And how is the weather there today?"),
]


@dataclass(frozen=True)
class MergeReport:
    """The result of a merge.

    Args:
        output: The folder of the merged checkpoint.
        base: The base, as it was named.
        dtype: The dtype of the merged weights.
        effect: The largest change of a logit by the adapter, relative to the largest logit.
        error: The largest difference of a logit between adapter and merged weights, relative to the largest logit.
        warnings: Sentences about results that are allowed but probably unintended.
    """

    output: Path
    base: str
    dtype: str
    effect: float
    error: float
    warnings: tuple[str, ...]

    def describe(self) -> str:
        """Format the report as text."""
        lines = [
            f"merged into {self.base} in {self.dtype}: the adapter moves logits by up to {self.effect:.2g} of the "
            f"largest, merging by {self.error:.2g} (limit {TOLERANCES[self.dtype]:g})",
            *(f"warning: {warning}" for warning in self.warnings),
            f"merged checkpoint: {self.output}",
        ]
        return "\n".join(lines)


def merge_adapter(adapter: Path, output: Path, *, model: str | None = None, dtype: str = "auto") -> MergeReport:
    """Merge an adapter into its base and write the result.

    Args:
        adapter: The folder of a LoRA adapter as peft writes it.
        output: The folder to write; must be empty or not exist.
        model: The base; by default the one that adapter_config.json names.
        dtype: The dtype of the merged weights: ``bf16``, ``fp32``, or ``auto`` for that of the stored base.

    Returns:
        The report of the merge.

    Raises:
        ConfigError: If the output folder is in use or cannot be written, or the dtype is not supported.
        ModelError: If base or adapter cannot be used, or do not fit each other.
        RunError: If the logits of the merged weights differ from those of base and adapter by more than the tolerance.
    """
    output, adapter = output.expanduser().absolute(), adapter.expanduser()
    require_unused(output)
    with only_writer(output, "config.json"):
        require_unused(output)  # still
        return _merge_into(output, adapter, model, dtype)


def _merge_into(output: Path, adapter: Path, model: str | None, dtype: str) -> MergeReport:
    config = require_adapter(adapter)
    base = _load_base(adapter, config, model, dtype)
    dtype = {torch.bfloat16: "bf16", torch.float32: "fp32"}[base.model.dtype]
    probe_BT = _probe(base)
    before_BTV = _logits(base.model, probe_BT)
    adapted = load_adapter(base.model, adapter)
    adapted_BTV = _logits(adapted, probe_BT)
    merged = _merge(adapted, adapter)
    effect, error = _compare(before_BTV, adapted_BTV, _logits(merged, probe_BT), TOLERANCES[dtype])
    warnings = (*base.warnings, *_doubts(effect, error), *_about_training(adapter))
    report = MergeReport(output, base.source, dtype, effect, error, warnings)
    _write(merged, base, report, adapter)
    return report


def _load_base(adapter: Path, config: dict[str, Any], model: str | None, dtype: str) -> Base:
    named = model or base_of(adapter, config)
    try:
        dtype = _stored_dtype(named) if dtype == "auto" else dtype
        # only the probe depends on the format; naming one also accepts checkpoints whose format has to be chosen
        chat_format = TEMPLATE if is_llama_like(named) else "glm-4-0414"
        return load_base(named, dtype=dtype, chat_format=chat_format, force_format=True)
    except ModelError as error:
        if model:
            raise
        raise ModelError(
            f"the adapter's base cannot be used: {error.message}",
            where=f"{adapter / CONFIG}, base_model_name_or_path",
            found=f"{named}; {error.found}" if error.found else named,
            expected=error.expected,
            fix="; ".join(filter(None, [error.fix, "or name the base with --model"])),
        ) from error


def _stored_dtype(model: str) -> str:
    if model == TINY:
        return "fp32"
    config = read_json(find_checkpoint(model) / "config.json")
    return "bf16" if config.get("dtype", config.get("torch_dtype")) == "bfloat16" else "fp32"


def _merge(adapted: PeftModel, adapter: Path) -> PreTrainedModel:
    try:
        merged: PreTrainedModel = adapted.merge_and_unload()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            "peft cannot merge this adapter", where=str(adapter / CONFIG), found=one_line(error)
        ) from error
    return merged


def _probe(base: Base) -> torch.Tensor:
    """Make two rows of token ids to compare logits on: a chat prompt, and random ordinary tokens."""
    prompt = make_format(base.format_name, base.tokenizer).prompt(_PROBE)
    ordinary = set(base.tokenizer.get_vocab().values()) - set(base.tokenizer.get_added_vocab().values())
    return torch.tensor([prompt, random.Random(0).choices(sorted(ordinary), k=len(prompt))])


@torch.no_grad()
def _logits(model: PreTrainedModel | PeftModel, ids_BT: torch.Tensor) -> torch.Tensor:
    logits_BTV: torch.Tensor = model(input_ids=ids_BT.to(model.device), use_cache=False).logits
    return logits_BTV.float().cpu()


def _compare(
    before_BTV: torch.Tensor, adapted_BTV: torch.Tensor, merged_BTV: torch.Tensor, tolerance: float
) -> tuple[float, float]:
    largest = adapted_BTV.abs().max()
    effect, error = (((other - adapted_BTV).abs().max() / largest).item() for other in (before_BTV, merged_BTV))
    if not error <= tolerance:  # NaN fails too
        raise RunError(
            "nothing written: the logits of the merged weights differ from those of base and adapter (largest "
            f"difference {error:.2g} of the largest logit, limit {tolerance:g}; effect of the adapter {effect:.2g})"
        )
    return effect, error


def _doubts(effect: float, error: float) -> list[str]:
    if effect == 0:
        return ["the adapter has no effect: the merged model gives the logits of the base"]
    if error >= effect:
        return ["rounding changes the logits as much as the adapter does; a merge with --dtype fp32 would preserve it"]
    return []


def _about_training(adapter: Path) -> list[str]:
    quantised = quantisation_of_run(adapter)
    return [
        f"the adapter was trained on weights quantised to {name} and is merged into the plain ones, which it has not "
        "seen: losses differ from the run's by the rounding; compare the merged model's answers, with glm4ft chat"
        for name in [quantised] * bool(quantised)
    ]


def _write(merged: PreTrainedModel, base: Base, report: MergeReport, adapter: Path) -> None:
    try:
        with appearing_whole(report.output, "config.json") as folder:
            merged.save_pretrained(folder)
            write_both_names(folder)
            write_tokenizer(base.tokenizer, base.folder, folder)
            require_same_reading(folder)
            write_card(folder, _card(report, adapter), base=report.base, library="transformers", relation="finetune")
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            "the merged checkpoint cannot be written", where=str(report.output), found=one_line(error)
        ) from error


def _card(report: MergeReport, adapter: Path) -> list[str]:
    training = own_body(adapter)
    return [
        f"# {code(report.output.name)}",
        "",
        f"The LoRA adapter {code(adapter.name)}, merged into {shown_base(report.base)} by glm4ft {glm4ft.__version__}. "
        "It loads without peft, in transformers 4.51 and newer, vLLM and llama.cpp's converter.",
        "",
        *table(
            {
                "base": shown_base(report.base),
                "dtype": report.dtype,
                "largest change of a logit by the adapter": f"{report.effect:.2g} of the largest logit",
                "largest change of a logit by merging": f"{report.error:.2g} (limit {TOLERANCES[report.dtype]:g})",
            }
        ),
        # the adapter's own card, one level lower
        *(["", *(f"#{line}" if line.startswith("#") else line for line in training)] if training else []),
    ]
