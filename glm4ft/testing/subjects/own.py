"""This project's own trainer as a subject."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from glm4ft.data.batching import Collator, Item, RowSet
from glm4ft.data.formats import make_format
from glm4ft.data.turn_format import TEMPLATE
from glm4ft.model.base_model import Base, load_base, load_format
from glm4ft.model.checkpoint import read_json
from glm4ft.model.generation import greedy
from glm4ft.model.lora import attach_lora
from glm4ft.model.lora_options import LoraOptions
from glm4ft.model.loss import install_supervised_loss
from glm4ft.model.merge import merge_adapter
from glm4ft.testing.subjects.building_blocks import EncodedHere, default_lora
from glm4ft.train.config import TrainConfig
from glm4ft.train.run import make_trainer


class MemoryRows(RowSet):
    """Encoded rows in memory, instead of in a file."""

    def __init__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> None:
        self.items = [
            {"input_ids": np.array(row["input_ids"]), "labels": np.array(row["labels"]), "lines": [index]}
            for index, row in enumerate(rows, start=1)
        ]
        self.lengths = np.array([len(row["input_ids"]) for row in rows])

    def __getitem__(self, index: int) -> Item:
        return self.items[index]


class Subject(EncodedHere):
    """This project's trainer on a base folder.

    Args:
        base_dir: The Hugging Face model folder of the base.
    """

    name = "glm4ft"
    distributed = True
    options = LoraOptions()

    def __init__(self, base_dir: str) -> None:
        self.base_dir = base_dir
        self.tokenizer, self.format_name = load_format(base_dir)
        # of a template nothing is known beforehand: the rules that hold for every template apply
        self.chat_format = None if self.format_name == TEMPLATE else self.format_name
        self.format = make_format(self.format_name, self.tokenizer)
        self.stop_ids = self.format.stop_ids
        self.autocast = "bf16" if _stored_dtype(base_dir) == "bf16" else None

    def collate(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        """A padded batch, without the line numbers that the project's collator adds."""
        items = MemoryRows(rows)
        batch = Collator(self.tokenizer.pad_token_id)([items[i] for i in range(len(items))])
        return {name: tensor for name, tensor in batch.items() if name != "lines"}

    def build_model(self, base_dir: str, seed: int) -> PeftModel:
        """Load the base with LoRA adapters on the six linear layers of a GLM-4 block."""
        base = load_base(base_dir, dtype=_stored_dtype(base_dir))
        install_supervised_loss(base.model)
        return attach_lora(base.model, self.options, seed=seed)

    @functools.cached_property
    def lora(self) -> dict[str, Any]:
        """The options of the LoRA adapter that ``build_model`` must attach, by peft's names."""
        return default_lora(self.base_dir, self.options)

    def train(
        self, model: PeftModel, conversations: Sequence[Mapping[str, Any]], plan: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Train the model in place according to the plan; returns the log of transformers' trainer."""
        rows = MemoryRows([self.encode(c["messages"], c.get("tools")) for c in conversations])
        output = Path(plan["output_dir"] or tempfile.mkdtemp())
        config = TrainConfig(
            output=str(output),
            max_length=int(rows.lengths.max()) * 4,
            packing=plan["packing"],
            learning_rate=plan["learning_rate"],
            schedule=plan["schedule"],
            warmup_steps=plan["warmup_steps"],
            weight_decay=plan["weight_decay"],
            max_grad_norm=plan["max_grad_norm"],
            max_steps=plan["steps"],
            micro_batch_size=plan["micro_batch_size"],
            accumulation=plan["accumulation"],
            gradient_checkpointing=plan["gradient_checkpointing"],
            eval_every=plan["eval_every"] or plan["steps"],
            save_every=plan["save_every"],
            keep_checkpoints=plan["steps"],
            seed=plan["seed"],
        )
        trainer = make_trainer(config, self._base(model), model, rows, rows if plan["eval_every"] else None, output)
        trainer.args.adam_beta1, trainer.args.adam_beta2 = plan["betas"]
        trainer.args.adam_epsilon = plan["eps"]
        trainer.train(resume_from_checkpoint=plan["resume_from"])
        return list(trainer.state.log_history)

    def evaluate(self, model: PeftModel, conversations: Sequence[Mapping[str, Any]]) -> float:
        """The mean loss over all supervised tokens."""
        rows = MemoryRows([self.encode(c["messages"], c.get("tools")) for c in conversations])
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(TrainConfig(output=folder), self._base(model), model, rows, rows, Path(folder))
            return float(trainer.evaluate()["eval_loss"])

    def _base(self, model: PeftModel) -> Base:
        base: Any = model.get_base_model()
        return Base(base, self.tokenizer, self.format_name, source="", warnings=())

    def generate(
        self, model: PeftModel, messages: Sequence[Mapping[str, Any]], tools: Any, max_new_tokens: int
    ) -> list[int]:
        """Generate the next assistant turn by greedy decoding."""
        was_training = model.training
        try:
            return greedy(model.eval(), self.prompt(messages, tools), self.stop_ids, max_new_tokens)
        finally:
            model.train(was_training)

    def save(self, model: PeftModel, folder: str) -> None:
        """Write the LoRA adapter and the tokenizer."""
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def load(self, base_dir: str, folder: str) -> PeftModel:
        """Load the base with a saved LoRA adapter."""
        return PeftModel.from_pretrained(load_base(base_dir, dtype=_stored_dtype(base_dir)).model, folder)

    def merge(self, base_dir: str, folder: str, output: str) -> None:
        """Write the base with the LoRA adapter merged into it."""
        merge_adapter(Path(folder), Path(output), model=base_dir)


def _stored_dtype(base_dir: str) -> str:
    """The dtype of the base on the disk, in which a run loads it, as every other subject does."""
    return "bf16" if read_json(Path(base_dir) / "config.json").get("dtype") == "bfloat16" else "fp32"
