"""Load a base: a local folder, a hub id, or the built-in tiny GLM-4.

A damaged or foreign checkpoint often loads without an error: missing tensors are initialised at random, an adapter
beside the weights is applied, a tokenizer of another family encodes text just as well. Faults that the files show are
therefore refused before the weights are read, all others right after.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    Glm4ForCausalLM,
    Glm4MoeForCausalLM,
    Glm4MoeLiteForCausalLM,
    GlmForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from glm4ft.data.control_tokens import END_OF_TEXT, control_ids
from glm4ft.data.format_check import detect_format, require_agreement
from glm4ft.data.formats import make_format
from glm4ft.data.turn_format import TEMPLATE, FormatName
from glm4ft.errors import ConfigError, ModelError, show
from glm4ft.model.checkpoint import TINY, find_checkpoint, listed, one_line, read_json, require_whole_file, weight_files
from glm4ft.model.portable import complete_stops

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
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


_ATTENTION = r"eager|sdpa|flex_attention|flash_attention_\d"


@dataclass(frozen=True)
class Base:
    """A base model, ready for adapters.

    Args:
        model: The model in eval mode, frozen, on its device.
        tokenizer: The checkpoint's tokenizer, unchanged; batches are padded without it.
        format_name: The name of the chat format.
        source: ``tiny``, or the folder or hub id as it was given.
        warnings: Sentences about settings that are allowed but probably unintended.
        folder: The folder of the checkpoint's files; None for the built-in base.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    format_name: FormatName
    source: str
    warnings: tuple[str, ...]
    folder: Path | None = None

    @property
    def is_built_in(self) -> bool:
        """Whether the base is the built-in tiny GLM-4."""
        return self.source == TINY


def load_base(
    model: str,
    *,
    dtype: str = "auto",
    chat_format: str | None = None,
    force_format: bool = False,
    quantise: str | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
) -> Base:
    """Load a base model with its tokenizer.

    Args:
        model: The base: ``tiny`` for the built-in one, a local folder, or a hub id.
        dtype: The dtype of the weights: ``bf16``, ``fp32``, or ``auto`` for bf16 on CUDA and fp32 elsewhere.
        chat_format: The name of the chat format; by default chosen from the checkpoint.
        force_format: Whether to go on with a format that the checkpoint's own chat template contradicts.
        quantise: ``nf4`` to keep the weights of the linear layers in four bits; None for plain weights.
        device: The device of the model; by default this process's CUDA device if there is one, else the CPU.
        seed: The seed of the built-in base's weights; ignored for a checkpoint.

    Returns:
        The base; its model and generation configs contain all three stop tokens.

    Raises:
        ConfigError: If the dtype is not supported, or the weights cannot be quantised here.
        ModelError: If the checkpoint is damaged or not supported.
    """
    require_loadable(model, dtype, quantise)
    device = torch.device(device) if device is not None else _default_device()
    torch_dtype = _torch_dtype(dtype, device)
    if model == TINY:
        folder, loaded = None, _built_in_model(seed, torch_dtype)
        if quantise:
            from glm4ft.model.quantisation import quantised_copy

            loaded = quantised_copy(loaded, device)
        tokenizer, format_name = load_format(model, chat_format, force=force_format)
    else:
        folder = find_checkpoint(model)
        architecture = _architecture(folder)
        tokenizer, format_name = load_format(str(folder), chat_format, force=force_format)
        _require_room_for(tokenizer, architecture, folder)
        loaded = _read_weights(architecture, find_checkpoint(model, weights=True), torch_dtype, quantise, device)
        # peft writes this into adapter_config.json, where a folder must be found again from any working directory
        loaded.name_or_path = str(folder) if os.path.isdir(os.path.expanduser(model)) else model
    warnings = complete_stops(loaded, make_format(format_name, tokenizer).stop_ids, tokenizer, model)
    torch.nn.Module.to(loaded.requires_grad_(False).train(False), device)
    return Base(loaded, tokenizer, format_name, model, tuple(warnings), folder)


def require_loadable(model: str, dtype: str, quantise: str | None = None) -> None:
    """Refuse a checkpoint whose local files show that ``load_base`` cannot load it; no weight is read.

    Args:
        model: The base, as for ``load_base``; the files of a hub id are not checked.
        dtype: The dtype of the weights, as for ``load_base``.
        quantise: How the weights are quantised, as for ``load_base``.

    Raises:
        ConfigError: If the dtype is not supported, or the weights cannot be quantised here.
        ModelError: If a file of a local checkpoint is missing or truncated.
    """
    _torch_dtype(dtype, torch.device("cpu"))
    if quantise:
        from glm4ft.model.quantisation import require_quantisable, require_quantisation

        require_quantisation(_default_device())
    if model == TINY or not os.path.isdir(os.path.expanduser(model)):
        return
    folder = find_checkpoint(model)
    architecture = _architecture(folder)
    if quantise:
        require_quantisable(architecture, folder)
    for shard in weight_files(folder):
        require_whole_file(shard)


