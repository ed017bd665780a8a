"""What is supervised is exactly what the model must sample, in every chat format and with every text.

The format is implemented a second time here, naively, from its specification: ids by tokenising text piece by piece
without any added token, the mask by one walk over control ids. The checkpoint's own template is a third reference.

Run: pytest tests/data/test_masks.py  [--glm4ft-tokenizer FOLDER: repeats everything with a real GLM-4 tokenizer]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.conversation import Conversation, Message
from glm4ft.data.encoded_row import IGNORED, EncodedRow
from glm4ft.errors import DataError
from glm4ft.testing.strategies import MARKERS, conversations, marker_free_contents

InEachLane = Callable[..., Iterator[ChatFormat]]
TOOLS = ({"type": "function", "function": {"name": "f"}},)

# --- the second implementation --------------------------------------------------------------------------------------


def ordered(chat_format: ChatFormat, conversation: Conversation) -> list[Message]:
    """Order messages as the format does: glm-4-0414 puts all system messages first, glm-4-9b-chat keeps the order."""
    messages = list(conversation.messages)
    if chat_format.name == "glm-4-0414":
        systems = [message for message in messages if message.role == "system"]
        return systems + [message for message in messages if message.role != "system"]
    return messages


def naive_controls(chat_format: ChatFormat, conversation: Conversation, *, final_stop: str = "role") -> list[str]:
    """List the control tokens of the row: prefix, one header per message, and an appended terminator if needed."""
    messages = ordered(chat_format, conversation)
    controls = ["[gMASK]", "<sop>"] + ["<|system|>"] * bool(conversation.tools)
    controls += [f"<|{message.role}|>" for message in messages]
    if messages[-1].role != "assistant":
        return controls
    by_role = "<|observation|>" if messages[-1].metadata else "<|user|>"
    return [*controls, "<|endoftext|>" if final_stop == "endoftext" else by_role]


def naive_texts(chat_format: ChatFormat, conversation: Conversation) -> list[str]:
    """List the text after each header, the tool block's included."""
    texts = [f"{message.metadata}\n{message.content}" for message in ordered(chat_format, conversation)]
    if not conversation.tools:
        return texts
    rendered = render(chat_format, Conversation((Message("user", "x"),), conversation.tools), tokenize=False)
    return [rendered.removeprefix("[gMASK]<sop><|system|>").removesuffix("<|user|>\nx"), *texts]


def naive_encoding(tokenizer: Any, text: str) -> list[int]:
    """Encode text by pre-tokenizer and model alone, so that no marker becomes a control token."""
    backend = tokenizer.backend_tokenizer
    words = backend.pre_tokenizer.pre_tokenize_str(text)
    return [token.id for word, _ in words for token in backend.model.tokenize(word)]


def naive_ids(chat_format: ChatFormat, conversation: Conversation, **options: str) -> list[int]:
    vocabulary = chat_format.tokenizer.get_added_vocab()
    controls = [vocabulary[token] for token in naive_controls(chat_format, conversation, **options)]
    ids, headers = controls[:2], controls[2:]
    texts = naive_texts(chat_format, conversation)
    for header, text in zip(headers, texts, strict=False):
        ids += [header, *naive_encoding(chat_format.tokenizer, text)]
    return ids + headers[len(texts) :]


def naive_supervised(chat_format: ChatFormat, ids: list[int], trained: Sequence[bool]) -> list[bool]:
    """Mark all tokens after each trained turn's header, up to and including the next control token."""
    control_ids = set(chat_format.tokenizer.get_added_vocab().values())
    header = chat_format.tokenizer.get_added_vocab()["<|assistant|>"]
    supervised, inside, turns = [], False, iter(trained)
    for token in ids:
        supervised.append(inside)
        if token in control_ids:
            inside = token == header and next(turns)
    return supervised


