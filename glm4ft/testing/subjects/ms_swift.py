"""ms-swift as its documentation configures it for GLM-4-0414: template ``glm4``, LoRA on all linear layers."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from swift.arguments import ExportArguments, SftArguments
from swift.pipelines.export.merge_lora import merge_lora
from swift.pipelines.train.sft import SwiftSft
from swift.trainers import TrainerFactory

from glm4ft.testing.subject import make_plan
from glm4ft.testing.subjects.building_blocks import PeftSubject, json_chat, training_arguments
from glm4ft.testing.subjects.known_failures import MS_SWIFT, reasons


class Subject(PeftSubject):
    """The parts of ``swift sft``.

    Args:
        base_dir: The Hugging Face model folder of the base.
    """

    name, chat_format = "ms-swift", "glm-4-0414"
    model_type = template_name = "glm4"
    expected_failures = reasons(MS_SWIFT)

    def __init__(self, base_dir: str) -> None:
        self.base, self.data = base_dir, Path(tempfile.mkdtemp()) / "chats.jsonl"
        self.pipeline = self._pipeline(make_plan(), [])
        template = self.pipeline.template
        self.tokenizer = template.tokenizer
        self.stop_ids = self.tokenizer.convert_tokens_to_ids(template.template_meta.stop_words)

    @property
    def types(self) -> dict[str, Any]:
        """The options that say which model it is and how it is asked."""
        return {"model_type": self.model_type, "template": self.template_name}

    def _pipeline(self, plan: Any, conversations: Any) -> Any:
        if plan["packing"]:
            raise NotImplementedError("packing needs flash attention, which needs a CUDA GPU")
        self.data.write_text("".join(json.dumps(_chat(c)) + "\n" for c in conversations), "utf-8")
        base = {"model": self.base, **self.types, "torch_dtype": "float32"}
        lora = {"tuner_type": "lora", "lora_rank": 8, "lora_dropout": 0.0, "target_modules": ["all-linear"]}
        data = {"dataset": [str(self.data)], "split_dataset_ratio": 0.0, "load_from_cache_file": False}
        job = {**training_arguments(plan), "data_seed": plan["seed"], "add_version": False, "check_model": False}
        return SwiftSft(SftArguments(**base, **lora, **data, **job))

    def encode(self, messages: Any, tools: Any = None) -> dict[str, list[int]]:
        """Encode one conversation with ms-swift's template in training mode."""
        row = self.pipeline.template.encode(_chat({"messages": messages, "tools": tools}))
        return {"input_ids": row["input_ids"], "labels": row["labels"]}

    def prompt(self, messages: Any, tools: Any = None) -> list[int]:
        """The ids that ms-swift's inference engine makes of a history, with the same template in inference mode."""
        template = self.pipeline.args.get_template(self.pipeline.processor)
        return list(template.encode(_chat({"messages": messages, "tools": tools}))["input_ids"])

    def build_model(self, base_dir: str, seed: int) -> Any:
        """Load the base with LoRA adapters on all linear layers."""
        self.base = base_dir
        pipeline = self._pipeline(make_plan(seed=seed), [])
        return pipeline.prepare_model(pipeline.args, pipeline.model, template=pipeline.template)

    def train(self, model: Any, conversations: Any, plan: Any) -> list[dict[str, Any]]:
        """Train the model in place according to the plan."""
        pipeline = self._pipeline(plan, conversations)
        rows, _ = pipeline._prepare_dataset()
        trainer = TrainerFactory.get_trainer_cls(pipeline.args)(
            model=model, args=pipeline.args.training_args, template=pipeline.template, train_dataset=rows
        )
        trainer.train(plan["resume_from"])
        return list(trainer.state.log_history)

    def merge(self, base_dir: str, folder: str, output: str) -> None:
        """Write a merged checkpoint as ``swift export --merge_lora true`` does."""
        base = {"model": base_dir, **self.types, "torch_dtype": "float32"}
        merge_lora(ExportArguments(**base, adapters=[folder], output_dir=output, merge_lora=True))


def _chat(conversation: Any) -> dict[str, Any]:
    chat = json_chat(conversation, call_role="tool_call", result_role="tool_response")
    return {key: value for key, value in chat.items() if value}
