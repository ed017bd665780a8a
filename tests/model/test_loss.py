"""The loss is the exact token mean of the supervised rows, and nothing but supervised rows reaches the head.

Run: pytest tests/model/test_loss.py
"""

from __future__ import annotations

import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import glm4ft.model.loss
from glm4ft.data.encoded_row import IGNORED
from glm4ft.model.loss import install_supervised_loss, supervised_nll
from glm4ft.model.tiny import tiny_model

# fp32 against fp32 in another order of summation; measured at most 4e-7 over 20 seeds (x86-64 CPU, torch 2.13)
RELATIVE_LIMIT = 5e-6


@pytest.fixture
def model() -> nn.Module:
    return tiny_model(seed=1)


def batch(seed: int, rows: int = 3, length: int = 40, share: float = 0.3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, 480, (rows, length), generator=generator)
    supervised = torch.rand(rows, length, generator=generator) < share
    return {"input_ids": input_ids, "labels": torch.where(supervised, input_ids, IGNORED)}


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("seed", range(3))
def test_loss_equals_that_of_transformers(model: nn.Module, seed: int, frozen: bool) -> None:
    """The model's own loss over full logits, for the same divisor, gives the same number."""
    data = batch(seed)
    model.lm_head.requires_grad_(not frozen)
    expected = model(**data, num_items_in_batch=torch.tensor(50)).loss
    install_supervised_loss(model)
    loss = model(**data, num_items_in_batch=torch.tensor(50)).loss
    assert abs(loss - expected) <= RELATIVE_LIMIT * expected


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen head", "trained head"])
def test_gradients_equal_those_of_transformers(model: nn.Module, frozen: bool) -> None:
    model.lm_head.requires_grad_(not frozen)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(**batch(0)).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    expected = gradients()
    install_supervised_loss(model)
    for got, want in zip(gradients(), expected, strict=True):
        assert (got - want).norm() <= RELATIVE_LIMIT * want.norm() + 1e-12


def test_padding_on_the_left_is_masked(model: nn.Module) -> None:
    """Our padding is on the right, where no token attends to it; padding on the left relies on the mask."""
    install_supervised_loss(model)
    alone = batch(0, rows=1)
    padded = {name: nn.functional.pad(tensor, (9, 0), value=5) for name, tensor in alone.items()}
    padded["labels"][:, : 9 + 1] = alone["labels"][:, 0] = IGNORED
    mask = (torch.arange(padded["input_ids"].shape[1]) >= 9).long()[None]
    expected = model(**alone).loss
    assert abs(model(**padded, attention_mask=mask).loss - expected) <= RELATIVE_LIMIT * expected
    assert abs(model(**padded).loss - expected) > RELATIVE_LIMIT * expected


def test_head_sees_supervised_rows_only(model: nn.Module) -> None:
    seen: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    install_supervised_loss(model)
    data = batch(0)
    model(**data)
    assert seen == [int((data["labels"][:, 1:] != IGNORED).sum())]


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen head", "trained head"])
@pytest.mark.parametrize(("max_logits", "rows"), [(7 * 554, 7), (1, 1)])  # the head has 554 rows
def test_chunks_change_neither_loss_nor_gradient(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, max_logits: int, rows: int, frozen: bool
) -> None:
    """The chunks of a long batch add up to the result without chunks; a chunk has at least one position."""
    hidden = torch.randn(3, 40, 128, requires_grad=True)
    labels = batch(0)["labels"]
    weights = torch.rand(int((labels[:, 1:] != IGNORED).sum()))  # each token's gradient has a factor of its own

    def nll_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        nll_N = supervised_nll(model.lm_head, hidden, labels)[0]
        return nll_N.detach(), torch.autograd.grad(nll_N @ weights, hidden)[0]

    expected = nll_and_gradient()
    model.lm_head.requires_grad_(not frozen)
    monkeypatch.setattr(glm4ft.model.loss, "MAX_LOGITS", max_logits)
    calls: list[int] = []
    model.lm_head.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    for got, want in zip(nll_and_gradient(), expected, strict=True):
        assert (got - want).norm() <= RELATIVE_LIMIT * want.norm()
    assert max(calls) == rows


def test_a_frozen_head_leaves_no_logits_in_memory(model: nn.Module) -> None:
    """Between forward and backward nothing of the size of the logits is alive."""
    model.lm_head.requires_grad_(False)
    hidden, labels = torch.randn(3, 40, 128, requires_grad=True), batch(0)["labels"]
    logits: list[weakref.ref[torch.Tensor]] = []
    model.lm_head.register_forward_hook(lambda _, __, output: logits.append(weakref.ref(output)))
    nll_N, _ = supervised_nll(model.lm_head, hidden, labels)
    assert [ref() for ref in logits] == [None]
    assert nll_N.requires_grad


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen head", "trained head"])
def test_losses_of_confident_tokens_are_exact(frozen: bool) -> None:
    """A target of probability 1 loses next to nothing, one of probability 0 in fp32 loses its logit's distance."""
    head = nn.Linear(2, 3, bias=False).requires_grad_(not frozen)
    head.weight.data = torch.tensor([[300.0, 0.0], [0.0, 0.0], [0.0, 10.0]])
    hidden = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]], requires_grad=True)
    nll_N, _ = supervised_nll(head, hidden, torch.tensor([[IGNORED, 0, 1, 2]]))
    (gradient,) = torch.autograd.grad(nll_N.sum(), hidden)
    logits = (hidden.detach().double() @ head.weight.double().T)[0, :3].requires_grad_()
    exact = nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2]), reduction="none")
    (exact_gradient,) = torch.autograd.grad(exact.sum(), logits)
    # two rounding steps of fp32 at 1: the largest probability's, and its logarithm's; measured 2.0e-7
    assert ((nll_N - exact).abs() <= 2.4e-7 * (1 + exact)).all()
    assert torch.allclose(gradient[0, :3].double(), exact_gradient @ head.weight.double(), rtol=0, atol=1e-4)


