"""Our options, as the arguments of ``transformers.Trainer``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from glm4ft.train.config import TrainConfig


def trainer_arguments(config: TrainConfig, output: Path, *, has_eval: bool, bf16: bool) -> TrainingArguments:
    """Our options as ``transformers.TrainingArguments``."""
    # passed only where asked for: transformers is renaming the option, and says so at every mention
    options: dict[str, Any] = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    checkpointing = options if config.gradient_checkpointing else {}
    with_warmup = config.schedule == "constant" and config.warmup_steps
    args = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=config.micro_batch_size,
        per_device_eval_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.peak_learning_rate,
        lr_scheduler_type="constant_with_warmup" if with_warmup else config.schedule,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        # clipping to an infinite norm changes nothing but still measures
        max_grad_norm=config.max_grad_norm or math.inf,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        seed=config.seed,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        **checkpointing,
        eval_strategy="steps" if has_eval else "no",
        eval_steps=config.eval_every,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 500,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        report_to=config.report_to or "none",
        remove_unused_columns=False,
        label_names=["labels"],
    )
    # one process drives one device; transformers would split batches over all it sees, past our forward
    args._n_gpu = min(args.n_gpu, 1)
    return args
