"""Interventions in a model from outside, by hooks: numbers that are not finite, dropout on or held off."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from glm4ft.testing.recording.discovery import decoder_of


@dataclass
class Spoilt:
    """What has been spoilt so far.

    Args:
        num_passes: The number of forward passes.
        is_trained: Whether a backward pass went through one of them; a trainer may throw a forward pass away.
    """

    num_passes: int = 0
    is_trained: bool = False


@contextlib.contextmanager
def spoiling(model: Any, what: str, is_due: Callable[[torch.Tensor], bool]) -> Iterator[Spoilt]:
    """Make forward passes, or the gradients of them, not finite while the context is open.

    Args:
        model: The model; its final norm is where the numbers are spoilt.
        what: ``loss`` for NaN in the forward pass, ``gradient`` for an infinite gradient behind a finite loss.
        is_due: A function of the ids (B, T) of a forward pass; those for which it is true are spoilt.
    Yields:
        What has been spoilt.
    """
    spoilt, ids = Spoilt(), list[torch.Tensor]()

    def see(embedding: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        ids[:] = [args[0]]

    def train(gradient: torch.Tensor) -> torch.Tensor:
        spoilt.is_trained = True
        return gradient * torch.inf if what == "gradient" else gradient

    def spoil(norm: torch.nn.Module, args: Any, hidden: torch.Tensor) -> torch.Tensor | None:
        if not is_due(ids[0]) or (what == "gradient" and not hidden.requires_grad):
            return None
        spoilt.num_passes += 1
        seen = hidden * torch.nan if what == "loss" else hidden
        if seen.requires_grad:
            seen.register_hook(train)
        return seen

    decoder = decoder_of(model)
    hooks = [decoder.embedding.register_forward_pre_hook(see), decoder.norm.register_forward_hook(spoil)]
    try:
        yield spoilt
    finally:
        for hook in hooks:
            hook.remove()


def adapter_dropouts(model: Any) -> list[torch.nn.Dropout]:
    """The dropout layers in front of the adapters, as peft names them."""
    named = model.named_modules()
    return [m for name, m in named if "lora_dropout" in name and isinstance(m, torch.nn.Dropout)]


@contextlib.contextmanager
def without_dropout(model: Any) -> Iterator[None]:
    """Hold the adapters' dropout off while the context is open, so that everything else can be compared."""
    layers = [(layer, layer.p) for layer in adapter_dropouts(model)]
    for layer, _ in layers:
        layer.p = 0.0
    try:
        yield
    finally:
        for layer, p in layers:
            layer.p = p


@contextlib.contextmanager
def dropping(model: Any, share: float) -> Iterator[None]:
    """Apply dropout in training while the context is open, with hooks that work on any pipeline's model.

    It acts on the embeddings and, inside each decoder layer, on the first norm's output: what checkpointing recomputes.
    """

    def drop(module: torch.nn.Module, _: Any, out: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(out, share, module.training)

    named = model.named_modules() if share else ()
    modules = [m for name, m in named if isinstance(m, torch.nn.Embedding) or name.endswith(".input_layernorm")]
    hooks = [module.register_forward_hook(drop) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