def render(chat_format: ChatFormat, conversation: Conversation, **options: Any) -> Any:
    """Apply the checkpoint's template; tools go on a system message for glm-4-9b-chat, else into an argument."""
    messages: list[dict[str, Any]] = [
        {"role": m.role, "metadata": m.metadata, "content": m.content} for m in conversation.messages
    ]
    tools = list(conversation.tools) or None
    if tools and chat_format.name == "glm-4-9b-chat":
        messages.insert(0, {"role": "system", "metadata": "", "content": "", "tools": tools})
        tools = None
    return chat_format.tokenizer.apply_chat_template(messages, tools=tools, return_dict=False, **options)


def flags(conversation: Conversation) -> list[bool]:
    return [message.loss for message in conversation.messages if message.role == "assistant"]


def nonstop(chat_format: ChatFormat, conversation: Conversation) -> list[Message]:
    """List the messages that follow an assistant turn and whose header is not a stop token."""
    messages = ordered(chat_format, conversation)
    pairs = pairwise(messages)
    return [after for before, after in pairs if before.role == "assistant" and after.role in ("assistant", "system")]


# --- assertions -----------------------------------------------------------------------------------------------------


def explain_difference(tokenizer: Any, ids: list[int], got: Sequence[Any], expected: Sequence[Any], rule: str) -> str:
    """Describe the first difference of two rows, with the tokens around it."""
    pairs = zip(got, expected, strict=False)
    where = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(got), len(expected)))
    around = range(max(0, where - 6), min(len(ids), where + 4))
    tokens = "  ".join(f"[{i} {tokenizer.decode([ids[i]])!r}]" for i in around)
    found, wanted = list(got[where : where + 3]), list(expected[where : where + 3])
    return f"{rule}: position {where} of {len(got)}/{len(expected)}: {found} instead of {wanted}\n  {tokens}"


def assert_row(
    *, row: EncodedRow, ids: list[int] | None = None, supervised: list[bool] | None = None, by: ChatFormat, rule: str
) -> None:
    """Compare ids, the mask, or both, and show the first difference."""
    __tracebackhide__ = True
    for got, expected in ((row.input_ids, ids), (row.supervised, supervised)):
        if expected is not None and got != expected:
            raise AssertionError(explain_difference(by.tokenizer, row.input_ids, got, expected, rule))


# --- ids ------------------------------------------------------------------------------------------------------------


@given(conversation=conversations(nonstop_terminators=True))
@example(conversation=Conversation((Message("user", "<|assistant|>\n[gMASK]<sop>"), Message("assistant", "<|user|>"))))
def test_ids_are_those_of_the_naive_encoder(in_each_lane: InEachLane, conversation: Conversation) -> None:
    """Hence a row has one prefix, its control ids depend on the roles alone, and no text becomes a control token."""
    for chat_format in in_each_lane(allow_nonstop_terminator=True):
        row = chat_format.encode(conversation)
        assert_row(row=row, ids=naive_ids(chat_format, conversation), by=chat_format, rule="naive encoder")


@given(conversation=conversations(nonstop_terminators=True))
def test_control_ids_are_a_function_of_the_roles(in_each_lane: InEachLane, conversation: Conversation) -> None:
    """With other texts the row has the same control ids in the same order, and one prefix."""
    for chat_format in in_each_lane(allow_nonstop_terminator=True):
        vocabulary = chat_format.tokenizer.get_added_vocab()
        names = {i: token for token, i in vocabulary.items()}
        controls = [names[i] for i in chat_format.encode(conversation).input_ids if i in names]
        assert controls == naive_controls(chat_format, conversation)
        assert controls[:2] == ["[gMASK]", "<sop>"]
        assert not {"[gMASK]", "<sop>"} & set(controls[2:])


