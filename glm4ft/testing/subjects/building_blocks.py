"""What adapters of trainers have in common. A subject needs none of it; an adapter gets shorter with it.

``class Subject(PeftSubject)`` has ``build_model``, ``save``, ``load`` and ``merge``; ``EncodedHere`` adds ``encode``
and ``prompt``, ``Generates`` ``generate``; ``training_arguments`` translates a plan, ``json_chat`` and
``sharegpt_chat`` a conversation.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, set_seed

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.reader import from_messages


class PeftSubject:
    """A subject's model and its way to the disk and back, in plain peft and transformers."""

    tokenizer: Any
    lora: Mapping[str, Any]

    def build_model(self, base_dir: str, seed: int) -> Any:
        """The base with the adapters that ``lora`` asks for."""
        set_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(base_dir)
        return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **self.lora))

    def save(self, model: Any, folder: str) -> None:
        """Write the adapter, and the tokenizer beside it, as ``Trainer`` does for its ``processing_class``."""
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def load(self, base_dir: str, folder: str) -> Any:
        """The base with a saved adapter."""
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), folder)

    def merge(self, base_dir: str, folder: str, output: str) -> None:
        """Write a merged checkpoint."""
        self.load(base_dir, folder).merge_and_unload().save_pretrained(output)
        self.tokenizer.save_pretrained(output)


class EncodedHere:
    """The rows of a subject that leaves them to glm4ft."""

    format: ChatFormat

    def encode(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> dict[str, list[int]]:
        """Ids and labels of one conversation."""
        row = self.format.encode(from_messages(messages, tools))
        return {"input_ids": row.input_ids, "labels": row.labels}

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> list[int]:
        """The ids that serving sends to have the next assistant turn generated."""
        # a conversation needs an answer to be valid; this one is taken off again
        conversation = from_messages([*messages, {"role": "assistant", "content": "."}], tools)
        return self.format.prompt(conversation.messages[:-1], conversation.tools)


class Generates:
    """The inference side of a subject that has ``prompt``, in plain transformers."""

    prompt: Any

    def generate(self, model: Any, messages: Any, tools: Any, max_new_tokens: int) -> list[int]:
        """The next assistant turn, by greedy decoding; where it stops, the base's generation config says."""
        was_training, ids = model.training, torch.tensor([self.prompt(messages, tools)], device=model.device)
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": max_new_tokens}
        try:
            with torch.no_grad():
                output = model.eval().generate(input_ids=ids, **options)
        finally:
            model.train(was_training)
        return list(output[0, ids.shape[1] :].tolist())


def training_arguments(plan: Mapping[str, Any]) -> dict[str, Any]:
    """A plan in the names of ``transformers.TrainingArguments``, which most trainers take.

    Args:
        plan: as ``train`` gets it.
    Returns:
        Keyword arguments; ``output_dir`` is a new folder if the plan names none.
    """
    # named only where asked for: transformers is renaming the option, and says so at every mention
    checkpointing = {"gradient_checkpointing": True} if plan["gradient_checkpointing"] else {}
    return {
        **checkpointing,
        "output_dir": plan["output_dir"] or tempfile.mkdtemp(),
        "max_steps": plan["steps"],
        "per_device_train_batch_size": plan["micro_batch_size"],
        "gradient_accumulation_steps": plan["accumulation"],
        "learning_rate": plan["learning_rate"],
        "lr_scheduler_type": "constant_with_warmup" if plan["schedule"] == "constant" else plan["schedule"],
        "warmup_steps": plan["warmup_steps"],
        "max_grad_norm": plan["max_grad_norm"],
        "weight_decay": plan["weight_decay"],
        "adam_beta1": plan["betas"][0],
        "adam_beta2": plan["betas"][1],
        "adam_epsilon": plan["eps"],
        "seed": plan["seed"],
        "logging_steps": plan["log_every"],
        "eval_strategy": "steps" if plan["eval_every"] else "no",
        "eval_steps": plan["eval_every"] or None,
        "save_strategy": "steps" if plan["save_every"] else "no",
        "save_steps": plan["save_every"] or 500,
        "report_to": "none",
        "disable_tqdm": True,
    }


def json_chat(conversation: Mapping[str, Any], *, call_role: str, result_role: str) -> dict[str, Any]:
    """A conversation in the shape in which most trainers take tools: a role for calls, and JSON inside of text.

    Args:
        conversation: as ``train`` gets it: a call is an assistant message with the tool's name in ``metadata``.
        call_role: of a call, whose content becomes its name and arguments.
        result_role: of what a tool answered.
    Returns:
        ``messages`` and ``tools``, a JSON list; "" without tools.
    Raises:
        NotImplementedError: if the arguments of a call are no JSON.
    """
    messages = [_json_message(message, call_role, result_role) for message in conversation["messages"]]
    tools = conversation.get("tools")
    return {"messages": messages, "tools": json.dumps(tools, ensure_ascii=False) if tools else ""}


def sharegpt_chat(conversation: Mapping[str, Any]) -> dict[str, Any]:
    """A conversation in the ShareGPT shape: ``conversations`` with ``from`` and ``value``, and tools as JSON in text.

    Args:
        conversation: as ``train`` gets it.
    Raises:
        NotImplementedError: if the loss of a message is switched off, for which the shape has no place.
    """
    if any(message.get("loss") is False for message in conversation["messages"]):
        raise NotImplementedError("the ShareGPT shape has no flag for the loss of one message")
    names = {"user": "human", "assistant": "gpt"}
    chat = json_chat(conversation, call_role="function_call", result_role="observation")
    turns = [{"from": names.get(m["role"], m["role"]), "value": m["content"]} for m in chat["messages"]]
    return {"conversations": turns, "tools": chat["tools"]}


def _json_message(message: Mapping[str, Any], call_role: str, result_role: str) -> dict[str, Any]:
    rest = {key: value for key, value in message.items() if key != "metadata"}
    if not message.get("metadata"):
        return {**rest, "role": result_role} if message["role"] == "observation" else rest
    try:
        call = {"name": message["metadata"], "arguments": json.loads(message["content"])}
    except json.JSONDecodeError as error:
        raise NotImplementedError(f"arguments of a call that are no JSON: {error}") from error
    return {**rest, "role": call_role, "content": json.dumps(call, ensure_ascii=False)}
