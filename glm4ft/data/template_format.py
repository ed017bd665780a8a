r"""Rows of any checkpoint whose own chat template tells prompt and answer apart, as the ChatML family's do.

Nothing is known of the format but its template, so the mask comes from rendering. The text of a turn's prompt, rendered
with its generation prompt, is what serving sends; what the whole conversation has behind it, up to and including the
token that ends the turn, is what the model must sample:

    ``<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n [hello] [<|im_end|>] \n``

That holds only if the whole conversation begins with the prompt, the prompt asks for an answer, and a control token
follows the answer; a template without one of these is refused.

Texts are rendered as placeholders first, so it is known which characters are theirs. A text with the name of a control
token is encoded apart, without control tokens; every other stretch between two borders of a turn is encoded as serving
encodes it, at once.
"""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.control_tokens import plain_text_tokenizer
from glm4ft.data.conversation import Conversation, Message
from glm4ft.data.encoded_row import AssistantTurn, EncodedRow, Part, Segment
from glm4ft.data.time_limit import TEMPLATE_LIMIT_S, within
from glm4ft.data.turn_format import TEMPLATE
from glm4ft.errors import DataError, ModelError, show

_PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")  # private use: no template writes these
_PROBE = (
    Message("user", "Hi. 你好"), Message("assistant", "Hello there."),
    Message("user", "Bye."), Message("assistant", "Bye bye."),
)  # fmt: skip


