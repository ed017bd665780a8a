"""Where a model samples in a row: by the chat format's control tokens, or by what the base's own template writes.

A subject without ``chat_format`` may be of any family; then the tokens around an answer are read off renderings of the
template (``glm4ft.testing.specification.chat_template``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from glm4ft.testing.specification.chat_template import Marks, answers, marks_of
from glm4ft.testing.specification.mask_oracle import TurnSpan, Undecidable, control_ids, find_turns
from glm4ft.testing.trial.recorded_rows import stop_ids
from glm4ft.testing.trial.stages import NotApplicable
from glm4ft.testing.trial.trial import Trial


def turns_in(trial: Trial, conversation: Mapping[str, Any], ids: Sequence[int]) -> list[TurnSpan]:
    """Locate the assistant turns of a row.

    Args:
        trial: The trial of the subject that encoded the row.
        conversation: The conversation that the row encodes.
        ids: The ids of the row.
    Raises:
        Undecidable: If the row does not have the assistant turns of the conversation.
        NotApplicable: If neither the subject's chat format nor the base's template tells where turns begin.
    """
    tokenizer, messages = trial.subject.tokenizer, conversation["messages"]
    if chat_format := getattr(trial.subject, "chat_format", None):
        return find_turns(ids, messages, control_ids(tokenizer), tokenizer, chat_format)
    said = (index for index, message in enumerate(messages) if message["role"] == "assistant")
    spans = zip(said, sampled_spans(trial, ids), strict=False)
    return [TurnSpan(index, span.start - 1, span.start, span.stop - 1, supervised=True) for index, span in spans]


def template_marks(trial: Trial) -> Marks:
    """The tokens around an answer in the template of the base.

    Args:
        trial: The trial of a subject without ``chat_format``.
    Raises:
        NotApplicable: If the template does not mark answers by tokens of their own.
    """
    if "marks" not in trial.shared:
        try:
            trial.shared["marks"] = marks_of(trial.base_tokenizer, stop_ids(trial.base_dir))
        except Undecidable as error:
            raise NotApplicable(f"the subject names no GLM-4 chat format, and {error}") from error
    marks: Marks = trial.shared["marks"]
    return marks


def sampled_spans(trial: Trial, ids: Sequence[int]) -> list[range]:
    """The positions of each answer that the model samples by the base's template: behind the prompt to its terminator.

    Args:
        trial: The trial of a subject without ``chat_format``.
        ids: The token ids of the row.
    Returns:
        A range per turn. One that ends behind the row lacks its terminator.
    Raises:
        NotApplicable: If the template does not mark answers by tokens of their own.
    """
    marks = template_marks(trial)
    opening = list(marks.opening)
    return [
        range(turn.start + len(opening) * (list(ids[turn.start : turn.start + len(opening)]) == opening), turn.stop)
        for turn in answers(ids, marks)
    ]
