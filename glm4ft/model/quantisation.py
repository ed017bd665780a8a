"""Load a base with its linear layers in four bits: adapters are trained on a quarter of the memory (QLoRA).

Embeddings, norms and the output head stay as they are stored, so a floor that is certified for the head holds as
before. The adapter learns beside rounded weights: base and adapter have to be quantised alike again to compute what the
run computed, and a merge into the plain weights is a slightly different model.

Source: QLoRA, arXiv 2305.14314; the layers are those of bitsandbytes.
"""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from glm4ft.errors import ConfigError, ModelError
from glm4ft.model.checkpoint import one_line
from glm4ft.reading import decode_yaml, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUANTISE = "--quantise"
_RUN_OPTIONS = "config.yaml"  # beside the adapter of a run, or above that of a checkpoint


def require_quantisation(device: torch.device) -> None:
    """Refuse to quantise where bitsandbytes is missing, or where it cannot compute.

    Args:
        device: The device that the model will be on.

    Raises:
        ConfigError: If so, with the reason.
    """
    try:
        import bitsandbytes
        from transformers.utils.import_utils import BITSANDBYTES_MIN_VERSION, is_bitsandbytes_available
    except (ImportError, OSError, RuntimeError) as error:
        found = "bitsandbytes is not installed" if isinstance(error, ModuleNotFoundError) else one_line(error)
        raise _refused(found) from error
    if not is_bitsandbytes_available():
        raise _refused(f"bitsandbytes {version('bitsandbytes')}; transformers asks for {BITSANDBYTES_MIN_VERSION}")
    try:
        layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        hidden_TD = torch.ones(2, 64, device=device, requires_grad=True)
        layer.to(device)(hidden_TD).sum().backward()
        is_able = bool(torch.isfinite(hidden_TD.grad).all()) if hidden_TD.grad is not None else False
    except (RuntimeError, NotImplementedError, AttributeError, AssertionError, ValueError) as error:
        raise _refused(f"bitsandbytes {version('bitsandbytes')} on {device}: {one_line(error)}") from error
    if not is_able:
        raise _refused(f"bitsandbytes {version('bitsandbytes')} on {device}: a wrong gradient")


def require_quantisable(architecture: str, folder: Path) -> None:
    """Refuse a base of which nearly nothing would be quantised.

    Args:
        architecture: The name of its class.
        folder: Its folder, for the error.

    Raises:
        ConfigError: If it has experts: transformers keeps their weights as fused parameters, not as linear layers.
    """
    if "Moe" in architecture:
        raise ConfigError(
            "the base would stay as large as it is: bitsandbytes quantises linear layers, and the weights of the "
            "routed experts are none",
            where=QUANTISE,
            found=f"{architecture} in {folder}",
            fix="train on the plain base, without --quantise",
        )


def loading_options(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What ``from_pretrained`` needs to quantise a base: to NF4 in blocks, whose scales are quantised once more.

    Args:
        dtype: The dtype in which products are computed.
        device: The device of the model.
    """
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": config, "device_map": {"": device}}


def quantised_copy(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Quantise a model that is in memory; transformers does it only while it reads files.

    Args:
        model: The plain model.
        device: The device of the copy.
    """
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        options = loading_options(model.dtype, device)
        quantised: PreTrainedModel = type(model).from_pretrained(folder, dtype=model.dtype, **options)
    keep_layout(quantised)
    return quantised


def keep_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from packing weights anew in eval mode, after which they would pass no gradient.

    On CPUs with AVX512-BF16 the first forward pass in eval mode packs the weights for a kernel without a backward pass,
    and so they stay: after an evaluation, a run would train its last layer alone, and round activations to bf16.
    """
    for module in quantised_layers(model):
        module.support_avx512bf16_for_cpu = False


def quantised_layers(model: nn.Module) -> list[Any]:
    """The layers of a model whose weights are quantised, by bitsandbytes or another library."""
    # not by the attribute: peft's layers pass on the weight of the layer that they wrap
    weights = ((module, module._parameters.get("weight")) for module in model.modules())
    return [module for module, weight in weights if getattr(weight, "quant_state", None) is not None]


def describe_quantised(model: nn.Module) -> str:
    """What became of a base, and what follows from it."""
    return (
        f"{len(quantised_layers(model))} linear layers of the base are quantised to nf4; head, embeddings and norms "
        "are not, so floors are those of the plain base"
    )


def quantisation_of_run(adapter: Path) -> str | None:
    """How the base was quantised on which one of our runs trained an adapter; None if it was not, or is not known.

    Args:
        adapter: The folder of the run, or of one of its checkpoints.
    """
    for path in (adapter / _RUN_OPTIONS, adapter.parent / _RUN_OPTIONS):
        if path.is_file():
            message = "the options of the run cannot be read"
            try:
                options = decode_yaml(read_text(path, ModelError, message))
            except ValueError as error:
                raise ModelError(message, where=str(path), found=one_line(error)) from error
            value = options.get("quantise") if isinstance(options, dict) else None
            return str(value) if value else None
    return None


def _refused(found: str) -> ConfigError:
    return ConfigError(
        "the base cannot be quantised here",
        where=QUANTISE,
        found=found,
        expected="bitsandbytes, and a device that it computes on",
        fix="pip install 'glm4ft[quantised]'; or train on the plain base, and merge the adapter of a run that is there",
    )
