"""``glm4ft floor``: how low the loss can go, before anything is trained."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Literal

from glm4ft.cli.conversations import add_conversations, chat_format_of, check_conversations, read_options_of
from glm4ft.cli.libraries import quiet_libraries
from glm4ft.cli.options import Parser


def parse(argv: Sequence[str]) -> Namespace:
    """Read and check the arguments.

    Args:
        argv: The arguments after the command's name.
    """
    parser = Parser("floor")
    add_conversations(parser)
    parser.add_argument(
        "--dtype", annotation=Literal["fp32", "bf16"], default="fp32", help="Forward passes to certify for."
    )
    parser.add_argument(
        "--frozen_head",
        annotation=bool,
        default=True,
        help="false: head or final norm are trained; entropy alone is left.",
    )
    parser.add_argument("--json", nargs="?", const="-", help="Write the floor as JSON here, or to stdout.")
    options = parser.parse(argv)
    check_conversations(options)
    return options


def run(options: Namespace) -> bool:
    """Show the floor.

    Args:
        options: The arguments.
    """
    quiet_libraries()
    from glm4ft.floors.head import format_of, read_head
    from glm4ft.report.floor_view import show_floor

    show_floor(
        options.inputs,
        # by config.json alone: of a quantised base too, which cannot be trained here
        chat_format_of(options, options.chat_format or format_of(options.model)),
        read_head(options.model) if options.frozen_head else None,
        max_length=options.max_length,
        options=read_options_of(options),
        bf16=options.dtype == "bf16",
        json_file=options.json,
    )
    return True