def test_probabilities_of_a_large_vocabulary_sum_to_one() -> None:
    """Where all rows of a head share a direction, as those of trained heads do, the gradient along it is their sum - 1.

    At most 1.2e-6 in 64 tokens of 3 seeds, most of it of the product with the head; by torch.softmax 5.2e-6 to 6.8e-6
    (x86-64 CPU, torch 2.13, 2026-11-28).
    """
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(16, 49_152, bias=False).requires_grad_(False)
    head.weight.normal_(generator=generator)[:, 0] = 1.0
    hidden = torch.randn(1, 65, 16, generator=generator)
    hidden[..., 0] = 0.0
    nll, _ = supervised_nll(head, hidden.requires_grad_(True), torch.full((1, 65), 7))
    (gradient,) = torch.autograd.grad(nll.sum(), hidden)
    assert gradient[..., 0].abs().max() <= 2.5e-6


def test_an_evaluation_computes_no_gradient(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """And loses what training loses."""
    model.requires_grad_(False)
    hidden, labels = torch.randn(3, 40, 128, requires_grad=True), batch(0)["labels"]
    expected = supervised_nll(model.lm_head, hidden, labels)[0].detach()
    monkeypatch.setattr(torch.autograd, "grad", lambda *_: pytest.fail("a gradient was computed"))
    with torch.no_grad():
        assert torch.equal(supervised_nll(model.lm_head, hidden, labels)[0], expected)


def test_rows_are_summed_apart(model: nn.Module) -> None:
    """With ``per_row`` each row's loss equals the loss of the row alone."""
    install_supervised_loss(model)
    data = batch(0)
    together = model(**data, per_row=True).loss
    for i in range(3):
        alone = model(**{name: tensor[i : i + 1] for name, tensor in data.items()}, num_items_in_batch=1).loss
        assert abs(together[i] - alone) <= RELATIVE_LIMIT * alone


@pytest.mark.parametrize("training", [True, False])
def test_packed_rows_lose_what_they_lose_alone(model: nn.Module, training: bool) -> None:
    """In eval mode a cache, on by default, would disable the isolation of packed rows."""
    install_supervised_loss(model.train(training))
    rows = batch(0, rows=2)
    alone = model(**rows, per_row=True).loss.sum()
    packed = {name: tensor.reshape(1, -1) for name, tensor in rows.items()}
    packed["labels"][0, 40] = IGNORED  # the first token of a row has nothing before it
    rows_positions = torch.arange(40).repeat(2)[None]
    together = model(**packed, position_ids=rows_positions, num_items_in_batch=1).loss
    assert abs(together - alone) <= RELATIVE_LIMIT * alone


def test_micro_batch_without_targets_gives_zero_gradient_not_nan(model: nn.Module) -> None:
    """Such a micro-batch is harmless in a step with targets elsewhere, because the step's divisor is given."""
    install_supervised_loss(model)
    loss = model(**batch(0, share=0.0), num_items_in_batch=torch.tensor(7)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_loss_is_in_fp32_on_a_bf16_model(model: nn.Module) -> None:
    install_supervised_loss(model.to(torch.bfloat16))
    assert model(**batch(0)).loss.dtype == torch.float32


def test_adapter_on_the_head_takes_part(model: nn.Module) -> None:
    """A loss that read ``lm_head.weight`` directly would leave an adapter there without gradient (unsloth 9331)."""
    install_supervised_loss(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["lm_head"]))
    adapted(**batch(0)).loss.backward()
    assert adapted.base_model.model.lm_head.lora_B["default"].weight.grad.abs().sum() > 0


def test_without_labels_the_model_is_as_before(model: nn.Module) -> None:
    ids = batch(0)["input_ids"]
    expected = model(input_ids=ids).logits
    install_supervised_loss(model)
    assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("num_targets", [0, 3])
def test_a_trained_head_that_is_sharded_is_called_once(num_targets: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes with other numbers of targets would otherwise gather it unequally often, and wait for each other."""

    class ShardedHead(nn.Linear):
        calls = 0

        def unshard(self) -> None: ...

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().forward(hidden)

    monkeypatch.setattr(glm4ft.model.loss, "MAX_LOGITS", 16)  # one token of it
    head = ShardedHead(8, 16)
    labels = torch.full((1, 6), IGNORED)
    labels[0, 1 : 1 + num_targets] = 5
    supervised_nll(head, torch.randn(1, 6, 8), labels)
    assert head.calls == 1
