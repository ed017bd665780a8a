r"""The GLM-4 family's chat formats, which encode a conversation as token ids and a supervision mask.

A token is supervised exactly if the model must sample it at inference, given the prompt that serving sends. GLM-4 has
no end-of-turn token: a turn is ended by the control token of the next role, so for an assistant turn

    ``<|user|> \n hi <|assistant|> [\n] [hello] [<|user|>]``

the bracketed tokens are supervised: all tokens after the header, up to and including the next control token.

The mask is derived from the structure of the conversation. Headers are control ids; a body (``metadata + "\n" +
content``) is encoded on its own by a tokenizer without control tokens, so text can never become one, and no boundary is
ever searched for in ids.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from glm4ft.data.conversation import Conversation, Message
from glm4ft.errors import DataError, ModelError

IGNORED = -100  # the label of a token that is not supervised; the default ignore_index of torch's cross entropy
PREFIX = ("[gMASK]", "<sop>")
HEADERS = {role: f"<|{role}|>" for role in ("system", "user", "assistant", "observation")}
END_OF_TEXT = "<|endoftext|>"
STOPS = (END_OF_TEXT, HEADERS["user"], HEADERS["observation"])

FormatName = Literal["glm-4-9b-chat", "glm-4-0414"]
FORMATS: tuple[FormatName, ...] = ("glm-4-9b-chat", "glm-4-0414")
UNSUPPORTED = {
    "glm-z1": "its template deletes the reasoning of every rendered turn, so training rows need rules of their own",
    "glm-4.5": "its thinking and tool-call markers need rules of their own",
}

Part = Literal["prefix", "header", "body", "terminator"]


@dataclass(frozen=True)
class Segment:
    """A run of tokens with one origin.

    Args:
        role: The role of the tokens' message; ``""`` for the prefix and an appended terminator.
        part: The kind of segment; a header that ends a trained assistant turn is supervised as its terminator.
        message: The index of the message; None for the prefix, the tool block and an appended terminator.
        start: The first position in the row.
        end: One past the last position.
        supervised: True if these tokens contribute to the loss.
    """

    role: str
    part: Part
    message: int | None
    start: int
    end: int
    supervised: bool


@dataclass(frozen=True)
class AssistantTurn:
    """The position of one assistant turn in its row.

    Args:
        message: The index into ``Conversation.messages``.
        start: The position after the header; ``input_ids[:start]`` is the prompt that serving sends.
        end: The position of the terminator, the last token the model has to sample.
        supervised: True if the turn is trained.
    """

    message: int
    start: int
    end: int
    supervised: bool


@dataclass(frozen=True)
class EncodedRow:
    """One encoded conversation; all sequences have the same length.

    Args:
        input_ids: The token ids, prefix included.
        supervised: True at each token that the loss counts as a target (unshifted).
        segments: The segments of the row, in order and without gaps.
        turns: The assistant turns, in order.
        line: The line of the conversation in its file, from 1; 0 if it is not from a file.
    """

    input_ids: list[int]
    supervised: list[bool]
    segments: tuple[Segment, ...]
    turns: tuple[AssistantTurn, ...]
    line: int = 0

    @property
    def expected(self) -> list[bool]:
        """The mask that follows from the turns: True from each trained turn's start to its terminator, included."""
        expected = [False] * len(self.input_ids)
        for turn in self.turns:
            if turn.supervised:
                expected[turn.start : turn.end + 1] = [True] * (turn.end + 1 - turn.start)
        return expected

    @property
    def labels(self) -> list[int]:
        """The labels: ids where supervised and -100 elsewhere. They are unshifted, because the model shifts them."""
        return [i if keep else IGNORED for i, keep in zip(self.input_ids, self.supervised, strict=True)]


@dataclass(frozen=True)
class _Block:
    """A header and the text after it, not yet encoded."""

    role: str
    text: str
    message: int | None


