"""The arguments of the commands that read conversations: the file, and how it is encoded."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import TYPE_CHECKING, Literal

from glm4ft.cli.options import Parser
from glm4ft.train.config import TrainConfig

if TYPE_CHECKING:
    from glm4ft.data.chat_format import ChatFormat


def add_conversations(parser: Parser) -> None:
    """Add the file of conversations, and the options of the chat format.

    Args:
        parser: The parser of the command.
    """
    default = TrainConfig()
    parser.add_argument("data", annotation=str, help="JSONL of conversations, or 'demo'.")
    parser.add_argument(
        "--model", annotation=str, default=default.model, help="Base whose tokenizer and template are used."
    )
    parser.add_argument(
        "--chat_format", annotation=str | None, help="glm-4-9b-chat or glm-4-0414; by default the base's."
    )
    parser.add_argument("--max_length", annotation=int, default=default.max_length, help="Longest row, in tokens.")
    parser.add_argument("--train_on", annotation=Literal["all", "last"], default=default.train_on, help="As in train.")
    parser.add_argument(
        "--final_stop", annotation=Literal["role", "endoftext"], default=default.final_stop, help="As in train."
    )
    parser.add_argument("--allow_nonstop_terminator", annotation=bool, default=False, help="As in train.")


def check_conversations(options: Namespace) -> None:
    """Refuse what can be refused at once, before anything slow is imported.

    Args:
        options: The arguments of ``add_conversations``.
    """
    TrainConfig(max_length=options.max_length)
    require_file(options.data)


def require_file(data: str) -> None:
    """Refuse a file of conversations that is not there.

    Args:
        data: The file, or 'demo'.
    """
    from glm4ft.data.reader import read_conversations

    # os.path: a Path raises an error of its own for a name that is too long
    if data != "demo" and (os.path.isdir(data) or not os.path.exists(data)):
        next(read_conversations(data))  # says what is wrong with the path


def chat_format_of(options: Namespace, name: str | None) -> ChatFormat:
    """The chat format that the options ask for.

    Args:
        options: The arguments of ``add_conversations``.
        name: The name of the chat format; None for that of the base.
    """
    from glm4ft.data.chat_format import ChatFormat
    from glm4ft.model.base_model import load_format

    tokenizer, name = load_format(options.model, name)
    return ChatFormat(
        name,
        tokenizer,
        final_stop=options.final_stop,
        train_on=options.train_on,
        allow_nonstop_terminator=options.allow_nonstop_terminator,
    )
