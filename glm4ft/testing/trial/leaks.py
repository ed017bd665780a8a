"""Measures which tokens a row's hidden states depend on: the gradient at the embeddings in a run's forward passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import nn

from glm4ft.testing.recording.discovery import decoder_of
from glm4ft.testing.recording.trace import Forward
from glm4ft.testing.replay.matching import KnownRows, RowSpan


@dataclass(frozen=True)
class Leak:
    """How strongly a row depends on tokens outside of it.

    Args:
        span: The row's span in the forward pass.
        position: The position of the outside token that the row depends on most; -1 if it depends on none.
        size: The gradient's norm at that token over the largest at the row's own tokens.
        training: Whether the model was in training mode.
        neighbours: The number of rows in the same sequence, this one included.
    """

    span: RowSpan
    position: int
    size: float
    training: bool
    neighbours: int


@contextmanager
def watch_leaks(model: nn.Module, known: KnownRows) -> Iterator[list[Leak]]:
    """Measure every known row of every forward pass, evaluation included, while the context is open.

    Args:
        model: The model that is trained or evaluated in the context.
        known: The rows to find.
    Yields:
        A list to which each forward pass appends one leak per known row.
    """
    watcher = _Watcher(known, model)
    decoder = decoder_of(model)
    with ExitStack() as stack:
        if hasattr(functorch_config, "donated_buffer"):  # a compiled backward pass would give away what others need
            stack.enter_context(functorch_config.patch(donated_buffer=False))
        for hook in (
            decoder.body.register_forward_pre_hook(watcher.backbone_called, with_kwargs=True),
            decoder.embedding.register_forward_hook(watcher.embedded),
            decoder.norm.register_forward_hook(watcher.hidden_ready),
        ):
            stack.callback(hook.remove)
        stack.callback(watcher.mode.close)  # of a forward pass that an error ended
        yield watcher.leaks


class _Watcher:
    def __init__(self, known: KnownRows, model: nn.Module) -> None:
        self.known, self.model, self.leaks = known, model, list[Leak]()
        self.mode = ExitStack()

    def backbone_called(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        # evaluation runs without gradients, but the measurement needs them up to the final norm
        self.mode.enter_context(torch.inference_mode(False))
        self.mode.enter_context(torch.enable_grad())
        self.inputs = {name: _usable(value) for name, value in kwargs.items()}
        return args, self.inputs

    def embedded(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(False), torch.enable_grad():  # the backbone may be called later
            self.input_ids = _usable(args[0])
            self.probe = torch.zeros_like(output, requires_grad=True)
            moved: torch.Tensor = _usable(output) + self.probe
            return moved

    def hidden_ready(self, module: nn.Module, args: Any, hidden: torch.Tensor) -> None:
        positions, mask = (self.inputs.get(name) for name in ("position_ids", "attention_mask"))
        forward = Forward(self.input_ids.cpu(), positions, mask, hidden, None, module.training)
        spans = self.known.find_in(forward).rows
        direction_D = torch.linspace(-1, 1, hidden.shape[-1], device=hidden.device, dtype=hidden.dtype)
        for span in spans:
            target = (hidden[span.b, span.positions.to(hidden.device)] * direction_D).sum()
            (gradient,) = torch.autograd.grad(target, self.probe, retain_graph=True)
            self.leaks.append(self._leak(span, gradient, sum(other.b == span.b for other in spans)))
        self.mode.close()

    def _leak(self, span: RowSpan, gradient_BTD: torch.Tensor, neighbours: int) -> Leak:
        size_BT = gradient_BTD.detach().float().norm(dim=-1).cpu()
        own = float(size_BT[span.b, span.positions].max())
        size_BT[span.b, span.positions] = 0
        worst = int(size_BT.argmax())
        share = float(size_BT.max()) / max(own, 1e-30)
        position = worst % size_BT.shape[1] if share > 0 else -1
        return Leak(span, position, share, self.model.training, neighbours)


def _usable(value: Any) -> Any:
    """The value; of a tensor made in inference mode, which no gradient can be computed from, a copy."""
    return value.clone() if isinstance(value, torch.Tensor) and value.is_inference() else value
