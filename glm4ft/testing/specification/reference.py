"""The executable specification of one training step, in plain torch and independent of any trainer.

Every function computes the correct output of a stage *from the recorded input of that stage*, so the first stage that
departs is the one that is wrong.

Shapes: N supervised tokens, T positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from glm4ft.data.encoded_row import IGNORED
from glm4ft.testing.recording.discovery import decoder_of
from glm4ft.testing.recording.trace import Tensors, Trace
from glm4ft.testing.specification.lora_spec import LoraSpec, NotSpecified, adapted_modules, base_name
from glm4ft.testing.specification.routed_experts import fused_delta, fused_name, specify_experts

LabelledIds = tuple[tuple[int, ...], tuple[int, ...]]  # input ids and unshifted labels

CPU = torch.device("cpu")


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
            NotSpecified: If a trained parameter is neither a LoRA matrix nor a weight of the base.
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
            NotSpecified: If such a parameter is no weight of the base.
        """
        names = {name: base_name(name) for name in trace.sampled}
        if lost := [name for name, own in names.items() if own not in self.weights]:
            raise NotSpecified(f"{lost[0]} is trained, but is neither a LoRA matrix nor a weight of the base")
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

    def loss(
        self,
        rows: Sequence[LabelledIds],
        trained: Tensors,
        kept: Sequence[Tensors] = (),
        weights: Sequence[torch.Tensor] = (),
        *,
        dtype: torch.dtype = torch.float64,
    ) -> torch.Tensor:
        """The loss of an optimizer step: the mean over all supervised tokens of its rows, or their weighted sum.

        Softmax is computed in float64. In fp32 that of torch is off by more than rounding over a large vocabulary: over
        49,152 tokens it sums to 1 + 1.5e-5, and the gradient of SmolLM2's adapters is off by 4.5e-5 (x86-64 CPU, torch
        2.13, 2026-11-27).

        Args:
            rows: The ``(input_ids, labels)`` of each row, labels unshifted.
            trained: The trained parameters, by their names in the model under test.
            kept: For each row, what dropout multiplied entries by, as in ``hidden``; empty without dropout.
            weights: For each row, the weight (T,) of each token in the sum; empty for the mean.
            dtype: The dtype that logits are rounded to before softmax: fp32 as in most trainers, or a lower one.
        """
        total, count = torch.zeros((), dtype=torch.float64), 0
        none = [None] * len(rows)
        for (input_ids, labels), own, weights_T in zip(rows, kept or none, weights or none, strict=True):
            at_N = (torch.tensor(list(labels))[1:] != IGNORED).nonzero()[:, 0]  # the positions that predict them
            logits_NV = self.logits(self.hidden(input_ids, trained, own)[at_N], trained)
            targets_N = torch.tensor(list(labels))[at_N + 1]
            logits_NV = logits_NV.to(dtype) if dtype.itemsize > 2 else logits_NV.to(dtype).float()
            nll_N = F.cross_entropy(logits_NV, targets_N, reduction="none").double()
            total = total + (nll_N if weights_T is None else nll_N * weights_T[at_N + 1]).sum()
            count += len(at_N)
        return total if weights else total / count

    def gradient(
        self,
        rows: Sequence[LabelledIds],
        trained: Tensors,
        kept: Sequence[Tensors] = (),
        weights: Sequence[torch.Tensor] = (),
        *,
        dtype: torch.dtype = torch.float64,
    ) -> Tensors:
        """The gradient of ``loss`` with respect to each trained parameter."""
        leaves = {name: tensor.detach().float().clone().requires_grad_(True) for name, tensor in trained.items()}
        gradients = torch.autograd.grad(self.loss(rows, leaves, kept, weights, dtype=dtype), list(leaves.values()))
        return dict(zip(leaves, gradients, strict=True))

    def _replaced(self, trained: Tensors) -> Tensors:
        """The trained weights that replace a weight of the base, by their names in the base."""
        matrices = {name for pair in adapted_modules(list(trained)).values() for name in pair.values()}
        for name in set(trained) - matrices:
            if base_name(name) not in self.weights:
                raise NotSpecified(f"{name} is trained, but is neither a LoRA matrix nor a weight of the base")
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
        is_embedding = isinstance(self.modules[module], torch.nn.Embedding)
        if "magnitude_vector" not in parts:
            return added.T if is_embedding else added
        if is_embedding:
            raise NotSpecified(f"the magnitudes of {module}, an embedding, are not covered by the reference")
        weight = self.weights[f"{module}.weight"]
        adapted = weight + added
        factor_O = parts["magnitude_vector"] / adapted.norm(dim=1).detach()  # of each row of the weight (out, in)
        delta: torch.Tensor = factor_O[:, None] * adapted - weight
        return delta


def _times(factor_TD: torch.Tensor) -> Any:
    """A hook that multiplies a module's output."""
    return lambda module, args, output: output * factor_TD


def _product(*weights: torch.Tensor, dropout_TD: torch.Tensor | None = None) -> Any:
    """A hook that adds to a layer's output the product of its input with further weights, in turn."""

    def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        if isinstance(module, torch.nn.Embedding):  # a product with one-hot vectors
            return output + F.embedding(args[0], weights[0].T) @ weights[1].T
        added = args[0] if dropout_TD is None else args[0] * dropout_TD
        for weight in weights:
            added = added @ weight.T
        return output + added

    return hook
