"""Claims about the rendering of conversations: role headers, tools, long texts, and no influence of earlier ones."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glm4ft.data.control_tokens import common_prefix_length
from glm4ft.testing.checks.encoding import (
    DENSE_FORMATS,
    bank_of,
    chat_format_of,
    controls_of,
    conversation_of,
    fail,
    name_of,
    row_of,
)  # fmt: skip
from glm4ft.testing.recording.record import record
from glm4ft.testing.replay.matching import KnownRows
from glm4ft.testing.specification.mask_oracle import END_OF_TEXT, HEADERS, IGNORED, PREFIX, show_token
from glm4ft.testing.subject import make_plan, parts
from glm4ft.testing.trial.bank import SEVERAL, WEATHER, Talk, answer, user
from glm4ft.testing.trial.registry import check
from glm4ft.testing.trial.stages import CheckFailed, NotApplicable
from glm4ft.testing.trial.trial import Trial

CLOCK: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "the time of a zone",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}},
    },
}
# Longer than the lengths at which pipelines cut by default: 512, 1024, 2048, 4096 tokens.
LONG_TEXT = "the river runs through the city " * 720  # a token per word with most tokenizers
REASONING = ("<think>wonder</think>", "wonder</think>plain", "<think>wonder", "<think>wonder</think>plain")


@check(
    stage="rows", incident="GLM-4 081f0fb: a slice of fixed length ate the role header; axolotl 2859: one header more"
)
def check_every_message_has_its_header(trial: Trial) -> None:
    """The control ids of a row are the prefix, one header per message in order, and at most one stop at the end."""
    controls = controls_of(trial)
    names = {token_id: token for token, token_id in controls.items()}
    for talk in bank_of(trial):
        row = row_of(trial, talk)
        found = [(i, names[token]) for i, token in enumerate(row.ids) if token in names]
        messages = _with_headers(trial, talk.messages)
        expected = [*PREFIX, *(HEADERS[message["role"]] for message in messages)]
        if talk.tools and [token for _, token in found[2:3]] == [HEADERS["system"]]:
            expected.insert(len(PREFIX), HEADERS["system"])  # the block that declares the tools
        got = [token for _, token in found]
        at = next(
            (i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), min(len(got), len(expected))
        )
        rest = got[len(expected) :]
        if (
            at < len(expected)
            or len(rest) > 1
            or not set(rest) <= {HEADERS["user"], HEADERS["observation"], END_OF_TEXT}
        ):
            position = found[at][0] if at < len(found) else len(row.ids)
            found_token = got[at] if at < len(got) else "the end of the row"
            if at >= len(expected):
                extra = "".join(rest)
                fail(trial, row, f"{extra} follows the last message, where at most one stop token should end the row",
                     position)  # fmt: skip
            number = at - (len(expected) - len(messages))
            owner = f" for message {number} ({messages[number]['role']})" if number >= 0 else ""
            fail(trial, row, f"control token {at + 1} is {found_token}, should be {expected[at]}{owner}", position)


def _with_headers(trial: Trial, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages that have a header: results that follow each other share one where calls can be parallel."""
    if chat_format_of(trial) in DENSE_FORMATS:
        return list(messages)
    before = ("", *(message["role"] for message in messages))
    return [m for m, role in zip(messages, before, strict=False) if not (m["role"] == role == "tool")]


@check(stage="rows", incident="axolotl 1265, LMFlow 394: ids of another conversation came out of a cache")
def check_encoding_depends_on_the_conversation_alone(trial: Trial) -> None:
    """A conversation always gives the same row, whatever was encoded before, and is not modified by encoding."""
    talks = bank_of(trial)
    first = [row_of(trial, talk) for talk in talks]
    for i, row in enumerate(first):
        twin = next((other for other in first[:i] if other.ids == row.ids), None)
        if twin:
            raise CheckFailed(f"conversations {name_of(twin.talk)} and {name_of(row.talk)} became the same row")
    for talk, before in [*zip(talks, first, strict=True)][::-1]:
        conversation = conversation_of(trial, talk)
        given = copy.deepcopy(conversation)
        ((ids, labels),) = trial.rows([conversation])
        if conversation != given:
            raise CheckFailed(f"conversation {name_of(talk)} was changed by encoding it")
        if (ids, labels) != (before.ids, before.labels):
            where = common_prefix_length(ids, before.ids)
            fail(trial, before, f"encoded again after others the row differs, at position {where}", where)


