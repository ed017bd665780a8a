"""TRL's SFTTrainer, used as its documentation recommends for a model whose template it does not know.

Dense GLM-4 is in none of TRL's template lists, so ``assistant_only_loss`` raises for lack of generation markers. The
remaining documented way is a conversational prompt-completion dataset, of which only the completion is trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import SFTConfig, SFTTrainer

from glm4ft.data.turn_format import TEMPLATE
from glm4ft.model.base_model import load_format
from glm4ft.testing.subject import make_plan
from glm4ft.testing.subjects.building_blocks import Generates, PeftSubject, default_lora, training_arguments
from glm4ft.testing.subjects.known_failures import TRL, TRL_TEMPLATE, reasons

MAX_LENGTH = 32_768  # the context of GLM-4-0414; TRL's default of 1,024 cuts without a warning


class Subject(PeftSubject, Generates):
    """``trl.SFTTrainer`` on a base folder; its own dataset preparation encodes the rows.

    Args:
        base_dir: The Hugging Face model folder of the base.
    """

    name = "trl"
    distributed = True

    def __init__(self, base_dir: str) -> None:
        disable_progress_bars()
        self.tokenizer = AutoTokenizer.from_pretrained(base_dir)
        _, name = load_format(base_dir)
        self.chat_format = None if name == TEMPLATE else name
        self.expected_failures = reasons(TRL_TEMPLATE if name == TEMPLATE else TRL)
        self.lora = default_lora(base_dir)
        base = AutoModelForCausalLM.from_pretrained(base_dir)
        stops = base.generation_config.eos_token_id
        self.stop_ids = stops if isinstance(stops, list) else [stops]
        example = {"messages": [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]}
        self.preparer = self.make_trainer(base, [example], make_plan())

    def encode(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> dict[str, list[int]]:
        """Encode one conversation as ``input_ids`` and ``labels``."""
        data = dataset([{"messages": messages, "tools": tools}]).to_iterable_dataset()
        (row,) = self.preparer._prepare_dataset(data, self.tokenizer, self.preparer.args, False, None, "train")
        return {"input_ids": list(row["input_ids"]), "labels": list(row["labels"])}

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> list[int]:
        """The ids that a server sends to the model, rendered by the checkpoint's chat template."""
        options: dict[str, Any] = {"tools": tools, "add_generation_prompt": True, "return_dict": False}
        return list(self.tokenizer.apply_chat_template(list(messages), **options))

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A padded batch."""
        return dict(self.preparer.data_collator([dict(row) for row in rows]))

    def train(self, model: Any, conversations: Any, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Train the model in place according to the plan."""
        trainer = self.make_trainer(model, conversations, plan)
        trainer.train(resume_from_checkpoint=plan["resume_from"])
        return list(trainer.state.log_history)

    def make_trainer(self, model: Any, conversations: Any, plan: Mapping[str, Any]) -> SFTTrainer:
        """A trainer with the settings of the plan; packing is TRL's default kind, best fit without cutting."""
        options = {"max_length": MAX_LENGTH, "packing": plan["packing"], "bf16": False, "gradient_checkpointing": False}
        args = SFTConfig(**{**options, **training_arguments(plan)}, use_cpu=not torch.cuda.is_available())
        data = dataset(conversations)
        trainer = SFTTrainer(model, args, train_dataset=data, eval_dataset=data, processing_class=self.tokenizer)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def evaluate(self, model: Any, conversations: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """The loss and the token accuracy that ``SFTTrainer.evaluate`` reports."""
        found = self.make_trainer(model, conversations, make_plan()).evaluate()
        return {"loss": found["eval_loss"], "accuracy": found["eval_mean_token_accuracy"]}


def dataset(conversations: Sequence[Mapping[str, Any]]) -> Dataset:
    """A prompt-completion dataset: the completion is the last answer, the prompt all before it; tools are JSON text."""
    if any(message.get("loss") is False for c in conversations for message in c["messages"]):
        raise NotImplementedError("TRL has no flag for the loss of one message")
    if any(c["messages"][-1]["role"] != "assistant" for c in conversations):
        raise NotImplementedError("a completion is trained whole, so the last message must be an answer")
    pairs = [{"prompt": list(c["messages"][:-1]), "completion": list(c["messages"][-1:])} for c in conversations]
    tools = [json.dumps(c["tools"]) if c.get("tools") else None for c in conversations]
    return Dataset.from_list([{**pair, "tools": t} for pair, t in zip(pairs, tools, strict=True)])
