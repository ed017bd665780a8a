"""Load a base: a local folder, a hub id, or the built-in tiny GLM-4.

A damaged or foreign checkpoint often loads without an error: missing tensors are initialised at random, an adapter
beside the weights is applied, a tokenizer of another family encodes text just as well. Faults that the files show are
therefore refused before the weights are read, all others right after.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from glm4ft.data.control_tokens import END_OF_TEXT, control_ids
from glm4ft.data.format_check import detect_format, require_agreement
from glm4ft.data.formats import make_format
from glm4ft.data.turn_format import TEMPLATE, FormatName
from glm4ft.errors import ConfigError, ModelError
from glm4ft.model.architectures import LLAMA_LIKE_CLASSES, MODEL_CLASSES, architecture_of, read_config
from glm4ft.model.checkpoint import TINY, find_checkpoint, listed, one_line, read_json, require_whole_file, weight_files
from glm4ft.model.portable import complete_stops

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


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
        architecture = architecture_of(folder)
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
    architecture = architecture_of(folder)
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
    architecture = "" if chat_format else "Glm4ForCausalLM" if model == TINY else architecture_of(Path(local))
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


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not (folder / "tokenizer.json").is_file():
        fix = "copy tokenizer.json, tokenizer_config.json and chat_template.jinja from the original checkpoint"
        raise ModelError("the folder has no tokenizer.json", where=str(folder), fix=fix)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ModelError("the tokenizer cannot be read", where=str(folder), found=one_line(error)) from error
    return tokenizer


def _require_room_for(tokenizer: PreTrainedTokenizerBase, architecture: str, folder: Path) -> None:
    highest, vocab_size = max(tokenizer.get_vocab().values()), read_config(architecture, folder).vocab_size
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