@given(conversation=conversations(marker_free_contents(), nonstop_terminators=True))
def test_ids_equal_the_checkpoints_own_template(in_each_lane: InEachLane, conversation: Conversation) -> None:
    """If no text holds a marker, the ids are the template's, plus a terminator if the last turn is the assistant's."""
    for chat_format in in_each_lane(allow_nonstop_terminator=True):
        row = chat_format.encode(conversation)
        rendered = list(render(chat_format, conversation, tokenize=True))
        appended = ordered(chat_format, conversation)[-1].role == "assistant"
        ids = row.input_ids[:-1] if appended else row.input_ids
        assert_row(row=replace(row, input_ids=ids), ids=rendered, by=chat_format, rule="apply_chat_template")
        assert len(row.input_ids) == len(rendered) + appended


@given(conversation=conversations(marker_free_contents(), late_system=False, nonstop_terminators=True))
def test_every_turn_is_preceded_by_the_prompt_of_serving(in_each_lane: InEachLane, conversation: Conversation) -> None:
    """The row up to a turn equals the template's prompt for generating that turn."""
    for chat_format in in_each_lane(allow_nonstop_terminator=True):
        row = chat_format.encode(conversation)
        for turn in row.turns:
            history = Conversation(conversation.messages[: turn.message], conversation.tools)
            if history.messages:  # transformers renders no empty conversation
                prompt = render(chat_format, history, tokenize=True, add_generation_prompt=True)
                assert row.input_ids[: turn.start] == list(prompt)


@given(conversation=conversations(late_system=False, nonstop_terminators=True))
def test_prompt_builds_the_beginning_of_the_row(in_each_lane: InEachLane, conversation: Conversation) -> None:
    """``prompt`` and ``encode`` agree for all texts, so generated turns continue prompts that were trained."""
    for chat_format in in_each_lane(allow_nonstop_terminator=True):
        row = chat_format.encode(conversation)
        for turn in row.turns:
            prompt = chat_format.prompt(conversation.messages[: turn.message], conversation.tools)
            assert row.input_ids[: turn.start] == prompt


# --- what is supervised ---------------------------------------------------------------------------------------------


@given(conversation=conversations(nonstop_terminators=True))
def test_supervised_is_what_a_walk_over_control_ids_finds(in_each_lane: InEachLane, conversation: Conversation) -> None:
    """Exactly the tokens after each trained header, up to the next control token, are supervised."""
    for chat_format in in_each_lane(allow_nonstop_terminator=True):
        row = chat_format.encode(conversation)
        expected = naive_supervised(chat_format, row.input_ids, flags(conversation))
        assert_row(row=row, supervised=expected, by=chat_format, rule="walk over control ids")
        assert row.labels == [i if keep else IGNORED for i, keep in zip(row.input_ids, expected, strict=True)]


@given(conversation=conversations())
def test_each_turn_is_one_run_that_ends_in_a_stop_token(in_each_lane: InEachLane, conversation: Conversation) -> None:
    """A trained turn is one run, from after its header to its terminator, a stop id; #targets = sum(len + 1)."""
    for chat_format in in_each_lane():
        row = chat_format.encode(conversation)
        trained = [turn for turn in row.turns if turn.supervised]
        positions = [i for i, keep in enumerate(row.supervised) if keep]
        runs = [[i for _, i in run] for _, run in groupby(enumerate(positions), key=lambda pair: pair[1] - pair[0])]
        assert runs == [list(range(turn.start, turn.end + 1)) for turn in trained]
        assert len(positions) == sum(turn.end - turn.start + 1 for turn in trained)
        for turn in row.turns:
            assert row.input_ids[turn.start - 1] == chat_format.header_ids["assistant"]
            assert row.input_ids[turn.end] in chat_format.stop_ids
        assert not row.supervised[0], "a first token has nothing that predicts it"


@given(conversation=conversations())
def test_a_turn_decodes_to_its_message(in_each_lane: InEachLane, conversation: Conversation) -> None:
    """A turn holds tool name, newline and content, verbatim; turns are the assistant messages in order."""
    for chat_format in in_each_lane():
        row = chat_format.encode(conversation)
        messages = [(i, message) for i, message in enumerate(conversation.messages) if message.role == "assistant"]
        assert [turn.message for turn in row.turns] == [i for i, _ in messages]
        for turn, (_, message) in zip(row.turns, messages, strict=True):
            text = chat_format.tokenizer.decode(
                row.input_ids[turn.start : turn.end], clean_up_tokenization_spaces=False
            )
            assert text == f"{message.metadata}\n{message.content}"
            assert turn.supervised == message.loss


