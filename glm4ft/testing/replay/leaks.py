"""Which tokens a row's hidden states depend on, by the gradient at the embeddings of a run's own forward passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from glm4ft.testing.recording.trace import Forward, backbone_of
from glm4ft.testing.replay.matching import KnownRows, RowSpan


@dataclass(frozen=True)
class Leak:
    """How far a row depends on tokens that are not its own.

    Args:
        place: of the row.
        position: of the foreign token that it depends on most; -1 if there is none.
        size: gradient there over the largest on the row's own tokens.
        training: whether the pass was one of training.
        neighbours: number of rows in the same sequence, itself included.
    """

    span: RowSpan
    position: int
    size: float
    training: bool
    neighbours: int


@contextmanager
def watch_leaks(model: nn.Module, known: KnownRows) -> Iterator[list[Leak]]:
    """Measure each row of each forward pass while the context is open, evaluation included.

    Args:
        model: trained or evaluated by whoever comes next.
        known: rows to be found.
    Yields:
        A list that fills as the passes run.
    """
    watcher = _Watcher(known, model)
    backbone: Any = backbone_of(model)
    with ExitStack() as stack:
        for hook in (
            backbone.register_forward_pre_hook(watcher.backbone_called, with_kwargs=True),
            backbone.embed_tokens.register_forward_hook(watcher.embedded),
            backbone.norm.register_forward_hook(watcher.hidden_ready),
        ):
            stack.callback(hook.remove)
        yield watcher.leaks


class _Watcher:
    def __init__(self, known: KnownRows, model: nn.Module) -> None:
        self.known, self.model, self.leaks = known, model, list[Leak]()
        self.was_enabled = True

    def backbone_called(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.inputs = kwargs
        # evaluation runs without gradients; between here and the final norm they are needed
        self.was_enabled = torch.is_grad_enabled()
        torch.set_grad_enabled(True)

    def embedded(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        self.input_ids = args[0]
        self.probe = torch.zeros_like(output, requires_grad=True)
        return output + self.probe

    def hidden_ready(self, module: nn.Module, args: Any, hidden: torch.Tensor) -> None:
        positions, mask = (self.inputs.get(name) for name in ("position_ids", "attention_mask"))
        forward = Forward(self.input_ids.cpu(), positions, mask, hidden, None, module.training)
        spans = self.known.find_in(forward).rows
        direction_D = torch.linspace(-1, 1, hidden.shape[-1], device=hidden.device, dtype=hidden.dtype)
        for span in spans:
            target = (hidden[span.b, span.positions.to(hidden.device)] * direction_D).sum()
            (gradient,) = torch.autograd.grad(target, self.probe, retain_graph=True)
            self.leaks.append(self._leak(span, gradient, sum(other.b == span.b for other in spans)))
        torch.set_grad_enabled(self.was_enabled)

    def _leak(self, span: RowSpan, gradient_BTD: torch.Tensor, neighbours: int) -> Leak:
        size_BT = gradient_BTD.detach().float().norm(dim=-1).cpu()
        own = float(size_BT[span.b, span.positions].max())
        size_BT[span.b, span.positions] = 0
        worst = int(size_BT.argmax())
        share = float(size_BT.max()) / max(own, 1e-30)
        position = worst % size_BT.shape[1] if share > 0 else -1
        return Leak(span, position, share, self.model.training, neighbours)