class ChatFormat:
    """Encodes conversations in one chat format with one tokenizer.

    Args:
        name: The format: ``glm-4-9b-chat`` keeps the order of messages; ``glm-4-0414`` puts system messages first.
        tokenizer: A fast tokenizer with GLM-4's control tokens.
        final_stop: The terminator of a conversation whose last turn is the assistant's: ``role`` is ``<|observation|>``
            after a tool call and ``<|user|>`` after a reply, as serving sees it; ``endoftext`` is ``<|endoftext|>``.
        train_on: The trained turns: ``all`` assistant turns, or the ``last`` assistant message only.
        allow_nonstop_terminator: Whether to train the header that follows an assistant turn even where it is not a stop
            token (another assistant or system message). Off by default, because only the collector of the data knows
            whether one generation spanned both messages.
    Raises:
        ModelError: If the format is unknown or not supported, or the tokenizer lacks a control token.
    """

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        final_stop: Literal["role", "endoftext"] = "role",
        train_on: Literal["all", "last"] = "all",
        allow_nonstop_terminator: bool = False,
    ) -> None:
        _require_supported(name)
        self.name, self.tokenizer = name, tokenizer
        self.final_stop, self.train_on, self.allow_nonstop_terminator = final_stop, train_on, allow_nonstop_terminator
        self.control_ids = control_ids(tokenizer)
        self.prefix_ids = [self.control_ids[token] for token in PREFIX]
        self.header_ids = {role: self.control_ids[token] for role, token in HEADERS.items()}
        self.stop_ids = [self.control_ids[token] for token in STOPS]
        self._plain = plain_text_tokenizer(tokenizer)
        self._tool_block = functools.lru_cache(maxsize=1024)(self._render_tool_block)

    def encode(self, conversation: Conversation) -> EncodedRow:
        """Encode a conversation as token ids and a supervision mask.

        Args:
            conversation: A validated conversation.
        Returns:
            The row. Trailing messages after the last assistant turn are context: nothing is appended to them.
        Raises:
            DataError: If an assistant turn is followed by a message whose header is not a stop token.
            ModelError: If the checkpoint's template does not render the tools.
        """
        blocks = self.require_stops(conversation)
        return self._assemble(blocks, self._trained_messages(conversation), conversation.line)

    def require_stops(self, conversation: Conversation) -> list[_Block]:
        """Check that a conversation can be encoded, without encoding it.

        Args:
            conversation: A validated conversation.
        Returns:
            The headers and texts of the row.
        Raises:
            DataError: If an assistant turn is followed by a message whose header is not a stop token.
            ModelError: If the checkpoint's template does not render the tools.
        """
        try:
            blocks = self._blocks(conversation.messages, conversation.tools)
        except ModelError as error:
            where = " and ".join(filter(None, (error.where, conversation.where())))  # either may be at fault
            raise ModelError(
                error.message, where=where, found=error.found, expected=error.expected, fix=error.fix
            ) from error
        self._require_stops(blocks, conversation)
        return blocks

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Encode the prompt that serving sends to generate the next assistant turn: all messages, then the header."""
        row = self._assemble(self._blocks(messages, tools), frozenset(), 0, append_stop=False)
        return [*row.input_ids, self.header_ids["assistant"]]

    def _blocks(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[_Block]:
        """Return the headers and texts in the order of the format, the tool block first."""
        numbered = list(enumerate(messages))
        if self.name == "glm-4-0414":
            numbered.sort(key=lambda pair: pair[1].role != "system")
        blocks = [_Block(m.role, f"{m.metadata}\n{m.content}", i) for i, m in numbered]
        if tools:
            text = self._tool_block(json.dumps(tools))
            blocks.insert(0, _Block("system", text, None))
        return blocks

    def _assemble(
        self, blocks: list[_Block], trained: frozenset[int], line: int, append_stop: bool = True
    ) -> EncodedRow:
        input_ids, supervised = list(self.prefix_ids), [False] * len(self.prefix_ids)
        segments, turns = [Segment("", "prefix", None, 0, len(input_ids), False)], []

        def append(ids: list[int], role: str, part: Part, message: int | None, is_supervised: bool) -> None:
            start = len(input_ids)
            input_ids.extend(ids)
            supervised.extend([is_supervised] * len(ids))
            segments.append(Segment(role, part, message, start, len(input_ids), is_supervised))

        ends_trained_turn = False
        for block, body in zip(blocks, self._encode_bodies([b.text for b in blocks]), strict=True):
            is_trained = block.message is not None and block.message in trained
            append([self.header_ids[block.role]], block.role, "header", block.message, ends_trained_turn)
            append(body, block.role, "body", block.message, is_trained)
            if block.role == "assistant" and block.message is not None:
                turns.append(AssistantTurn(block.message, len(input_ids) - len(body), len(input_ids), is_trained))
            ends_trained_turn = is_trained
        if append_stop and blocks and blocks[-1].role == "assistant":
            append([self._final_stop_id(blocks[-1])], "", "terminator", None, ends_trained_turn)
        return EncodedRow(input_ids, supervised, tuple(segments), tuple(turns), line)

    def _encode_bodies(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._plain.encode_batch(texts)]

    def _trained_messages(self, conversation: Conversation) -> frozenset[int]:
        turns = [i for i, m in enumerate(conversation.messages) if m.role == "assistant"]
        if self.train_on == "last":
            turns = turns[-1:]
        return frozenset(i for i in turns if conversation.messages[i].loss)

    def _final_stop_id(self, block: _Block) -> int:
        if self.final_stop == "endoftext":
            return self.control_ids[END_OF_TEXT]
        is_call = not block.text.startswith("\n")
        return self.header_ids["observation" if is_call else "user"]

    def _require_stops(self, blocks: list[_Block], conversation: Conversation) -> None:
        if self.allow_nonstop_terminator:
            return
        for block, following in pairwise(blocks):
            if block.role == "assistant" and following.role in ("assistant", "system"):
                raise DataError(
                    f"a message of role {following.role} follows an assistant turn, and its header is no stop token",
                    where=f"{conversation.where(following.message)}.role",
                    found=f"assistant, then {following.role}",
                    expected="user or observation after an assistant turn",
                    fix="merge the messages if they were one reply; if one generation wrote both, as parallel calls, "
                    f"pass --allow_nonstop_terminator true to train {HEADERS[following.role]} as the first one's end",
                )

    def _render_tool_block(self, tools_json: str) -> str:
        """Render the text after ``<|system|>`` that the checkpoint's own template writes for these tools.

        The wording belongs to the checkpoint, so it is rendered by its template and never restated here.
        """
        tools = json.loads(tools_json)
        if not self.tokenizer.chat_template:
            raise ModelError(
                "the conversation declares tools, but the tokenizer has no chat template to render them",
                where=str(self.tokenizer.name_or_path),
                fix="use a tokenizer folder that holds the checkpoint's chat_template.jinja",
            )
        probe = {"role": "user", "content": "probe"}
        start, end = "".join(PREFIX) + HEADERS["system"], HEADERS["user"] + "\nprobe"
        on_message = [{"role": "system", "content": "", "tools": tools}, probe]
        for messages, argument in ((on_message, None), ([probe], tools)):
            text = self._render(messages, argument)
            body = text[len(start) : -len(end)]
            if text.startswith(start) and text.endswith(end) and all(_tool_name(tool) in body for tool in tools):
                return body
        raise ModelError(
            "the checkpoint's chat template does not render tools as this chat format expects",
            where=str(self.tokenizer.name_or_path),
            found=repr(text[:200]),
            expected=f"{start}, the tools, then {end!r}",
            fix="check the chat template, or choose another --chat_format",
        )

    def _render(self, messages: list[dict[str, Any]], tools: Any) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))
        except Exception as error:  # a template is a program and can raise anything
            raise ModelError(
                "the checkpoint's chat template fails on the conversation's tools",
                where=str(self.tokenizer.name_or_path),
                found=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
                fix="check the chat template, and whether the tools are of the form that it expects",
            ) from error


def common_prefix_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Count the ids that two rows share from the start.

    Args:
        left: The token ids of one row.
        right: The token ids of the other row.
    Returns:
        The position of the first difference; the length of the shorter row if it is a prefix of the other.
    """
    pairs = enumerate(zip(left, right, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(left), len(right)))