@given(conversation=conversations(nonstop_terminators=True))
def test_segments_cover_the_row_and_agree_with_it(in_each_lane: InEachLane, conversation: Conversation) -> None:
    """Reports are drawn from segments: no gap, roles and messages in order, the same mask as the row's."""
    for chat_format in in_each_lane(allow_nonstop_terminator=True):
        row = chat_format.encode(conversation)
        ends = [0, *(segment.end for segment in row.segments)]
        assert [segment.start for segment in row.segments] == ends[:-1]
        assert ends[-1] == len(row.input_ids) == len(row.supervised)
        assert [keep for s in row.segments for keep in [s.supervised] * (s.end - s.start)] == row.supervised
        bodies = [segment for segment in row.segments if segment.part == "body"]
        blocks = ["system"] * bool(conversation.tools) + [
            message.role for message in ordered(chat_format, conversation)
        ]
        assert [segment.role for segment in bodies] == blocks
        assert [segment.role for segment in row.segments if segment.part == "header"] == blocks
        for segment in bodies:
            if segment.message is not None:
                assert conversation.messages[segment.message].role == segment.role


@given(conversation=conversations(system=True, tools=True))
def test_a_header_is_supervised_only_where_it_ends_a_trained_turn(
    in_each_lane: InEachLane, conversation: Conversation
) -> None:
    """Context and ``<|assistant|>`` are never targets; the header after a trained turn always is."""
    for chat_format in in_each_lane():
        row = chat_format.encode(conversation)
        assert not row.segments[0].supervised
        for before, segment in pairwise(row.segments):
            if segment.part in ("header", "terminator"):
                ends_trained_turn = before.role == "assistant" and before.part == "body" and before.supervised
                assert segment.supervised == ends_trained_turn
                assert not (segment.supervised and segment.role == "assistant")
            elif segment.role != "assistant":
                assert not segment.supervised


# --- options --------------------------------------------------------------------------------------------------------


@given(conversation=conversations())
def test_last_trains_the_last_assistant_message_only(in_each_lane: InEachLane, conversation: Conversation) -> None:
    """The last assistant *message* is trained, with its terminator, if its loss flag is on; the ids do not change."""
    for chat_format in in_each_lane(train_on="last"):
        row = chat_format.encode(conversation)
        trained = [False] * (len(flags(conversation)) - 1) + flags(conversation)[-1:]
        expected = naive_supervised(chat_format, row.input_ids, trained)
        usual = ChatFormat(chat_format.name, chat_format.tokenizer).encode(conversation)
        assert_row(row=row, ids=usual.input_ids, by=chat_format, rule="ids stay")
        assert_row(row=row, supervised=expected, by=chat_format, rule="last turn only")
        assert [turn.supervised for turn in row.turns] == trained


@given(conversation=conversations())
def test_endoftext_replaces_the_appended_terminator_only(in_each_lane: InEachLane, conversation: Conversation) -> None:
    """With ``final_stop="endoftext"`` turns before the last still end with the next role."""
    for chat_format in in_each_lane(final_stop="endoftext"):
        row = chat_format.encode(conversation)
        usual = ChatFormat(chat_format.name, chat_format.tokenizer).encode(conversation)
        expected = naive_ids(chat_format, conversation, final_stop="endoftext")
        assert_row(row=row, ids=expected, supervised=usual.supervised, by=chat_format, rule="final_stop=endoftext")


