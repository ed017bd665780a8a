"""LLaMA-Factory as its documentation configures it for GLM-4: template ``glm4``, LoRA on all linear layers."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from llamafactory.data import SFTDataCollatorWith4DAttentionMask, get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_model, load_tokenizer
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
from llamafactory.train.tuner import export_model

from glm4ft.testing.subject import make_plan
from glm4ft.testing.subjects.building_blocks import PeftSubject, json_chat, sharegpt_chat, training_arguments
from glm4ft.testing.subjects.known_failures import LLAMA_FACTORY, reasons

INFO = {"formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "tools"}, "file_name": "chats.json"}
# Gradient checkpointing is on by default; the suite can follow gradients only through its non-reentrant kind.
LORA = {"stage": "sft", "finetuning_type": "lora", "lora_target": "all", "lora_rank": 8, "use_reentrant_gc": False}


class Subject(PeftSubject):
    """The parts of ``llamafactory-cli train`` with ``stage: sft``.

    Args:
        base_dir: The Hugging Face model folder of the base.
    """

    name, chat_format, template_name, expected_failures = "LLaMA-Factory", "glm-4-0414", "glm4", reasons(LLAMA_FACTORY)

    def __init__(self, base_dir: str) -> None:
        self.folder = Path(tempfile.mkdtemp())
        (self.folder / "dataset_info.json").write_text(json.dumps({"chats": INFO}), "utf-8")
        self._configure(base_dir, make_plan())
        self.stop_ids = self.template.get_stop_token_ids(self.tokenizer)

    def _configure(self, base_dir: str, plan: Any) -> None:
        data: Any = {"dataset": "chats", "dataset_dir": str(self.folder), "template": self.template_name}
        job = {**training_arguments(plan), "neat_packing": plan["packing"], "eval_strategy": "no", "do_train": True}
        data["cutoff_len"] = 2048 if plan["packing"] else 32_768  # the default cuts; a pack is filled up to it
        self.args = get_train_args({"model_name_or_path": base_dir, **LORA, **data, **job, "overwrite_cache": True})
        self.modules = load_tokenizer(self.args[0])
        self.tokenizer = self.modules["tokenizer"]
        self.template = get_template_and_fix_tokenizer(self.tokenizer, self.args[1])

    def _rows(self, conversations: Any) -> Any:
        (self.folder / "chats.json").write_text(json.dumps([sharegpt_chat(c) for c in conversations]), "utf-8")
        return get_dataset(self.template, *self.args[:3], stage="sft", **self.modules)["train_dataset"]

    def encode(self, messages: Any, tools: Any = None) -> dict[str, list[int]]:
        """Encode one conversation with LLaMA-Factory's dataset file, converter, template and processor."""
        try:
            row = self._rows([{"messages": messages, "tools": tools}])[0]
        except RuntimeError as error:  # includes NotImplementedError, a subclass
            raise NotImplementedError(f"the conversation is dropped: {error}") from error
        return {"input_ids": row["input_ids"], "labels": row["labels"]}

    def prompt(self, messages: Any, tools: Any = None) -> list[int]:
        """The ids that LLaMA-Factory's Hugging Face engine makes of a history."""
        chat = json_chat({"messages": messages, "tools": tools}, call_role="function", result_role="observation")
        system = chat["messages"].pop(0)["content"] if messages[0]["role"] == "system" else ""
        history = [*chat["messages"], {"role": "assistant", "content": ""}]
        return list(self.template.encode_oneturn(self.tokenizer, history, system, chat["tools"])[0])

    def build_model(self, base_dir: str, seed: int) -> Any:
        """Load the base with LoRA adapters on all linear layers."""
        self._configure(base_dir, make_plan(seed=seed))
        return load_model(self.tokenizer, self.args[0], self.args[3], is_trainable=True)

    def train(self, model: Any, conversations: Any, plan: Any) -> list[dict[str, Any]]:
        """Train the model in place according to the plan."""
        self._configure(self.args[0].model_name_or_path, plan)
        more = {"template": self.template, "model": model, "pad_to_multiple_of": 8, "compute_dtype": model.dtype}
        more |= {**dict.fromkeys(("neat_packing", "block_diag_attn"), plan["packing"]), **self.modules}
        job = {"args": self.args[2], "finetuning_args": self.args[3], "train_dataset": self._rows(conversations)}
        job["data_collator"] = SFTDataCollatorWith4DAttentionMask(**more)
        trainer = CustomSeq2SeqTrainer(model=model, **job, **self.modules)
        trainer.train(resume_from_checkpoint=plan["resume_from"])
        self._configure(self.args[0].model_name_or_path, make_plan())  # later calls of encode must not pack
        return list(trainer.state.log_history)

    def merge(self, base_dir: str, folder: str, output: str) -> None:
        """Write a merged checkpoint with ``llamafactory-cli export``."""
        model = {"model_name_or_path": base_dir, "adapter_name_or_path": folder, "infer_dtype": "float32"}
        export_model({**model, "template": self.template_name, "export_dir": output})