def control_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Look up the ids of the control tokens that the formats need.

    Args:
        tokenizer: The checkpoint's tokenizer.
    Returns:
        A mapping of control token to id.
    Raises:
        ModelError: If a token is missing; the message names the missing tokens.
    """
    needed = [*PREFIX, *HEADERS.values(), END_OF_TEXT]
    added = tokenizer.get_added_vocab()
    missing = [token for token in needed if token not in added]
    if missing:
        raise ModelError(
            "the tokenizer lacks control tokens of GLM-4",
            where=str(tokenizer.name_or_path),
            found=f"no {', '.join(missing)}",
            expected="all of " + ", ".join(needed) + " as added tokens",
            fix="use the tokenizer that belongs to a GLM-4 chat checkpoint",
        )
    return {token: added[token] for token in needed}


def plain_text_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return the tokenizer without its added tokens: the text of a marker stays text, ordinary text keeps its ids.

    The flag ``encode_special_tokens`` is not sufficient: it still matches added tokens that are not flagged as special.

    Raises:
        ModelError: If the tokenizer is not a fast one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            "the tokenizer is not a fast tokenizer",
            where=str(tokenizer.name_or_path),
            found=type(tokenizer).__name__,
            expected="a tokenizer folder with tokenizer.json",
        )
    plain = Tokenizer(backend.model)  # shares the vocabulary; a real one takes seconds to copy
    if backend.normalizer is not None:
        plain.normalizer = backend.normalizer
    plain.pre_tokenizer, plain.decoder = backend.pre_tokenizer, backend.decoder
    return plain


def detect_format(architectures: Sequence[str], chat_template: str | None, *, where: str = "") -> FormatName:
    """Choose the chat format of a checkpoint.

    Args:
        architectures: The architectures in the checkpoint's ``config.json``.
        chat_template: The chat template of its tokenizer, or None.
        where: The checkpoint, for error messages.
    Returns:
        The name of the format.
    Raises:
        ModelError: If the format is not supported; the message states the reason.
    """
    fix = "use a GLM-4-9B-Chat or GLM-4-0414 checkpoint, or name the format with --chat_format"
    names = set(architectures)
    if "Glm4MoeForCausalLM" in names:
        raise ModelError(f"chat format glm-4.5 is not supported: {UNSUPPORTED['glm-4.5']}", where=where, fix=fix)
    if chat_template and "<think>" in chat_template:
        raise ModelError(f"chat format glm-z1 is not supported: {UNSUPPORTED['glm-z1']}", where=where, fix=fix)
    if "GlmForCausalLM" in names:
        return "glm-4-9b-chat"
    if "Glm4ForCausalLM" in names:
        return "glm-4-0414"
    raise ModelError(
        "no chat format is known for this architecture",
        where=where,
        found=", ".join(architectures) or "no architectures in config.json",
        expected="GlmForCausalLM or Glm4ForCausalLM",
        fix=fix,
    )


def _require_supported(name: str) -> None:
    if name in FORMATS:
        return
    reason = UNSUPPORTED.get(name)
    raise ModelError(
        f"chat format {name} is not supported: {reason}" if reason else "unknown chat format",
        where="--chat_format",
        found=name,
        expected=" or ".join(FORMATS),
    )


def _tool_name(tool: dict[str, Any]) -> str:
    return str(tool.get("function", tool).get("name", tool.get("type", "")))