class _Stretch(NamedTuple):
    """A run of characters with one origin.

    Args:
        text: The characters.
        is_content: Whether they are the text of a message, and not the template's.
        role: The role of their message; "" behind the last turn.
        part: The part of the message.
        message: The index of the message.
        turn: The turn that samples these characters, as the index of its message; None for context.
    """

    text: str
    is_content: bool
    role: str
    part: Part
    message: int | None
    turn: int | None


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
        self.control_ids = dict(tokenizer.get_added_vocab())
        self._plain = plain_text_tokenizer(tokenizer)
        self._backend: Any = tokenizer.backend_tokenizer
        names = sorted(self.control_ids, key=len, reverse=True)
        self._markers = re.compile("|".join(map(re.escape, names)) or "(?!)")
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
        for region in _regions(self._stretches(messages, trained, place, is_open=is_open)):
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

    def _stretches(
        self, messages: Sequence[Message], trained: frozenset[int], place: Callable[[int], str], *, is_open: bool
    ) -> list[_Stretch]:
        """Tell each character of the rendered conversation its message, and whether the model samples it."""
        whole = self._render(_placeholders(messages), is_open, place)
        found = list(_PLACEHOLDER.finditer(whole))
        order = [int(match[1]) for match in found]
        if sorted(order) != list(range(len(messages))):
            lost = next((i for i in range(len(messages)) if order.count(i) != 1), 0)
            raise _refused(f"the chat template writes the message {order.count(lost)} times", place(lost), "once")
        texts = [message.content for message in messages]
        if self._render(messages, is_open, place) != _PLACEHOLDER.sub(lambda match: texts[int(match[1])], whole):
            changed = next((i for i in order if not self._keeps(messages, i, place)), order[0])
            raise _refused(
                "the chat template changes the text of a message", place(changed), "the text, verbatim",
                found=show(texts[changed]), fix="write the text as the template leaves it (often without white space "
                "at its ends), or train a checkpoint whose template keeps it",
            )  # fmt: skip
        stretches, end = list[_Stretch](), 0
        for number, match in enumerate(found):
            index = order[number]
            role, follows = messages[index].role, found[number + 1].start() if number + 1 < len(found) else len(whole)
            border = self._border(messages, whole, index, match, place) if role == "assistant" else None
            stop = self._markers.search(whole, match.end(), follows) if border is not None else None
            if border is not None and (stop is None or self.control_ids[stop[0]] != self.terminator_id):
                border = None
            if index in trained and border is None:
                raise _refused(
                    "the chat template renders this turn otherwise than the prompt that asks for it", place(index),
                    "the conversation up to the turn to begin with the turn's prompt, and a terminator behind it",
                    fix="make one conversation of each turn, or train the last turn only (--train_on last): the "
                    "template renders earlier turns otherwise than the last",
                )  # fmt: skip
            turn = index if border is not None else None
            begin = match.start() if border is None else border
            stretches.append(_Stretch(whole[end:begin], False, role, "header", index, None))
            stretches.append(_Stretch(whole[begin : match.start()], False, role, "body", index, turn))
            stretches.append(_Stretch(texts[index], True, role, "body", index, turn))
            end = match.end()
            if stop is not None and border is not None:
                stretches.append(_Stretch(whole[end : stop.end()], False, role, "terminator", index, turn))
                end = stop.end()
        tail: tuple[str, Part] = ("assistant", "header") if is_open else ("", "prefix")
        stretches.append(_Stretch(whole[end:], False, *tail, None, None))
        return [stretch for stretch in stretches if stretch.text]

    def _border(
        self, messages: Sequence[Message], whole: str, index: int, at: re.Match[str], place: Callable[[int], str]
    ) -> int | None:
        """Where a turn's prompt ends in the conversation; None if that begins otherwise than prompt and answer."""
        prompt = self._render(_placeholders(messages[:index]), True, place)
        answered = self._render(_placeholders(messages[: index + 1]), False, place)
        is_kept = whole.startswith(prompt) and answered.startswith(whole[: at.end()])
        return len(prompt) if is_kept and len(prompt) <= at.start() else None

    def _keeps(self, messages: Sequence[Message], index: int, place: Callable[[int], str]) -> bool:
        """Whether the template writes the text of one message verbatim."""
        hidden = _placeholders(messages)
        shown = [m if i == index else hidden[i] for i, m in enumerate(messages)]
        expected = self._render(hidden, False, place).replace(hidden[index].content, messages[index].content)
        return self._render(shown, False, place) == expected

    def _encoded(self, region: Sequence[_Stretch]) -> list[list[int]]:
        """Encode what stands between two borders, at once if no text could become a control token."""
        ends = list(accumulate(len(stretch.text) for stretch in region))
        joined = "".join(stretch.text for stretch in region)
        spans = [(end - len(s.text), end) for s, end in zip(region, ends, strict=True) if s.is_content]
        markers = [match.span() for match in self._markers.finditer(joined)]
        if any(start < end and begin < stop for start, stop in markers for begin, end in spans):
            return [self._plain.encode(s.text).ids if s.is_content else self._joint(s.text).ids for s in region]
        found: list[list[int]] = [[] for _ in region]
        encoding = self._joint(joined)
        for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True):
            found[min(bisect.bisect_right(ends, start), len(region) - 1)].append(token)
        return found

    def _joint(self, text: str) -> Any:
        return self._backend.encode(text, add_special_tokens=False)

    def _render(self, messages: Sequence[Message], is_open: bool, place: Callable[[int], str]) -> str:
        rendered: list[dict[str, Any]] = [{"role": m.role, "content": m.content} for m in messages]
        try:
            render = functools.partial(
                self.tokenizer.apply_chat_template, rendered, tokenize=False, add_generation_prompt=is_open
            )
            return str(within(TEMPLATE_LIMIT_S, render))
        except Exception as error:  # a template is a program and can raise anything
            raise _refused(
                "the chat template cannot render the conversation", place(len(messages) - 1),
                "a conversation that the template accepts", found=" ".join(str(error).split())[:300],
            ) from error  # fmt: skip

    def _probe_terminator(self) -> int:
        """Find the token that ends an answer; refuse templates that do not tell prompt and answer apart."""
        place: Callable[[int], str] = "a plain conversation, message {}".format
        first, answered = _placeholders(_PROBE[:1]), _placeholders(_PROBE[:2])
        try:
            closed, prompt = (self._render(first, is_open, place) for is_open in (False, True))
            whole = self._render(answered, False, place)
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
        stop = self._markers.search(whole, answer + len(answered[1].content)) if answer >= 0 else None
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
            row, whole = self._row(_PROBE, frozenset(), str, 0), self._render(_PROBE, False, str)
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


def _regions(stretches: Iterable[_Stretch]) -> Iterator[list[_Stretch]]:
    """Split a conversation at the borders of its turns."""
    region: list[_Stretch] = []
    for stretch in stretches:
        if region and (stretch.turn != region[0].turn):
            yield region
            region = []
        region.append(stretch)
    if region:
        yield region


def _placeholders(messages: Sequence[Message]) -> list[Message]:
    return [Message(message.role, f"\ue000{index}\ue001") for index, message in enumerate(messages)]


def _require_plain(messages: Sequence[Message], tools: Sequence[Any], where: Callable[..., str]) -> None:
    """Refuse what only the family's own formats know how to write."""
    if tools:
        raise _refused("chat format template has no tools", where(), "no declared tools", found=f"{len(tools)}")
    for index, message in enumerate(messages):
        found = "a tool call" if message.is_call else "reasoning" if message.reasoning else message.role
        if message.is_call or message.reasoning or message.role == "observation":
            raise _refused("chat format template has no place for this", where(index), "plain text", found=found)


def _refused(
    problem: str, where: str, expected: str, *, found: str = "", fix: str = "leave the conversation out"
) -> DataError:
    return DataError(problem, where=where, found=found, expected=expected, fix=fix)
