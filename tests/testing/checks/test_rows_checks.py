"""Every check of rows passes for this project's encoder and fails, with its reason, for a faulty one.

Run: pytest tests/testing/checks/test_rows_checks.py  [--glm4ft-tokenizer FOLDER: a real GLM-4 tokenizer too]
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from glm4ft.data.chat_format import ChatFormat
from glm4ft.model.tiny import write_tiny_base
from glm4ft.testing.checks import loss_flags, rows
from glm4ft.testing.specification.mask_oracle import (
    IGNORED,
    Mistake,
    Undecidable,
    control_ids,
    find_mistakes,
    find_turns,
)
from glm4ft.testing.subjects import own
from glm4ft.testing.subjects.founding_bug import FoundingBugFormat
from glm4ft.testing.subjects.own import Subject
from glm4ft.testing.trial.bank import answer, user
from glm4ft.testing.trial.registry import CHECKS, Check
from glm4ft.testing.trial.stages import CheckFailed, NotApplicable
from glm4ft.testing.trial.trial import Trial

MODULES = {rows.__name__, loss_flags.__name__}
ROWS = {check.name: check for check in CHECKS if check.run.__module__ in MODULES and "train" not in check.needs}
Messages = Sequence[dict[str, Any]]
Lists = dict[str, list[int]]


class Serving(Subject):
    """This project's encoder, with a prompt that is cut out of a row and independent of the project's own prompt."""

    def __init__(self, base_dir: str) -> None:
        super().__init__(base_dir)
        self.controls = control_ids(self.tokenizer)

    def prompt(self, messages: Messages, tools: Any = None) -> list[int]:
        probe = [*messages, {"role": "assistant", "content": "probe"}]
        row = Subject.encode(self, probe, tools)
        return row["input_ids"][: find_turns(row["input_ids"], probe, self.controls)[-1].header + 1]


# --- faults: each is a subject that differs from the right one in one respect ---------------------------------------


class Founding(Serving):
    def __init__(self, base_dir: str) -> None:
        super().__init__(base_dir)
        self.format = FoundingBugFormat(self.chat_format, self.tokenizer)


class Edited(Serving):
    """Encodes the right row, then calls ``edit``, which gets ids, labels and turns and changes them in place."""

    def encode(self, messages: Messages, tools: Any = None) -> Lists:
        row = super().encode(messages, tools)
        ids, labels = row["input_ids"], row["labels"]
        self.edit(ids, labels, find_turns(ids, messages, self.controls), messages)
        return {"input_ids": ids, "labels": labels}

    def edit(self, ids: list[int], labels: list[int], turns: list[Any], messages: Messages) -> None:
        raise NotImplementedError


class HeaderTrained(Edited):
    def edit(self, ids: Any, labels: Any, turns: Any, messages: Any) -> None:
        for turn in turns:
            labels[turn.header] = ids[turn.header]


class StopIgnored(Edited):
    def edit(self, ids: Any, labels: Any, turns: Any, messages: Any) -> None:
        for turn in turns:
            labels[turn.end] = IGNORED


class StopMissing(Edited):
    def edit(self, ids: Any, labels: Any, turns: Any, messages: Any) -> None:
        if messages[-1]["role"] == "assistant":
            del ids[-1], labels[-1]


class WrongStop(Edited):
    def edit(self, ids: Any, labels: Any, turns: Any, messages: Any) -> None:
        ids[turns[0].end] = labels[turns[0].end] = self.controls["<|system|>"]


class TextBehindStop(Edited):
    def edit(self, ids: Any, labels: Any, turns: Any, messages: Any) -> None:
        ids.append(self.tokenizer.encode("\n", add_special_tokens=False)[0])
        labels.append(IGNORED)


class GenerationPromptAppended(Edited):
    def edit(self, ids: Any, labels: Any, turns: Any, messages: Any) -> None:
        ids.append(self.controls["<|assistant|>"])
        labels.append(IGNORED)


class StopUnknownToServing(Serving):
    def __init__(self, base_dir: str) -> None:
        super().__init__(base_dir)
        self.stop_ids = [self.controls["<|endoftext|>"]]


class EndOfText(Edited):
    """Not a fault: the other convention for the end of a conversation."""

    def edit(self, ids: Any, labels: Any, turns: Any, messages: Any) -> None:
        if messages[-1]["role"] == "assistant":
            ids[-1] = self.controls["<|endoftext|>"]
            labels[-1] = IGNORED if labels[-1] == IGNORED else ids[-1]


class DoublePrefix(Edited):
    def edit(self, ids: Any, labels: Any, turns: Any, messages: Any) -> None:
        ids[:0], labels[:0] = ids[:2], labels[:2]


class PrefixMissing(Edited):
    def edit(self, ids: Any, labels: Any, turns: Any, messages: Any) -> None:
        del ids[:2], labels[:2]


class MaskShifted(Edited):
    def edit(self, ids: Any, labels: Any, turns: Any, messages: Any) -> None:
        keep = [label != IGNORED for label in labels]
        labels[:] = [i if k else IGNORED for i, k in zip(ids, [*keep[1:], False], strict=True)]


class NewlineIgnored(Edited):
    def edit(self, ids: Any, labels: Any, turns: Any, messages: Any) -> None:
        for turn in turns:
            labels[turn.header + 1] = IGNORED


class LabelsShifted(Edited):
    def edit(self, ids: Any, labels: Any, turns: Any, messages: Any) -> None:
        labels[:] = [*labels[1:], IGNORED]


class LabelsShort(Edited):
    def edit(self, ids: Any, labels: Any, turns: Any, messages: Any) -> None:
        del labels[-1]


class FirstTrained(Edited):
    def edit(self, ids: Any, labels: Any, turns: Any, messages: Any) -> None:
        labels[0] = ids[0]


class OnlyLastTurn(Edited):
    def edit(self, ids: Any, labels: Any, turns: Any, messages: Any) -> None:
        for turn in turns[:-1]:
            labels[turn.header : turn.end + 1] = [IGNORED] * (turn.end + 1 - turn.header)


class PromptsTrained(Edited):
    def edit(self, ids: Any, labels: Any, turns: Any, messages: Any) -> None:
        labels[:] = [IGNORED, *ids[1:]]


class TrailingTrained(Edited):
    def edit(self, ids: Any, labels: Any, turns: Any, messages: Any) -> None:
        labels[turns[-1].end :] = ids[turns[-1].end :]


class Flags(Serving):
    """Reads loss flags wrongly: it ignores them."""

    def encode(self, messages: Messages, tools: Any = None) -> Lists:
        return super().encode([self.read(m, messages) for m in messages], tools)

    def read(self, message: dict[str, Any], messages: Messages) -> dict[str, Any]:
        return {key: value for key, value in message.items() if key != "loss"}


class FlagForAll(Flags):
    def read(self, message: dict[str, Any], messages: Messages) -> dict[str, Any]:
        off = any(m.get("loss") is False for m in messages) and message["role"] == "assistant"
        return {**message, "loss": False} if off else message


class DropsFlagged(Serving):
    def encode(self, messages: Messages, tools: Any = None) -> Lists:
        kept = [m for m in messages if m.get("loss") is not False]
        return super().encode(kept, tools)


class MarkersEncoded(Serving):
    """Encodes the joined text with the tokenizer, and finds the mask by searching for control ids."""

    def encode(self, messages: Messages, tools: Any = None) -> Lists:
        text = "".join(f"<|{m['role']}|>{m.get('metadata', '')}\n{m['content']}" for m in messages) + "<|user|>"
        ids = self.tokenizer.encode("[gMASK]<sop>" + text, add_special_tokens=False)
        labels, inside = [], False
        for token in ids:
            labels.append(token if inside else IGNORED)
            if token in self.controls.values():
                inside = token == self.controls["<|assistant|>"]
        return {"input_ids": ids, "labels": labels}


class OnlyMarkersEncoded(MarkersEncoded):
    """Right except for texts that contain markers."""

    def encode(self, messages: Messages, tools: Any = None) -> Lists:
        marked = any("<|" in message["content"] for message in messages)
        return super().encode(messages, tools) if marked else Subject.encode(self, messages, tools)


class MarkersDropped(Serving):
    """Drops messages whose content contains a marker, with their header."""

    def encode(self, messages: Messages, tools: Any = None) -> Lists:
        return super().encode([m for m in messages if "<|" not in m["content"]] or messages, tools)


class Stripped(Serving):
    def encode(self, messages: Messages, tools: Any = None) -> Lists:
        return super().encode([{**m, "content": m["content"].strip() or "\n"} for m in messages], tools)


class HistoryRewritten(Serving):
    def encode(self, messages: Messages, tools: Any = None) -> Lists:
        last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
        cut = [{**m, "content": m["content"][:1]} if m["role"] == "assistant" else m for m in messages[:last]]
        return super().encode([*cut, *messages[last:]], tools)


class SystemDropped(Serving):
    def encode(self, messages: Messages, tools: Any = None) -> Lists:
        return super().encode([m for m in messages if m["role"] != "system"], tools)


class ToolNameDropped(Serving):
    def encode(self, messages: Messages, tools: Any = None) -> Lists:
        return super().encode([{**m, "metadata": ""} for m in messages], tools)


class CallEndsLikeReply(Edited):
    def edit(self, ids: Any, labels: Any, turns: Any, messages: Any) -> None:
        if messages[-1].get("metadata"):
            ids[-1] = labels[-1] = self.controls["<|user|>"]


class NewlineInPrompt(Serving):
    def prompt(self, messages: Messages, tools: Any = None) -> list[int]:
        return [*super().prompt(messages, tools), *self.tokenizer.encode("\n", add_special_tokens=False)]


class PromptWithoutHeader(Serving):
    def prompt(self, messages: Messages, tools: Any = None) -> list[int]:
        return super().prompt(messages, tools)[:-1]


class PromptStripped(Serving):
    def prompt(self, messages: Messages, tools: Any = None) -> list[int]:
        return super().prompt([{**m, "content": m["content"].strip() or "x"} for m in messages], tools)


@dataclass(frozen=True)
class Case:
    """A fault, the check that must fail, and regular expressions that its message must match."""

    fault: type[Serving]
    check: str
    says: tuple[str, ...]


LISTS = "lists_have_one_length_and_labels_equal_ids_where_supervised"
MASK = "mask_is_what_the_model_must_sample"
PREFIX = "prefix_occurs_once"


class ZeroIsTrue(Serving):
    def encode(self, messages: Messages, tools: Any = None) -> Lists:
        return super().encode([{**m, "loss": m.get("loss") is not False} for m in messages], tools)


STOP = "every_turn_ends_in_one_stop"
CONTROL = "content_never_becomes_a_control_token"
TEXT = "supervised_text_is_the_answer"
MESSAGES = "every_message_is_in_the_row"
PROMPT = "row_begins_with_the_serving_prompt"
EARLIER = "earlier_turns_do_not_change"
FLAG = "loss_flag_is_honoured"
SPELLINGS = "loss_flag_means_the_same_in_every_spelling"
NONE = "conversation_without_targets_is_not_trained"

HEADER_WRONG = r"'<\|assistant\|>' is supervised, should be ignored: a header"
STOP_WRONG = r"'<\|user\|>' is ignored, should be supervised: the terminator"
CASES = (
    Case(LabelsShort, LISTS, (r"\d+ input_ids but \d+ labels",)),
    Case(LabelsShifted, LISTS, (r"conversation 1 \(reply\), position \d+: label \d+ over id \d+ '",)),
    Case(FirstTrained, LISTS, ("position 0 is supervised", r"\[0 '\[gMASK\]'\]")),
    Case(Founding, MASK, (HEADER_WRONG, STOP_WRONG, "wrong labels: 2", r"turn 1 \(message 1\): position \d+")),
    Case(HeaderTrained, MASK, (HEADER_WRONG, "wrong labels: 1")),
    Case(StopIgnored, MASK, (STOP_WRONG,)),
    Case(StopMissing, MASK, (r"turn 1 \(message 1\): no terminator", "end of the row")),
    Case(MaskShifted, MASK, (HEADER_WRONG, STOP_WRONG)),
    Case(NewlineIgnored, MASK, (r"'\\n' is ignored, should be supervised: part of the answer",)),
    Case(OnlyLastTurn, MASK, (r"conversation 3 \(several turns\)", "turn 1 .* part of the answer", "like it")),
    Case(PromptsTrained, MASK, ("is supervised, should be ignored: context", "a prefix token", HEADER_WRONG)),
    Case(TrailingTrained, MASK, ("after the last turn: .* should be ignored: context",)),
    Case(GenerationPromptAppended, MASK, (r"2 <\|assistant\|> for 1 assistant turns",)),
    Case(DoublePrefix, PREFIX, (r"position 2: '\[gMASK\]' is a second prefix",)),
    Case(PrefixMissing, PREFIX, (r"should begin with \[gMASK\]<sop>",)),
    Case(StopMissing, STOP, ("no terminator; the row ends after the answer", "end of the row")),
    Case(StopIgnored, STOP, (r"terminator '<\|user\|>', is ignored, should be supervised",)),
    Case(Founding, STOP, (r"terminator '<\|user\|>', is ignored",)),
    Case(WrongStop, STOP, (r"terminator '<\|system\|>', should be <\|user\|> or <\|endoftext\|>",)),
    Case(TextBehindStop, STOP, ("should end the row, but tokens follow it",)),
    Case(StopUnknownToServing, STOP, (r"terminator '<\|user\|>', is not among the subject's stop_ids",)),
    Case(MarkersEncoded, CONTROL, (r"message 0 \(user\): \d+ control ids, should be \d+ .* comes from content",)),
    Case(MarkersDropped, CONTROL, ("the text of message 0 changes control ids",)),
    Case(MaskShifted, TEXT, (r"decode to '<\|assistant\|>\\na river', should be '\\na river<\|user\|>'",)),
    Case(NewlineIgnored, TEXT, (r"decode to 'a river<\|user\|>'",)),
    Case(StopMissing, TEXT, (r"decode to '\\na river', should be",)),
    Case(Stripped, TEXT, (r"white space\), turn 1 .*should be '\\n\\n\\n it is \\n<\|user\|>'",)),
    Case(OnlyLastTurn, TEXT, ("1 supervised runs, should be 3",)),
    Case(HistoryRewritten, TEXT, (r"decode to '\\nh<\|user\|>', should be '\\nhello you",)),
    Case(ToolNameDropped, TEXT, (r"\(tool call\), .*should be 'get_weather\\n",)),
    Case(CallEndsLikeReply, STOP, (r"terminator '<\|user\|>', should be <\|observation\|> or <\|endoftext\|>",)),
    Case(SystemDropped, MESSAGES, (r"\(system\), message 0 \(system\), 'be clear', is not in the row",)),
    Case(Stripped, MESSAGES, (r"\(white space\), message 0 \(user\), '  hi \\n'",)),
    Case(NewlineInPrompt, PROMPT, (r"serving sends '\\n'", r"turn 1 \(message 1\): serving sends \d+ ids")),
    Case(PromptWithoutHeader, PROMPT, ("serving sends nothing", r"\[\d+ '<\|assistant\|>'\]")),
    Case(PromptStripped, PROMPT, (r"\(white space\), turn 1",)),
    Case(DoublePrefix, PROMPT, ("at position 2 serving sends",)),
    Case(HistoryRewritten, EARLIER, ("the ids of the conversation to turn 1 change when more follows",)),
    Case(OnlyLastTurn, EARLIER, (r"the labels of the conversation to turn 1 change .* was \d+ for '\\n', is -100",)),
    Case(Flags, FLAG, (r"turn 1 \(message 1\) has loss false: position \d+ '\\n' is supervised, should be ignored",)),
    Case(FlagForAll, FLAG, ("is ignored, should be supervised",)),
    Case(DropsFlagged, FLAG, ("the flag changes the ids at position",)),
    Case(ZeroIsTrue, SPELLINGS, ("a loss flag of 0 is taken for true, it means false",)),
    Case(Flags, NONE, ("every loss is false, but position",)),
    Case(TrailingTrained, NONE, ("is supervised, should be ignored: no answer follows it",)),
    Case(PromptsTrained, NONE, ("no answer follows it",)),
)


@pytest.fixture(scope="module", autouse=True)
def _each_base_is_read_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own, "load_base", functools.cache(own.load_base))
        yield


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def try_subject(base_dir: Path, tmp_path: Path) -> Callable[[type[Subject]], Trial]:
    return lambda kind: Trial(kind(str(base_dir)), base_dir, tmp_path)


MakeTrial = Callable[[type[Subject]], Trial]
each_check = pytest.mark.parametrize("check", ROWS.values(), ids=list(ROWS))


def test_every_claim_has_a_case_that_breaks_it() -> None:
    assert {case.check for case in CASES} == set(ROWS)
    assert all(check.incident and check.stage == "rows" for check in ROWS.values())


@each_check
def test_holds_for_this_projects_encoder(check: Check, try_subject: MakeTrial) -> None:
    check.run(try_subject(Subject))


@each_check
def test_holds_in_every_lane(check: Check, chat_format: ChatFormat, tmp_path: Path) -> None:
    """With both chat formats, and with a real tokenizer if one is given."""
    subject = Serving.__new__(Serving)  # rows need no base
    subject.tokenizer, subject.chat_format, subject.format = chat_format.tokenizer, chat_format.name, chat_format
    subject.stop_ids, subject.controls = chat_format.stop_ids, control_ids(chat_format.tokenizer)
    trial = Trial(subject, tmp_path, tmp_path)
    trial.base_tokenizer = subject.tokenizer
    check.run(trial)


@each_check
def test_holds_where_endoftext_ends_a_conversation(check: Check, try_subject: MakeTrial) -> None:
    check.run(try_subject(EndOfText))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.fault.__name__}-{case.check}")
def test_fails_for_a_faulty_encoder(case: Case, try_subject: MakeTrial) -> None:
    with pytest.raises(CheckFailed) as caught:
        ROWS[case.check].run(try_subject(case.fault))
    message = str(caught.value)
    assert message.startswith("conversation ")
    for pattern in case.says:
        assert re.search(pattern, message), message


def test_marker_text_that_becomes_control_tokens_hides_no_other_fault(try_subject: MakeTrial) -> None:
    """It fails only the check of marker text; the others judge rows without markers."""
    failed = []
    for check in ROWS.values():
        try:
            check.run(try_subject(OnlyMarkersEncoded))
        except CheckFailed:
            failed.append(check.name)
    assert failed == [CONTROL]


def test_a_failure_shows_every_kind_of_mistake_with_the_tokens_around_it(try_subject: MakeTrial) -> None:
    with pytest.raises(CheckFailed) as caught:
        ROWS[MASK].run(try_subject(Founding))
    lines = str(caught.value).splitlines()
    assert lines[0] == "conversation 1 (reply), wrong labels: 2"
    assert lines[1].endswith("a header, which serving sends and the model never samples")
    assert re.search(r"\[\d+ '<\|assistant\|>'\]", lines[2])
    assert lines[3].endswith("the terminator, which the model must sample to stop")
    assert re.search(r"' river'  \[\d+ '<\|user\|>'\]$", lines[4])


@each_check
def test_without_a_chat_format_only_rules_for_every_template_apply(check: Check, try_subject: MakeTrial) -> None:
    trial = try_subject(Serving)
    trial.subject.chat_format = None
    if check.name in (PREFIX, TEXT):
        with pytest.raises(NotApplicable, match="glm-4-9b-chat and glm-4-0414"):
            check.run(trial)
    else:
        check.run(trial)


@each_check
def test_a_base_without_a_template_for_tools_is_not_asked_for_them(
    check: Check, try_subject: MakeTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = try_subject(Serving)
    monkeypatch.setattr(trial.base_tokenizer, "chat_template", "{{ messages[0].content }}")
    check.run(trial)


def test_lists_that_differ_in_length_are_judged_once(try_subject: MakeTrial) -> None:
    for name in set(ROWS) - {LISTS}:
        with pytest.raises((NotApplicable, CheckFailed), match="differ in length"):
            ROWS[name].run(try_subject(LabelsShort))


def test_refusing_a_conversation_without_targets_is_fine(try_subject: MakeTrial) -> None:
    class Refuses(Serving):
        def encode(self, messages: Messages, tools: Any = None) -> Lists:
            row = super().encode(messages, tools)
            if set(row["labels"]) == {IGNORED}:
                raise ValueError("no target")
            return row

    ROWS[NONE].run(try_subject(Refuses))


# --- the oracle alone, on ids written by hand -----------------------------------------------------------------------

P, S, USER, BOT, TOOL, END, SYSTEM = range(100, 107)
CONTROLS = {
    "[gMASK]": P, "<sop>": S, "<|user|>": USER, "<|assistant|>": BOT, "<|observation|>": TOOL, "<|endoftext|>": END,
    "<|system|>": SYSTEM,
}  # fmt: skip
HAND_WRITTEN = [user("q"), answer("f", loss=False), user("q"), answer("a")]
IDS = [P, S, USER, 1, BOT, 2, 3, USER, 1, BOT, 4, USER]
LABELS = [IGNORED] * 10 + [4, USER]


def test_the_oracle_accepts_the_right_labels_and_skips_a_turn_whose_loss_is_false() -> None:
    turns = find_turns(IDS, HAND_WRITTEN, CONTROLS)
    assert [(t.message, t.header, t.end, t.supervised) for t in turns] == [(1, 4, 7, False), (3, 9, 11, True)]
    assert not list(find_mistakes(IDS, LABELS, turns, CONTROLS))


@pytest.mark.parametrize(
    ("position", "kind"),
    [(0, "prefix"), (2, "context"), (3, "context"), (4, "header"), (5, "loss false"), (7, "loss false"), (9, "header"),
     (10, "answer"), (11, "terminator")],
)  # fmt: skip
def test_the_oracle_names_each_kind_of_mistake(position: int, kind: str) -> None:
    labels = [*LABELS]
    labels[position] = IDS[position] if labels[position] == IGNORED else IGNORED
    turns = find_turns(IDS, HAND_WRITTEN, CONTROLS)
    expected = Mistake(kind, position, labels[position] != IGNORED)
    assert list(find_mistakes(IDS, labels, turns, CONTROLS)) == [expected]


def test_the_oracle_does_not_guess_whose_turn_it_is() -> None:
    with pytest.raises(Undecidable, match=r"2 <\|assistant\|> for 1 assistant turns"):
        find_turns(IDS, HAND_WRITTEN[:2], CONTROLS)
