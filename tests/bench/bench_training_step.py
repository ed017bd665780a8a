"""One optimizer step of ours against plain ``transformers.Trainer``, with GLM-4's vocabulary of 151,552.

Run: pytest tests/bench/bench_training_step.py -o python_files=bench_*.py
Each round times both trainers in one process, one right after the other, so that the ratio holds on a noisy machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DataCollatorForSeq2Seq, Glm4Config, Glm4ForCausalLM, Trainer, TrainingArguments

from glm4ft.data.batching import Collator
from glm4ft.data.encoded_row import IGNORED
from glm4ft.model.lora import LoraOptions, attach_lora
from glm4ft.model.loss import install_supervised_loss
from glm4ft.model.tiny_tokenizer import tiny_tokenizer
from glm4ft.train.trainer import SupervisedTrainer

VOCABULARY, HIDDEN, LAYERS = 151_552, 256, 4
ROWS, LENGTH, SUPERVISED_SHARE = 2, 512, 0.25


def model() -> Glm4ForCausalLM:
    """A GLM-4 with the true vocabulary and a small body, so that a CPU finishes a step in seconds."""
    torch.manual_seed(0)
    config = Glm4Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        head_dim=HIDDEN // 8,
    )
    return Glm4ForCausalLM(config)


class Data(torch.utils.data.Dataset):
    """Rows of one length, a quarter of each supervised, as in a chat."""

    def __init__(self, with_lines: bool) -> None:
        self.with_lines, self.lengths = with_lines, np.full(64, LENGTH)

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = np.random.default_rng(0).integers(0, 151_000, LENGTH)  # alike, so that order does not matter
        labels = np.where(np.arange(LENGTH) < LENGTH * (1 - SUPERVISED_SHARE), IGNORED, ids)
        item: dict[str, Any] = {"input_ids": ids.tolist(), "labels": labels.tolist()}
        return item | ({"lines": [index]} if self.with_lines else {})


def steps(trainer: Trainer) -> Callable[[], float]:
    """A function that runs one optimizer step and returns its loss."""
    model = trainer.model
    trainer.create_optimizer()
    batches = iter(trainer.get_train_dataloader())

    def step() -> float:
        inputs, num_items = trainer.get_batch_samples(batches, 1, trainer.args.device)
        loss = trainer.training_step(model, inputs[0], num_items)
        trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0)
        trainer.optimizer.step()
        model.zero_grad()
        return loss.item()

    return step


def trainers(folder: Path) -> tuple[Trainer, Trainer]:
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=ROWS,
        use_cpu=True,
        remove_unused_columns=False,
        report_to="none",
        train_sampling_strategy="sequential",
    )
    ours_model = model()
    install_supervised_loss(ours_model)
    ours = SupervisedTrainer(
        record=lambda _: None,
        model=attach_lora(ours_model, LoraOptions(), seed=0),
        args=args,
        train_dataset=Data(with_lines=True),
        data_collator=Collator(0),
    )
    plain = Trainer(
        model=attach_lora(model(), LoraOptions(), seed=0),
        args=args,
        train_dataset=Data(with_lines=False),
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer(), label_pad_token_id=IGNORED),
    )
    return ours, plain


@pytest.mark.benchmark(group="training step")
def test_training_step_against_transformers(benchmark: Any, tmp_path: Path) -> None:
    ours, plain = (steps(trainer) for trainer in trainers(tmp_path))
    first = [ours(), plain()]
    assert abs(first[0] - first[1]) <= 1e-5 * first[1], "the two trainers compute different losses"
    ratios = []

    def round_() -> None:
        began_s = time.perf_counter()
        plain()
        between_s = time.perf_counter()
        ours()
        ratios.append((between_s - began_s) / (time.perf_counter() - between_s))

    benchmark.pedantic(round_, rounds=7, warmup_rounds=1)
    benchmark.extra_info["plain/ours"] = [round(ratio, 2) for ratio in sorted(ratios)]
    print(f"\ntransformers.Trainer / glm4ft, step time: median {statistics.median(ratios):.2f}, {sorted(ratios)}")
