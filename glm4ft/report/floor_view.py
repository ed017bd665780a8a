"""Implements ``glm4ft floor``: bounds the loss of a conversation file from below, and shows what causes the bound."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.encoded_rows import TrainedRow
from glm4ft.data.encoding import encoded_conversations
from glm4ft.data.inputs import DataInput
from glm4ft.data.read_options import AS_IS, ReadOptions
from glm4ft.files import write_atomically
from glm4ft.floors.bounds import UNDECIDED
from glm4ft.floors.find_floor import find_floor
from glm4ft.floors.floor import Floor, TokenFloor
from glm4ft.floors.head import Head
from glm4ft.floors.solver import BF16, EXACT
from glm4ft.floors.stops import stop_warnings
from glm4ft.text.safe_text import Ruled, visible

_SHOWN = 10
_TOO_SMALL = 5e-5  # smaller floors would be shown as 0.0000


def show_floor(
    inputs: Sequence[DataInput],
    chat_format: ChatFormat,
    head: Head | None,
    *,
    max_length: int,
    options: ReadOptions,
    bf16: bool = False,
    json_file: str | None = None,
) -> None:
    """Print the certified floor of a file's conversations.

    Args:
        inputs: The files of conversations.
        chat_format: The chat format that encodes them.
        head: The head of the base; None if head or final norm are trained.
        max_length: The length of the longest row, in tokens.
        options: How conversations are read.
        bf16: Whether the bound is for bf16 forward passes instead of exact arithmetic.
        json_file: The file to write the floor to as JSON; ``-`` writes only the JSON to stdout.
    Raises:
        DataError: If a conversation cannot be used, or no token is supervised.
    """
    rows = encoded_rows(inputs, chat_format, max_length, options)
    if bf16 and head is not None:
        head = head.in_dtype(torch.bfloat16)
    floor = find_floor(rows, chat_format.tokenizer, head, precision=BF16 if bf16 else EXACT)
    if json_file == "-":
        sys.stdout.writelines(floor.json())
        return
    if json_file:
        write_atomically(Path(json_file), floor.json())
    print_floor(floor, ", ".join(one.name for one in inputs), Console(highlight=False), chat_format.stop_ids)


def encoded_rows(
    inputs: Sequence[DataInput], chat_format: ChatFormat, max_length: int, options: ReadOptions = AS_IS
) -> Iterator[TrainedRow]:
    """Encode conversations as for training; yield the rows that are not dropped, each as often as it is trained."""
    for outcome in encoded_conversations(inputs, chat_format, max_length, options):
        if outcome.row is not None:
            row = TrainedRow(outcome.row.line, outcome.row.input_ids, outcome.row.labels)
            yield from itertools.repeat(row, outcome.repeats)


def print_floor(floor: Floor, name: str, console: Console, stop_ids: Collection[int]) -> None:
    """Print the floor: warnings about stop tokens that cannot be learnt, then the total, then its sources.

    Args:
        floor: The floor.
        name: The name of the data.
        console: The console to print to.
        stop_ids: The ids that end a turn.
    """
    for warning in stop_warnings(floor.tokens, stop_ids):
        console.print(Ruled(Text(warning, style="bold red")))
    num_tokens = floor.num_targets
    console.print(
        Text(
            f"{visible(name, newlines=False)}: the mean loss of {num_tokens:,} targets in {len(floor.samples):,} rows "
            f"cannot go below {floor.floor:.4f} nats (certified; the exact value is at most {floor.gap:.1g} higher)"
        ),
        soft_wrap=True,
    )
    console.print(f"  {floor.entropy:.4f} because equal prefixes go on differently (entropy)")
    console.print(f"  {floor.head:.4f} because the frozen head cannot express a target (head)")
    if undecided := floor.undecided:
        count = sum(token.count for token in undecided)
        worst = max(undecided, key=lambda token: token.head_reaches - token.head)
        what = "Of " + ("one token" if len(undecided) == 1 else f"{len(undecided):,} tokens")
        console.print(Text(
            f"  UNDECIDED: {what} ({count:,} targets) it is not known whether the head can express them, e.g. "
            f"{worst.text}: its smallest loss lies between {worst.head:.4f} and {worst.head_reaches:.4f}",
            style="bold",
        ), soft_wrap=True)  # fmt: skip
    console.print(Text(f"  holds for: {floor.label}", style="dim"))
    costly = [token for token in floor.tokens if token.floor > _TOO_SMALL][:_SHOWN]
    if costly:
        console.print(_token_table(costly, floor.floor * num_tokens))
        console.print(_part_table(floor))
        console.print(_sample_table(floor))


def _token_table(tokens: list[TokenFloor], total: float) -> Table:
    # a border at the left of every line, so that no line starts with text from the data
    table = Table("token", "times", "floor each", "by the head", "share", box=box.SQUARE)
    for token in tokens:
        share = token.floor * token.count / total
        figures = (f"{token.count:,}", f"{token.floor:.4f}", _by_head(token), f"{share:.0%}")
        table.add_row(Text(token.text), *figures)
    return table


def _by_head(token: TokenFloor) -> str:
    is_wide = token.head_reaches - token.head > max(UNDECIDED, 0.05 * token.head)
    return f"{token.head:.4f} to {token.head_reaches:.4f}" if is_wide else f"{token.head:.4f}"


def _part_table(floor: Floor) -> Table:
    table = Table("part", "floor", box=box.SIMPLE)
    for name, value in sorted(floor.parts.items(), key=lambda part: -part[1]):
        table.add_row(name, f"{value:.4f}")
    return table


def _sample_table(floor: Floor) -> Table:
    table = Table("line", "floor", "targets", box=box.SIMPLE)
    for sample in floor.samples[:_SHOWN]:
        table.add_row(str(sample.line), f"{sample.floor:.4f}", f"{sample.supervised_tokens:,}")
    return table
