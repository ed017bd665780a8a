"""Chooses which entries of each trained tensor are recorded: all of them, or of a large model a sample.

Full fine-tuning of a large model trains too many entries to copy them four times a step. Of each large tensor the same
entries are then recorded every time, chosen by its name, beside the exact norms of its gradients. Adapters are always
whole: the specification computes with them, while the first weights of a base are in its files.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

Shapes = Mapping[str, Sequence[int]]

WHOLE = 2**25  # entries of all trained tensors up to which they are recorded whole: 0.5 GB a step in fp32
SAMPLE = 2**12  # entries of a tensor that are recorded otherwise; a smaller one is recorded whole
CHUNK = 2**22  # entries whose squares are added up in fp32


def sampled_shapes(parameters: Mapping[str, torch.Tensor], split: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The shapes of the trained tensors of which a sample is recorded, by their names.

    Args:
        parameters: The trained parameters.
        split: Those that are split over the processes; they are recorded whole.
    """
    if sum(parameter.numel() for parameter in parameters.values()) <= WHOLE:
        return {}
    return {
        name: tuple(parameter.shape)
        for name, parameter in parameters.items()
        if parameter.numel() > SAMPLE and "lora_" not in name and name not in split
    }


def sample(name: str, tensor: torch.Tensor, shapes: Shapes) -> torch.Tensor:
    """The recorded entries of a tensor: those of its sample, or if it has none, all of them.

    Args:
        name: The name of the trained parameter.
        tensor: The parameter, or its gradient.
        shapes: What ``sampled_shapes`` returned.
    """
    if name not in shapes:
        return tensor
    width = math.prod(shapes[name]) // SAMPLE  # one entry of each stretch of this width
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    at = torch.arange(SAMPLE) * width + torch.randint(width, (SAMPLE,), generator=generator)
    return tensor.detach().flatten()[at.to(tensor.device)]


def samples(tensors: Mapping[str, torch.Tensor], shapes: Shapes) -> dict[str, torch.Tensor]:
    """The recorded entries of each tensor."""
    return {name: sample(name, tensor, shapes) for name, tensor in tensors.items()}


def norms(tensors: Mapping[str, Any], shapes: Shapes) -> dict[str, float]:
    """The exact norm of each tensor of which a sample is recorded."""
    return {
        name: math.hypot(*(float(part.float().norm()) for part in tensor.detach().flatten().split(CHUNK)))
        for name, tensor in tensors.items()
        if name in shapes
    }