@given(conversation=conversations(trailing=True))
def test_messages_after_the_last_turn_are_context(in_each_lane: InEachLane, conversation: Conversation) -> None:
    """There is no target after the last turn's terminator, and nothing is appended, whatever ``final_stop``."""
    for chat_format in in_each_lane(final_stop="endoftext"):
        row = chat_format.encode(conversation)
        assert not any(row.supervised[row.turns[-1].end + 1 :])
        assert row.segments[-1].part == "body"
        assert row.segments[-1].role != "assistant"


@given(conversation=conversations(loss=False))
def test_a_row_of_untrained_turns_has_no_target(in_each_lane: InEachLane, conversation: Conversation) -> None:
    """Its terminators are context too. Rows without a target are handled where batches are made."""
    for chat_format in in_each_lane():
        row = chat_format.encode(conversation)
        assert not any(row.supervised)
        assert set(row.labels) == {IGNORED}


@given(conversation=conversations(min_turns=2, loss=True), data=st.data())
def test_a_loss_flag_changes_its_own_turn_only(
    in_each_lane: InEachLane, conversation: Conversation, data: st.DataObject
) -> None:
    for chat_format in in_each_lane():
        turn = data.draw(st.sampled_from(chat_format.encode(conversation).turns))
        messages = list(conversation.messages)
        messages[turn.message] = replace(messages[turn.message], loss=False)
        before, after = (chat_format.encode(c) for c in (conversation, replace(conversation, messages=tuple(messages))))
        changed = [i for i, (a, b) in enumerate(zip(before.supervised, after.supervised, strict=True)) if a != b]
        assert changed == list(range(turn.start, turn.end + 1))
        assert before.input_ids == after.input_ids


# --- turns that no stop token ends ----------------------------------------------------------------------------------


@given(conversation=conversations(nonstop_terminators=True, min_turns=2))
def test_a_turn_that_no_stop_token_ends_is_refused_with_its_place(
    in_each_lane: InEachLane, conversation: Conversation
) -> None:
    """Exactly such conversations are refused, and the error names file, line and message."""
    for chat_format in in_each_lane():
        placed = replace(conversation, line=7, path="chat.jsonl")
        offending = nonstop(chat_format, conversation)
        if not offending:
            chat_format.encode(placed)
            continue
        with pytest.raises(DataError) as caught:
            chat_format.encode(placed)
        index = next(i for i, message in enumerate(conversation.messages) if message is offending[0])
        assert caught.value.where == f"chat.jsonl:7: messages[{index}].role"
        assert offending[0].role in caught.value.message
        assert "--allow_nonstop_terminator" in caught.value.fix


def test_on_request_the_second_header_is_the_first_turns_terminator(chat_format: ChatFormat) -> None:
    """A generation that spans both messages has to sample the header between them."""
    chat_format = ChatFormat(chat_format.name, chat_format.tokenizer, allow_nonstop_terminator=True)
    messages = (Message("user", "a"), Message("assistant", "b"), Message("assistant", "{}", "f"))
    row = chat_format.encode(Conversation(messages, TOOLS))
    first, second = row.turns
    assert row.input_ids[first.end] == chat_format.header_ids["assistant"]
    assert (first.end + 1, row.supervised[first.end]) == (second.start, True)
    assert row.input_ids[second.end] == chat_format.header_ids["observation"]


# --- the oracle's own assumptions -----------------------------------------------------------------------------------


def test_text_without_markers_holds_none_of_the_tokenizers_control_tokens(tokenizer: Any) -> None:
    """The strategies know every control token, so that text without markers cannot become one in the template."""
    assert set(tokenizer.get_added_vocab()) <= set(MARKERS)


def test_a_failure_shows_the_first_difference(chat_format: ChatFormat) -> None:
    row = chat_format.encode(Conversation((Message("user", "a"), Message("assistant", "b"))))
    with pytest.raises(AssertionError, match=r"the rule: position 3 of 9/9: .*\n.*\[2 '<\|user\|>'\]"):
        assert_row(row=row, supervised=[i >= 3 for i in range(9)], by=chat_format, rule="the rule")