@check(stage="rows", incident="GLM-4 finetune.py process_message: tools of other rows left null keys behind")
def check_tools_of_other_conversations_are_not_rendered(trial: Trial) -> None:
    """A row has its own tools as they are declared, and neither those of other conversations nor null values."""
    if not any(talk.tools for talk in bank_of(trial)):
        raise NotApplicable("the subject accepts no tools")
    talks = [Talk("a tool", (user("now?"), answer("yes")), (tool,)) for tool in (WEATHER, CLOCK)]
    texts = [trial.subject.tokenizer.decode(row_of(trial, talk).ids) for talk in talks]
    for text, tool, own, other in ((texts[0], WEATHER, "city", "zone"), (texts[1], CLOCK, "zone", "city")):
        for what, said in (("argument", own), ("description", tool["function"]["description"])):
            if said not in text:
                raise CheckFailed(f"the {what} {said!r} of the declared tool is not in the row")
        for word in (f'"{other}"', "null", "None"):
            if word in text:
                raise CheckFailed(f"{word} is in the row of a tool whose only argument is {own!r}")


@check(stage="rows", incident="axolotl 1818, LLaMA-Factory 6632: the length that was asked for never arrived")
def check_long_conversations_are_not_cut(trial: Trial) -> None:
    """A conversation longer than common default limits is encoded whole."""
    talk = Talk("a long one", (user(LONG_TEXT), answer("the end of it")))
    ((ids, labels),) = trial.rows([conversation_of(trial, talk)])
    if len(ids) != len(labels):
        raise CheckFailed(f"a long conversation has {len(ids)} input_ids but {len(labels)} labels")
    text = trial.subject.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if LONG_TEXT.strip() not in text or "the end of it" not in text:
        change = f"was cut to a row of {len(ids):,} tokens" if len(text) < len(LONG_TEXT) else "is not in its row"
        raise CheckFailed(f"a conversation of {len(LONG_TEXT):,} characters {change}")
    _require_limit_is_told(trial)


def _require_limit_is_told(trial: Trial) -> None:
    """Fail if a row over the subject's ``max_length`` is cut without an error or a warning."""
    longest = getattr(trial.subject, "max_length", None)
    if not isinstance(longest, int):
        return
    per_word = len(trial.rows([_long_talk(trial, 20)])[0][0]) - len(trial.rows([_long_talk(trial, 19)])[0][0])
    fixed = len(trial.rows([_long_talk(trial, 1)])[0][0]) - per_word
    num_fitting = (longest - fixed) // per_word
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for num_words, fits in ((num_fitting, True), (num_fitting + 1, False)):
            expected = fixed + num_words * per_word
            try:
                ((ids, _),) = trial.rows([_long_talk(trial, num_words)])
            except Exception as error:
                if fits:
                    raise CheckFailed(
                        f"a row of {expected:,} tokens is refused under a limit of {longest:,}"
                    ) from error
                continue
            if len(ids) < expected and not told:
                raise CheckFailed(f"a row of {expected:,} tokens is cut to {len(ids):,}, and nothing says so")


def _long_talk(trial: Trial, num_words: int) -> dict[str, Any]:
    return conversation_of(trial, Talk("a very long one", (user("why " * num_words), answer("the end of it"))))


@check(stage="rows", incident="ms-swift 9266: turns were joined, and the flags of one taken for both")
def check_adjacent_answers_keep_their_loss_flags(trial: Trial) -> None:
    """Two assistant messages in a row are refused, or each is trained as its own flag says."""
    for flags in ((False, True), (True, False)):
        messages = (user("hi"), answer("first", loss=flags[0]), answer("second", loss=flags[1]))
        try:
            row = row_of(trial, Talk("two answers in a row", messages))
        except NotApplicable:
            raise
        except Exception:  # the data cannot say whether the second header is sampled, so refusing is right
            return
        text = trial.subject.tokenizer.decode([token for token in row.labels if token != IGNORED])
        for word, flag in zip(("first", "second"), flags, strict=True):
            if (word in text) != flag:
                raise CheckFailed(
                    f"of two assistant messages in a row the {word} has loss {str(flag).lower()}, but is "
                    f"{'not ' if flag else ''}supervised: {text!r}"
                )


