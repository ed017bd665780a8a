"""Plain ``transformers.Trainer`` with the seq2seq collator, as people commonly use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from glm4ft.data.encoded_row import IGNORED
from glm4ft.data.formats import make_format
from glm4ft.data.turn_format import TEMPLATE
from glm4ft.model.base_model import load_format
from glm4ft.testing.subject import make_plan
from glm4ft.testing.subjects.building_blocks import (
    EncodedHere,
    Generates,
    PeftSubject,
    default_lora,
    training_arguments,
)
from glm4ft.testing.subjects.known_failures import TRANSFORMERS, reasons


class Subject(EncodedHere, PeftSubject, Generates):
    """``transformers.Trainer`` on a base folder; glm4ft encodes the rows, since Trainer expects encoded rows.

    Args:
        base_dir: The Hugging Face model folder of the base.
    """

    name = "transformers.Trainer"
    distributed = True
    expected_failures = reasons(TRANSFORMERS)

    def __init__(self, base_dir: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base_dir)
        _, name = load_format(base_dir)
        self.chat_format = None if name == TEMPLATE else name
        self.format = make_format(name, self.tokenizer)
        self.lora = default_lora(base_dir)
        self.stop_ids = self.format.stop_ids

    def collate(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        """A padded batch, made by the seq2seq collator."""
        collator = DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=IGNORED)
        return dict(collator([dict(row) for row in rows], return_tensors="pt"))

    def train(
        self, model: Any, conversations: Sequence[Mapping[str, Any]], plan: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Train the model in place according to the plan. Trainer cannot pack, so rows are always padded."""
        trainer = self.make_trainer(model, [self.encode(c["messages"], c.get("tools")) for c in conversations], plan)
        trainer.train(resume_from_checkpoint=plan["resume_from"])
        return list(trainer.state.log_history)

    def evaluate(self, model: Any, conversations: Sequence[Mapping[str, Any]]) -> float:
        """The mean loss that ``Trainer.evaluate`` reports."""
        rows = [self.encode(c["messages"], c.get("tools")) for c in conversations]
        return float(self.make_trainer(model, rows, make_plan()).evaluate()["eval_loss"])

    def make_trainer(self, model: Any, rows: list[dict[str, list[int]]], plan: Mapping[str, Any]) -> Trainer:
        """A trainer with the settings of the plan."""
        use_cpu = not torch.cuda.is_available()
        args = TrainingArguments(**training_arguments(plan), use_cpu=use_cpu, remove_unused_columns=False)
        collator = DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=IGNORED)
        data: Any = rows
        trainer = Trainer(model=model, args=args, train_dataset=data, eval_dataset=data, data_collator=collator)
        trainer.remove_callback(PrinterCallback)
        return trainer
