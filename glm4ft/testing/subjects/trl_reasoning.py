"""TRL's rows of GLM-4.5, whose template it knows: ``assistant_only_loss`` trains what its own training template marks.

It is judged with the checkpoint's template as TRL holds it, since it recognises templates by their text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from glm4ft.testing.specification.turn_text import openai_messages
from glm4ft.testing.subject import make_plan
from glm4ft.testing.subjects.building_blocks import training_arguments
from glm4ft.testing.subjects.known_failures import reasons
from glm4ft.testing.subjects.known_failures_reasoning import TRL_REASONING


class Subject:
    """The rows that ``trl.SFTTrainer`` prepares.

    Args:
        base_dir: The Hugging Face model folder of a base for GLM-4.5.
    """

    name, chat_format = "trl, GLM-4.5", "glm-4.5"
    expected_failures = reasons(TRL_REASONING)

    def __init__(self, base_dir: str) -> None:
        disable_progress_bars()
        self.tokenizer = AutoTokenizer.from_pretrained(base_dir)
        self.tokenizer.chat_template = (files("trl") / "chat_templates" / "glm4moe.jinja").read_text("utf-8")
        base = AutoModelForCausalLM.from_pretrained(base_dir)
        self.stop_ids = base.generation_config.eos_token_id
        more = {"max_length": 32_768, "bf16": False, "gradient_checkpointing": False, "assistant_only_loss": True}
        args = SFTConfig(**{**more, **training_arguments(make_plan())}, use_cpu=True)
        example = [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]
        data = Dataset.from_list([{"messages": example}])
        self.trainer = SFTTrainer(base, args, train_dataset=data, processing_class=self.tokenizer)

    def encode(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> dict[str, list[int]]:
        """Encode one conversation as ``input_ids`` and ``labels``."""
        if any(message.get("loss") is False for message in messages):
            raise NotImplementedError("TRL has no flag for the loss of one message")
        row = {"messages": openai_messages(messages), **({"tools": json.dumps(tools)} if tools else {})}
        data = Dataset.from_list([row], on_mixed_types="use_json").to_iterable_dataset()
        (row,) = self.trainer._prepare_dataset(
            data, self.trainer.processing_class, self.trainer.args, False, None, "train"
        )
        batch = self.trainer.data_collator([dict(row)])
        return {"input_ids": batch["input_ids"][0].tolist(), "labels": batch["labels"][0].tolist()}

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> list[int]:
        """The ids that a server sends to the model, rendered by the checkpoint's chat template."""
        options: dict[str, Any] = {"tools": tools, "add_generation_prompt": True, "return_dict": False}
        return list(self.tokenizer.apply_chat_template(openai_messages(messages), **options))
