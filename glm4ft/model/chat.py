"""A conversation with a model, through the very chat format that it was trained in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.control_tokens import HEADERS
from glm4ft.data.conversation import Message
from glm4ft.data.formats import make_format
from glm4ft.model.adapter import CONFIG, base_of, load_adapter, require_adapter
from glm4ft.model.base_model import load_base
from glm4ft.model.checkpoint import TINY
from glm4ft.model.generation import generate
from glm4ft.model.quantisation import quantisation_of_run


@dataclass(frozen=True)
class Answer:
    """One generated assistant turn.

    Args:
        content: The text, verbatim; for a tool call the argument text.
        tool: The name of the tool that is called; "" for a reply.
        stop: The stop token that ended the turn; None if it was cut off.
        num_tokens: The number of generated tokens, the stop token included.
    """

    content: str
    tool: str
    stop: str | None
    num_tokens: int


class Chat:
    """A conversation that goes on: what was said is the prompt of what comes.

    Args:
        model: The model, in eval mode.
        chat_format: The chat format of the model.
        system: The system prompt; "" for none.
        tools: The declared tools.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        chat_format: ChatFormat,
        *,
        system: str = "",
        tools: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.model, self.chat_format, self.tools = model, chat_format, tools
        self._beginning = [Message("system", system)] if system else []
        self.messages = list(self._beginning)

    def restart(self) -> None:
        """Forget what was said, but for the system prompt."""
        self.messages = list(self._beginning)

    def say(
        self,
        content: str,
        *,
        is_result: bool = False,
        max_new_tokens: int = 1024,
        temperature: float = 0.0,
        on_token: Callable[[int], object] = lambda token_id: None,
    ) -> Answer:
        """Say something to the model, and let it answer; both become part of the conversation.

        Args:
            content: The user's text, or the result of the tool that was called.
            is_result: Whether it is a result.
            max_new_tokens: The number of tokens after which the answer is cut off.
            temperature: The temperature of the sampling; 0 takes the likeliest token each time.
            on_token: A function that is given each token as it comes, but the stop token.
        """
        self.messages.append(Message("observation" if is_result else "user", content))
        stop_ids, tokenizer = self.chat_format.stop_ids, self.chat_format.tokenizer
        ids = generate(
            self.model,
            self.chat_format.prompt(self.messages, self.tools),
            stop_ids,
            max_new_tokens,
            temperature=temperature,
            on_token=lambda token_id: None if token_id in stop_ids else on_token(token_id),
        )
        is_stopped = bool(ids) and ids[-1] in stop_ids
        # the first line names the tool; a reply begins with a newline, so that its first line is empty
        name, newline, rest = str(tokenizer.decode(ids[:-1] if is_stopped else ids)).partition("\n")
        tool, text = (name, rest) if newline else ("", name)
        stop = str(tokenizer.convert_ids_to_tokens(ids[-1])) if is_stopped else None
        if tool and stop != HEADERS["observation"]:  # a first line alone makes no call
            tool, text = "", f"{name}\n{rest}"
        if text:
            self.messages.append(Message("assistant", text, tool))
        return Answer(text, tool, stop, len(ids))


def load_chat(
    source: str,
    *,
    model: str | None = None,
    dtype: str = "auto",
    chat_format: str | None = None,
) -> tuple[PreTrainedModel | PeftModel, ChatFormat, tuple[str, ...]]:
    """Load what one can talk to.

    Args:
        source: The folder of a run or of another adapter, a checkpoint's folder or hub id, or ``tiny``. The base of a
            run is quantised as it was in training.
        model: The base of an adapter; by default the one that it names.
        dtype: The dtype of the weights, as for ``load_base``.
        chat_format: The name of the chat format; by default chosen from the base.
    Returns:
        The model in eval mode, its chat format, and warnings.
    Raises:
        ModelError: If the folder holds nothing that can be loaded.
    """
    folder = Path(source).expanduser()
    is_unfinished_run = any(folder.glob(f"checkpoint-*/{CONFIG}")) and not (folder / "config.json").exists()
    if source != TINY and ((folder / CONFIG).is_file() or is_unfinished_run):
        named = model or base_of(folder, require_adapter(folder))
        base = load_base(named, dtype=dtype, chat_format=chat_format, quantise=quantisation_of_run(folder))
        return load_adapter(base.model, folder), make_format(base.format_name, base.tokenizer), base.warnings
    base = load_base(source, dtype=dtype, chat_format=chat_format)
    return base.model, make_format(base.format_name, base.tokenizer), base.warnings
