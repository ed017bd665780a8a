"""Merge an adapter into its base, as a checkpoint that plain transformers, or a server, loads without peft.

The logits of base and adapter are compared with those of the merged weights before anything is written, and the output
folder appears only when it is complete.
"""

from __future__ import annotations

import random
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from transformers import PreTrainedModel

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.conversation import Message
from glm4ft.errors import ConfigError, ModelError, RunError
from glm4ft.folders import COMPLETE_MARKER, appearing_whole, damage, only_writer, require_unused
from glm4ft.model.base_model import Base, load_base
from glm4ft.model.checkpoint import TINY, find_checkpoint, listed, one_line, read_json, require_whole_file

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

# Largest difference of a logit between adapter and merged weights, relative to the largest logit. Measured on an AMD
# EPYC, torch 2.13, 2026-11-23, tiny bases of both architectures with random adapters on all targets that move logits by
# 0.02 to 1.2 (relative): fp32 at most 1.4e-6 with 2 layers (60 runs) and 4.3e-6 with 40 (6 runs); bf16 at most 1.9e-2
# and 6.0e-2, which is the rounding of the forward pass: the merged bf16 weights equal, bit for bit, those merged in
# fp32 and rounded once, so merging in fp32 would double the memory for nothing.
TOLERANCES = {"fp32": 1e-4, "bf16": 0.15}

# Copied byte for byte: saved again, they would name classes of this transformers version and our padding side.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip

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
    adapted = _load_adapter(base.model, adapter)
    adapted_BTV = _logits(adapted, probe_BT)
    merged = _merge(adapted, adapter)
    effect, error = _compare(before_BTV, adapted_BTV, _logits(merged, probe_BT), TOLERANCES[dtype])
    _write(merged, base, output)
    return MergeReport(output, base.source, dtype, effect, error, (*base.warnings, *_doubts(effect, error)))


def require_adapter(adapter: Path) -> dict[str, Any]:
    """Read the configuration of a LoRA adapter, and require that its weights exist as safetensors.

    Raises:
        ModelError: If the folder does not hold such an adapter.
    """
    if not (adapter / CONFIG).is_file():
        checkpoints = sorted(path.parent.name for path in adapter.glob(f"checkpoint-*/{CONFIG}"))
        raise ModelError(
            "not the folder of an adapter",
            where=str(adapter),
            found=f"no {CONFIG}" if adapter.is_dir() else "no such folder",
            fix=f"the run was not finished; it has {listed(checkpoints)}" if checkpoints else "",
        )
    config = read_json(adapter / CONFIG)
    if config.get("peft_type") != "LORA":
        found = str(config.get("peft_type"))
        raise ModelError("not a LoRA adapter", where=str(adapter / CONFIG), found=f"peft_type {found}", expected="LORA")
    if config.get("megatron_config"):
        where, fix = str(adapter / CONFIG), "remove megatron_config from a copy of the file"
        raise ModelError("the adapter names a module to import, which is code", where=where, fix=fix)
    if not (adapter / WEIGHTS).is_file():
        is_pickle = (adapter / PICKLE).is_file()
        raise ModelError(
            "the adapter is in a pickle file, which can run code" if is_pickle else "the adapter has no weights",
            where=str(adapter),
            found=PICKLE if is_pickle else "",
            expected=WEIGHTS,
        )
    if (adapter / COMPLETE_MARKER).is_file() and (problem := damage(adapter, only=(CONFIG, WEIGHTS))):
        raise ModelError(
            "the adapter is damaged", where=str(adapter), found=problem, fix="copy it again, or take a checkpoint's"
        )
    return config


def _load_base(adapter: Path, config: dict[str, Any], model: str | None, dtype: str) -> Base:
    named = model or config.get("base_model_name_or_path")
    if not named:
        raise ModelError(
            "the adapter does not name its base", where=str(adapter / CONFIG), fix="name the base with --model"
        )
    try:
        dtype = _stored_dtype(named) if dtype == "auto" else dtype
        # only the probe depends on the format; naming one also accepts checkpoints whose format has to be chosen
        return load_base(named, dtype=dtype, chat_format="glm-4-0414")
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


def _load_adapter(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """Load an adapter with peft, but refuse missing and foreign tensors: peft only warns of the former."""
    stored = set(require_whole_file(adapter / WEIGHTS))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = PeftModel.from_pretrained(model, str(adapter))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ModelError("the adapter does not fit the base", where=str(adapter), found=one_line(error)) from error
    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    # with a target such as lm_head peft also stores the base's own weights of it
    foreign = {name for name in stored - wanted if ".base_layer." not in name}
    for message, names in (("lacks tensors", wanted - stored), ("has tensors without a place in the base", foreign)):
        if names:
            raise ModelError(
                f"the adapter {message}",
                where=str(adapter / WEIGHTS),
                found=f"{len(names)}: {listed(names)}",
                expected=f"the {len(wanted)} tensors that {CONFIG} describes",
            )
    return adapted.eval()


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
    prompt = ChatFormat(base.format_name, base.tokenizer).prompt(_PROBE)
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


def _write(merged: PreTrainedModel, base: Base, output: Path) -> None:
    try:
        with appearing_whole(output, "config.json") as folder:
            merged.save_pretrained(folder)
            if base.folder is None:
                base.tokenizer.save_pretrained(folder)
            else:
                for path in (base.folder / name for name in _TOKENIZER_FILES):
                    if path.exists():
                        shutil.copyfile(path, folder / path.name)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            "the merged checkpoint cannot be written", where=str(output), found=one_line(error)
        ) from error
