"""The arguments of the commands that read conversations: the file, and how it is encoded."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Literal

from glm4ft.cli.options import Parser
from glm4ft.data.inputs import data_inputs
from glm4ft.data.read_options import ReadOptions, columns_of
from glm4ft.train.config import TrainConfig

if TYPE_CHECKING:
    from glm4ft.data.chat_format import ChatFormat


def add_conversations(parser: Parser) -> None:
    """Add the file of conversations, and the options of the chat format.

    Args:
        parser: The parser of the command.
    """
    default = TrainConfig()
    what = "Conversations: files, patterns, data sets of the hub (org/name:split), or 'demo'."
    parser.add_argument("data", annotation=str, nargs="+", help=what)
    parser.add_argument(
        "--model", annotation=str, default=default.model, help="Base whose tokenizer and template are used."
    )
    parser.add_argument("--chat_format", annotation=str | None, help="As in train; by default the base's.")
    parser.add_argument("--force_format", annotation=bool, default=False, help="As in train.")
    parser.add_argument("--max_length", annotation=int, default=default.max_length, help="Longest row, in tokens.")
    parser.add_argument("--train_on", annotation=Literal["all", "last"], default=default.train_on, help="As in train.")
    parser.add_argument(
        "--final_stop", annotation=Literal["role", "endoftext"], default=default.final_stop, help="As in train."
    )
    parser.add_argument("--allow_nonstop_terminator", annotation=bool, default=False, help="As in train.")
    parser.add_argument(
        "--reasoning", annotation=Literal["template", "kept", "none"], default=default.reasoning, help="As in train."
    )
    add_reading(parser)


def add_reading(parser: Parser) -> None:
    """Add the options of how records become conversations.

    Args:
        parser: The parser of the command.
    """
    default = TrainConfig()
    parser.add_argument("--columns", annotation=str | None, help="prompt=question,completion=answer; as in train.")
    parser.add_argument("--calls_in_content", annotation=bool, default=default.calls_in_content, help="As in train.")
    parser.add_argument("--on_error", annotation=Literal["stop", "skip"], default=default.on_error, help="As in train.")


def read_options_of(options: Namespace) -> ReadOptions:
    """How the options ask conversations to be read.

    Args:
        options: The arguments of ``add_reading``.
    """
    return ReadOptions(columns_of(options.columns), options.calls_in_content, options.on_error)


def check_conversations(options: Namespace) -> None:
    """Refuse what can be refused at once, before anything slow is imported.

    Args:
        options: The arguments of ``add_conversations``.
    """
    TrainConfig(max_length=options.max_length, columns=options.columns)
    # several arguments, as a shell makes them of a pattern, or one with commas
    options.inputs = [one for name in options.data for one in data_inputs(name)]


def chat_format_of(options: Namespace, name: str | None) -> ChatFormat:
    """The chat format that the options ask for.

    Args:
        options: The arguments of ``add_conversations``.
        name: The name of the chat format; None for that of the base.
    """
    from glm4ft.data.chat_format import ChatFormat
    from glm4ft.model.base_model import load_format

    tokenizer, name = load_format(options.model, name, force=options.force_format)
    return ChatFormat(
        name,
        tokenizer,
        final_stop=options.final_stop,
        train_on=options.train_on,
        allow_nonstop_terminator=options.allow_nonstop_terminator,
        reasoning=options.reasoning,
    )
