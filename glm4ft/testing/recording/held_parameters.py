"""Finds where optimizers hold the trained parameters: as they are, or as master copies, which mixed precision keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from glm4ft.testing.recording.tensors import as_number
from glm4ft.testing.recording.trace import ParameterGroup


@dataclass(frozen=True)
class Place:
    """Where an optimizer holds a trained parameter.

    Args:
        tensor: The tensor that it updates: the parameter, a copy, or a flat copy of several one behind another.
        start: The parameter's first entry in the flattened tensor.
    """

    tensor: torch.Tensor
    start: int = 0


class HeldParameters:
    """The trained parameters of a model, each with its place in an optimizer.

    Args:
        parameters: The trained parameters by name.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        self.parameters = parameters
        self.places = {name: Place(parameter) for name, parameter in parameters.items()}
        self.names: dict[int, tuple[str, ...]] = {id(parameter): (name,) for name, parameter in parameters.items()}

    def meet(self, optimizer: torch.optim.Optimizer, accumulated: Mapping[str, torch.Tensor]) -> None:
        """Look for copies of parameters in an optimizer that is about to take a step, and holds none itself.

        Each of its tensors must have a gradient and consist of copies, with nothing but zeros behind them: an optimizer
        of another model, or of a copy of this one that nothing trains, is not taken for one of this model. A copy has
        the values of its parameter, or, where it is stale, the direction of its gradient.

        Args:
            optimizer: The optimizer.
            accumulated: The gradient of each parameter after the last backward pass, where it is known.
        """
        tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        if self.names_in(tensors) or any(tensor.grad is None for tensor in tensors):
            return
        found, left = dict[str, Place](), dict(self.parameters)
        for tensor in tensors:
            assert tensor.grad is not None
            flat, gradient, start = tensor.detach().flatten(), tensor.grad.flatten(), 0
            while name := self._copied(flat[start:], gradient[start:], left, accumulated):
                found[name] = Place(tensor, start)
                start += left.pop(name).numel()
            if flat[start:].any():
                return
        # zeros are found everywhere; of several processes each may hold a share, see is_share
        if any(self.parameters[name].any() for name in found) and not (num_processes() > 1 and left):
            self.places |= found
            for tensor in tensors:
                self.names[id(tensor)] = tuple(n for n, place in found.items() if place.tensor is tensor)

    def _copied(
        self,
        flat: torch.Tensor,
        gradient: torch.Tensor,
        left: Iterable[str],
        accumulated: Mapping[str, torch.Tensor],
    ) -> str:
        """The parameter that is copied at the beginning of a flat tensor; "" if there is none.

        Its gradient tells best, since matrices B are all zeros at first; but that of a matrix A is zero then.
        """
        by_gradient = (name for name in left if _is_along(gradient, accumulated.get(name)))
        return next(by_gradient, "") or next((n for n in left if _begins_with(flat, self.parameters[n])), "")

    def is_share(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer seems to update this process's share of flat copies, as ZeRO over processes does."""
        tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        whole = sum(parameter.numel() for parameter in self.parameters.values())
        size = sum(tensor.numel() for tensor in tensors if tensor.dim() == 1 and tensor.grad is not None)
        return num_processes() > 1 and whole <= size * num_processes() < 2 * whole

    def names_in(self, tensors: Iterable[torch.Tensor]) -> tuple[str, ...]:
        """The names of the trained parameters that some tensors of an optimizer hold, in order."""
        return tuple(name for tensor in tensors for name in self.names.get(id(tensor), ()))

    def groups(self, optimizer: torch.optim.Optimizer) -> list[ParameterGroup]:
        """The settings of an optimizer's groups, each with the names of the trained parameters that it holds."""
        return [
            ParameterGroup(
                self.names_in(group["params"]),
                {key: as_number(value) for key, value in group.items() if key != "params"},
                len(group["params"]),
            )
            for group in optimizer.param_groups
        ]

    def gradients(self) -> dict[str, torch.Tensor]:
        """The gradient of each parameter that has one, where its optimizer reads it."""
        return {n: self._part(n, at.tensor.grad) for n, at in self.places.items() if at.tensor.grad is not None}

    def before_step(self) -> dict[str, torch.Tensor]:
        """Each parameter as its optimizer holds it, or as the model does where that is not the optimizer's, rounded."""
        held, own = self.after_step(), self.parameters
        return {
            n: t if t is own[n] or torch.equal(t.to(own[n].device, own[n].dtype), own[n]) else own[n]
            for n, t in held.items()
        }

    def after_step(self) -> dict[str, torch.Tensor]:
        """Each parameter as its optimizer holds it."""
        return {name: self._part(name, place.tensor) for name, place in self.places.items()}

    def _part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What a tensor of the optimizer, or its gradient, holds of a parameter."""
        own, place = self.parameters[name], self.places[name]
        if place.tensor is own:
            return tensor
        return tensor.detach().flatten()[place.start : place.start + own.numel()].view(own.shape)


def num_processes() -> int:
    """The number of processes that train together; 1 without a process group."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _is_along(flat: torch.Tensor, gradient: torch.Tensor | None) -> bool:
    """Whether the first entries of a flat tensor are a positive multiple of a gradient."""
    if gradient is None or not 0 < gradient.numel() <= len(flat):
        return False
    a, b = flat[: gradient.numel()].cpu().double(), gradient.flatten().double()
    length = float(a.norm() * b.norm())
    return length > 0 and float(a @ b) >= (1 - 1e-6) * length


def _begins_with(flat: torch.Tensor, parameter: torch.Tensor) -> bool:
    """Whether the first entries of a flat tensor are those of a parameter, but for rounding to its dtype."""
    if hasattr(parameter, "to_local") or not 0 < parameter.numel() <= len(flat):
        return False
    head = flat[: parameter.numel()].to(parameter.device, parameter.dtype)
    return torch.equal(head, parameter.detach().flatten())
