r"""Encodes conversations in the chat formats of the GLM-4 family, as token ids and a supervision mask.

A token is supervised exactly if the model must sample it at inference, given the prompt that serving sends. GLM-4 has
no end-of-turn token: a turn is ended by the control token of the next role, so for an assistant turn

    ``<|user|> \n hi <|assistant|> [\n] [hello] [<|user|>]``

the bracketed tokens are supervised: all tokens after the header and what serving writes behind it (``turn_format``), up
to and including the next control token.

The mask is derived from the structure of the conversation. Headers are control ids; bodies are encoded on their own by
a tokenizer without control tokens, so text can never become one, and no boundary is ever searched for in ids.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from glm4ft.data.control_tokens import END_OF_TEXT, HEADERS, PREFIX, STOPS, control_ids, plain_text_tokenizer
from glm4ft.data.conversation import Conversation, Message
from glm4ft.data.encoded_row import AssistantTurn, EncodedRow, Part, Segment
from glm4ft.data.render import Block, Place, ReasoningTurns, Renderer, prompt_pieces
from glm4ft.data.tool_block import tool_block
from glm4ft.data.turn_format import FORMATS, TEMPLATE, FormatName, Piece, merged
from glm4ft.errors import DataError, ModelError


class ChatFormat:
    """Encodes conversations in one chat format with one tokenizer.

    Args:
        name: The format, one of ``FORMATS``.
        tokenizer: A fast tokenizer with GLM-4's control tokens.
        final_stop: The terminator of a conversation whose last turn is the assistant's: ``role`` is ``<|observation|>``
            after a tool call and ``<|user|>`` after a reply, as serving sees it; ``endoftext`` is ``<|endoftext|>``.
        train_on: The trained turns: ``all`` assistant turns, or the ``last`` assistant message only.
        allow_nonstop_terminator: Whether to train the header that follows an assistant turn even where it is not a stop
            token (another assistant or system message). Off by default, because only the collector of the data knows
            whether one generation spanned both messages.
        reasoning: The turns that carry their reasoning: ``template``, as the checkpoint's template renders them by
            default; ``kept``, all of them, where serving can be told so; ``none``, for serving without thinking.
    Raises:
        ModelError: If the format is unknown, cannot keep reasoning, or the tokenizer lacks a control token.
    """

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        final_stop: Literal["role", "endoftext"] = "role",
        train_on: Literal["all", "last"] = "all",
        allow_nonstop_terminator: bool = False,
        reasoning: ReasoningTurns = "template",
    ) -> None:
        self.name, self.tokenizer = _known(name), tokenizer
        self.final_stop, self.train_on, self.allow_nonstop_terminator = final_stop, train_on, allow_nonstop_terminator
        self.reasoning = _possible(self.name, reasoning)
        self.turn_format, self._renderer = FORMATS[self.name], Renderer(self.name, reasoning)
        self.control_ids = control_ids(tokenizer, self.turn_format.needed_markers)
        self.prefix_ids = [self.control_ids[token] for token in PREFIX]
        self.header_ids = {role: self.control_ids[token] for role, token in HEADERS.items()}
        self.stop_ids = [self.control_ids[token] for token in STOPS]
        self._added = dict(tokenizer.get_added_vocab())
        self._tokens = frozenset(self._added)
        self._plain = plain_text_tokenizer(tokenizer)
        self._tool_block = functools.lru_cache(maxsize=1024)(self._render_tool_block)

    def encode(self, conversation: Conversation) -> EncodedRow:
        """Encode a conversation as token ids and a supervision mask.

        Args:
            conversation: A validated conversation.
        Returns:
            The row. Trailing messages after the last assistant turn are context: nothing is appended to them.
        Raises:
            DataError: If the format has no place for a part of a message, or an assistant turn is followed by a message
                whose header is not a stop token.
            ModelError: If the checkpoint's template does not render the tools.
        """
        blocks = self._checked_blocks(conversation)
        return self._assemble(blocks, self._trained(blocks, conversation), conversation.line)

    def check(self, conversation: Conversation) -> None:
        """Raise what ``encode`` would raise, without encoding the texts."""
        self._checked_blocks(conversation)

    def exceeds(self, message: Message, limit: int) -> bool:
        """Whether a message alone certainly has more tokens than a limit; no more of it is encoded than that takes.

        Args:
            message: The message.
            limit: The limit in tokens.
        Returns:
            True if the words of a part of the text have more tokens; False if its text is short, or it is not certain.
        """
        size = 8 * limit  # characters; one token has four or so
        while size < len(message.content):
            # the last two words may go on differently in the whole text, the others are the same there
            words = [word or 0 for word in self._plain.encode(message.content[:size]).word_ids]
            if sum(word < words[-1] - 1 for word in words) > limit:
                return True
            size *= 4
        return False

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), *, thinking: bool = True
    ) -> list[int]:
        """Encode the prompt that serving sends to generate the next assistant turn: all messages, then its beginning.

        Args:
            messages: The messages before the turn.
            tools: The declared tools.
            thinking: Whether serving asks the model to think, as it does by default; without meaning in a format
                without reasoning, and in one that always thinks.
        """
        blocks = self._blocks(messages, tools, "messages[{}]".format, thinking=thinking)
        turn = Block("assistant", None, prompt_pieces(self.turn_format, thinking=thinking))
        return self._assemble([*blocks, turn], frozenset(), 0, append_stop=False).input_ids

    def num_given(self, ids: Sequence[int]) -> int:
        """Count the ids after an assistant's header that serving supplies before the model samples.

        Args:
            ids: The ids of a row from behind the header.
        """
        given = self._encode([prompt_pieces(self.turn_format, thinking=thinking) for thinking in (True, False)])
        return max(len(part) for part in ([], *given) if list(ids[: len(part)]) == part)

    def warnings(self, conversation: Conversation) -> list[str]:
        """Sentences about parts of a conversation that are probably unintended, or that the format does not train."""
        wanted = frozenset(i for i, m in enumerate(conversation.messages) if m.role == "assistant" and m.loss)
        return [
            *conversation.warnings,
            *self._renderer.warnings(conversation.messages, conversation.field_of, wanted),
        ]

    def num_turns(self, conversation: Conversation) -> int:
        """The number of assistant turns that a whole row of the conversation has."""
        turns = self._renderer.turns(conversation.messages, conversation.where)
        return sum(turn.role == "assistant" for turn in turns)

    def _blocks(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        place: Place,
        *,
        thinking: bool | None = None,
    ) -> list[Block]:
        """Return the blocks in the order of the format, the tool block first."""
        blocks = self._renderer.blocks(messages, place, thinking=thinking)
        return [Block("system", None, self._tool_block(json.dumps(tools))), *blocks] if tools else blocks

    def _render_tool_block(self, tools_json: str) -> tuple[Piece, ...]:
        return tool_block(self.tokenizer, self.turn_format, json.loads(tools_json))

    def _checked_blocks(self, conversation: Conversation) -> list[Block]:
        try:
            blocks = self._blocks(conversation.messages, conversation.tools, conversation.where)
        except ModelError as error:
            where = " and ".join(filter(None, (error.where, conversation.where())))  # either may be at fault
            raise ModelError(
                error.message, where=where, found=error.found, expected=error.expected, fix=error.fix
            ) from error
        self._require_stops(blocks, conversation)
        return blocks

    def _assemble(
        self, blocks: list[Block], trained: frozenset[int], line: int, append_stop: bool = True
    ) -> EncodedRow:
        input_ids, supervised = list(self.prefix_ids), [False] * len(self.prefix_ids)
        segments, turns = [Segment("", "prefix", None, 0, len(input_ids), False)], list[AssistantTurn]()

        def append(ids: list[int], role: str, part: Part, message: int | None, is_supervised: bool) -> None:
            start = len(input_ids)
            input_ids.extend(ids)
            supervised.extend([is_supervised] * len(ids))
            segments.append(Segment(role, part, message, start, len(input_ids), is_supervised))

        ends_trained_turn = False
        bodies = self._encode([parts for block in blocks for parts in (block.given, block.sampled)])
        for block, given, sampled in zip(blocks, bodies[::2], bodies[1::2], strict=True):
            is_trained = block.message is not None and block.message in trained
            if block.has_header:
                append([self.header_ids[block.role]], block.role, "header", block.message, ends_trained_turn)
                ends_trained_turn = is_trained
            if given or block.role != "assistant":
                append(given, block.role, "body", block.message, False)
            if block.role == "assistant" and block.message is not None:
                append(sampled, block.role, "body", block.message, is_trained)
                turns.append(AssistantTurn(block.message, len(input_ids) - len(sampled), len(input_ids), is_trained))
        if append_stop and blocks and blocks[-1].role == "assistant":
            append([self._final_stop_id(blocks[-1])], "", "terminator", None, ends_trained_turn)
        return EncodedRow(input_ids, supervised, tuple(segments), tuple(turns), line)

    def _encode(self, bodies: Sequence[Sequence[Piece]]) -> list[list[int]]:
        """Encode bodies, each on its own: ids of markers, and texts in one batch."""
        parts = [list(merged(body, self._tokens)) for body in bodies]
        texts = [part.text for body in parts for part in body if not part.is_marker]
        encoded = iter(self._plain.encode_batch_fast(texts))  # without offsets, which nobody asks for
        return [
            [i for part in body for i in ([self._added[part.text]] if part.is_marker else next(encoded).ids)]
            for body in parts
        ]

    def _trained(self, blocks: Sequence[Block], conversation: Conversation) -> frozenset[int]:
        """The indices of the turns that are trained: those that some prompt of serving asks for."""
        turns = [block for block in blocks if block.role == "assistant" and block.message is not None]
        last = turns[-1].message if turns else None
        wanted = [b for b in turns if self.train_on == "all" or b.message == last]
        trained = [b for b in wanted if conversation.messages[b.message or 0].loss]
        for block in trained:
            if block.message == last and not block.is_served:
                raise DataError(
                    f"{self.name} has no prompt that asks for this turn",
                    where=conversation.where(block.message),
                    found="a tool call" if block.is_call else "an answer without reasoning",
                    expected="reasoning, then an answer: serving's prompt ends with <think>",
                    fix="add reasoning_content, set the message's loss to false, or train a GLM-4-0414 checkpoint",
                )
        return frozenset(block.message or 0 for block in trained if block.is_served)

    def _final_stop_id(self, block: Block) -> int:
        if self.final_stop == "endoftext":
            return self.control_ids[END_OF_TEXT]
        return self.header_ids["observation" if block.is_call else "user"]

    def _require_stops(self, blocks: list[Block], conversation: Conversation) -> None:
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


def _known(name: str) -> FormatName:
    for known in FORMATS:
        if known == name:
            return known
    raise ModelError(
        "unknown chat format", where="--chat_format", found=name, expected=" or ".join([*FORMATS, TEMPLATE])
    )


def _possible(name: FormatName, reasoning: ReasoningTurns) -> ReasoningTurns:
    written = FORMATS[name].reasoning
    if reasoning == "kept" and not (written and written.can_be_kept):
        able = [other for other, known in FORMATS.items() if known.reasoning and known.reasoning.can_be_kept]
        raise ModelError(
            f"serving cannot be told to keep reasoning in chat format {name}",
            where="--reasoning", found=reasoning, expected="template or none", fix=f"kept is for {' and '.join(able)}",
        )  # fmt: skip
    return reasoning
