"""Records the inputs of the loss and of the optimizer with hooks, on a trainer that needs no change.

The hooks are at points that every trainer must pass: the input of the token embedding, the output of the final norm and
the gradient with respect to it, the gradient accumulated in each trained parameter, and the optimizer's step. A forward
pre-hook on the whole model would miss a trainer that calls backbone and head itself.

Shapes: B sequences of a forward pass, T positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from glm4ft.testing.recording.discovery import decoder_of
from glm4ft.testing.recording.held_parameters import HeldParameters
from glm4ft.testing.recording.sampling import norms, sample, sampled_shapes
from glm4ft.testing.recording.tensors import copy_of, dtype_of_moments, is_multiple, local, sharing, split_dimension
from glm4ft.testing.recording.trace import Forward, Step, Tensors, Trace

# The largest number of entries of a forward pass of which it is recorded whether dropout kept them; a byte for each.
MAX_KEPT = 2**26


class Recorder:
    """Records the optimizer steps of a model until it is closed or has recorded enough of them.

    Args:
        model: The model with its adapters attached.
        max_steps: The number of steps to record.
        names: The names of embedding, final norm and head, for a model that does not state them.
    """

    def __init__(self, model: nn.Module, max_steps: int, names: Sequence[str] = ()) -> None:
        self.decoder = decoder_of(model, names)
        self.max_steps, self.pending = max_steps, list[Forward]()
        self.last, self.summed = Tensors(), Tensors()  # gradients since the last step, see _accumulated
        self.last_norms = dict[str, float]()  # of the gradients of which a sample is kept
        self.num_detached = 0  # since the last step, see Step
        self.num_cleared = 0  # forward passes since the last step whose gradients were cleared after them
        self.num_tried = 0  # and of them those of the first step, see _leave_out_tries
        # of optimizer steps inside of one another: a subclass calls its parent's, a wrapper that of the optimizer in it
        self.depth = 0
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.held = HeldParameters(self.parameters)
        dims = {name: split_dimension(name, parameter) for name, parameter in self.parameters.items()}
        split = {name: dim for name, dim in dims.items() if dim is not None}
        self.sampled = sampled_shapes(self.parameters, split)
        self.at_start = self._kept(self.parameters)  # until the first step
        self.trace = Trace(
            dtype=self.decoder.head.weight.dtype,  # type: ignore[arg-type]
            trained=tuple(self.parameters),
            sharded=split,
            sampled=self.sampled,
        )
        # the modules whose mode matters: dropout layers, and those with trained parameters
        self.parts = [
            part for part in self.decoder.body.modules()
            if isinstance(part, nn.Dropout) or any(p.requires_grad for p in part.parameters(recurse=False))
        ] or list(self.decoder.body.modules())  # fmt: skip
        self.inputs: dict[str, torch.Tensor | None] = {}
        self.kept: dict[str, torch.Tensor] | None = {}  # of the forward pass under way, see Forward
        self.stack = ExitStack()
        hooks: list[RemovableHandle] = [
            self.decoder.body.register_forward_pre_hook(
                self.guarded(self._body_called, in_forward=True), with_kwargs=True
            ),
            self.decoder.embedding.register_forward_pre_hook(self.guarded(self.ids_embedded, in_forward=True)),
            self.decoder.norm.register_forward_hook(self.guarded(self._hidden_ready, in_forward=True)),
            register_optimizer_step_pre_hook(self.guarded(self._step_begins)),
            register_optimizer_step_post_hook(self.guarded(self._step_ended)),
        ]
        for name, parameter in self.parameters.items():
            hooks.append(parameter.register_hook(self.guarded(self._add_up(name))))
            hooks.append(parameter.register_post_accumulate_grad_hook(self.guarded(self._keep_last(name))))
        for name, module in model.named_modules():
            if isinstance(module, nn.Dropout) and module.p > 0:
                hooks.append(module.register_forward_hook(self.guarded(self._keep_dropped(name), in_forward=True)))
        for hook in hooks:
            self.stack.callback(hook.remove)

    def close(self) -> None:
        """Remove the hooks."""
        self.stack.close()

    def refuse(self, why: str) -> None:
        """Raise the reason why the run cannot be recorded."""
        raise ValueError(why)

    def guarded(self, hook: Any, *, in_forward: bool = False) -> Any:
        """The hook as it is registered; for subclasses that may not let an error reach the run.

        Args:
            hook: The hook.
            in_forward: Whether it is called in the forward pass, which may be compiled.
        """
        return hook

    def step_recorded(self) -> None:
        """Called after each step; for subclasses."""

    def _body_called(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        # the ids may be embedded before the body is called: a trainer may hand over the embeddings
        self.inputs |= {name: copy_of(kwargs.get(name)) for name in ("position_ids", "attention_mask")}

    def ids_embedded(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Keep the ids of a forward pass.

        Args:
            module: The token embedding.
            args: Its inputs.
        """
        if len(self.trace.steps) >= self.max_steps:
            self.close()  # not before: a second optimizer may share the last step
        self.inputs["input_ids"], self.kept = copy_of(args[0]), {}

    def _hidden_ready(self, module: nn.Module, args: Any, hidden: torch.Tensor) -> None:
        if len(self.trace.steps) >= self.max_steps:
            return  # of the forward pass that ended the recording
        if hidden.dtype in (torch.bfloat16, torch.float16):  # of the head, or of FSDP2's mixed precision
            self.trace.dtype = hidden.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            self.trace.dtype = torch.get_autocast_dtype(hidden.device.type)
            if torch.is_grad_enabled():
                self.trace.autocast = str(self.trace.dtype).removeprefix("torch.")
        inputs, self.inputs = self.inputs, {}
        input_ids = inputs.get("input_ids")
        if input_ids is None:
            self.refuse("the final norm ran without the token embedding: the embeddings come from elsewhere")
            return
        forward = Forward(
            input_ids_BT=input_ids,
            positions_BT=inputs.get("position_ids"),
            attention_mask=inputs.get("attention_mask"),
            hidden_BTD=hidden.detach().float().cpu().clone(),
            gradient_BTD=None,
            training=self._mode(),
            kept=self.kept,
        )
        if not (torch.is_grad_enabled() and hidden.requires_grad):
            self.trace.evaluations.append((len(self.trace.steps), forward))
            self.num_detached += bool(torch.is_grad_enabled() and forward.training)
            return

        def keep(gradient: torch.Tensor) -> None:
            forward.gradient_BTD = gradient.detach().float().cpu().clone()

        hidden.register_hook(keep)
        if len(self.trace.steps) < 2 and self._is_cleared():
            self.num_cleared = len(self.pending)
        self.pending.append(forward)

    def _is_cleared(self) -> bool:
        """Whether there have been backward passes since the last step, and nothing is left of their gradients."""
        left = [local(parameter.grad) for parameter in self.parameters.values() if parameter.grad is not None]
        # rows without targets leave nothing but zeros either
        return any(bool(t.any()) for t in self.last.values()) and not any(bool(t.any()) for t in left)

    def _keep_dropped(self, name: str) -> Any:
        def keep(module: nn.Dropout, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if not (module.training and module.p) or self.kept is None or name in self.kept:
                return  # checkpointing runs layers again
            self.trace.dropout[name] = module.p
            if sum(t.numel() for t in self.kept.values()) + output.numel() > MAX_KEPT:
                self.kept = None
                return
            # an entry that is zero in the input is zero either way
            self.kept[name] = ((output != 0) | (args[0] == 0)).cpu()

        return keep

    def _mode(self) -> bool | None:
        """The mode of the modules that it matters to; None if it is mixed."""
        modes = {part.training for part in self.parts}
        return modes.pop() if len(modes) == 1 else None

    def _add_up(self, name: str) -> Any:
        def add(gradient: torch.Tensor) -> None:
            own = copy_of(sample(name, gradient, self.sampled))
            self.summed[name] = self.summed[name] + own if name in self.summed else own

        return add

    def _keep_last(self, name: str) -> Any:
        def keep(parameter: torch.Tensor) -> None:
            # every backward pass overwrites this, so at the step it is the gradient accumulated over all of them
            assert parameter.grad is not None
            self.last[name] = copy_of(sample(name, parameter.grad, self.sampled))
            if name in self.sampled:
                self.last_norms |= norms({name: parameter.grad}, self.sampled)

        return keep

    def _accumulated(self, received: Tensors) -> Tensors:
        """The gradient accumulated for a step, of which the optimizer receives a multiple.

        It is what ``grad`` held after the last backward pass, or, where a trainer accumulates in a buffer of its own
        (Megatron's ``main_grad``), the sum over all backward passes: whichever has the direction of what is received.
        """
        return self.summed if is_multiple(received, self.summed) and not is_multiple(received, self.last) else self.last

    def _step_begins(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        self.depth += 1
        if self.depth > 1:
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._keep_step(optimizer)
            return None

        def closure_then_keep() -> Any:  # the closure may run the forward and backward pass (Lightning)
            loss = closure()
            self._keep_step(optimizer)
            return loss

        return (args[0],), {**kwargs, "closure": closure_then_keep}

    def _keep_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.held.meet(optimizer, {} if self.sampled else self.last)
        groups = self.held.groups(optimizer)
        own = {name for group in groups for name in group.names}
        if not own:
            self.trace.foreign_steps += 1
            if self.held.is_share(optimizer):
                self.refuse(
                    "the optimizer holds copies of the parameters that are split over the processes, as by DeepSpeed's "
                    "ZeRO; a run of one process is recorded"
                )
            return  # the step of an optimizer that holds no trained parameter of this model
        forwards = [forward for forward in self.pending if forward.gradient_BTD is not None]
        if not forwards and self.trace.steps and own.isdisjoint(self.trace.optimized):
            self.trace.steps[-1].groups += groups  # a second optimizer's part of the same step
            self.trace.optimized += tuple(own)
            return
        gradients = self.held.gradients()
        received = self._kept(gradients)
        accumulated = self._accumulated(received)
        self.trace.optimized = tuple(name for group in groups for name in group.names)
        self.trace.steps.append(
            Step(
                forwards=forwards,
                raw=sharing(accumulated, received),
                clipped=received,
                before=sharing(self._kept(self.held.before_step()), self._left()),
                groups=groups,
                optimizer=type(optimizer).__name__,
                num_detached=self.num_detached,
                norms={  # of a trainer's own buffer the norm is not known
                    "raw": self.last_norms if accumulated is self.last else {},
                    "clipped": norms(gradients, self.sampled),
                },
            )
        )
        self._leave_out_tries(len(self.trace.steps), self.num_cleared if accumulated is self.last else 0)
        self.num_detached = self.num_cleared = 0
        self.pending, self.last, self.summed, self.last_norms = [], {}, {}, {}

    def _leave_out_tries(self, number: int, num_cleared: int) -> None:
        """Leave out passes before the first step that only try the model, such as a search for the largest batch.

        Their gradients are cleared, as those of no later step are: a trainer that clears between the micro-batches of
        every step has a fault, and one that moves gradients to a buffer of its own receives a sum of them.
        """
        if number == 1:
            self.num_tried = num_cleared
        elif number == 2 and not num_cleared:
            del self.trace.steps[0].forwards[: self.num_tried]

    def _kept(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """Copies of tensors, of a large model those of a sample of their entries."""
        return {name: copy_of(sample(name, tensor, self.sampled)) for name, tensor in tensors.items()}

    def _left(self) -> Tensors:
        """The trained parameters as the last step left them."""
        return self.trace.steps[-1].after if self.trace.steps else {}

    def _step_ended(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self.depth and self.pending:  # the step began before the recorder did: its closure ran the forward pass
            self._keep_step(optimizer)
            for first in self.trace.steps:
                first.before = self.at_start
        self.depth = max(0, self.depth - 1)
        self.at_start = {}
        held = self.held.names_in(tensor for group in optimizer.param_groups for tensor in group["params"])
        if self.depth or not held or not self.trace.steps:
            return
        step = self.trace.steps[-1]
        step.after = self._kept(self.held.after_step())
        places = {name: self.held.places[name].tensor for name in held}
        step.state_dtypes |= {n: found for n, t in places.items() if (found := dtype_of_moments(optimizer, t))}
        self.step_recorded()
