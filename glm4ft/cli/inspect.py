"""``glm4ft inspect``: which tokens of each conversation are supervised."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from glm4ft.cli.conversations import add_conversations, chat_format_of, check_conversations, read_options_of
from glm4ft.cli.libraries import quiet_libraries
from glm4ft.cli.options import Parser
from glm4ft.errors import ConfigError


def parse(argv: Sequence[str]) -> Namespace:
    """Read and check the arguments.

    Args:
        argv: The arguments after the command's name.
    """
    parser = Parser("inspect")
    add_conversations(parser)
    parser.add_argument("--boundaries", action="store_true", help="Show the tokens around each turn's start and end.")
    parser.add_argument("--limit", annotation=int, default=10, help="Conversations to show; all of them are counted.")
    parser.add_argument("--json", nargs="?", const="-", help="Write a JSON line per conversation here, or to stdout.")
    options = parser.parse(argv)
    if options.limit < 0:
        raise ConfigError("option out of range", where="--limit", found=str(options.limit), expected="at least 0")
    check_conversations(options)
    return options


def run(options: Namespace) -> bool:
    """Show the conversations.

    Args:
        options: The arguments.
    """
    quiet_libraries()
    from glm4ft.report.inspection import inspect_conversations

    inspect_conversations(
        options.inputs,
        chat_format_of(options, options.chat_format),
        read_options_of(options),
        max_length=options.max_length,
        boundaries=options.boundaries,
        limit=options.limit,
        json_file=options.json,
    )
    return True
