"""Copies, shares and compares the tensors that a recording keeps."""

from __future__ import annotations

from typing import Any

import torch

from glm4ft.testing.recording.trace import Tensors


def copy_of(tensor: Any) -> Any:
    """A copy on the CPU of a tensor, of a sharded one that of this process's part; None for anything else."""
    if not isinstance(tensor, torch.Tensor):
        return None
    return local(tensor.detach()).cpu().clone()


def local(tensor: Any) -> Any:
    """The tensor, of a sharded one this process's part: to compute with the whole, one process waits for the others."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def as_number(setting: Any) -> Any:
    """A setting of an optimizer; in place of a tensor of one entry, which may be filled anew, the number in it."""
    if isinstance(setting, tuple):
        return tuple(as_number(part) for part in setting)
    return setting.item() if isinstance(setting, torch.Tensor) and setting.numel() == 1 else setting


def sharing(tensors: Tensors, others: Tensors) -> Tensors:
    """The tensors, those that equal another of their name replaced by it: half of a trace is there twice."""
    return {n: others[n] if n in others and torch.equal(t, others[n]) else t for n, t in tensors.items()}


def is_multiple(received: Tensors, gradient: Tensors) -> bool:
    """Whether one gradient is the other times a positive factor, to the rounding of fp32."""
    if received.keys() != gradient.keys():
        return False
    pairs = [(received[name].double(), gradient[name].double()) for name in received]
    product = sum(float((a * b).sum()) for a, b in pairs)
    lengths = [sum(float((t * t).sum()) for t in tensors) for tensors in zip(*pairs, strict=True)] if pairs else [0.0]
    return product > 0 and product**2 >= (1 - 1e-9) * lengths[0] * lengths[-1]


def dtype_of_moments(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> torch.dtype | None:
    """The dtype of the optimizer's moments of a parameter; None if it keeps none."""
    state = optimizer.state.get(parameter, {}).values()
    return next((v.dtype for v in state if isinstance(v, torch.Tensor) and v.shape == parameter.shape), None)


def split_dimension(name: str, parameter: Any) -> int | None:
    """The dimension along which FSDP2 splits a parameter over the processes; None if each process holds it whole.

    Raises:
        ValueError: If the parameter is split in another way.
    """
    if type(parameter).__name__ == "FlatParameter" or hasattr(parameter, "ds_id"):
        raise ValueError(f"{name} is split over the processes by FSDP's first version or DeepSpeed's third stage")
    if not hasattr(parameter, "to_local"):
        return None
    placements = parameter.placements
    if len(placements) != 1 or not placements[0].is_shard():
        raise ValueError(f"{name} is a distributed tensor of placements {placements}, not split once as by FSDP2")
    return int(placements[0].dim)
