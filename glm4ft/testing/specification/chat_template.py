"""Which tokens a model must sample, by the chat template of its checkpoint: prompt and answer are rendered apart.

Nothing here knows a format. What the template writes around an answer is read off renderings that differ in one place,
so the rules hold for every template that marks its turns with tokens of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glm4ft.data.control_tokens import common_prefix_length
from glm4ft.data.encoded_row import IGNORED
from glm4ft.testing.specification.mask_oracle import Undecidable

USER, ANSWERS = {"role": "user", "content": "one"}, ("two", "three")

WHY = {
    "prefix": "the template's prefix, which opens a row once",
    "header": "part of an assistant header, which serving sends and the model never samples",
    "prompt": "part of a prompt, which the model is given",
    "terminator": "the terminator, which the model must sample to stop",
    "answer": "part of an answer, which the model must sample",
    "after": "behind the terminator, where generation has stopped",
}


@dataclass(frozen=True)
class Marks:
    """The tokens that a template writes around an answer.

    Args:
        prefix: What opens every row, and occurs nowhere else.
        header: The assistant header, without white space at its end.
        opening: What the generation prompt has behind the header: white space, or the beginning of a thought.
        terminators: The tokens that end an answer.
    """

    prefix: tuple[int, ...]
    header: tuple[int, ...]
    opening: tuple[int, ...]
    terminators: frozenset[int]


@dataclass(frozen=True)
class Mistake:
    """One position of a row whose label is wrong.

    Args:
        kind: The kind of token, a key of ``WHY``.
        position: The position; the row's length for a terminator that is not there.
        is_trained: Whether the row trains the position.
    """

    kind: str
    position: int
    is_trained: bool


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Any = None, prompt: bool = False) -> list[int]:
    """The ids of messages by the tokenizer's template; with the header of the next answer if ``prompt``.

    Raises:
        Undecidable: If there is no template, or it refuses the messages.
    """
    try:
        ids = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tools=tools or None, add_generation_prompt=prompt,
            tokenize=True, return_dict=False,
        )  # fmt: skip
    except Exception as error:  # a template may raise anything
        raise Undecidable(f"the chat template does not render this: {error}") from error
    return list(ids)


def marks_of(tokenizer: Any, stop_ids: Sequence[int] = ()) -> Marks:
    """Read the tokens around an answer off renderings of short conversations.

    Args:
        tokenizer: The tokenizer, with its template.
        stop_ids: The tokens that end generation, by the checkpoint's generation config.
    Raises:
        Undecidable: If the tokenizer has no template, or the template does not mark answers by tokens of their own.
    """
    question, prompt = render(tokenizer, [USER]), render(tokenizer, [USER], prompt=True)
    one, other = (render(tokenizer, [USER, {"role": "assistant", "content": text}]) for text in ANSWERS)
    following = render(tokenizer, [USER, {"role": "assistant", "content": ANSWERS[0]}, USER])
    asked, written = prompt[len(question) :], one[len(question) : common_prefix_length(one, other)]
    if prompt[: len(question)] != question or one[: len(question)] != question:
        raise Undecidable("the chat template changes a question once an answer follows")
    header = asked[: common_prefix_length(asked, written)]
    while header and not tokenizer.decode(header[-1:]).strip():
        header.pop()
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    if not header or special.isdisjoint(header):
        raise Undecidable("the chat template's assistant header has no token of its own")
    tail = common_prefix_length(one[::-1], other[::-1])
    end = next(iter(following[len(one) - tail :]), None)
    if end is None or end not in special:
        raise Undecidable("the chat template ends an answer with ordinary text")
    opens = question[: common_prefix_length(question, render(tokenizer, [{"role": "system", "content": "be"}, USER]))]
    prefix = opens[: next((i for i, token in enumerate(opens) if following.count(token) > 1), len(opens))]
    terminators = {end, *stop_ids, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])}
    return Marks(tuple(prefix), tuple(header), tuple(asked[len(header) :]), frozenset(terminators))


def answers(ids: Sequence[int], marks: Marks) -> list[range]:
    """The answers of a row: from behind each assistant header to its terminator, which is the last of the range.

    A range that ends behind the row lacks its terminator.
    """
    found, at, header = list[range](), 0, list(marks.header)
    while at < len(ids):
        if list(ids[at : at + len(header)]) != header:
            at += 1
            continue
        start = at + len(header)
        end = next((i for i in range(start, len(ids)) if ids[i] in marks.terminators), len(ids))
        found.append(range(start, end + 1))
        at = end
    return found


def find_mistakes(tokenizer: Any, ids: Sequence[int], labels: Sequence[int], marks: Marks) -> Iterator[Mistake]:
    """Compare the trained tokens of a row with the rules that hold for every template.

    Prompts and headers are never trained; an answer of which any token is trained is trained as a whole, with the one
    terminator that ends it, except for what the generation prompt has of it; the prefix occurs once.

    Args:
        tokenizer: The tokenizer.
        ids: The token ids of the row.
        labels: The labels; -100 where a token is not trained.
        marks: The tokens around an answer.
    """
    owner, opening = dict[int, range](), set[int]()
    for answer in answers(ids, marks):
        owner |= dict.fromkeys(answer, answer)
        begin = answer.start
        given = list(marks.opening) == list(ids[begin : begin + len(marks.opening)])
        opening |= set(range(begin, begin + len(marks.opening))) if given else set()
        while begin < answer.stop - 1 and not tokenizer.decode([ids[begin]]).strip():
            opening.add(begin)  # white space: the templates of training and serving may differ there
            begin += 1
    trained = [label != IGNORED for label in labels]
    is_active = {answer: any(trained[i] for i in answer if i < len(ids)) for answer in owner.values()}
    headers = {answer.start - i for answer in owner.values() for i in range(1, len(marks.header) + 1)}
    for position, token in enumerate(ids):
        if token in marks.prefix and position >= len(marks.prefix):
            yield Mistake("prefix", position, trained[position])
        if position not in owner:
            behind = position - 1 in owner and position == owner[position - 1].stop
            if trained[position] and not (behind and not tokenizer.decode([token]).strip()):
                yield Mistake("header" if position in headers else "after" if behind else "prompt", position, True)
        elif is_active[owner[position]] and not trained[position] and position not in opening:
            yield Mistake("terminator" if position == owner[position].stop - 1 else "answer", position, False)
    for answer in answers(ids, marks):
        if is_active[answer] and answer.stop > len(ids):
            yield Mistake("terminator", len(ids), False)


def expected_row(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Any, marks: Marks
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids of a conversation by the template, and the labels of the tokens that the model must sample.

    Each answer is what follows its prompt, rendered apart, up to its terminator. A last answer that the template leaves
    without a terminator stays so.

    Raises:
        Undecidable: If a prompt is not the beginning of the conversation's rendering.
    """
    ids = render(tokenizer, messages, tools)
    labels = [IGNORED] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or message.get("loss") is False:
            continue
        start = len(prompt := render(tokenizer, messages[:index], tools, prompt=True))
        if ids[:start] != prompt:
            raise Undecidable(f"the prompt of message {index} is not the beginning of the conversation's rendering")
        end = next((i for i in range(start, len(ids)) if ids[i] in marks.terminators), len(ids) - 1)
        labels[start : end + 1] = ids[start : end + 1]
    return tuple(ids), tuple(labels)
