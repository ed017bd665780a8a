"""Which checkpoints can be loaded: the classes of transformers that they may name, and why others are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import (
    Glm4ForCausalLM,
    Glm4MoeForCausalLM,
    Glm4MoeLiteForCausalLM,
    GlmForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from glm4ft.errors import ModelError, show
from glm4ft.model.checkpoint import TINY, find_checkpoint, one_line, read_json

# An explicit list, so that code in a checkpoint (`auto_map`) is never loaded.
GLM4_CLASSES: dict[str, Any] = {
    "GlmForCausalLM": GlmForCausalLM,
    "Glm4ForCausalLM": Glm4ForCausalLM,
    "Glm4MoeForCausalLM": Glm4MoeForCausalLM,
    "Glm4MoeLiteForCausalLM": Glm4MoeLiteForCausalLM,
}
# Dense decoders of the same build: a backbone ``model`` with ``norm``, and a head ``lm_head`` without further scaling.
LLAMA_LIKE_CLASSES: dict[str, Any] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": MistralForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
}
MODEL_CLASSES = GLM4_CLASSES | LLAMA_LIKE_CLASSES
# Others of the family, and why a language model's rows do not fit them.
_VISION = "it sees images and video, so its rows need image tokens, which are not rendered here"
REFUSED = {
    "Glm4vForConditionalGeneration": f"GLM-4.1V: {_VISION}",
    "Glm4vMoeForConditionalGeneration": f"GLM-4.5V: {_VISION}",
    "Glm46VForConditionalGeneration": f"GLM-4.6V: {_VISION}",
    "GlmOcrForConditionalGeneration": f"GLM-OCR: {_VISION}",
    "GlmMoeDsaForCausalLM": "GLM-5 has a chat format of its own",
}
GLM4_VOCAB_SIZE = 151552  # rows of GLM-4's embeddings; ChatGLM2 and ChatGLM3 have 65,024
_ATTENTION = r"eager|sdpa|flex_attention|flash_attention_\d"


def architecture_of(folder: Path) -> str:
    """The transformers class named in ``config.json``.

    Args:
        folder: The folder of the checkpoint.
    Returns:
        A key of ``MODEL_CLASSES``.
    Raises:
        ModelError: If the folder holds no base that can be loaded, or its configuration cannot be used.
    """
    if (folder / "adapter_config.json").exists():  # beside a base, transformers would load the two as one
        fix = "name the adapter's base, merge the two, or move the adapter into a folder of its own"
        raise ModelError("the folder holds an adapter, not a base alone", where=str(folder), fix=fix)
    config, where, expected = read_json(folder / "config.json"), str(folder / "config.json"), " or ".join(MODEL_CLASSES)
    stated = config.get("architectures")
    names = [str(name) for name in stated] if isinstance(stated, list) and stated else ["no architectures"]
    found = ", ".join(names)
    if names[0].startswith("ChatGLM"):
        message = "the checkpoint needs remote code, which is never run here"
        raise ModelError(message, where=where, found=found, expected=expected, fix=_converted(folder, config))
    if found not in MODEL_CLASSES:
        reason = REFUSED.get(names[0], "it sees images or video" if "vision_config" in config else "")
        message = "not a GLM-4 or dense Llama-like language model" + f": {reason}" * bool(reason)
        raise ModelError(message, where=where, found=found, expected=expected)
    if config.get("quantization_config"):
        message = "quantised bases are not supported: merging and the checks read plain weights"
        fix = "use the bf16 checkpoint that this one was made from"
        raise ModelError(message, where=where, found="quantization_config", fix=fix)
    _refuse_kernels(config, where)
    read_config(found, folder)
    return found


def _converted(folder: Path, config: dict[str, Any]) -> str:
    """Which checkpoint to take in place of one with remote code, if there is one."""
    if "vision_config" in config:
        return "a model with vision is not supported"
    for name in (folder.as_posix(), config.get("_name_or_path"), *(config.get("auto_map") or {}).values()):
        # parts of a path, of a hub id, and of a folder of the hub's cache (models--zai-org--glm-4-9b-chat)
        if known := re.search(r"(?:^|/|--)glm-?4-9b((?:-chat)?(?:-1m)?)(?=$|/|--)", str(name)):
            return f"use the converted checkpoint, zai-org/glm-4-9b{known[1]}-hf"
    if config.get("padded_vocab_size") == GLM4_VOCAB_SIZE:
        return "of glm-4-9b, glm-4-9b-chat and glm-4-9b-chat-1m there are converted checkpoints (-hf); use one of those"
    return "not supported: ChatGLM models before GLM-4 and glm-4v-9b have no checkpoint without remote code"


def _refuse_kernels(config: dict[str, Any], where: str) -> None:
    """Refuse the name of a kernel on the hub: transformers would load its code."""
    for key, value in config.items():
        if "_implementation" in key and not (value is None or re.fullmatch(_ATTENTION, str(value))):
            raise ModelError(
                "the checkpoint asks for code from elsewhere",
                where=f"{where}: {key}",
                found=show(value),
                expected="an attention of transformers' own, such as sdpa, or no such key",
                fix="remove the key from a copy of the folder: attention is computed by PyTorch here",
            )


def is_llama_like(model: str) -> bool:
    """Whether a checkpoint is a dense decoder outside the GLM-4 family, whose format is its template's.

    Args:
        model: The base, as for ``load_base``.
    """
    if model == TINY:
        return False
    architectures = read_json(find_checkpoint(model) / "config.json").get("architectures") or []
    return bool(set(architectures) & set(LLAMA_LIKE_CLASSES))


def read_config(architecture: str, folder: Path) -> Any:
    """The configuration of a checkpoint, as its transformers class reads it.

    Args:
        architecture: A key of ``MODEL_CLASSES``.
        folder: The folder of the checkpoint.
    Raises:
        ModelError: If the configuration cannot be used.
    """
    try:
        return MODEL_CLASSES[architecture].config_class.from_pretrained(folder)
    except Exception as error:  # its validation has error classes of its own
        where, found = str(folder / "config.json"), one_line(error)
        raise ModelError("the model's configuration cannot be used", where=where, found=found) from error