def load_format(
    model: str, chat_format: str | None = None, *, force: bool = False
) -> tuple[PreTrainedTokenizerBase, FormatName]:
    """Load the tokenizer and the chat format of a base, without its weights.

    Args:
        model: The base, as for ``load_base``; if ``chat_format`` is given, a folder with only a tokenizer is enough.
        chat_format: The name of the format; by default chosen from the checkpoint.
        force: Whether to go on with a format that the checkpoint's own chat template contradicts.

    Returns:
        The tokenizer and the name of the format.

    Raises:
        ModelError: If the tokenizer cannot be used, or the format is unknown or not the template's.
    """
    local = model if model == TINY else str(find_checkpoint(model))
    architecture = "" if chat_format else "Glm4ForCausalLM" if model == TINY else _architecture(Path(local))
    tokenizer = load_tokenizer(local)
    if architecture in LLAMA_LIKE_CLASSES:
        chat_format = TEMPLATE
    elif chat_format != TEMPLATE:
        control_ids(tokenizer)  # before anything else is said of the format
    if chat_format is None:
        name = detect_format([architecture], tokenizer, where=model)
    else:
        name = make_format(chat_format, tokenizer).name  # refuses unknown names, and what a template cannot tell apart
    if name != TEMPLATE and not force:
        require_agreement(name, tokenizer, where=model)
    return tokenizer, name


def is_llama_like(model: str) -> bool:
    """Whether a checkpoint is a dense decoder outside the GLM-4 family, whose format is its template's.

    Args:
        model: The base, as for ``load_base``.
    """
    if model == TINY:
        return False
    architectures = read_json(find_checkpoint(model) / "config.json").get("architectures") or []
    return bool(set(architectures) & set(LLAMA_LIKE_CLASSES))


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Args:
        model: The base, as for ``load_base``.

    Returns:
        The checkpoint's tokenizer; ``<|endoftext|>``, or its own end of text, becomes its pad token if it has none.

    Raises:
        ModelError: If there is no tokenizer, or it cannot be read.
    """
    tokenizer = _built_in_tokenizer() if model == TINY else _read_tokenizer(find_checkpoint(model))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = END_OF_TEXT if END_OF_TEXT in tokenizer.get_added_vocab() else tokenizer.eos_token
    return tokenizer


def _default_device() -> torch.device:
    if torch.cuda.is_available():
        # under torchrun each process has its own device; a plain "cuda" would put every copy on the first
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def _torch_dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype in DTYPES:
        return DTYPES[dtype]
    is_half = dtype in ("fp16", "float16", "half")
    message = "GLM-4's activations overflow in fp16" if is_half else "unknown dtype"
    raise ConfigError(message, where="--dtype", found=dtype, expected="auto, bf16 or fp32")


def _architecture(folder: Path) -> str:
    """Return the architecture named in config.json; refuse folders that this module cannot load."""
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
    _config(found, folder)
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


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not (folder / "tokenizer.json").is_file():
        fix = "copy tokenizer.json, tokenizer_config.json and chat_template.jinja from the original checkpoint"
        raise ModelError("the folder has no tokenizer.json", where=str(folder), fix=fix)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ModelError("the tokenizer cannot be read", where=str(folder), found=one_line(error)) from error
    return tokenizer


def _config(architecture: str, folder: Path) -> Any:
    try:
        return MODEL_CLASSES[architecture].config_class.from_pretrained(folder)
    except Exception as error:  # its validation has error classes of its own
        where, found = str(folder / "config.json"), one_line(error)
        raise ModelError("the model's configuration cannot be used", where=where, found=found) from error


def _require_room_for(tokenizer: PreTrainedTokenizerBase, architecture: str, folder: Path) -> None:
    highest, vocab_size = max(tokenizer.get_vocab().values()), _config(architecture, folder).vocab_size
    if highest >= vocab_size:
        raise ModelError(
            "the tokenizer has tokens that the model has no row for",
            where=str(folder),
            found=f"vocab_size {vocab_size:,}, highest token id {highest:,}",
            fix="use the tokenizer that belongs to this checkpoint",
        )


def write_built_in_base(folder: Path) -> None:
    """Write the built-in base as a checkpoint, so that others can load an adapter that was trained on it."""
    from glm4ft.model.tiny import write_tiny_base

    write_tiny_base(folder)


def _built_in_tokenizer() -> PreTrainedTokenizerBase:
    from glm4ft.model.tiny_tokenizer import tiny_tokenizer  # imported here, since real checkpoints do not need it

    return tiny_tokenizer()


def _built_in_model(seed: int, dtype: torch.dtype) -> PreTrainedModel:
    from glm4ft.model.tiny import tiny_model

    model = tiny_model(seed)
    for parameter in model.parameters():  # not the buffers: rotary frequencies stay fp32, as in transformers
        parameter.data = parameter.data.to(dtype)
    return model


def _read_weights(
    architecture: str, folder: Path, dtype: torch.dtype, quantise: str | None, device: torch.device
) -> PreTrainedModel:
    for shard in weight_files(folder):
        require_whole_file(shard)
    # by itself, transformers would load a kernel from the hub for a flash attention that is not installed
    stated = read_json(folder / "config.json").get("attn_implementation")
    attention = {"attn_implementation": "eager" if stated == "eager" else "sdpa"}
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True, **attention}
    if quantise:
        from glm4ft.model.quantisation import keep_layout, loading_options, require_quantisable

        require_quantisable(architecture, folder)
        options |= loading_options(dtype, device)
    try:
        loaded = MODEL_CLASSES[architecture].from_pretrained(folder, **options)
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        raise ModelError("the weights cannot be loaded", where=str(folder), found=one_line(error)) from error
    model: PreTrainedModel = loaded[0]
    if quantise:
        keep_layout(model)
    # transformers would continue, with random numbers in place of missing tensors
    for message, keys in (("tensors are missing", "missing_keys"), ("there are unknown tensors", "unexpected_keys")):
        if loaded[1][keys]:
            raise ModelError(
                f"{message} in the checkpoint",
                where=str(folder),
                found=f"{len(loaded[1][keys])}: {listed(loaded[1][keys])}",
                expected=f"exactly the tensors of {architecture}",
                fix="compare config.json with the original checkpoint's, or download it again",
            )
    return model
