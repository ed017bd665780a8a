"""Executable specification of one training step, in plain torch and independent of any trainer.

Every function computes what a stage should have produced *from the recorded input of that stage*, so that the first
stage that departs is the one that is wrong.

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

from glm4ft.data.chat_format import IGNORED
from glm4ft.testing.recording.trace import Forward, Tensors, backbone_of
from glm4ft.testing.specification.lora_spec import LoraSpec, adapted_modules, base_name

LabelledIds = tuple[tuple[int, ...], tuple[int, ...]]  # input ids and unshifted labels

CPU = torch.device("cpu")
# A gradient this much smaller than the largest of its forward pass is rounding: bf16 keeps 8 bits of mantissa.
ZERO_GRADIENT = 1e-6


@dataclass(frozen=True)
class Targets:
    """What the gradient at the final norm says about the tokens of a sequence.

    Args:
        labels_T: unshifted, -100 where no gradient arrives.
        weights_T: of each target in the loss; 0 where there is none.
        fit_T: cosine between the gradient and that of cross entropy with the found label; 1 is a perfect fit.
    """

    labels_T: torch.Tensor
    weights_T: torch.Tensor
    fit_T: torch.Tensor

    def at(self, positions: torch.Tensor) -> Targets:
        """Those of some of the tokens."""
        return Targets(self.labels_T[positions], self.weights_T[positions], self.fit_T[positions])


class Reference:
    """The base as the harness wrote it, with a forward of its own, in fp32.

    Tensors come and go on the CPU, wherever the base is.

    Args:
        base_dir: Hugging Face model folder.
        lora_spec: how the trained matrices act on it.
        device: of the base; one of the true size takes a GPU.
    """

    def __init__(self, base_dir: str | Path, lora_spec: LoraSpec, device: torch.device = CPU) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()
        torch.nn.Module.to(self.model.requires_grad_(False), device)
        self.base_dir, self.lora_spec, self.device = base_dir, lora_spec, device
        self.backbone = backbone_of(self.model)
        self.weights: Tensors = dict(self.model.named_parameters())
        self.modules = dict(self.model.named_modules())

    @cached_property
    def tokenizer(self) -> Any:
        """The base's own, to show ids as text."""
        return AutoTokenizer.from_pretrained(self.base_dir)

    def show(self, ids: Sequence[int]) -> str:
        """Some tokens for a message: their text, quoted, and their ids."""
        return f"{self.tokenizer.decode(list(ids))!r} ({', '.join(map(str, ids))})"

    def hidden(self, input_ids: Sequence[int], trained: Tensors) -> torch.Tensor:
        """Output of the final norm for one row alone, without padding or neighbours.

        Args:
            input_ids: of the row.
            trained: the trained parameters by their names in the model under test.
        Returns:
            (T, D), differentiable in ``trained``.
        Raises:
            ValueError: if a trained parameter belongs to no weight of the base.
        """
        # the backbone's parameters are those of the whole model without its prefix
        changed = {name.removeprefix("model."): weight for name, weight in self._replaced(trained).items()}
        changed.pop("lm_head.weight", None)
        ids = torch.tensor([list(input_ids)], device=self.device)
        with self._adapters(trained):
            output = torch.func.functional_call(self.backbone, changed, (ids,), {"use_cache": False})
        hidden: torch.Tensor = output.last_hidden_state[0].cpu()
        return hidden

    def head_weight(self, trained: Tensors) -> torch.Tensor:
        """Weight (V, D) of the output head, its adapter included, where the base is."""
        weight = self._replaced(trained).get("lm_head.weight", self.weights["lm_head.weight"])
        pair = adapted_modules(list(trained)).get("lm_head")
        return weight + self._scaled(pair, trained, "lm_head") if pair else weight

    def deltas(self, trained: Tensors) -> Tensors:
        """What each adapter adds to its module's weight (out, in), by the module's name in the base."""
        pairs = adapted_modules(list(trained))
        return {module: self._scaled(pair, trained, module).cpu() for module, pair in pairs.items()}

    def logits(self, hidden_TD: torch.Tensor, trained: Tensors) -> torch.Tensor:
        """What the output head makes of hidden states; shape (T, V)."""
        return (hidden_TD.to(self.device) @ self.head_weight(trained).T).cpu()

    def nll(self, input_ids: Sequence[int], trained: Tensors) -> torch.Tensor:
        """Loss of each token but the first given all before it, in nats; shape T - 1."""
        logits = self.logits(self.hidden(input_ids, trained)[:-1], trained)
        return F.cross_entropy(logits, torch.tensor(list(input_ids))[1:], reduction="none")

    def loss(self, rows: Sequence[LabelledIds], trained: Tensors) -> torch.Tensor:
        """Token mean over all rows of an optimizer step.

        Args:
            rows: (input_ids, labels), labels unshifted.
            trained: the trained parameters.
        """
        total, count = torch.zeros(()), 0
        for input_ids, labels in rows:
            targets = torch.tensor(list(labels))[1:]
            logits = self.logits(self.hidden(input_ids, trained)[:-1], trained)
            total = total + F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
            count += int((targets != IGNORED).sum())
        return total / count

    def gradient(self, rows: Sequence[LabelledIds], trained: Tensors) -> Tensors:
        """Gradient of ``loss`` with respect to each trained parameter."""
        leaves = {name: tensor.detach().float().clone().requires_grad_(True) for name, tensor in trained.items()}
        gradients = torch.autograd.grad(self.loss(rows, leaves), list(leaves.values()))
        return dict(zip(leaves, gradients, strict=True))

    def _replaced(self, trained: Tensors) -> Tensors:
        """Weights of the base that are trained themselves, by their names there."""
        matrices = {name for pair in adapted_modules(list(trained)).values() for name in pair.values()}
        for name in set(trained) - matrices:
            if base_name(name) not in self.weights:
                raise ValueError(f"{name} is trained, but is neither a LoRA matrix nor a weight of the base")
        return {base_name(name): trained[name].float().to(self.device) for name in trained if name not in matrices}

    @contextmanager
    def _adapters(self, trained: Tensors) -> Iterator[None]:
        """Let the adapters act while the context is open, beside the weights: merged, they would double them."""
        hooks = []
        for name, pair in adapted_modules(list(trained)).items():
            if name == "lm_head":
                continue
            a, b = (trained[pair[matrix]].float().to(self.device) for matrix in "AB")
            hooks.append(self.modules[name].register_forward_hook(_added(a, b, self.lora_spec.scale_of(name))))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _scaled(self, pair: Mapping[str, str], trained: Tensors, module: str) -> torch.Tensor:
        a, b = (trained[pair[matrix]].float().to(self.device) for matrix in "AB")
        return self.lora_spec.scale_of(module) * (b @ a)