@check(stage="rows", incident="TRL 6363, LLaMA-Factory 9219: reasoning was cut out at one tag of two")
def check_reasoning_tags_are_encoded_as_text(trial: Trial) -> None:
    """In formats without reasoning, ``<think>`` and ``</think>`` stay text, in pairs and alone."""
    if chat_format_of(trial) not in DENSE_FORMATS:
        raise NotApplicable("the claim is about GLM-4 formats without reasoning of their own")

    def text_of(*messages: dict[str, Any]) -> str:
        ids = row_of(trial, Talk("reasoning tags", messages)).ids
        return str(trial.subject.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def as_earlier_answer(content: str) -> str:
        return text_of(user("hi"), answer(content), user("and now?"), answer("end"))

    for content in REASONING:
        text = text_of(user(content), answer(content))
        if text.count(content) != 2:
            raise CheckFailed(f"{content!r} as question and as answer became {text!r}")
        text = as_earlier_answer(content)
        # where any text changes in earlier turns, it is not about reasoning, and another check says so
        if content not in text and "plain words" in as_earlier_answer("plain words"):
            raise CheckFailed(f"{content!r} as an earlier answer became {text!r}")


@check(stage="rows", incident="axolotl 1298, open-instruct 1518: the cache's key knew neither tokenizer nor template")
def check_no_stale_ids_are_used(trial: Trial) -> None:
    """If tokenizer or conversations change while the output folder stays, the new rows are trained, not cached ones."""
    base = _with_other_ids(trial)
    other = trial.subject_on(base)
    talk = conversation_of(trial, Talk("several turns", SEVERAL))
    ((before, _),), row = trial.rows([talk]), other.encode(copy.deepcopy(talk["messages"]), None)
    if tuple(row["input_ids"]) == before:
        raise CheckFailed("with another tokenizer the ids are still those of the first one")
    if not {"train", "build_model"} <= parts(trial.subject):
        return
    folder, changed = trial.new_folder("stale"), [_changed(c) for c in trial.conversations]
    trace = _train(trial, trial.subject, trial.base_dir, trial.conversations, folder)
    if not _trains_its_rows(trace, trial.subject, trial.conversations):
        raise NotApplicable("not judged: the trained rows are not those of encode even before anything changes")
    _require_fresh(trial, other, base, trial.conversations, folder, "the tokenizer")
    _require_fresh(trial, trial.subject, trial.base_dir, changed, folder, "the conversations")


def _require_fresh(trial: Trial, subject: Any, base: Path, conversations: Any, folder: Path, what: str) -> None:
    """Fail if the trained rows are not those that the subject encodes now."""
    trace = _train(trial, subject, base, conversations, folder)
    if not _trains_its_rows(trace, subject, conversations):
        ids = trace.steps[0].forwards[0].input_ids_BT[0].tolist()
        shown = show_token(subject.tokenizer, ids, len(ids) // 2)
        raise CheckFailed(f"after a change of {what} in the same folder, old rows are trained (as {shown})")


def _trains_its_rows(trace: Any, subject: Any, conversations: Any) -> bool:
    encoded = [subject.encode(c["messages"], c.get("tools")) for c in conversations]
    known = KnownRows([(tuple(row["input_ids"]), tuple(row["labels"])) for row in encoded])
    seen = [known.find_in(forward) for step in trace.steps for forward in step.forwards]
    return all(matches.rows and not matches.unknown for matches in seen)


def _train(trial: Trial, subject: Any, base: Path, conversations: Any, folder: Path) -> Any:
    model = subject.build_model(str(base), 0)
    with record(model, 1) as trace:
        subject.train(model, conversations, make_plan(steps=1, output_dir=str(folder)))
    return trace


def _changed(conversation: dict[str, Any]) -> dict[str, Any]:
    first, *rest = conversation["messages"]
    return {**conversation, "messages": [{**first, "content": "now " + first["content"]}, *rest]}


def _with_other_ids(trial: Trial) -> Path:
    """A copy of the base whose tokenizer has the ids of two tokens swapped in each set of texts that is encoded."""
    folder = trial.copy_of_base("other-ids")
    file = folder / "tokenizer.json"
    if not file.exists():
        raise NotApplicable("the base has no tokenizer.json to change")
    stored = json.loads(file.read_text("utf-8"))
    vocab = stored["model"]["vocab"]
    if not isinstance(vocab, dict):
        raise NotApplicable("the base's tokenizer has no vocabulary by token")
    tokens = {token_id: token for token, token_id in vocab.items()}
    swapped: set[int] = set()
    for messages in (SEVERAL, trial.conversations[0]["messages"]):
        text = " ".join(message["content"] for message in messages)
        found = dict.fromkeys(trial.base_tokenizer.encode(text, add_special_tokens=False))
        one, other = [token_id for token_id in found if token_id in tokens and token_id not in swapped][-2:]
        vocab[tokens[one]], vocab[tokens[other]] = other, one
        swapped |= {one, other}
    file.write_text(json.dumps(stored, ensure_ascii=False), "utf-8")
    return folder
