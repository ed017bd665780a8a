"""A recorded run is judged stage by stage: healthy trainers agree with the specification, faults are named.

Run: pytest tests/testing/replay/test_replay.py
The faults are put into an unmodified ``transformers.Trainer``, or into this project's, where they occurred in reality.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from glm4ft.data.batching import Collator
from glm4ft.data.encoded_row import IGNORED
from glm4ft.model.tiny import tiny_model, write_tiny_base
from glm4ft.testing.recording.record import record
from glm4ft.testing.specification.recovered_targets import recover_targets
from glm4ft.testing.subjects import own, transformers_trainer
from glm4ft.testing.trial.trial import Trial

Rows = list[dict[str, list[int]]]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


@dataclass(frozen=True)
class Fault:
    """A bug to put into a subject, and what the verdict must say."""

    id: str
    stage: str
    cause: str
    plan: Mapping[str, Any] = field(default_factory=dict)
    rows: Callable[[Rows], Rows] | None = None  # what the data code made of the rows
    trainer: Callable[[Trainer], Any] | None = None  # changes the trainer before it runs
    model: Callable[[Any], Any] | None = None  # changes the model after it is built


class FaultySubject(transformers_trainer.Subject):
    """``transformers.Trainer`` with one fault."""

    def __init__(self, base_dir: str, fault: Fault) -> None:
        super().__init__(base_dir)
        self.fault = fault

    def build_model(self, base_dir: str, seed: int) -> Any:
        model = super().build_model(base_dir, seed)
        if self.fault.model:
            self.fault.model(model)
        return model

    def make_trainer(self, model: Any, rows: Rows, plan: Mapping[str, Any]) -> Trainer:
        trainer = super().make_trainer(model, self.fault.rows(rows) if self.fault.rows else rows, plan)
        if self.fault.trainer:
            self.fault.trainer(trainer)
        return trainer


def mean_of_micro_means(trainer: Trainer) -> None:
    trainer.model_accepts_loss_kwargs = False


def scaled_loss(trainer: Trainer) -> None:
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: 1.75 * compute_loss(*args, **kwargs)


def set_argument(name: str, value: Any) -> Callable[[Trainer], None]:
    return lambda trainer: setattr(trainer.args, name, value)


def label_smoothing(trainer: Trainer) -> None:
    from transformers.trainer_pt_utils import LabelSmoother

    trainer.label_smoother = LabelSmoother(epsilon=0.1)


def unshifted_loss(model: Any) -> None:
    def loss(logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: Any = None, **_: Any) -> torch.Tensor:
        flat = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return flat / num_items_in_batch

    model.base_model.model.loss_function = loss


def gradients_never_cleared(trainer: Trainer) -> None:
    trainer.model.zero_grad = lambda *_, **__: None
    create = trainer.create_optimizer

    def create_optimizer(*args: Any) -> Any:
        optimizer = create(*args)
        optimizer.zero_grad = lambda *_, **__: None
        return optimizer

    trainer.create_optimizer = create_optimizer


def optimizer_without(part: str) -> Callable[[Trainer], None]:
    def change(trainer: Trainer) -> None:
        kept = [p for name, p in trainer.model.named_parameters() if p.requires_grad and part not in name]
        trainer.optimizer = torch.optim.AdamW(kept, lr=trainer.args.learning_rate, weight_decay=0.0)

    return change


def other_optimizer(trainer: Trainer) -> None:
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    trainer.optimizer = torch.optim.Adamax(trained, lr=trainer.args.learning_rate)


def scale_lost(model: Any) -> None:
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] = 1.0


def matrices_b_drawn_at_random(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)


def adapters_off_after_a_step(trainer: Trainer) -> None:
    step = trainer.training_step

    def training_step(*args: Any) -> torch.Tensor:
        for module in trainer.model.modules():
            if trainer.state.global_step and isinstance(getattr(module, "scaling", None), dict):
                module.scaling["default"] = 0.0
        return step(*args)

    trainer.training_step = training_step


def moved_before_the_step(trainer: Trainer) -> None:
    """As by a decay that is done by hand between backward pass and optimizer."""
    step = trainer.training_step

    def training_step(*args: Any) -> torch.Tensor:
        loss = step(*args)
        for parameter in trainer.model.parameters():
            if parameter.requires_grad and trainer.state.global_step:
                parameter.data *= 0.99
        return loss

    trainer.training_step = training_step


def attention_window(model: Any) -> None:
    """A token attends to the 16 tokens before it only."""
    model.config._attn_implementation = "eager"

    def hide(attention: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        length = kwargs["hidden_states"].shape[1]
        at_T = torch.arange(length)
        far_TT = (at_T[:, None] - at_T >= 16) | (at_T[:, None] < at_T)
        mask = torch.zeros(length, length).masked_fill(far_TT, torch.finfo(torch.float32).min)[None, None]
        return args, {**kwargs, "attention_mask": mask}

    for layer in model.base_model.model.model.layers:
        layer.self_attn.register_forward_pre_hook(hide, with_kwargs=True)


def transposed_square_weight(model: Any) -> None:
    weight = model.base_model.model.model.layers[0].self_attn.o_proj.base_layer.weight
    weight.data = weight.data.T.contiguous()


def changed(field_name: str, change: Callable[[list[int], list[int]], list[int]]) -> Callable[[Rows], Rows]:
    return lambda rows: [{**row, field_name: change(row["input_ids"], row["labels"])} for row in rows]


def train_the_header(ids: list[int], labels: list[int]) -> list[int]:
    first = next(i for i, label in enumerate(labels) if label != IGNORED)
    return [*labels[: first - 1], ids[first - 1], *labels[first:]]


def untrain_the_stop(ids: list[int], labels: list[int]) -> list[int]:
    return [*labels[:-1], IGNORED]


def shift_once_more(ids: list[int], labels: list[int]) -> list[int]:
    return [*labels[1:], IGNORED]


def cut(rows: Rows) -> Rows:
    return [{name: values[:20] for name, values in row.items()} for row in rows]


FAULTS = [
    Fault("header-trained", "rows", "", rows=changed("labels", train_the_header)),
    Fault("stop-not-trained", "rows", "", rows=changed("labels", untrain_the_stop)),
    Fault("prompt-trained", "rows", "", rows=changed("labels", lambda ids, labels: ids)),
    Fault("cut-rows", "rows", "truncation", rows=cut),
    Fault("one-row-for-all", "batches", "repeat", rows=lambda rows: [rows[0]] * len(rows), plan={"steps": 2}),
    Fault("scale-lost", "model", "scale", model=scale_lost, plan={"steps": 2}),
    Fault("B-not-zero", "model", "", model=matrices_b_drawn_at_random),
    Fault("weight-transposed", "model", "", model=transposed_square_weight),
    Fault("adapters-off", "model", "what is trained has no effect", trainer=adapters_off_after_a_step),
    Fault("moved-before-the-step", "update", "changed between the forward pass", trainer=moved_before_the_step),
    Fault("window", "model", "the first 16 tokens of the row are right", model=attention_window),
    Fault("mean-of-micro-means", "gradient", "micro-batch means", {"accumulation": 2}, trainer=mean_of_micro_means),
    Fault("loss-scaled", "gradient", "1.75 times the token mean", trainer=scaled_loss),
    Fault("double-shift", "gradient", "shifted twice", rows=changed("labels", shift_once_more)),
    Fault("no-shift", "gradient", "not shifted", model=unshifted_loss),
    Fault("label-smoothing", "gradient", "label smoothing", trainer=label_smoothing),
    Fault("never-cleared", "gradient", "not cleared", trainer=gradients_never_cleared),
    Fault("not-clipped", "clipping", "not clipped", {"max_grad_norm": 0.05}, trainer=set_argument("max_grad_norm", 0)),
    Fault(
        "constant-rate", "schedule", "", {"schedule": "cosine"}, trainer=set_argument("lr_scheduler_type", "constant")
    ),
    Fault("no-warm-up", "schedule", "", {"warmup_steps": 2}, trainer=set_argument("warmup_steps", 0)),
    Fault("weight-decay", "update", "weight_decay is 0.01", trainer=set_argument("weight_decay", 0.01)),
    Fault("other-betas", "update", "betas", trainer=set_argument("adam_beta2", 0.95)),
    Fault("optimizer-misses-A", "update", "", trainer=optimizer_without("lora_A")),
    Fault("other-optimizer", "update", "Adamax", trainer=other_optimizer),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_fault_is_named_at_its_stage(fault: Fault, base_dir: Path, tmp_path: Path) -> None:
    trial = Trial(FaultySubject(str(base_dir), fault), base_dir, tmp_path)
    departure = trial.run(**{"steps": 4, **fault.plan}).verdict.departure
    assert departure is not None
    assert departure.stage == fault.stage, str(departure)
    assert fault.cause in departure.cause, str(departure)


PLANS = [
    {},
    {"packing": True, "micro_batch_size": 1},
    {"accumulation": 4, "micro_batch_size": 1, "max_grad_norm": 0.05},
    {"schedule": "cosine", "warmup_steps": 3, "weight_decay": 0.1, "seed": 3},
]


@pytest.mark.parametrize("subject", [own.Subject, transformers_trainer.Subject], ids=lambda s: s.__module__)
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: "-".join(plan) or "default")
def test_healthy_trainer_agrees_over_ten_steps(
    subject: Any, plan: dict[str, Any], base_dir: Path, tmp_path: Path
) -> None:
    """Largest departures measured (fp32, x86-64 CPU): model 8e-7, gradient 1.4e-6, clipping 1.3e-7, update below 1e-7.

    The limit of every stage is 1e-5.
    """
    verdict = Trial(subject(str(base_dir)), base_dir, tmp_path).run(steps=10, **plan).verdict
    assert verdict.departure is None, str(verdict.departure)
    assert verdict.steps == 10
    assert {"model", "gradient", "clipping", "schedule", "update"} <= verdict.largest.keys()
    assert all(size <= 1e-5 for size in verdict.largest.values())


def test_packed_rows_that_see_their_neighbours_are_named(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An all-ones mask beside restarting positions switches the isolation off (transformers 46634)."""
    collate = Collator.__call__

    def with_mask(self: Collator, items: Any) -> dict[str, torch.Tensor]:
        batch = collate(self, items)
        return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}

    monkeypatch.setattr(Collator, "__call__", with_mask)
    trial = Trial(own.Subject(str(base_dir)), base_dir, tmp_path)
    departure = trial.run(steps=2, packing=True, micro_batch_size=1).verdict.departure
    assert departure is not None
    assert departure.stage == "batches"
    assert "the mask lets it see" in departure.cause


