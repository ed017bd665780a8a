r"""Rows of any checkpoint whose own chat template tells prompt and answer apart, as the ChatML family's do.

Nothing is known of the format but its template, so the mask comes from rendering. The text of a turn's prompt, rendered
with its generation prompt, is what serving sends; what the whole conversation has behind it, up to and including the
token that ends the turn, is what the model must sample:

    ``<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n [hello] [<|im_end|>] \n``

That holds only if the whole conversation begins with the prompt, the prompt asks for an answer, and a control token
follows the answer; a template without one of these is refused.

A text with the name of a control token is encoded apart, without control tokens; every other stretch between two
borders of a turn is encoded as serving encodes it, at once.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.control_tokens import plain_text_tokenizer
from glm4ft.data.conversation import Conversation, Message
from glm4ft.data.encoded_row import AssistantTurn, EncodedRow, Segment
from glm4ft.data.template_rendering import Stretch, TemplateRenderer, placeholders, refused, regions
from glm4ft.data.turn_format import TEMPLATE
from glm4ft.errors import DataError, ModelError, show

_PROBE = (
    Message("user", "Hi. 你好"), Message("assistant", "Hello there."),
    Message("user", "Bye."), Message("assistant", "Bye bye."),
)  # fmt: skip


class TemplateFormat(ChatFormat):
    """Encodes conversations as the tokenizer's chat template renders them.

    Args:
        name: ``template``.
        tokenizer: A fast tokenizer with a chat template.
        final_stop: ``role``: a template writes its own terminator.
        train_on: The trained turns: ``all`` assistant turns, or the ``last`` one only.
        allow_nonstop_terminator: Without meaning here: every turn has a terminator of its own.
        reasoning: ``template``.
    Raises:
        ModelError: If the template does not tell prompt and answer apart; the message gives the reason.
    """

    def __init__(  # the parent's knows GLM-4's control tokens
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        final_stop: Literal["role", "endoftext"] = "role",
        train_on: Literal["all", "last"] = "all",
        allow_nonstop_terminator: bool = False,
        reasoning: Literal["template", "kept", "none"] = "template",
    ) -> None:
        self.name, self.tokenizer = TEMPLATE, tokenizer
        self.final_stop, self.train_on, self.allow_nonstop_terminator = final_stop, train_on, allow_nonstop_terminator
        self.reasoning = reasoning
        self._require(bool(tokenizer.chat_template), "the checkpoint has no chat template", "", "a chat_template.jinja")
        for option, value, only in (("final_stop", final_stop, "role"), ("reasoning", reasoning, "template")):
            if value != only:
                raise ModelError(
                    f"chat format {TEMPLATE} writes what the checkpoint's template writes",
                    where=f"--{option}", found=value, expected=only,
                )  # fmt: skip
        self._template = TemplateRenderer(tokenizer)
        self.control_ids = self._template.control_ids
        self._plain = plain_text_tokenizer(tokenizer)
        self._backend: Any = tokenizer.backend_tokenizer
        self.terminator_id = self._probe_terminator()
        eos = tokenizer.eos_token_id
        self.stop_ids = list(dict.fromkeys([self.terminator_id, *([eos] if isinstance(eos, int) else [])]))
        self.headers = self._probe_headers()
        self._require_joints()

    def encode(self, conversation: Conversation) -> EncodedRow:
        """Encode a conversation as token ids and a supervision mask.

        Args:
            conversation: A validated conversation.
        Returns:
            The row, whose text is what the template renders.
        Raises:
            DataError: If the template cannot render the conversation, changes a text, or renders a trained turn
                otherwise than its prompt announced.
        """
        messages = conversation.messages
        _require_plain(messages, conversation.tools, conversation.where)
        turns = [i for i, m in enumerate(messages) if m.role == "assistant"]
        wanted = turns[-1:] if self.train_on == "last" else turns
        trained = frozenset(i for i in wanted if messages[i].loss)
        return self._row(messages, trained, conversation.where, conversation.line)

    def check(self, conversation: Conversation) -> None:
        """Raise what ``encode`` would raise; a template shows it only when it renders the texts."""
        self.encode(conversation)

    def num_given(self, ids: Sequence[int]) -> int:
        """Count the ids behind an assistant's header that serving supplies: none, since the header is all of them."""
        return 0

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), *, thinking: bool = True
    ) -> list[int]:
        """Encode the prompt that serving sends to generate the next assistant turn.

        Args:
            messages: The messages before the turn.
            tools: The declared tools; none can be given.
            thinking: Without meaning here.
        """
        place: Callable[[int], str] = "messages[{}]".format
        _require_plain(messages, tools, lambda index=None: "" if index is None else place(index))
        return self._row(messages, frozenset(), place, 0, is_open=True).input_ids

    def warnings(self, conversation: Conversation) -> list[str]:
        """Sentences about parts of a conversation that are probably unintended."""
        return list(conversation.warnings)

    def num_turns(self, conversation: Conversation) -> int:
        """The number of assistant turns that a whole row of the conversation has."""
        return sum(message.role == "assistant" for message in conversation.messages)

    def _row(
        self,
        messages: Sequence[Message],
        trained: frozenset[int],
        place: Callable[[int], str],
        line: int,
        *,
        is_open: bool = False,
    ) -> EncodedRow:
        input_ids, supervised = list[int](), list[bool]()
        segments, turns = list[Segment](), list[AssistantTurn]()
        for region in regions(self._template.stretches(messages, trained, self.terminator_id, place, is_open=is_open)):
            turn, start = region[0].turn, len(input_ids)
            for stretch, ids in zip(region, self._encoded(region), strict=True):
                at = len(input_ids)
                input_ids += ids
                supervised += [turn in trained] * len(ids)
                segments.append(
                    Segment(stretch.role, stretch.part, stretch.message, at, len(input_ids), turn in trained)
                )
            if turn is not None:
                turns.append(AssistantTurn(turn, start, len(input_ids) - 1, turn in trained))
        return EncodedRow(input_ids, supervised, tuple(segments), tuple(turns), line)

    def _encoded(self, region: Sequence[Stretch]) -> list[list[int]]:
        """Encode what stands between two borders, at once if no text could become a control token."""
        ends = list(accumulate(len(stretch.text) for stretch in region))
        joined = "".join(stretch.text for stretch in region)
        spans = [(end - len(s.text), end) for s, end in zip(region, ends, strict=True) if s.is_content]
        markers = [match.span() for match in self._template.markers.finditer(joined)]
        if any(start < end and begin < stop for start, stop in markers for begin, end in spans):
            return [self._plain.encode(s.text).ids if s.is_content else self._joint(s.text).ids for s in region]
        found: list[list[int]] = [[] for _ in region]
        encoding = self._joint(joined)
        for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True):
            found[min(bisect.bisect_right(ends, start), len(region) - 1)].append(token)
        return found

    def _joint(self, text: str) -> Any:
        return self._backend.encode(text, add_special_tokens=False)

    def _probe_terminator(self) -> int:
        """Find the token that ends an answer; refuse templates that do not tell prompt and answer apart."""
        place: Callable[[int], str] = "a plain conversation, message {}".format
        first, answered = placeholders(_PROBE[:1]), placeholders(_PROBE[:2])
        try:
            closed, prompt = (self._template.render(first, is_open, place) for is_open in (False, True))
            whole = self._template.render(answered, False, place)
        except DataError as error:
            raise ModelError(error.message, where=self._where, found=error.found) from error
        self._require(
            prompt != closed, "the chat template has no generation prompt", prompt, "a prompt that asks for an answer"
        )
        self._require(
            whole.startswith(prompt), "the chat template is not prefix-preserving: an answered prompt begins otherwise",
            whole, f"it to begin with {show(prompt)}",
        )  # fmt: skip
        answer = whole.find(answered[1].content)
        stop = self._template.markers.search(whole, answer + len(answered[1].content)) if answer >= 0 else None
        if stop is None:
            self._require(False, "the chat template writes no terminator behind an answer", whole, "a control token")
            raise AssertionError
        return self.control_ids[stop[0]]

    def _probe_headers(self) -> dict[str, tuple[int, ...]]:
        """The ids between a role's last control token and its text, by which rows of other trainers are read."""
        probe = [Message("system", "S"), *_PROBE[:2]]
        try:
            row = self._row(probe, frozenset(), str, 0)
        except DataError:  # a template without system messages
            row = self._row(probe[1:], frozenset(), str, 0)
        markers, headers = set(self.control_ids.values()), dict[str, tuple[int, ...]]()
        for segment in row.segments:
            ids = row.input_ids[segment.start : segment.end]
            if segment.part == "header" and (starts := [at for at, token in enumerate(ids) if token in markers]):
                headers[segment.role] = tuple(ids[starts[-1] :])
        return headers

    def _require_joints(self) -> None:
        """Refuse a tokenizer that encodes an answer otherwise alone than behind its prompt, as by a space put first."""
        try:
            row, whole = self._row(_PROBE, frozenset(), str, 0), self._template.render(_PROBE, False, str)
        except DataError as error:
            raise ModelError(error.message, where=self._where, found=error.found) from error
        self._require(
            row.input_ids == self._joint(whole).ids, "the tokenizer joins an answer with its prompt",
            str(self.tokenizer.decode(row.input_ids)), "the ids of the whole text to be those of its parts",
        )  # fmt: skip

    @property
    def _where(self) -> str:
        return str(self.tokenizer.name_or_path)

    def _require(self, holds: bool, problem: str, found: str, expected: str) -> None:
        if not holds:
            fix = "the mask comes from rendering prompt and answer apart: use a checkpoint whose template allows that"
            raise ModelError(problem, where=self._where, found=show(found), expected=expected, fix=fix)


def _require_plain(messages: Sequence[Message], tools: Sequence[Any], where: Callable[..., str]) -> None:
    """Refuse what only the family's own formats know how to write."""
    if tools:
        raise refused("chat format template has no tools", where(), "no declared tools", found=f"{len(tools)}")
    for index, message in enumerate(messages):
        found = "a tool call" if message.is_call else "reasoning" if message.reasoning else message.role
        if message.is_call or message.reasoning or message.role == "observation":
            raise refused("chat format template has no place for this", where(index), "plain text", found=found)
