"""Text that belongs to a chat template: as content it is trained letter by letter, which is hardly ever meant.

Markers of any chat format in an answer, and whole rendered prompts in any message, are told; they are never refused,
since a conversation may be about templates. Nothing here changes a row: text can never become a control token.

Sources: the published chat templates of the named model families.
"""

from __future__ import annotations

import re

_FAMILIES = (  # what marks a family; the first that fits names it
    ("GLM-4", r"\[gMASK\]|\[sMASK\]|<sop>|<eop>|<\|(?:user|assistant|system|observation|endoftext)\|>"),
    ("ChatML", r"<\|im_\w+\|>"),
    ("Llama 3", r"<\|(?:begin_of_text|start_header_id|end_header_id|eot_id|eom_id|python_tag|end_of_text)\|>"),
    ("Llama 4", r"<\|(?:header_start|header_end|eot)\|>"),
    ("Llama 2 or Mistral", r"\[/?(?:INST|TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS)\]|<</?SYS>>|</?s>"),
    ("Gemma", r"<(?:start|end)_of_turn>|<bos>|<eos>"),
    ("DeepSeek", r"<[|｜](?:User|Assistant|(?:begin|end)[▁_]of[▁_]sentence|tool[▁_][\w▁]+)[|｜]>"),
    ("gpt-oss", r"<\|(?:start|channel|message|return|call|constrain)\|>"),
    ("Command R", r"<\|[A-Z_]+_TOKEN\|>"),
    ("Phi", r"<\|end\|>"),
    ("InternLM", r"<eo[ahs]>|<\|(?:User|Bot|System)\|>|<TOKENS_UNUSED_\d+>"),
    ("Baichuan", r"<reserved_10[67]>"),
    ("Alpaca", r"### (?:Instruction|Response|Input):"),
    ("Vicuna", r"### ?(?:Human|Assistant|User|System):"),
    ("the tool calls of other formats", r"</?tool_(?:call|response)s?>|<functioncall>|<function=[\w.-]+>"),
    ("an unknown template", r"<[|｜].+[|｜]>"),
)
_THINK = r"</?think(?:ing)?>"
_MEDIA = r"<(?:image|video|audio|img|Img|ImageHere|AudioHere|image_placeholder)>|<\|(?:image|video|audio)(?:_\d+)?\|>"
# Each begins with one literal character, which the search skips to: texts are scanned at hundreds of MB/s.
_ANGLES = re.compile(
    r"<(?:[|｜][^\s<>|｜]{1,40}[|｜]>|/?(?:s|think|thinking|tool_calls?|tool_responses?)>|</?SYS>>"
    r"|(?:sop|eop|bos|eos|eoa|eoh|functioncall|start_of_turn|end_of_turn|reserved_10[67]|TOKENS_UNUSED_\d+)>"
    r"|(?:image|video|audio|img|Img|ImageHere|AudioHere|image_placeholder)>|function=[\w.-]{1,64}>)"
)
_BRACKETS = re.compile(r"\[(?:gMASK|sMASK|/?INST|/?TOOL_CALLS|/?AVAILABLE_TOOLS|/?TOOL_RESULTS)\]")
_HEADINGS = re.compile(r"### ?(?:Instruction|Response|Input|Human|Assistant|User|System):")
_NAMED = tuple((name, re.compile(pattern)) for name, pattern in _FAMILIES)
_IS_THINK, _IS_MEDIA = re.compile(_THINK), re.compile(_MEDIA)
# The openings of two turns, by which a rendered prompt is recognised; those without markers have to begin a line.
_OPENINGS = (
    ("<|user|>", "<|assistant|>"), ("<|im_start|>user", "<|im_start|>assistant"), ("[INST]", "[/INST]"),
    ("<|start_header_id|>user", "<|start_header_id|>assistant"), ("<|header_start|>user", "<|header_start|>assistant"),
    ("<start_of_turn>user", "<start_of_turn>model"), ("<｜User｜>", "<｜Assistant｜>"), ("<|User|>", "<|Bot|>"),
    ("<|start|>user", "<|start|>assistant"), ("<|im_user|>", "<|im_assistant|>"), ("<reserved_106>", "<reserved_107>"),
    ("<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"), ("### Instruction:", "### Response:"), ("### Human:", "### Assistant:"),
)  # fmt: skip
_PLAIN_OPENINGS = (
    ("Human:", "Assistant:"), ("USER:", "ASSISTANT:"), ("User:", "Assistant:"), ("问：", "答："), ("用户：", "助手："),
)  # fmt: skip


def foreign_text(text: str, *, is_answer: bool) -> list[str]:
    """Say what in a text belongs to a chat template.

    Args:
        text: The content of a message.
        is_answer: Whether it is an assistant's turn, in which a single marker is told.
    Returns:
        Parts of sentences that follow the message's place; empty for ordinary text.
    """
    markers = dict.fromkeys(match[0] for pattern in (_ANGLES, _BRACKETS, _HEADINGS) for match in pattern.finditer(text))
    told = []
    if _is_rendered(text, has_markers=bool(markers)):
        told.append("looks like a whole rendered prompt: give its messages instead, the template adds the markers")
    elif is_answer:
        told += _families([marker for marker in markers if _is_marker(marker, text)])
    if media := next((marker for marker in markers if _IS_MEDIA.fullmatch(marker)), ""):
        told.append(f"holds {media}, the place of media: it is ordinary text here, and the model is shown nothing")
    return told


def holds_reasoning(text: str) -> bool:
    """Whether a text holds the markers of reasoning, which only some chat formats have."""
    return any(_IS_THINK.fullmatch(match[0]) for match in _ANGLES.finditer(text))


def _is_rendered(text: str, *, has_markers: bool) -> bool:
    if has_markers and any(first in text and second in text for first, second in _OPENINGS):
        return True
    return any(_begins_a_line(first, text) and _begins_a_line(second, text) for first, second in _PLAIN_OPENINGS)


def _begins_a_line(opening: str, text: str) -> bool:
    return opening in text and (text.startswith(opening) or f"\n{opening}" in text)


def _is_marker(marker: str, text: str) -> bool:
    """Whether a marker is told as one of a template: ``<s>`` is also HTML, and only ends and begins a text as one."""
    if marker in ("<s>", "</s>"):
        return text.startswith("<s>") or (text.rstrip().endswith("</s>") and "<s>" not in text)
    return not _IS_THINK.fullmatch(marker) and not _IS_MEDIA.fullmatch(marker)


def _families(markers: list[str]) -> list[str]:
    """One part of a sentence for each family, with its first marker."""
    named = ((next(name for name, pattern in _NAMED if pattern.fullmatch(marker)), marker) for marker in markers)
    first = dict[str, str]()
    for name, marker in named:
        first.setdefault(name, marker)
    return [
        f"holds {m}, a marker of {name}: it is trained as ordinary text, and stops nothing" for name, m in first.items()
    ]
