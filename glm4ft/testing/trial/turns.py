"""Where a model samples in a row: by GLM-4's control tokens, or by what the base's own chat template writes.

A subject without ``chat_format`` may be of any family; then the tokens around an answer are read off renderings of the
template (``glm4ft.testing.specification.chat_template``).
"""

from __future__ import annotations

from collections.abc import Sequence

from glm4ft.testing.specification.chat_template import Marks, answers, marks_of
from glm4ft.testing.specification.mask_oracle import HEADERS, Undecidable
from glm4ft.testing.trial.recorded_rows import stop_ids
from glm4ft.testing.trial.stages import NotApplicable
from glm4ft.testing.trial.trial import Trial


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
    """The positions of each assistant turn that the model samples: from behind its prompt up to its terminator.

    Args:
        trial: The trial of the subject that encoded the row.
        ids: The token ids of the row.
    Returns:
        A range per turn. One that ends behind the row lacks its terminator.
    Raises:
        NotApplicable: If neither the subject's chat format nor the base's template tells where turns begin.
    """
    if getattr(trial.subject, "chat_format", None):
        added = trial.subject.tokenizer.get_added_vocab()
        header, stops = added.get(HEADERS["assistant"]), set(added.values())
        starts = [at + 1 for at, token in enumerate(ids) if token == header]
        return [range(start, next((at for at in range(start, len(ids)) if ids[at] in stops), len(ids)) + 1)
                for start in starts]  # fmt: skip
    marks = template_marks(trial)
    opening = list(marks.opening)
    return [
        range(turn.start + len(opening) * (list(ids[turn.start : turn.start + len(opening)]) == opening), turn.stop)
        for turn in answers(ids, marks)
    ]
