"""One optimizer step of ours against those of ``transformers.Trainer`` and TRL, with GLM-4's vocabulary of 151,552.

Run: pytest tests/bench/bench_training_step.py -o python_files=bench_*.py       (without TRL its ratios are left out)
Each round times all trainers in one process, one right after the other, so that the ratios hold on a noisy machine;
and the matrix products that the step needs, alone, which tells how much of the step's time is spent on anything else.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Glm4Config,
    Glm4ForCausalLM,
    Trainer,
    TrainingArguments,
)

from glm4ft.data.batching import Collator, PackedRows
from glm4ft.data.encoded_row import IGNORED
from glm4ft.model.lora import attach_lora
from glm4ft.model.lora_options import LoraOptions
from glm4ft.model.loss import install_supervised_loss
from glm4ft.model.tiny_tokenizer import tiny_tokenizer
from glm4ft.train.trainer import SupervisedTrainer

VOCABULARY = 151_552
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
MAX_LOSS_DIFFERENCE = 1e-5  # relative: fp32 in another order of summation


@dataclass(frozen=True)
class Case:
    """A model and the rows of each step.

    Args:
        hidden: The hidden size; a head has 32 of its dimensions.
        layers: The number of decoder layers.
        lengths: The lengths of the rows of a step.
        share: The share of each row's tokens that is supervised.
        packed: Whether the rows of a step are joined to one.
        rounds: The number of timed rounds.
    """

    hidden: int
    layers: int
    lengths: tuple[int, ...] = (512, 512)
    share: float = 0.25
    packed: bool = False
    rounds: int = 7

    def __str__(self) -> str:
        rows = "packed" if self.packed else "padded" if len(set(self.lengths)) > 1 else "equal"
        return f"{self.hidden}x{self.layers}-{self.share:.0%}-{rows}"


CASES = (
    Case(128, 2),
    Case(256, 4),
    Case(512, 8, rounds=5),
    Case(256, 4, share=1.0),
    Case(256, 4, lengths=(512, 256)),
    Case(256, 4, lengths=(256, 256, 256, 256), packed=True),
)


def model(case: Case) -> Glm4ForCausalLM:
    """A GLM-4 with the true vocabulary and a small body, so that a CPU finishes a step in seconds."""
    torch.manual_seed(0)
    config = Glm4Config(
        vocab_size=VOCABULARY,
        hidden_size=case.hidden,
        intermediate_size=3 * case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=case.hidden // 32,
        head_dim=32,
    )
    return Glm4ForCausalLM(config)


def rows(case: Case) -> list[dict[str, list[int]]]:
    """The rows of a step; supervised at their ends, as in a chat."""
    made = []
    for number, length in enumerate(case.lengths):
        ids = np.random.default_rng(number).integers(0, 151_000, length)
        labels = np.where(np.arange(length) < length * (1 - case.share), IGNORED, ids)
        made.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return made


class OurRows(torch.utils.data.Dataset):
    """The rows, with what our collator and sampler need."""

    def __init__(self, case: Case) -> None:
        self.rows = rows(case)
        self.lengths = np.array(case.lengths)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], "lines": [index]}


def ours(case: Case, folder: Path) -> Trainer:
    """The trainer of ``glm4ft train``."""
    base = model(case)
    install_supervised_loss(base)
    data: Any = OurRows(case)
    return SupervisedTrainer(
        record=lambda _: None,
        model=attach_lora(base, LoraOptions(), seed=0),
        args=TrainingArguments(**arguments(case, folder)),
        train_dataset=PackedRows(data, sum(case.lengths)) if case.packed else data,
        data_collator=Collator(0),
    )


def plain(case: Case, folder: Path) -> Trainer:
    """``transformers.Trainer`` with the collators that transformers has for such rows."""
    padding = DataCollatorForSeq2Seq(tiny_tokenizer(), label_pad_token_id=IGNORED)
    return Trainer(
        model=attach_lora(model(case), LoraOptions(), seed=0),
        args=TrainingArguments(**arguments(case, folder)),
        train_dataset=rows(case),
        data_collator=DataCollatorWithFlattening(return_flash_attn_kwargs=False) if case.packed else padding,
    )


def trl(case: Case, folder: Path) -> Trainer:
    """``trl.SFTTrainer`` on rows that are encoded already; what is packed is padding-free."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    options = {**arguments(case, folder), "max_length": None, "padding_free": case.packed, "bf16": False}
    return SFTTrainer(
        attach_lora(model(case), LoraOptions(), seed=0),
        SFTConfig(**options, gradient_checkpointing=False),
        train_dataset=Dataset.from_list(rows(case)),
        processing_class=tiny_tokenizer(),
    )


