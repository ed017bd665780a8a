"""The executable specification of one training step, in plain torch and independent of any trainer.

Every function computes the correct output of a stage *from the recorded input of that stage*, so the first stage that
departs is the one that is wrong.

Shapes: N supervised tokens, T positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from glm4ft.data.encoded_row import IGNORED
from glm4ft.testing.recording.discovery import decoder_of
from glm4ft.testing.recording.trace import Forward, Tensors, Trace
from glm4ft.testing.specification.lora_spec import LoraSpec, adapted_modules, base_name
from glm4ft.testing.specification.routed_experts import fused_delta, fused_name, specify_experts

LabelledIds = tuple[tuple[int, ...], tuple[int, ...]]  # input ids and unshifted labels

CPU = torch.device("cpu")
# A gradient that is smaller than the largest of its sequence by this factor is rounding: bf16 keeps 8 bits of mantissa.
ZERO_GRADIENT = 1e-6
CHUNK = 64  # tokens whose logits are held at a time


@dataclass(frozen=True)
class Targets:
    """The labels and weights of a sequence's tokens in the loss, recovered from the gradient at the final norm.

    Args:
        labels_T: The unshifted labels, -100 where no gradient arrives.
        weights_T: The weight of each target in the loss; 0 where there is no target.
        fit_T: The cosine between the gradient and that of cross entropy with the found label; 1 is a perfect fit.
    """

    labels_T: torch.Tensor
    weights_T: torch.Tensor
    fit_T: torch.Tensor

    def at(self, positions: torch.Tensor) -> Targets:
        """The targets at the given positions."""
        return Targets(self.labels_T[positions], self.weights_T[positions], self.fit_T[positions])


class Reference:
    """The base loaded from its files in fp32, with an independent implementation of experts, adapters and loss.

    The methods accept CPU tensors and return CPU tensors on any device, except where they state otherwise.

    Args:
        base_dir: The Hugging Face model folder of the base.
        lora_spec: The specification of the trained adapters.
        device: The device of the base; a base of the true size needs a GPU.
    """

    def __init__(self, base_dir: str | Path, lora_spec: LoraSpec, device: torch.device = CPU) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()
        torch.nn.Module.to(self.model.requires_grad_(False), device)
        specify_experts(self.model)
        self.base_dir, self.lora_spec, self.device = base_dir, lora_spec, device
        self.weights: Tensors = dict(self.model.named_parameters())
        self.modules = dict(self.model.named_modules())
        decoder, names = decoder_of(self.model), {id(module): name for name, module in self.modules.items()}
        self.body, self.prefix, self.head = decoder.body, names[id(decoder.body)] + ".", names[id(decoder.head)]
        # a tied head has no weight of its own
        own, tied = f"{self.head}.weight", f"{names[id(decoder.embedding)]}.weight"
        self.head_name = own if own in self.weights else tied

    @cached_property
    def tokenizer(self) -> Any:
        """The base's tokenizer, which shows ids as text."""
        return AutoTokenizer.from_pretrained(self.base_dir)

    @property
    def num_layers(self) -> int:
        """The number of decoder layers."""
        return int(self.model.config.num_hidden_layers)

    def show(self, ids: Sequence[int]) -> str:
        """Format tokens for a message: their quoted text, then their ids in brackets."""
        return f"{self.tokenizer.decode(list(ids))!r} ({', '.join(map(str, ids))})"

    def hidden(self, input_ids: Sequence[int], trained: Tensors, kept: Tensors | None = None) -> torch.Tensor:
        """The output of the final norm for one row alone, without padding or neighbours.

        Args:
            input_ids: The token ids of the row.
            trained: The trained parameters, by their names in the model under test.
            kept: What the run's dropout multiplied each entry (T, D) of its input by, by the name of the dropout layer.
        Returns:
            The hidden states (T, D), differentiable with respect to ``trained``.
        Raises:
            ValueError: If a trained parameter is neither a LoRA matrix nor a weight of the base.
        """
        replaced = self._replaced(trained)
        replaced |= self._fused(trained)
        changed = {n.removeprefix(self.prefix): weight for n, weight in replaced.items() if n.startswith(self.prefix)}
        ids = torch.tensor([list(input_ids)], device=self.device)
        with self._adapters(trained, kept or {}):
            output = torch.func.functional_call(self.body, changed, (ids,), {"use_cache": False})
        hidden: torch.Tensor = output.last_hidden_state[0].cpu()
        return hidden

    def head_weight(self, trained: Tensors) -> torch.Tensor:
        """The weight (V, D) of the output head with its adapter merged, on the base's device."""
        weight = self._replaced(trained).get(self.head_name, self.weights[self.head_name])
        pair = self.adapters(trained).get(self.head)
        return weight + self._delta(pair, trained, self.head) if pair else weight

    def first_weights(self, trace: Trace) -> Tensors:
        """The trained parameters before the first step, those of which a sample is recorded by the base's files.

        Raises:
            ValueError: If such a parameter is no weight of the base.
        """
        names = {name: base_name(name) for name in trace.sampled}
        if lost := [name for name, own in names.items() if own not in self.weights]:
            raise ValueError(f"{lost[0]} is trained, but is neither a LoRA matrix nor a weight of the base")
        return trace.steps[0].before | {name: self.weights[own].cpu() for name, own in names.items()}

    def adapters(self, trained: Tensors) -> dict[str, dict[str, str]]:
        """The LoRA matrices among parameters, by the name in the base of the module or fused parameter they adapt."""
        found = {}
        for module, pair in adapted_modules(list(trained)).items():
            shapes = {matrix: trained[name].shape for matrix, name in pair.items()}
            found[fused_name(base_name(module), shapes, self.weights) or module] = pair
        return found

    def rank_of(self, adapted: str, pair: Mapping[str, str], trained: Tensors) -> set[int]:
        """The ranks of a pair's matrices, by which one says: one if they fit each other."""
        ranks = {trained[pair[m]].shape[axis] for m, axis in (("A", 0), ("B", 1)) if m in pair}
        return {rank // len(self.weights[adapted]) for rank in ranks} if adapted in self.weights else ranks

    def deltas(self, trained: Tensors) -> Tensors:
        """What each adapter adds to its weight, by the weight's name in the base."""
        pairs = self.adapters(trained)
        return {self.weight_name(name): self._delta(pair, trained, name).cpu() for name, pair in pairs.items()}

    def weight_name(self, adapted: str) -> str:
        """The name of the weight that an adapter of a module or fused parameter changes."""
        return adapted if adapted in self.weights else f"{adapted}.weight"

    def logits(self, hidden_TD: torch.Tensor, trained: Tensors) -> torch.Tensor:
        """The logits (T, V) of hidden states (T, D)."""
        return (hidden_TD.to(self.device) @ self.head_weight(trained).T).cpu()

    def nll(self, input_ids: Sequence[int], trained: Tensors) -> torch.Tensor:
        """The loss of each token but the first, given all tokens before it, in nats; shape (T - 1,)."""
        logits = self.logits(self.hidden(input_ids, trained)[:-1], trained)
        return F.cross_entropy(logits, torch.tensor(list(input_ids))[1:], reduction="none")

    def loss(self, rows: Sequence[LabelledIds], trained: Tensors, kept: Sequence[Tensors] = ()) -> torch.Tensor:
        """The loss of an optimizer step: the mean over all supervised tokens of its rows.

        Args:
            rows: The ``(input_ids, labels)`` of each row, labels unshifted.
            trained: The trained parameters, by their names in the model under test.
            kept: For each row, what dropout multiplied entries by, as in ``hidden``; empty without dropout.
        """
        total, count = torch.zeros(()), 0
        for (input_ids, labels), own in zip(rows, kept or [{}] * len(rows), strict=True):
            targets = torch.tensor(list(labels))[1:]
            logits = self.logits(self.hidden(input_ids, trained, own)[:-1], trained)
            total = total + F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
            count += int((targets != IGNORED).sum())
        return total / count

    def gradient(self, rows: Sequence[LabelledIds], trained: Tensors, kept: Sequence[Tensors] = ()) -> Tensors:
        """The gradient of ``loss`` with respect to each trained parameter."""
        leaves = {name: tensor.detach().float().clone().requires_grad_(True) for name, tensor in trained.items()}
        gradients = torch.autograd.grad(self.loss(rows, leaves, kept), list(leaves.values()))
        return dict(zip(leaves, gradients, strict=True))

    def _replaced(self, trained: Tensors) -> Tensors:
        """The trained weights that replace a weight of the base, by their names in the base."""
        matrices = {name for pair in adapted_modules(list(trained)).values() for name in pair.values()}
        for name in set(trained) - matrices:
            if base_name(name) not in self.weights:
                raise ValueError(f"{name} is trained, but is neither a LoRA matrix nor a weight of the base")
        return {base_name(name): trained[name].float().to(self.device) for name in trained if name not in matrices}

    def _fused(self, trained: Tensors) -> Tensors:
        """The fused parameters with their adapters merged, by their names in the base."""
        pairs = {name: pair for name, pair in self.adapters(trained).items() if name in self.weights}
        return {name: self.weights[name] + self._delta(pair, trained, name) for name, pair in pairs.items()}

    @contextmanager
    def _adapters(self, trained: Tensors, kept: Tensors) -> Iterator[None]:
        """Apply the adapters of modules as hooks while it is open: merging would need a second copy of the weights."""
        hooks, factors = [], {base_name(name): factor_TD.to(self.device) for name, factor_TD in kept.items()}
        for name in factors.keys() & self.modules.keys():  # a dropout layer of the base itself, which is in eval mode
            hooks.append(self.modules[name].register_forward_hook(_times(factors[name])))
        for name, pair in self.adapters(trained).items():
            if name == self.head or name in self.weights:
                continue
            a, b = (trained[pair[matrix]].float().to(self.device) for matrix in "AB")
            is_decomposed = "magnitude_vector" in pair
            weights = [self._delta(pair, trained, name)] if is_decomposed else [a, self.lora_spec.scale_of(name) * b]
            own = next((f for layer, f in factors.items() if layer.startswith(f"{name}.lora_dropout")), None)
            hooks.append(self.modules[name].register_forward_hook(_product(*weights, dropout_TD=own)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _delta(self, pair: Mapping[str, str], trained: Tensors, module: str) -> torch.Tensor:
        """What an adapter adds to its weight: ``s B A``; with DoRA the rest of a weight whose rows have new norms.

        Source: LoRA, arXiv 2106.09685, section 4.1; DoRA, arXiv 2402.09353, section 4.3, which takes the norm as a
            constant in the backward pass.
        """
        parts = {name: trained[parameter].float().to(self.device) for name, parameter in pair.items()}
        if module in self.weights:
            return self.lora_spec.scale_of(module) * fused_delta(parts["A"], parts["B"], len(self.weights[module]))
        added = self.lora_spec.scale_of(module) * (parts["B"] @ parts["A"])
        if "magnitude_vector" not in parts:
            return added
        weight = self.weights[f"{module}.weight"]
        adapted = weight + added
        factor_O = parts["magnitude_vector"] / adapted.norm(dim=1).detach()  # of each row of the weight (out, in)
        delta: torch.Tensor = factor_O[:, None] * adapted - weight
        return delta


def _times(factor_TD: torch.Tensor) -> Any:
    """A hook that multiplies a module's output."""
    return lambda module, args, output: output * factor_TD


def _product(*weights: torch.Tensor, dropout_TD: torch.Tensor | None = None) -> Any:
    """A hook that adds to a linear layer's output the product of its input with further weights, in turn."""

    def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        added = args[0] if dropout_TD is None else args[0] * dropout_TD
        for weight in weights:
            added = added @ weight.T
        return output + added

    return hook


def split_rows(forward: Forward) -> list[tuple[int, torch.Tensor]]:
    """Split a forward pass into rows: padded rows by the mask, packed rows where the position ids restart.

    Returns:
        For each row, the index of its sequence in the batch and the row's positions (T,) in that sequence.
    """
    rows = []
    for b, ids_T in enumerate(forward.input_ids_BT):
        mask = forward.attention_mask
        if mask is not None and mask.dim() == 2:
            real = mask[b, -len(ids_T) :].bool()  # with a cache it begins with the tokens of earlier passes
        else:
            real = torch.ones(len(ids_T), dtype=torch.bool)
        used = real.nonzero()[:, 0]
        if forward.positions_BT is None:
            rows.append((b, used))
            continue
        positions = forward.positions_BT[min(b, len(forward.positions_BT) - 1)][used]
        starts = [i for i in range(len(used)) if i == 0 or positions[i] <= positions[i - 1]]
        ends = [*starts[1:], len(used)]
        rows += [(b, used[start:end]) for start, end in zip(starts, ends, strict=True)]
    return rows


def recover_targets(hidden_TD: torch.Tensor, gradient_TD: torch.Tensor, weight_VD: torch.Tensor) -> Targets:
    """Recover the label and the weight of every token from the loss's gradient at the final norm.

    For cross entropy that gradient is ``w * W^T (p - e_y)``. Given the hidden state, only ``w`` and ``y`` are unknown,
    and ``y`` is the token whose direction ``W^T p - W_y`` is that of the gradient.

    Args:
        hidden_TD: The output of the final norm for a sequence.
        gradient_TD: The gradient of the loss with respect to that output.
        weight_VD: The weight of the output head.
    Returns:
        The targets by the position of the token that is predicted, T + 1 of them: the last position predicts a token
        behind the sequence.
    """
    weight_VD = weight_VD.detach().double()
    hidden, gradient = (tensor.double().to(weight_VD.device) for tensor in (hidden_TD, gradient_TD))
    labels, weights = torch.full((len(hidden) + 1,), IGNORED), torch.zeros(len(hidden) + 1, dtype=torch.float64)
    size = gradient.norm(dim=1)
    active = (size > ZERO_GRADIENT * size.max()).nonzero()[:, 0] if size.max() > 0 else torch.zeros(0, dtype=torch.long)
    fit = torch.ones(len(hidden) + 1, dtype=torch.float64)
    lengths_V = (weight_VD * weight_VD).sum(1)
    for chunk in active.split(CHUNK):
        expected_TD = (hidden[chunk] @ weight_VD.T).softmax(1) @ weight_VD
        # |W^T p - W_y|^2 and its product with the gradient, without the V directions themselves
        squares_TV = (expected_TD * expected_TD).sum(1)[:, None] - 2 * expected_TD @ weight_VD.T + lengths_V
        products_TV = (expected_TD * gradient[chunk]).sum(1)[:, None] - gradient[chunk] @ weight_VD.T
        # the squares are differences of large numbers: below this they are rounding
        best_T = (products_TV / squares_TV.clamp_min(1e-14 * lengths_V.max()).sqrt()).argmax(1)
        directions_TD = expected_TD - weight_VD[best_T]
        lengths_T = directions_TD.norm(dim=1).clamp_min(1e-300)
        fit[chunk + 1] = ((directions_TD * gradient[chunk]).sum(1) / (lengths_T * size[chunk])).cpu()
        labels[chunk + 1] = best_T.cpu()
        weights[chunk + 1] = (size[chunk] / lengths_T).cpu()
    return Targets(labels, weights, fit)


def clip_factor(gradients: Tensors, max_norm: float, norms: Mapping[str, float] | None = None) -> tuple[float, float]:
    """The global norm of the gradients and the factor that clipping multiplies them by.

    Args:
        gradients: The gradient of each parameter, or a sample of it.
        max_norm: The largest norm; 0 for none.
        norms: The norms of the gradients that are samples.
    Returns:
        ``(norm, factor)``; the factor is ``min(1, max_norm / (norm + 1e-6))``, and 1 if ``max_norm`` is 0.
    Source: ``torch.nn.utils.clip_grad_norm_``.
    """
    known = norms or {}
    norm = math.hypot(*(known.get(n, 0.0) or float(g.double().norm()) for n, g in gradients.items()))
    return norm, min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0


def scheduled_rate(step: int, plan: Mapping[str, Any], total_steps: int) -> float:
    """The learning rate of an optimizer step.

    Args:
        step: The number of the step, from 1.
        plan: The plan, with ``learning_rate`` (the peak), ``schedule`` and ``warmup_steps``.
        total_steps: The number of steps of the whole run.
    Source: the closed forms of transformers' ``get_scheduler``: linear warm-up from 0 over ``warmup_steps``, then
        constant, linear to 0, or half a cosine to 0.
    """
    done, warmup = step - 1, plan["warmup_steps"]
    if done < warmup:
        return float(plan["learning_rate"] * done / warmup)
    share = (done - warmup) / max(1, total_steps - warmup)
    shape = {"constant": 1.0, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}[plan["schedule"]]
    return float(plan["learning_rate"] * shape)


def warmups_above_zero(plan: Mapping[str, Any]) -> list[list[float]]:
    """The learning rates of the warm-up in pipelines whose first step already moves.

    Args:
        plan: The plan, with ``learning_rate`` and ``warmup_steps``.
    Returns:
        The learning rate of each warm-up step, in each of the forms that are in use.
    Source: karpathy/nanoGPT's ``train.py``, ``(done + 1) / (warmup + 1)``; Megatron-LM's scheduler, which counts the
        step that it is about to take: ``(done + 1) / warmup``.
    """
    peak, warmup = float(plan["learning_rate"]), int(plan["warmup_steps"])
    return [[peak * (done + 1) / divisor for done in range(warmup)] for divisor in (warmup + 1, max(warmup, 1))]


class AdamW:
    """AdamW in float64, with its moments kept from step to step.

    Args:
        betas: The decay rates of the first and second moment.
        eps: The term added to the root of the second moment.
        weight_decay: The decoupled weight decay, applied to every trained parameter.
    Source: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2.
    """

    def __init__(self, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        self.betas, self.eps, self.weight_decay, self.steps = betas, eps, weight_decay, 0
        self.first, self.second = Tensors(), Tensors()

    def update(self, before: Tensors, gradients: Tensors, rate: float) -> Tensors:
        """Advance the moments by one step and return the parameters after it."""
        self.steps += 1
        beta1, beta2 = self.betas
        after = {}
        for name, gradient in gradients.items():
            g = gradient.double()
            self.first[name] = beta1 * self.first.get(name, torch.zeros_like(g)) + (1 - beta1) * g
            self.second[name] = beta2 * self.second.get(name, torch.zeros_like(g)) + (1 - beta2) * g * g
            root = (self.second[name] / (1 - beta2**self.steps)).sqrt() + self.eps
            direction = self.first[name] / (1 - beta1**self.steps) / root
            after[name] = before[name].double() * (1 - rate * self.weight_decay) - rate * direction
        return after