def _added(a: torch.Tensor, b: torch.Tensor, scale: float) -> Any:
    def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output + scale * (args[0] @ a.T @ b.T)

    return hook


def split_rows(forward: Forward) -> list[tuple[int, torch.Tensor]]:
    """The rows of a forward pass: padded ones by the mask, packed ones by positions that restart.

    Returns:
        For each row its index in the batch and the positions (T) it takes there.
    """
    rows = []
    for b, ids_T in enumerate(forward.input_ids_BT):
        mask = forward.attention_mask
        real = mask[b].bool() if mask is not None and mask.dim() == 2 else torch.ones(len(ids_T), dtype=torch.bool)
        places = real.nonzero()[:, 0]
        if forward.positions_BT is None:
            rows.append((b, places))
            continue
        positions = forward.positions_BT[min(b, len(forward.positions_BT) - 1)][places]
        starts = [i for i in range(len(places)) if i == 0 or positions[i] <= positions[i - 1]]
        ends = [*starts[1:], len(places)]
        rows += [(b, places[start:end]) for start, end in zip(starts, ends, strict=True)]
    return rows


def recover_targets(hidden_TD: torch.Tensor, gradient_TD: torch.Tensor, weight_VD: torch.Tensor) -> Targets:
    """Read label and weight of every token out of the loss's gradient at the final norm.

    For cross entropy that gradient is ``w * W^T (p - e_y)``; given the hidden state only ``w`` and ``y`` are unknown,
    and y is the token whose direction ``W^T p - W_y`` the gradient has.

    Args:
        hidden_TD: output of the final norm.
        gradient_TD: of the loss there.
        weight_VD: of the output head.
    """
    weight_VD = weight_VD.detach().double()
    hidden, gradient = (tensor.double().to(weight_VD.device) for tensor in (hidden_TD, gradient_TD))
    labels, weights = torch.full((len(hidden),), IGNORED), torch.zeros(len(hidden), dtype=torch.float64)
    size = gradient.norm(dim=1)
    active = (size > ZERO_GRADIENT * size.max()).nonzero()[:, 0] if size.max() > 0 else torch.zeros(0, dtype=torch.long)
    fit = torch.ones(len(hidden), dtype=torch.float64)
    for t in active.tolist():
        expected_D = (hidden[t] @ weight_VD.T).softmax(0) @ weight_VD
        directions_VD = expected_D - weight_VD
        lengths_V = directions_VD.norm(dim=1).clamp_min(1e-300)
        cosine_V = directions_VD @ gradient[t] / (lengths_V * size[t])
        best = int(cosine_V.argmax())
        if t + 1 < len(hidden):
            fit[t + 1] = cosine_V[best]
            labels[t + 1] = best
            weights[t + 1] = size[t] / lengths_V[best]
    return Targets(labels, weights, fit)


def clip_factor(gradients: Tensors, max_norm: float) -> tuple[float, float]:
    """Global norm and what every gradient is multiplied by.

    Returns:
        ``(norm, factor)``; the factor is ``min(1, max_norm / (norm + 1e-6))``, and 1 if ``max_norm`` is 0.
    Source: ``torch.nn.utils.clip_grad_norm_``.
    """
    norm = math.sqrt(sum(float(g.double().pow(2).sum()) for g in gradients.values()))
    return norm, min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0


def scheduled_rate(step: int, plan: Mapping[str, Any], total_steps: int) -> float:
    """Learning rate of an update.

    Args:
        step: from 1.
        plan: peak rate, schedule and warm-up.
        total_steps: of the whole run.
    Source: the closed forms of transformers' ``get_scheduler``: linear warm-up from 0 over ``warmup_steps``, then
        constant, linear to 0, or half a cosine to 0.
    """
    done, warmup = step - 1, plan["warmup_steps"]
    if done < warmup:
        return float(plan["learning_rate"] * done / warmup)
    share = (done - warmup) / max(1, total_steps - warmup)
    shape = {"constant": 1.0, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}[plan["schedule"]]
    return float(plan["learning_rate"] * shape)


class AdamW:
    """The update of decoupled Adam, carried from step to step in float64.

    Args:
        betas: decay of the two moments.
        eps: added to the root of the second.
        weight_decay: decoupled; applied to every trained matrix.
    Source: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2.
    """

    def __init__(self, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        self.betas, self.eps, self.weight_decay, self.steps = betas, eps, weight_decay, 0
        self.first, self.second = Tensors(), Tensors()

    def update(self, before: Tensors, gradients: Tensors, rate: float) -> Tensors:
        """Parameters after one step."""
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
