"""Before training: what a run is asked to reach, beside what the data and the frozen head let it reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from peft import PeftModel

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.encoded_rows import rows_of
from glm4ft.data.stored_rows import JoinedRows, Rows
from glm4ft.floors.bounds import Target, bound_targets
from glm4ft.floors.find_floor import find_floor, token_floor
from glm4ft.floors.floor import Floor, TokenFloor
from glm4ft.floors.head import Head, frozen_head
from glm4ft.floors.solver import BF16, EXACT, Precision
from glm4ft.floors.stops import stop_warnings
from glm4ft.train.config import TrainConfig
from glm4ft.train.observer import PreparedRun, RunObserver

_NAMED = 5


class FloorObserver(RunObserver):
    """Warns before training of what cannot be reached, and makes a target such as ``floor+0.01`` a number."""

    def on_prepared(self, run: PreparedRun) -> None:
        """Compare the target with the certified floor of the run's rows."""
        run.config = set_target(run.config, run.rows, run.model, run.chat_format, run.say)


def set_target(
    config: TrainConfig,
    rows: Rows | JoinedRows,
    model: PeftModel,
    chat_format: ChatFormat,
    say: Callable[[str], object],
) -> TrainConfig:
    """Warn of what cannot be reached, and make ``floor+0.01`` a number.

    Args:
        config: The options of the run.
        rows: The rows to train on.
        model: The model with its adapters; whether it trains its head decides what the floor is.
        chat_format: The chat format of the rows, which knows what ends a turn.
        say: A function that is given each warning.
    Returns:
        The options, their target loss a number or None.
    """
    head = frozen_head(model)
    precision = BF16 if model.dtype == torch.bfloat16 else EXACT
    if head is not None and precision is BF16:
        head = head.in_dtype(torch.bfloat16)
    if config.target_loss is None:
        # the whole floor takes a pass over the head for every few hundred tokens; the stops are always worth one
        ends = [] if head is None else _stop_floors(rows, head, chat_format, precision)
        for warning in stop_warnings(ends, chat_format.stop_ids):
            say(warning)
        return config
    floor = find_floor(rows_of(rows), chat_format.tokenizer, head, precision=precision)
    for warning in stop_warnings(floor.tokens, chat_format.stop_ids):
        say(warning)
    above = config.target_above_floor
    target = float(config.target_loss) if above is None else floor.floor + above
    if above is not None:
        say(f"target loss {target:.4g}: the floor {floor.floor:.4g} (certified: {floor.label}) + {above:g}")
    elif blocking := floor.blocking(target):
        say(f"warning: {describe_unreachable(floor, target, blocking)}; --target_loss floor+0.01 asks for what can be")
    return replace(config, target_loss=target)


def describe_unreachable(floor: Floor, target_loss: float, blocking: list[TokenFloor]) -> str:
    """Explain why a mean loss cannot be reached, with the tokens that keep it up."""
    named = ", ".join(f"{token.text} ({token.count:,} times, {token.floor:.2f} each)" for token in blocking[:_NAMED])
    more = f" and {len(blocking) - _NAMED:,} more" if len(blocking) > _NAMED else ""
    if floor.entropy > floor.head:
        cause = "equal prompts go on differently"
    else:
        worst = max(blocking, key=lambda token: token.head)
        cause = f"the frozen head cannot express them (certified: {worst.text} never below {worst.head:.2f} nats)"
    return (
        f"a mean loss of {target_loss:g} cannot be reached: the certified floor of these targets is {floor.floor:.4f}, "
        f"kept up by {named}{more}: {cause}"
    )


def _stop_floors(
    rows: Rows | JoinedRows, head: Head, chat_format: ChatFormat, precision: Precision
) -> list[TokenFloor]:
    """The floors of the stop tokens among the targets."""
    names = {i: str(chat_format.tokenizer.convert_ids_to_tokens(i)) for i in chat_format.stop_ids}
    found = [(token_id, count) for token_id, count in sorted(rows.target_counts().items()) if token_id in names]
    bounds = bound_targets(head, [Target((i,), (1.0,)) for i, _ in found], precision=precision) if found else []
    return [token_floor(i, names[i], n, b, b.lower) for (i, n), b in zip(found, bounds, strict=True)]
