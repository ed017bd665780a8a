"""TRL's SFTTrainer, as its documentation recommends it for a model whose template it does not know.

Dense GLM-4 is in none of TRL's template lists, so ``assistant_only_loss`` raises for want of generation markers. The
road that its documentation leaves is the conversational prompt-completion dataset, trained on the completion alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed
from trl import SFTConfig, SFTTrainer

from glm4ft.lora import GLM4_TARGETS
from glm4ft.testing.subject import make_plan
from glm4ft.testing.wiring import Generates, PeftAdapter, training_arguments

MAX_LENGTH = 4096
# Measured with trl 1.16.0 on the built-in base: after 60 steps the loss is 0.0007 and the stop token's is 11.2 nats.
NO_STOP = (
    "GLM-4 ends a turn with the next role's token, which the template renders only before a next message; nothing is "
    "appended to a completion, so stopping is never trained (as in TRL 3091, and TRL 6044 for GLM-4-MoE)"
)
LAST_ONLY = "a completion is the last answer alone: earlier answers are prompt, and a longer conversation untrains them"
JOINED_TEXT = (
    "the rendered chat is tokenised as one text, in which marker text turns into control ids (transformers 29279)"
)


class Subject(PeftAdapter, Generates):
    """``trl.SFTTrainer`` on a base folder; rows are those of its own dataset preparation.

    Args:
        base_dir: Hugging Face model folder.
    """

    name = "trl"
    chat_format = "glm-4-0414"
    distributed = True
    lora: Mapping[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": list(GLM4_TARGETS)}
    expected_failures: Mapping[str, str] = {
        "mask_is_what_the_model_must_sample": NO_STOP,
        "every_turn_ends_in_one_stop": NO_STOP,
        "supervised_text_is_the_answer": NO_STOP,
        "every_turn_has_learnt_to_stop": NO_STOP,
        "every_turn_comes_back_and_stops": NO_STOP,
        "earlier_turns_do_not_change": LAST_ONLY,
        "content_never_becomes_a_control_token": JOINED_TEXT,
    }

    def __init__(self, base_dir: str) -> None:
        disable_progress_bars()
        self.tokenizer = AutoTokenizer.from_pretrained(base_dir)
        base = AutoModelForCausalLM.from_pretrained(base_dir)
        self.stop_ids = base.generation_config.eos_token_id
        example = {"messages": [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]}
        self.preparer = self.make_trainer(base, [example], make_plan())

    def encode(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> dict[str, list[int]]:
        """Ids and labels of one conversation."""
        data = dataset([{"messages": messages, "tools": tools}]).to_iterable_dataset()
        (row,) = self.preparer._prepare_dataset(data, self.tokenizer, self.preparer.args, False, None, "train")
        return {"input_ids": list(row["input_ids"]), "labels": list(row["labels"])}

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> list[int]:
        """The ids that serving sends, by the checkpoint's template."""
        options: dict[str, Any] = {"tools": tools, "add_generation_prompt": True, "return_dict": False}
        return list(self.tokenizer.apply_chat_template(list(messages), **options))

    def build_model(self, base_dir: str, seed: int) -> Any:
        """The base with adapters on GLM-4's six targets."""
        set_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(base_dir)
        return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **self.lora))

    def train(
        self, model: Any, conversations: Sequence[Mapping[str, Any]], plan: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Train in place, by the plan."""
        trainer = self.make_trainer(model, conversations, plan)
        trainer.train(resume_from_checkpoint=plan["resume_from"])
        return list(trainer.state.log_history)

    def make_trainer(
        self, model: Any, conversations: Sequence[Mapping[str, Any]], plan: Mapping[str, Any]
    ) -> SFTTrainer:
        """The trainer that the plan asks for; packing is TRL's default kind, best fit without cutting."""
        options = {"max_length": MAX_LENGTH, "packing": plan["packing"], "bf16": False, "gradient_checkpointing": False}
        args = SFTConfig(**{**options, **training_arguments(plan)}, use_cpu=not torch.cuda.is_available())
        data = dataset(conversations)
        trainer = SFTTrainer(model, args, train_dataset=data, eval_dataset=data, processing_class=self.tokenizer)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def evaluate(self, model: Any, conversations: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Loss and token accuracy, as ``SFTTrainer.evaluate`` reports them."""
        found = self.make_trainer(model, conversations, make_plan()).evaluate()
        return {"loss": found["eval_loss"], "accuracy": found["eval_mean_token_accuracy"]}


def dataset(conversations: Sequence[Mapping[str, Any]]) -> Dataset:
    """Prompt and completion: the last answer, and all that is before it. Tools are JSON, as TRL takes them."""
    rows = []
    for conversation in conversations:
        messages = [dict(message) for message in conversation["messages"]]
        if any(message.get("loss") is False for message in messages):
            raise NotImplementedError("TRL has no flag for the loss of one message")
        if messages[-1]["role"] != "assistant":
            raise NotImplementedError(
                "a completion is trained whole, so a last message that nobody answers has no place"
            )
        tools = conversation.get("tools")
        row = {"prompt": messages[:-1], "completion": messages[-1:]}
        rows.append({**row, "tools": json.dumps(tools) if tools else None})
    return Dataset.from_list(rows)
