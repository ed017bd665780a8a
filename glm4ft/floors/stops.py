"""Warnings about stop tokens that the frozen head cannot express, so that no training makes the model stop."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator

from glm4ft.data.control_tokens import STOPS
from glm4ft.floors.floor import HARD_TO_REACH, TokenFloor

_REMEDIES = (
    "train the head row of {0} (--lora.options '{{modules_to_save: [lm_head]}}'), end turns with a stop token that the "
    "head can express{1}, or start from a chat checkpoint, which has learnt to say it"
)


def stop_warnings(tokens: Iterable[TokenFloor], stop_ids: Collection[int]) -> Iterator[str]:
    """The loudest warnings: a model that cannot express its stop token never stops.

    Args:
        tokens: The floors of tokens.
        stop_ids: The ids that end a turn.
    """
    for token in tokens:
        if token.id in stop_ids and not token.is_decided and not token.head > HARD_TO_REACH:
            yield (
                f"WARNING: {token.text} ends turns here, and it is undecided whether the frozen head can say it: its "
                f"smallest loss lies between {token.head:.2f} and {token.head_reaches:.2f} nats"
            )
        if token.id in stop_ids and token.head > HARD_TO_REACH:
            remedies = _REMEDIES.format(token.text, " (--final_stop endoftext)" if token.text in STOPS else "")
            yield (
                f"WARNING: {token.text} ends turns here, but the frozen head cannot say it: its loss stays above "
                f"{token.head:.2f} nats (a probability of {math.exp(-token.head):.1%} at most), so the model will "
                f"not stop. Remedies: {remedies}"
            )