def arguments(case: Case, folder: Path) -> dict[str, Any]:
    """The arguments that all trainers are given."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": len(case.lengths),
        "use_cpu": True,
        "remove_unused_columns": False,
        "report_to": "none",
        "train_sampling_strategy": "sequential",
        "disable_tqdm": True,
    }


TRAINERS = {"glm4ft": ours, "transformers": plain} | ({"trl": trl} if importlib.util.find_spec("trl") else {})


def steps(trainer: Trainer) -> Callable[[], float]:
    """A function that runs one optimizer step and returns its loss."""
    model: Any = trainer.model
    trainer.create_optimizer()
    loader = trainer.get_train_dataloader()

    def step() -> float:
        inputs, num_items = trainer.get_batch_samples(iter(loader), 1, trainer.args.device)
        loss = trainer.training_step(model, inputs[0], num_items)
        trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0)
        trainer.optimizer.step()
        model.zero_grad()
        return loss.item()

    return step


class MatrixProducts(TorchDispatchMode):
    """Records all matrix products within it and the attention, whose own products are fused."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket in PRODUCTS or "attention" in str(function):
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))

    def flops(self) -> int:
        """Multiplications and additions of all of them but the attention's."""
        operands = (args[-2:] for function, args, _ in self.calls if function.overloadpacket in PRODUCTS)
        return sum(2 * a.numel() * b.shape[-1] for a, b in operands)

    def alone(self) -> None:
        """Compute all of them again, one after the other, and nothing else."""
        for function, args, kwargs in self.calls:
            function(*args, **kwargs)


def needed_flops(case: Case, model: Any) -> int:
    """What LoRA has to compute on these rows with a frozen base, of which the lowest inputs need no gradient."""
    tokens, total = sum(case.lengths) if case.packed else len(case.lengths) * max(case.lengths), 0
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            rank = module.r["default"]
            has_no_input_gradient = "layers.0.self_attn" in name and "o_proj" not in name
            products = [(module.in_features * module.out_features, 1 if has_no_input_gradient else 2)]
            products += [
                (rank * module.in_features, 2 if has_no_input_gradient else 3),
                (rank * module.out_features, 3),
            ]
            total += sum(2 * tokens * size * times for size, times in products)
    supervised = sum(sum(label != IGNORED for label in row["labels"][1:]) for row in rows(case))
    return total + 4 * supervised * case.hidden * VOCABULARY


@pytest.mark.benchmark(group="training step")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_step(benchmark: Any, tmp_path: Path, case: Case) -> None:
    made = {name: make(case, tmp_path / name) for name, make in TRAINERS.items()}
    step: dict[str, Callable[[], object]] = {name: steps(trainer) for name, trainer in made.items()}
    losses = {name: run() for name, run in step.items()}
    for name, loss in losses.items():
        assert abs(loss - losses["glm4ft"]) <= MAX_LOSS_DIFFERENCE * loss, (name, losses)
    with MatrixProducts() as products:
        step["glm4ft"]()
    assert abs(products.flops() / needed_flops(case, made["glm4ft"].model) - 1) < 0.01, "products that nobody needs"
    step["products"] = products.alone
    seconds: dict[str, list[float]] = {name: [] for name in step}

    def round_() -> None:
        for name, run in step.items():
            began_s = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began_s)

    benchmark.pedantic(round_, rounds=case.rounds, warmup_rounds=1)
    own = seconds.pop("glm4ft")[1:]
    ratios = {name: sorted(a / b for a, b in zip(times[1:], own, strict=True)) for name, times in seconds.items()}
    benchmark.extra_info.update(
        {f"{name} / glm4ft": [round(ratio, 3) for ratio in found] for name, found in ratios.items()},
        step_s=round(statistics.median(own), 4),
        gflops=round(products.flops() / statistics.median(own) / 1e9, 1),
    )
    print(f"\n{case}: {statistics.median(own):.3f} s a step; times as long: ", end="")
    print(", ".join(f"{name} {statistics.median(found):.2f}" for name, found in ratios.items()))
