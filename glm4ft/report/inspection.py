"""Implements ``glm4ft inspect``: encodes each conversation as for training, and shows it or writes it as JSON."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.text import Text

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.data_report import count_keys
from glm4ft.data.encoding import encoded_conversations
from glm4ft.data.inputs import DataInput
from glm4ft.data.read_options import AS_IS, ReadOptions
from glm4ft.errors import ConfigError
from glm4ft.report.mask_totals import Totals, render_totals
from glm4ft.report.mask_view import mask_record, render_legend, render_row
from glm4ft.text.safe_text import Ruled, visible


def inspect_conversations(
    inputs: Sequence[DataInput],
    chat_format: ChatFormat,
    options: ReadOptions = AS_IS,
    *,
    max_length: int,
    boundaries: bool = False,
    limit: int = 10,
    json_file: str | None = None,
) -> None:
    """Show which tokens of conversations are supervised.

    Args:
        inputs: The files of conversations; of several, lines are counted on from one to the next.
        chat_format: The chat format that encodes them.
        options: How conversations are read.
        max_length: The length of the longest row, in tokens.
        boundaries: Whether to add a table of the tokens around each turn's start and end.
        limit: The number of conversations to show; the totals count all of them.
        json_file: The file to write one JSON line per conversation to; ``-`` writes only the JSON to stdout.
    Raises:
        ConfigError: If the JSON file cannot be written; it is left unchanged.
        DataError: If a conversation cannot be used and is not to be skipped; the JSON file is left unchanged.
    """
    console, totals = Console(highlight=False, quiet=json_file == "-"), Totals()
    with _json_output(json_file) as output:
        for index, outcome in enumerate(encoded_conversations(inputs, chat_format, max_length, options)):
            if index == 0:
                console.print(render_legend())
            conversation, row, line = outcome.conversation, outcome.row, outcome.line
            dropped = None if row else outcome.reason if conversation else f"cannot be used: {outcome.reason}"
            warnings = outcome.warnings
            totals.add(row, line=line, dropped=dropped, warnings=warnings)
            count_keys(totals.unused, conversation.unused if conversation else ())
            if output:
                output.write(json.dumps(mask_record(index, row, line=line, dropped=dropped)) + "\n")
            if index < limit:
                console.print()
                shown = render_row(row, chat_format, boundaries=boundaries) if row else _drop(line, str(dropped))
                console.print(shown)
                for warning in warnings:
                    console.print(Ruled(Text(f"warning: {visible(warning, newlines=False)}", style="yellow")))
    if totals.conversations > limit:
        console.print(f"\n{totals.conversations - limit:,} more conversations are counted below; --limit shows more")
    console.print()
    console.print(render_totals(totals))


def _drop(line: int, reason: str) -> Text:
    return Text(f"line {line}: dropped, {visible(reason, newlines=False)}", style="bold red")


@contextlib.contextmanager
def _json_output(name: str | None) -> Iterator[TextIO | None]:
    """Open the output for the JSON lines; a file is replaced only when all of them are written."""
    if name is None:
        yield None
    elif name == "-":
        yield sys.stdout
    else:
        unfinished = Path(f"{name}.{os.getpid()}.part")
        try:
            with open(unfinished, "w", encoding="utf-8") as file:
                yield file
            os.replace(unfinished, name)
        except OSError as error:
            raise ConfigError("the file cannot be written", where=name, found=error.strerror or str(error)) from error
        finally:
            unfinished.unlink(missing_ok=True)
