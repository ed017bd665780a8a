"""Read the folder of a LoRA adapter, of ours or any other trainer, and put it on its base.

peft leaves out tensors that have no place in the base, and warns of those that are missing; both are refused here. What
most often causes it is named: an adapter of the checkpoint with remote code, or a state dict that was saved by hand.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedModel

from glm4ft.errors import ModelError
from glm4ft.folders import COMPLETE_MARKER, damage
from glm4ft.model.checkpoint import listed, one_line, read_json, require_whole_file
from glm4ft.model.lora_options import GLM4_TARGETS

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

# Layers of the checkpoints with remote code, and what became of them in the converted ones.
# Source: transformers, models/glm/convert_glm_weights_to_hf.py.
_REMOTE_CODE_LAYERS = {
    "query_key_value": "q_proj, k_proj and v_proj",
    "dense": "o_proj",
    "dense_h_to_4h": "gate_up_proj",
    "dense_4h_to_h": "down_proj",
}
# Where names of tensors differ from peft's: what to replace, by what, and what wrote it there.
_RENAMINGS = (
    (re.compile(r"(\.lora_\w+)\.(?!weight$|bias$)\w+(?=\.(weight|bias)$|$)"), r"\1", "the name of the adapter"),
    (re.compile(r"(?:^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."), "", "a wrapper"),
    (re.compile(r"^(?!base_model\.)"), "base_model.model.", "the missing prefix base_model.model"),
)


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
    if (adapter / COMPLETE_MARKER).is_file() and (problem := damage(adapter, only=(CONFIG, WEIGHTS))):
        fix = "copy it again, or take a checkpoint's; another base is named with --model, not in the file"
        raise ModelError("the adapter is damaged", where=str(adapter), found=problem, fix=fix)
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
    return config


def base_of(adapter: Path, config: dict[str, Any]) -> str:
    """The base that an adapter names.

    Args:
        adapter: The folder of the adapter.
        config: Its configuration.
    Returns:
        A folder or a hub id. A run on the built-in base writes that into a folder of its own, which is found
        there after the run was moved as well.
    Raises:
        ModelError: If the adapter names no base.
    """
    named = str(config.get("base_model_name_or_path") or "")
    if not named:
        raise ModelError(
            "the adapter does not name its base", where=str(adapter / CONFIG), fix="name the base with --model"
        )
    beside = adapter / Path(named).name
    is_moved = Path(named).is_absolute() and not Path(named).exists() and (beside / "config.json").is_file()
    return str(beside) if is_moved else named


def load_adapter(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """Put an adapter on its base.

    Args:
        model: The base, changed in place.
        adapter: The folder of the adapter.
    Returns:
        The adapted model, in eval mode.
    Raises:
        ModelError: If the adapter does not fit the base, tensor by tensor.
    """
    stored = set(require_whole_file(adapter / WEIGHTS))
    _require_layers(model, stored, adapter)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = PeftModel.from_pretrained(model, str(adapter))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        if "size mismatch" in str(error):
            raise _other_size(error, adapter) from error
        raise ModelError(
            "the adapter does not fit the base", where=str(adapter), found=one_line(error), fix=_about_names(stored)
        ) from error
    _require_same_tensors(set(get_peft_model_state_dict(adapted, save_embedding_layers=False)), stored, adapter)
    return adapted.eval()


def _require_layers(model: PreTrainedModel, stored: set[str], adapter: Path) -> None:
    """Refuse an adapter of layers that the base does not have, with the cause; peft says only that there are none."""
    targets = read_json(adapter / CONFIG).get("target_modules")
    if isinstance(targets, str):  # a pattern, which is peft's to match
        return
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    missing = [target for target in map(str, targets or ()) if target.rpartition(".")[2] not in names]
    # a list that was written for any model may name layers that this one never had, and that have no weights
    unknown = [target for target in missing if any(f".{target}." in f".{name}" for name in stored)]
    unknown = unknown or missing * (len(missing) == len(targets or ()))
    if not unknown:
        return
    raise ModelError(
        "the adapter does not fit the base: it adapts layers that the base does not have",
        where=f"{adapter / CONFIG}, target_modules",
        found=listed(unknown),
        expected=", ".join(GLM4_TARGETS),
        fix=_about_layers(unknown, model),
    )


def _about_layers(unknown: Collection[str], model: PreTrainedModel) -> str:
    """What layers of these names come from, and what can be done."""
    if remote := [name for name in unknown if name in _REMOTE_CODE_LAYERS]:
        config: Any = model.config
        heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        became = ", ".join(f"{name} is {_REMOTE_CODE_LAYERS[name]}" for name in remote)
        split = (
            f"; of query_key_value, lora_A goes to all three, and the rows of lora_B are {heads} of q, {kv} of k, "
            f"{kv} of v"
        )
        return (
            f"the adapter was trained on the checkpoint with remote code; in the converted one {became}: train it "
            f"again on this base, or split its tensors" + split * ("query_key_value" in remote)
        )
    if {"gate_proj", "up_proj"} & set(unknown):
        return (
            "GLM-4 has gate_proj and up_proj fused as gate_up_proj; this adapter belongs to a base that has them "
            "apart: another model family, or a checkpoint that was converted"
        )
    return "name the base that the adapter was trained on with --model"


def _other_size(error: Exception, adapter: Path) -> ModelError:
    return ModelError(
        "the adapter does not fit the base: tensors of the same name differ in size",
        where=str(adapter / WEIGHTS),
        found=one_line(error),
        fix=f"name the base that the adapter was trained on with --model; if it is this one, {CONFIG} is not the one "
        "that belongs to these weights (its r, or modules_to_save)",
    )


def _require_same_tensors(wanted: set[str], stored: set[str], adapter: Path) -> None:
    # with a target such as lm_head peft also stores the base's own weights of it
    foreign = {name for name in stored - wanted if ".base_layer." not in name}
    missing = wanted - stored
    if not missing and not foreign:
        return
    both = f"; in their place {len(foreign)} others: {listed(foreign)}" if foreign else ""
    raise ModelError(
        "the adapter lacks tensors" if missing else "the adapter has tensors without a place in the base",
        where=str(adapter / WEIGHTS),
        found=f"{len(missing)}: {listed(missing)}{both}" if missing else f"{len(foreign)}: {listed(foreign)}",
        expected=f"the {len(wanted)} tensors that {CONFIG} describes",
        fix=_about_names(foreign) if missing else _about_depth(wanted, foreign),
    )


def _about_names(names: Collection[str]) -> str:
    """What makes names of tensors differ from those that peft writes; "" if nothing known does."""
    renamed, causes = {name: name for name in names}, []
    for pattern, replacement, cause in _RENAMINGS:
        after = {name: pattern.sub(replacement, new) for name, new in renamed.items()}
        causes += [cause] if after != renamed else []
        renamed = after
    changed = min((name for name, new in renamed.items() if new != name), default="")
    if not changed:
        return ""
    return (
        f"the names of the tensors differ from peft's by {' and '.join(causes)}: rename them, as {changed} to "
        f"{renamed[changed]}, or save the model anew with its save_pretrained"
    )


def _about_depth(wanted: Collection[str], foreign: Collection[str]) -> str:
    inside, outside = (
        {match[1] for name in names if (match := re.search(r"layers\.(\d+)\.", name))} for names in (wanted, foreign)
    )
    if not outside or inside & outside:
        return ""
    return "the adapter has layers that the base has not: it was trained on a deeper one; name that with --model"
