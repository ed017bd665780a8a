"""Base classes and functions from which a subject can be built; all of them are optional.

``PeftSubject`` provides ``build_model``, ``save``, ``load`` and ``merge``; ``EncodedHere`` provides ``encode`` and
``prompt``; ``Generates`` provides ``generate``. ``default_lora`` names the adapters of a base, ``training_arguments``
translates a plan, ``json_chat`` and ``sharegpt_chat`` translate a conversation.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.reader import from_messages
from glm4ft.data.turn_format import TEMPLATE
from glm4ft.model.lora_options import LoraOptions


class PeftSubject:
    """The members of a subject that build, save, load and merge its model, in plain peft and transformers."""

    tokenizer: Any
    lora: Mapping[str, Any]

    def build_model(self, base_dir: str, seed: int) -> Any:
        """Load the base and attach the LoRA adapters that ``lora`` requests."""
        set_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(base_dir)
        return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **self.lora))

    def save(self, model: Any, folder: str) -> None:
        """Write the LoRA adapter and the tokenizer, as ``Trainer`` does with its ``processing_class``."""
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def load(self, base_dir: str, folder: str) -> Any:
        """Load the base with a saved LoRA adapter."""
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), folder)

    def merge(self, base_dir: str, folder: str, output: str) -> None:
        """Write the base with the LoRA adapter merged into it, and the tokenizer."""
        self.load(base_dir, folder).merge_and_unload().save_pretrained(output)
        self.tokenizer.save_pretrained(output)


class EncodedHere:
    """The members ``encode`` and ``prompt`` of a subject whose rows are encoded by glm4ft."""

    format: ChatFormat

    def encode(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> dict[str, list[int]]:
        """Encode one conversation as ``input_ids`` and ``labels``."""
        if self.format.name == TEMPLATE and (tools or any(m["role"] in ("observation", "tool") for m in messages)):
            raise NotImplementedError(f"chat format {TEMPLATE} has no tools")
        row = self.format.encode(from_messages(messages, tools))
        return {"input_ids": row.input_ids, "labels": row.labels}

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> list[int]:
        """The ids that a server sends to the model to generate the next assistant turn."""
        # a conversation needs an answer to be valid; this one is removed again
        conversation = from_messages([*messages, {"role": "assistant", "content": "."}], tools)
        return self.format.prompt(conversation.messages[:-1], conversation.tools)


class Generates:
    """The member ``generate`` of a subject that has ``prompt``, in plain transformers."""

    prompt: Any

    def generate(self, model: Any, messages: Any, tools: Any, max_new_tokens: int) -> list[int]:
        """Generate the next assistant turn by greedy decoding, up to a stop id of the base's generation config."""
        was_training, ids = model.training, torch.tensor([self.prompt(messages, tools)], device=model.device)
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": max_new_tokens}
        try:
            with torch.no_grad():
                output = model.eval().generate(input_ids=ids, **options)
        finally:
            model.train(was_training)
        return list(output[0, ids.shape[1] :].tolist())


def default_lora(base_dir: str, options: LoraOptions | None = None) -> dict[str, Any]:
    """The adapters on all linear layers of a base's decoder layers, by peft's names.

    Args:
        base_dir: The Hugging Face model folder of the base.
        options: The options, without targets; by default rank 8 and alpha 16.
    """
    with torch.device("meta"):  # the modules without their weights
        structure = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base_dir))
    filled = (options or LoraOptions()).for_model(structure)
    named = filled.peft_config()
    asked = {"r": filled.rank, "lora_alpha": filled.alpha, "target_modules": sorted(named.target_modules or ())}
    return {**asked, "target_parameters": named.target_parameters, **filled.options}


def training_arguments(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a plan into arguments of ``transformers.TrainingArguments``, which most trainers accept.

    Args:
        plan: The plan that ``train`` receives.
    Returns:
        Keyword arguments; ``output_dir`` is a new folder if the plan names none.
    """
    # only included if requested: transformers is renaming the option and warns at every use
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
    """Convert a conversation to the form in which most trainers accept tools: a role for calls, with JSON as text.

    Args:
        conversation: A conversation as ``train`` receives it, in which a call is an assistant message with the tool's
            name in ``metadata``.
        call_role: The role of a tool call; its content becomes a JSON object of name and arguments.
        result_role: The role of a tool's result.
    Returns:
        A dictionary of ``messages`` and ``tools``; the latter is a JSON list as text, or "" without tools.
    Raises:
        NotImplementedError: If the arguments of a call are not valid JSON.
    """
    messages = [_json_message(message, call_role, result_role) for message in conversation["messages"]]
    tools = conversation.get("tools")
    return {"messages": messages, "tools": json.dumps(tools, ensure_ascii=False) if tools else ""}


def with_tags(conversation: Mapping[str, Any], wording: str) -> dict[str, Any]:
    """Write reasoning into the answers, for trainers that have no field for it.

    Args:
        conversation: A conversation as ``train`` receives it.
        wording: How the trainer's documentation writes it, with the field ``reasoning``.
    Returns:
        The conversation without ``reasoning_content``, and with each of ``tool_calls`` as a message of its own.
    """
    messages = list[dict[str, Any]]()
    for message in conversation["messages"]:
        rest = {key: value for key, value in message.items() if key not in ("reasoning_content", "tool_calls")}
        reasoning = message.get("reasoning_content")
        if reasoning:
            rest["content"] = wording.format(reasoning=reasoning) + rest["content"]
        messages.append({**rest, "role": "observation" if rest["role"] == "tool" else rest["role"]})
        for call in message.get("tool_calls") or ():
            given = call["function"]
            messages.append({"role": "assistant", "metadata": given["name"], "content": given["arguments"]})
    return {**conversation, "messages": messages}


def sharegpt_chat(conversation: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a conversation to the ShareGPT format: ``conversations`` with ``from`` and ``value``, tools as JSON text.

    Args:
        conversation: A conversation as ``train`` receives it.
    Returns:
        A dictionary of ``conversations`` and ``tools``.
    Raises:
        NotImplementedError: If a message has ``loss: false``, which the format cannot express, or if the arguments of
            a call are not valid JSON.
    """
    if any(message.get("loss") is False for message in conversation["messages"]):
        raise NotImplementedError("the ShareGPT format has no flag for the loss of one message")
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
        raise NotImplementedError(f"the arguments of a tool call are not valid JSON: {error}") from error
    return {**rest, "role": call_role, "content": json.dumps(call, ensure_ascii=False)}