def test_recording_ends_with_its_steps_and_leaves_no_hook(base_dir: Path, tmp_path: Path) -> None:
    subject = own.Subject(str(base_dir))
    trial = Trial(subject, base_dir, tmp_path)
    model = subject.build_model(str(base_dir), 0)
    with record(model, 3) as trace:
        subject.train(model, trial.conversations, {**trial_plan(tmp_path), "steps": 6})
        assert len(trace.steps) == 3
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert sum(hooks) == 0
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters() if p.requires_grad)


def trial_plan(folder: Path) -> dict[str, Any]:
    from glm4ft.testing.subject import make_plan

    return make_plan(output_dir=str(folder / "out"))


@pytest.mark.parametrize("seed", range(3))
def test_labels_and_weights_are_recovered_from_the_gradient(seed: int) -> None:
    """Every label and weight of 60 random tokens, the ones with alike head rows included, from the gradient alone."""
    generator = torch.Generator().manual_seed(seed)
    head = tiny_model(seed).lm_head
    hidden = torch.randn(61, 128, generator=generator, requires_grad=True)
    ids = torch.randint(0, head.out_features, (61,), generator=generator)
    weights = torch.rand(60, generator=generator) + 0.1
    nll = torch.nn.functional.cross_entropy(head(hidden[:-1]), ids[1:], reduction="none")
    (gradient,) = torch.autograd.grad((weights * nll).sum(), hidden)
    targets = recover_targets(hidden.detach(), gradient, head.weight)
    assert targets.labels_T[1:-1].tolist() == ids[1:].tolist()
    assert torch.allclose(targets.weights_T[1:-1].float(), weights, rtol=1e-3)
    assert float(targets.fit_T.min()) > 0.9999
