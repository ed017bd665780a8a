"""The assistant turns of the rows that a trial's subject encodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from glm4ft.testing.specification.mask_oracle import TurnSpan, control_ids, find_turns
from glm4ft.testing.trial.trial import Trial


def turns_in(trial: Trial, conversation: Mapping[str, Any], ids: Sequence[int]) -> list[TurnSpan]:
    """Locate the assistant turns of a row.

    Args:
        trial: The trial of the subject that encoded the row.
        conversation: The conversation that the row encodes.
        ids: The ids of the row.
    Raises:
        Undecidable: If the row does not have the assistant turns of the conversation.
    """
    tokenizer, chat_format = trial.subject.tokenizer, str(getattr(trial.subject, "chat_format", None) or "")
    return find_turns(ids, conversation["messages"], control_ids(tokenizer), tokenizer, chat_format)
