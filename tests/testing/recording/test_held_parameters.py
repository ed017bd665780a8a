"""Copies of the parameters in an optimizer are found, whole, flat or stale, and no other model's tensors.

Run: pytest tests/testing/recording/test_held_parameters.py
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
import torch

from glm4ft.testing.recording import held_parameters
from glm4ft.testing.recording.held_parameters import HeldParameters


def parameters() -> dict[str, torch.Tensor]:
    """A matrix A, drawn at random, and two matrices B of zeros, as adapters have at their start."""
    generator = torch.Generator().manual_seed(0)
    return {"A": torch.randn(2, 3, generator=generator), "B": torch.zeros(4, 2), "C": torch.zeros(4, 2)}


def optimizer(tensors: Sequence[torch.Tensor], gradients: Iterable[torch.Tensor | None]) -> torch.optim.Optimizer:
    """AdamW on tensors with gradients."""
    held = [tensor.clone().requires_grad_() for tensor in tensors]
    for tensor, gradient in zip(held, gradients, strict=True):
        tensor.grad = gradient
    return torch.optim.AdamW(held, lr=0.1)


def gradients_of(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A gradient for each parameter, none of them a multiple of another."""
    return {
        name: torch.arange(p.numel(), dtype=p.dtype).view(p.shape) ** i + i
        for i, (name, p) in enumerate(found.items(), 1)
    }


@pytest.mark.parametrize("padding", [0, 5])
def test_flat_copy_is_found_with_padding_behind_it(padding: int) -> None:
    own = parameters()
    gradients = gradients_of(own)
    flat, gradient = (
        torch.cat([*(t.flatten() for t in tensors.values()), torch.zeros(padding)]) for tensors in (own, gradients)
    )
    adam, held = optimizer([flat], [gradient]), HeldParameters(own)
    held.meet(adam, gradients)
    assert held.names_in(adam.param_groups[0]["params"]) == ("A", "B", "C")
    assert all(torch.equal(held.gradients()[name], gradients[name]) for name in own)
    adam.step()
    assert all(not torch.equal(held.after_step()[name], own[name]) for name in own)
    assert held.after_step()["C"].shape == (4, 2)


def test_copy_in_fp32_stands_for_a_parameter_in_bf16_and_the_model_for_a_stale_one() -> None:
    master = parameters()
    own = {name: tensor.bfloat16() for name, tensor in master.items()}
    gradients = {name: gradient.float() for name, gradient in gradients_of(master).items()}
    adam, held = optimizer(list(master.values()), gradients.values()), HeldParameters(own)
    held.meet(adam, gradients)
    assert torch.equal(held.before_step()["A"], master["A"])
    assert not torch.equal(master["A"].bfloat16().float(), master["A"])
    own["A"].fill_(3.0)  # the model was loaded anew, and the copy was not
    assert torch.equal(held.before_step()["A"], own["A"])


@pytest.mark.parametrize("stale", [0.0, 1.0])
def test_copy_is_found_by_its_gradient_in_any_order_and_stale(stale: float) -> None:
    own = parameters()
    gradients, order = gradients_of(own), ("C", "A", "B")
    adam = optimizer([own[name] + stale for name in order], [0.5 * gradients[name] for name in order])
    held = HeldParameters(own)
    held.meet(adam, gradients)
    assert held.names_in(adam.param_groups[0]["params"]) == order


@pytest.mark.parametrize("kind", ["zeros", "no gradient", "one tensor more", "other values"])
def test_optimizer_of_another_model_holds_nothing(kind: str) -> None:
    own = parameters()
    tensors = {
        "zeros": [torch.zeros(4, 2), torch.zeros(4, 2)],
        "no gradient": list(own.values()),
        "one tensor more": [*own.values(), torch.ones(7)],
        "other values": [tensor + 1 for tensor in own.values()],
    }[kind]
    gradients = [None if kind == "no gradient" else torch.ones_like(tensor) for tensor in tensors]
    adam, held = optimizer(tensors, gradients), HeldParameters(own)
    held.meet(adam, gradients_of(own))
    assert held.names_in(adam.param_groups[0]["params"]) == ()
    assert all(held.after_step()[name] is own[name] for name in own)


def test_share_of_one_of_two_processes_is_not_taken_for_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    own = parameters()
    adam, held = optimizer([torch.cat([own["A"].flatten(), torch.zeros(5)])], [torch.ones(11)]), HeldParameters(own)
    assert not held.is_share(adam)
    monkeypatch.setattr(held_parameters, "num_processes", lambda: 2)
    held.meet(adam, gradients_of(own))
    assert held.names_in(adam.param_groups[0]["params"]) == ()
    assert held.is_share(adam)


def test_rate_in_a_tensor_is_recorded_as_it_was() -> None:
    own = parameters()
    adam = torch.optim.AdamW([tensor.requires_grad_() for tensor in own.values()], lr=torch.tensor(0.5), foreach=False)
    (group,) = HeldParameters(own).groups(adam)
    adam.param_groups[0]["lr"].fill_(0.25)
    assert group.settings["lr"] == 0.5
    assert group.names == ("A", "B", "C")
