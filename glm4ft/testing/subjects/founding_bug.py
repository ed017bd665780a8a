"""The founding bug as a subject: right in everything but the labels. It has to fail, or the suite is worth nothing."""

from __future__ import annotations

from glm4ft.testing.founding_bug import FoundingBugFormat
from glm4ft.testing.subjects import own


class Subject(own.Subject):
    """glm4ft with the label rule of zai-org/GLM-4 issue 342: header in, terminator out."""

    name = "founding-bug"

    def __init__(self, base_dir: str) -> None:
        super().__init__(base_dir)
        self.format = FoundingBugFormat(self.chat_format, self.tokenizer)
