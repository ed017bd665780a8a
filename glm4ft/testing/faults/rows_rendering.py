"""Faults of data format, loading and chat template: the row does not represent the conversation."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from glm4ft.data.conversation import Conversation, Message
from glm4ft.testing.faults.registry import MADE_UP, ServedRight, faults_at
from glm4ft.testing.subjects.plain_loop import Conversations, Subject
from glm4ft.testing.subjects.plain_loop_data import Features, TextSegment

ESCAPES = (
    "A rendering that is wrong in training and serving alike, but keeps all texts, escapes if the checkpoint has no "
    "chat template to compare with."
)

fault = faults_at("rows")


@fault(
    "system-prompt-dropped",
    evidence="LLaMA-Factory e734222",
    cause=r"\(system\).*is not in the row|should be <\|system\|>",
)
class SystemPromptDropped(Subject):
    """The system message is left out when a user message follows it."""

    def ordered(self, messages: Sequence[Message]) -> list[Message]:
        following = [*(message.role for message in messages[1:]), ""]
        pairs = zip(messages, following, strict=True)
        return [message for message, role in pairs if not (message.role == "system" and role == "user")]


@fault(
    "tool-schema-format-drift",
    evidence="ChatGLM3 4568c63: indent=4 missing",
    cause=r"serving sends",
)
class ToolSchemaFormatDrift(ServedRight):
    """Tool definitions are written without indentation in training and with it at inference."""

    def tool_text(self, tools: Sequence[Mapping[str, Any]]) -> str:
        return re.sub(r"\n +", " ", super().tool_text(tools))


@fault("null-keys-in-tools", evidence="GLM-4 finetune.py process_message, which strips them", cause=r"tool")
class NullKeysInTools(Subject):
    """A columnar data set gives every tool the argument names of all other tools, with null as their value."""

    columns: tuple[str, ...] = ()

    def train(self, model: Any, conversations: Conversations, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
        tools = [tool for conversation in conversations for tool in conversation.get("tools") or ()]
        self.columns = tuple(dict.fromkeys(name for tool in tools for name in arguments_of(tool)))
        try:
            return super().train(model, conversations, plan)
        finally:
            self.columns = ()

    def tool_text(self, tools: Sequence[Mapping[str, Any]]) -> str:
        table = copy.deepcopy(list(tools))
        for tool in table:
            arguments_of(tool).update({name: None for name in self.columns if name not in arguments_of(tool)})
        return super().tool_text(table)


def arguments_of(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The declared arguments of a tool, by name."""
    found: dict[str, Any] = tool["function"]["parameters"]["properties"]
    return found


@fault("merged-turns-lose-flags", evidence="ms-swift 9266", cause=r"loss false|should be ignored")
class MergedTurnsLoseFlags(Subject):
    """Adjacent messages of one role are merged, and the ``loss: false`` of one of them is lost."""

    def ordered(self, messages: Sequence[Message]) -> list[Message]:
        merged: list[Message] = []
        for message in super().ordered(messages):
            if merged and merged[-1].role == message.role and not message.is_call:
                merged[-1] = Message(message.role, f"{merged[-1].content}\n{message.content}", merged[-1].metadata)
            else:
                merged.append(message)
        return merged


@fault("stale-token-cache", evidence="axolotl 1265, 1298; LMFlow 394; open-instruct 1518", cause=r"cache|tokenizer")
class StaleTokenCache(Subject):
    """The key of the cache of encoded rows does not include the tokenizer."""

    cache: ClassVar[dict[str, Features]] = {}

    def encode(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> Features:
        key = repr((messages, tools))
        if key not in self.cache:
            self.cache[key] = super().encode(messages, tools)
        return {name: list(values) for name, values in self.cache[key].items()}


@fault("stop-token-owned-by-next-turn", evidence="TRL 6044, 5988", cause=r"terminator")
class StopTokenOwnedByNextTurn(Subject):
    """The role token that ends an answer is attributed to the next message, so it is never a target."""

    def render(self, conversation: Conversation) -> list[TextSegment]:
        return [replace(s, supervised=s.supervised and not s.is_control) for s in super().render(conversation)]


@fault(
    "double-prefix",
    evidence="unsloth-zoo 959; TRL 1509, 1591; open-r1 462",
    cause=r"second prefix|is \[gMASK\], should be",
)
class DoublePrefix(Subject):
    """The template renders the prefix and the tokenizer adds it again."""

    def render(self, conversation: Conversation) -> list[TextSegment]:
        segments = super().render(conversation)
        return segments[:2] + segments


@fault("per-message-slice-eats-header", evidence="GLM-4 081f0fb", cause=r"<\|assistant\|> for|header|is not in the row")
class PerMessageSliceEatsHeader(Subject):
    """Messages are encoded one by one and lose two leading ids, as if each still began with the prefix."""

    def label(self, segments: Sequence[TextSegment]) -> Features:
        row = super().label(segments[:2])
        for start in range(2, len(segments), 2):
            message = super().label(segments[start : start + 2])
            for name in row:
                row[name] += message[name][2:] if len(message[name]) > 2 else message[name]
        return row


@fault("template-not-prefix-preserving", evidence="TRL 5559, 6433", cause=r"change when more follows")
class TemplateNotPrefixPreserving(ServedRight):
    """The template cuts the beginning of every answer but the last, so earlier turns change when more follow."""

    def ordered(self, messages: Sequence[Message]) -> list[Message]:
        last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1)
        cut = [
            replace(message, content=message.content[2:]) if message.role == "assistant" and i != last else message
            for i, message in enumerate(messages)
        ]
        return super().ordered(cut)


@fault("second-question-dropped", evidence=MADE_UP, cause=r"should be <\|user\|> for message 1")
class SecondQuestionDropped(Subject):
    """Of two user messages in a row only the first is kept, as if roles had to alternate."""

    def ordered(self, messages: Sequence[Message]) -> list[Message]:
        kept = list[Message]()
        for message in super().ordered(messages):
            if not (kept and kept[-1].role == message.role == "user"):
                kept.append(message)
        return kept


@fault("tools-escaped-to-ascii", evidence="tabbyAPI 459", cause=r"description .*São Paulo.* is not in the row")
class ToolsEscapedToAscii(Subject):
    """Declared tools are dumped as ASCII, so that other letters become escapes."""

    def tool_text(self, tools: Sequence[Mapping[str, Any]]) -> str:
        return super().tool_text(tools).encode("ascii", "backslashreplace").decode("ascii")


@fault(
    "reasoning-tag-split-wrong",
    evidence="TRL 6363; LLaMA-Factory 9219",
    cause=r"is not in the row|<think>.* became",
)
class ReasoningTagSplitWrong(Subject):
    """Everything up to ``</think>`` is cut out as reasoning, even if there is no ``<think>``."""

    def body(self, message: Message) -> str:
        return super().body(replace(message, content=message.content.split("</think>")[-1]))


@fault(
    "generation-prompt-in-training-text", evidence="axolotl 2859; TRL 2450", cause=r"end the row|<\|assistant\|> for"
)
class GenerationPromptInTrainingText(ServedRight):
    """After the last answer, the header of another answer is rendered."""

    def render(self, conversation: Conversation) -> list[TextSegment]:
        return [*super().render(conversation), TextSegment("<|assistant|>", True, False)]
