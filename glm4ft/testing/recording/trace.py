"""Records the inputs of the loss and of the optimizer with hooks, on a trainer that needs no change.

The hooks are at points that every trainer must pass: the input of the token embedding, the output of the final norm and
the gradient with respect to it, the gradient accumulated in each trained parameter, and the optimizer's step. A forward
pre-hook on the whole model would miss a trainer that calls backbone and head itself.

Shapes: B sequences of a forward pass, T positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

Tensors = dict[str, torch.Tensor]


@dataclass
class Forward:
    """One forward pass.

    Args:
        input_ids_BT: The token ids that entered the embedding.
        positions_BT: The position ids that entered the backbone; None if the model had to count them itself.
        attention_mask: The mask that entered the backbone; None if there was none.
        hidden_BTD: The output of the final norm.
        gradient_BTD: The gradient of the loss at that output; None before the backward pass, and if there is none.
        training: True if every module was in training mode, False if none was, None if only some were.
    """

    input_ids_BT: torch.Tensor
    positions_BT: torch.Tensor | None
    attention_mask: torch.Tensor | None
    hidden_BTD: torch.Tensor
    gradient_BTD: torch.Tensor | None
    training: bool | None


@dataclass
class ParameterGroup:
    """The optimizer's settings for the parameters of one group.

    Args:
        names: The names of the trained parameters in the group.
        settings: The group's options: learning rate, betas, eps, weight decay.
        size: The number of parameters in the group, trained or not.
    """

    names: tuple[str, ...]
    settings: dict[str, Any]
    size: int = 0


@dataclass
class Step:
    """One optimizer step.

    Args:
        forwards: The forward passes whose gradients the step applied, in order.
        raw: The gradient of each trained parameter after the last backward pass, before clipping.
        clipped: The gradient of each trained parameter as the optimizer received it.
        before: The trained parameters before the update.
        groups: The optimizer's parameter groups, with learning rate, betas, eps and weight decay.
        optimizer: The name of the optimizer's class.
        after: The trained parameters after the update.
        state_dtypes: The dtype of the optimizer's moments, by parameter.
    """

    forwards: list[Forward]
    raw: Tensors
    clipped: Tensors
    before: Tensors
    groups: list[ParameterGroup]
    optimizer: str
    after: Tensors = field(default_factory=dict)
    state_dtypes: dict[str, torch.dtype] = field(default_factory=dict)


@dataclass
class Trace:
    """The first optimizer steps of a run.

    Args:
        steps: The completed steps, in order.
        dtype: The dtype of the base's weights.
        trained: The names of the parameters that require a gradient when the recording begins.
        optimized: The names of the trained parameters that the optimizer holds.
        evaluations: The forward passes without gradient, each with the number of steps taken before it.
    """

    steps: list[Step] = field(default_factory=list)
    dtype: torch.dtype = torch.float32
    trained: tuple[str, ...] = ()
    optimized: tuple[str, ...] = ()
    evaluations: list[tuple[int, Forward]] = field(default_factory=list)


@contextmanager
def record(model: nn.Module, max_steps: int) -> Iterator[Trace]:
    """Record the optimizer steps taken while the context is open.

    Args:
        model: The model with its adapters attached; in the context it may be wrapped, moved and trained.
        max_steps: The number of steps to record; then the hooks are removed and the run goes on at full speed.
    Yields:
        The trace, filled as the run proceeds.
    """
    recorder = _Recorder(model, max_steps)
    try:
        yield recorder.trace
    finally:
        recorder.close()


def backbone_of(model: nn.Module) -> nn.Module:
    """The decoder below the head: the module that holds the embedding, the layers and the final norm.

    Raises:
        ValueError: If there is no such module, or more than one.
    """
    found = [m for m in model.modules() if hasattr(m, "embed_tokens") and hasattr(m, "layers") and hasattr(m, "norm")]
    if len(found) != 1:
        raise ValueError(f"{type(model).__name__} has {len(found)} modules with embed_tokens, layers and norm, not one")
    return found[0]


def output_head_of(model: nn.Module) -> nn.Linear:
    """The linear layer of the output head, without an adapter around it.

    Raises:
        ValueError: If there is no ``lm_head``.
    """
    for name, module in model.named_modules():
        if name.split(".")[-1] == "lm_head":
            head: nn.Linear = getattr(module, "base_layer", module)
            return head
    raise ValueError(f"{type(model).__name__} has no lm_head")


class _Recorder:
    def __init__(self, model: nn.Module, max_steps: int) -> None:
        backbone: Any = backbone_of(model)
        self.backbone: nn.Module = backbone
        self.max_steps, self.pending, self.raw = max_steps, list[Forward](), Tensors()
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names = {id(p): name for name, p in self.parameters.items()}
        self.trace = Trace(dtype=output_head_of(model).weight.dtype, trained=tuple(self.parameters))
        self.inputs: dict[str, torch.Tensor | None] = {}
        self.stack = ExitStack()
        hooks: list[RemovableHandle] = [
            backbone.register_forward_pre_hook(self._backbone_called, with_kwargs=True),
            backbone.embed_tokens.register_forward_pre_hook(self._ids_embedded),
            backbone.norm.register_forward_hook(self._hidden_ready),
            register_optimizer_step_pre_hook(self._step_begins),
            register_optimizer_step_post_hook(self._step_ended),
        ]
        for name, parameter in self.parameters.items():
            hooks.append(parameter.register_post_accumulate_grad_hook(self._keep_raw(name)))
        for hook in hooks:
            self.stack.callback(hook.remove)

    def close(self) -> None:
        self.stack.close()

    def _backbone_called(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.inputs = {name: _copy(kwargs.get(name)) for name in ("position_ids", "attention_mask")}

    def _ids_embedded(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.inputs["input_ids"] = _copy(args[0])

    def _hidden_ready(self, module: nn.Module, args: Any, hidden: torch.Tensor) -> None:
        input_ids = self.inputs.get("input_ids")
        if input_ids is None:
            raise ValueError("the final norm ran without the token embedding: the trainer feeds embeddings directly")
        forward = Forward(
            input_ids_BT=input_ids,
            positions_BT=self.inputs.get("position_ids"),
            attention_mask=self.inputs.get("attention_mask"),
            hidden_BTD=hidden.detach().float().cpu().clone(),
            gradient_BTD=None,
            training=_mode(self.backbone),
        )
        if not (torch.is_grad_enabled() and hidden.requires_grad):
            self.trace.evaluations.append((len(self.trace.steps), forward))
            return

        def keep(gradient: torch.Tensor) -> None:
            forward.gradient_BTD = gradient.detach().float().cpu().clone()

        hidden.register_hook(keep)
        self.pending.append(forward)

    def _keep_raw(self, name: str) -> Any:
        def keep(parameter: torch.Tensor) -> None:
            # every backward pass overwrites this, so at the step it is the gradient accumulated over all of them
            self.raw[name] = _copy(parameter.grad)

        return keep

    def _step_begins(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        groups = [
            ParameterGroup(
                tuple(self.names[id(p)] for p in group["params"] if id(p) in self.names),
                {key: value for key, value in group.items() if key != "params"},
                len(group["params"]),
            )
            for group in optimizer.param_groups
        ]
        if not any(group.names for group in groups):
            return  # the step of an optimizer that holds no trained parameter of this model
        self.trace.optimized = tuple(name for group in groups for name in group.names)
        self.trace.steps.append(
            Step(
                forwards=[forward for forward in self.pending if forward.gradient_BTD is not None],
                raw=dict(self.raw),
                clipped={n: _copy(p.grad) for n, p in self.parameters.items() if p.grad is not None},
                before={n: _copy(p) for n, p in self.parameters.items()},
                groups=groups,
                optimizer=type(optimizer).__name__,
            )
        )
        self.pending, self.raw = [], {}

    def _step_ended(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self.trace.steps and not self.trace.steps[-1].after:
            step = self.trace.steps[-1]
            step.after = {n: _copy(p) for n, p in self.parameters.items()}
            step.state_dtypes = {n: found for n, p in self.parameters.items() if (found := _moments(optimizer, p))}
            if len(self.trace.steps) >= self.max_steps:
                self.close()


def _mode(model: nn.Module) -> bool | None:
    modes = {part.training for part in model.modules()}
    return modes.pop() if len(modes) == 1 else None


def _moments(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> torch.dtype | None:
    """The dtype of the optimizer's moments of a parameter; None if it keeps none."""
    state = optimizer.state.get(parameter, {}).values()
    return next((v.dtype for v in state if isinstance(v, torch.Tensor) and v.shape == parameter.shape), None)


def _copy(tensor: Any) -> Any:
    return tensor.detach().cpu().clone() if isinstance(tensor, torch.Tensor) else None
