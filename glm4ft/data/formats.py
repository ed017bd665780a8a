"""The chat format of a name: one of the GLM-4 family's, or the one that a checkpoint's own template writes."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.turn_format import TEMPLATE


def make_format(name: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> ChatFormat:
    """Make the encoder of a chat format.

    Args:
        name: The format: ``template``, or one of ``glm4ft.data.turn_format.FORMATS``.
        tokenizer: The checkpoint's tokenizer.
        **options: The options of ``ChatFormat``.
    Raises:
        ModelError: If the format is unknown, or the tokenizer cannot write it.
    """
    if name == TEMPLATE:
        from glm4ft.data.template_format import TemplateFormat  # a trainer of GLM-4 does without it

        return TemplateFormat(name, tokenizer, **options)
    return ChatFormat(name, tokenizer, **options)
