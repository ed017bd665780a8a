"""``glm4ft chat``: talk to a run, a merged checkpoint or a base."""

from __future__ import annotations

import contextlib
import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm4ft.cli.libraries import quiet_libraries
from glm4ft.cli.options import Parser
from glm4ft.errors import ConfigError

if TYPE_CHECKING:
    from glm4ft.model.chat import Answer, Chat

HELP = "Ctrl-D ends, Ctrl-C cuts an answer off, /new forgets what was said"


def parse(argv: Sequence[str]) -> Namespace:
    """Read the arguments.

    Args:
        argv: The arguments after the command's name.
    """
    parser = Parser("chat")
    parser.add_argument(
        "source", annotation=str, help="Folder of a run, an adapter, a merged checkpoint or a base; or a hub id."
    )
    parser.add_argument("--once", annotation=str | None, help="Say this, print the answer, and exit; 1 if cut off.")
    parser.add_argument("--system", annotation=str, default="", help="System prompt.")
    parser.add_argument("--tools", annotation=str | None, help="JSON file with the list of declared tools.")
    parser.add_argument("--max_new_tokens", annotation=int, default=1024, help="Tokens after which to cut off.")
    parser.add_argument(
        "--temperature", annotation=float, default=0.0, help="Of the sampling; 0: the likeliest token each time."
    )
    parser.add_argument("--model", annotation=str | None, help="Base, if not the one that the adapter names.")
    parser.add_argument("--dtype", annotation=str, default="auto", help="As in train.")
    parser.add_argument(
        "--chat_format", annotation=str | None, help="glm-4-9b-chat or glm-4-0414; by default the run's or the base's."
    )
    parser.add_argument("--json", action="store_true", help="With --once: print the answer as one JSON object.")
    options = parser.parse(argv)
    if not options.max_new_tokens >= 1:
        raise ConfigError("option out of range", where="--max_new_tokens", found=str(options.max_new_tokens))
    if not 0 <= options.temperature < float("inf"):
        raise ConfigError("option out of range", where="--temperature", found=str(options.temperature))
    if options.json and options.once is None:
        raise ConfigError("there is one JSON object for one answer", where="--json", fix="give the question by --once")
    options.tools = _tools(options.tools)
    return options


def run(options: Namespace) -> bool:
    """Talk.

    Args:
        options: The result of ``parse``.
    Returns:
        False if the one answer that was asked for was cut off.
    """
    quiet_libraries()
    from glm4ft.model.chat import Chat, load_chat

    chat_format = options.chat_format or _format_of_run(Path(options.source).expanduser())
    model, chat_format, warnings = load_chat(
        options.source, model=options.model, dtype=options.dtype, chat_format=chat_format
    )
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    chat = Chat(model, chat_format, system=options.system, tools=_declared(options.tools))
    if options.once is not None:
        return _once(chat, options)
    _talk(chat, options)
    return True


def _once(chat: Chat, options: Namespace) -> bool:
    if options.json:
        answer = chat.say(options.once, max_new_tokens=options.max_new_tokens, temperature=options.temperature)
        print(json.dumps({"schema": 1, **vars(answer)}, ensure_ascii=True))
    else:
        answer = _say(chat, options.once, options)
        if answer.stop is None:
            print(f"cut off after {answer.num_tokens} tokens: no stop token came", file=sys.stderr)
    return answer.stop is not None


def _talk(chat: Chat, options: Namespace) -> None:
    with contextlib.suppress(ImportError):  # Windows edits lines without it
        import readline  # noqa: F401  lines can be edited, and earlier ones called back
    names = [tool["function"]["name"] if tool["type"] == "function" else tool["type"] for tool in chat.tools]
    print(f"{chat.chat_format.name}; tools: {', '.join(names) or 'none'}; {HELP}", file=sys.stderr)
    tool = ""
    while True:
        try:
            text = input(f"result of {tool}> " if tool else "you> ")
        except EOFError:
            print()
            return
        if text == "/new":
            chat.restart()
            tool = ""
        elif text.strip() or tool:
            try:
                answer = _say(chat, text or "null", options, is_result=bool(tool))
            except KeyboardInterrupt:
                print("\n(interrupted)", file=sys.stderr)
                continue
            tool = answer.tool
            if answer.stop is None:
                print(f"(cut off after {answer.num_tokens} tokens: no stop token came)", file=sys.stderr)
            elif not answer.content:
                print(f"(an empty answer, ended by {answer.stop})", file=sys.stderr)


def _say(chat: Chat, text: str, options: Namespace, *, is_result: bool = False) -> Answer:
    """Say something, and print the answer as it comes; a call is printed as ``name`` and arguments."""
    from glm4ft.text.token_stream import TokenStream

    stream, is_first = TokenStream(chat.chat_format.tokenizer), True

    def show(piece: str) -> None:
        nonlocal is_first
        if piece and is_first:
            # the newline before a reply belongs to the format; before a call there is the tool's name instead
            piece, is_first = piece.removeprefix("\n"), False
        print(piece, end="", flush=True)

    answer = chat.say(
        text,
        is_result=is_result,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        on_token=lambda token_id: show(stream.push(token_id)),
    )
    show(stream.flush())
    print(flush=True)
    if answer.tool:
        print(f"(a call of {answer.tool})", file=sys.stderr)
    return answer


def _tools(path: str | None) -> list[Any]:
    """Read the file of tools, before anything slow is imported."""
    if path is None:
        return []
    try:
        tools = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        found = getattr(error, "strerror", None) or str(error)
        raise ConfigError("cannot read the tools", where="--tools", found=f"{path}: {found}") from error
    if not isinstance(tools, list):
        raise ConfigError("the tools are no list", where="--tools", found=path, expected="[{...}, ...]")
    return tools


def _declared(tools: list[Any]) -> tuple[dict[str, Any], ...]:
    """The tools in one form, by the reader of conversations."""
    from glm4ft.data.reader import from_messages

    probe = [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]
    return from_messages(probe, tools).tools if tools else ()


def _format_of_run(folder: Path) -> str | None:
    """The chat format that a run, or the run of a checkpoint, was started with; None if it took the base's."""
    import yaml

    from glm4ft.train.run_folder import CONFIG_FILE

    for config in (folder / CONFIG_FILE, folder.parent / CONFIG_FILE):
        if config.is_file() and (folder / "adapter_config.json").is_file():
            options = yaml.safe_load(config.read_text("utf-8"))
            return options.get("chat_format") if isinstance(options, dict) else None
    return None
