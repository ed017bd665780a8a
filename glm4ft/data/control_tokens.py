"""The control tokens of the GLM-4 family, and the encoding of text that can never become one."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from glm4ft.errors import ModelError

PREFIX = ("[gMASK]", "<sop>")
HEADERS = {role: f"<|{role}|>" for role in ("system", "user", "assistant", "observation")}
END_OF_TEXT = "<|endoftext|>"
STOPS = (END_OF_TEXT, HEADERS["user"], HEADERS["observation"])


def control_ids(tokenizer: PreTrainedTokenizerBase, markers: Sequence[str] = ()) -> dict[str, int]:
    """Look up the ids of the control tokens that the formats need.

    Args:
        tokenizer: The checkpoint's tokenizer.
        markers: Further tokens that a chat format needs, such as ``<think>``.
    Returns:
        A mapping of control token to id.
    Raises:
        ModelError: If a token is missing; the message names the missing tokens.
    """
    needed = [*PREFIX, *HEADERS.values(), END_OF_TEXT, *markers]
    added = tokenizer.get_added_vocab()
    missing = [token for token in needed if token not in added]
    if missing:
        raise ModelError(
            "the tokenizer lacks control tokens of GLM-4",
            where=str(tokenizer.name_or_path),
            found=f"no {', '.join(missing)}",
            expected="all of " + ", ".join(needed) + " as added tokens",
            fix="use the tokenizer that belongs to a GLM-4 chat checkpoint",
        )
    return {token: added[token] for token in needed}


def plain_text_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return the tokenizer without its added tokens: the text of a marker stays text, ordinary text keeps its ids.

    The flag ``encode_special_tokens`` is not sufficient: it still matches added tokens that are not flagged as special.

    Raises:
        ModelError: If the tokenizer is not a fast one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            "the tokenizer is not a fast tokenizer",
            where=str(tokenizer.name_or_path),
            found=type(tokenizer).__name__,
            expected="a tokenizer folder with tokenizer.json",
        )
    plain = Tokenizer(backend.model)  # shares the vocabulary; a real one takes seconds to copy
    if backend.normalizer is not None:
        plain.normalizer = backend.normalizer
    plain.pre_tokenizer, plain.decoder = backend.pre_tokenizer, backend.decoder
    return plain


def common_prefix_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Count the ids that two rows share from the start.

    Args:
        left: The token ids of one row.
        right: The token ids of the other row.
    Returns:
        The position of the first difference; the length of the shorter row if it is a prefix of the other.
    """
    pairs = enumerate(zip(left, right, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(left), len(right)))
