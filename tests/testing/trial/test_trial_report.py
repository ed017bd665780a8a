"""The report of a trial shows what the subject supervises, what the model learned, and where to look for the fault.

Run: pytest tests/testing/trial/test_trial_report.py
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from glm4ft.report.content import Content
from glm4ft.report.failure_card import MAX_LINES
from glm4ft.report.html_page import render_page
from glm4ft.testing.trial.report import explain_trial, trial_content
from glm4ft.testing.trial.runner import Result, trial_of
from glm4ft.testing.trial.trial import Trial
from glm4ft.testing.trial.wording import LONGEST_CAUSE, headline

FOUNDING_BUG = "glm4ft.testing.subjects.founding_bug:Subject"
RESULTS = [
    Result("mask_is_what_the_model_must_sample", "rows", "failed", "position 11\n  more", 0.1),
    Result("update_follows_adamw", "update", "skipped", "the subject has no train", 0.0),
    Result("every_turn_is_reproduced_and_stops", "outcome", "failed", "it says ::error::x", 0.2),
]


@pytest.fixture(scope="module")
def trial() -> Iterator[Trial]:
    """A trial of the founding bug with a run of 12 steps on the bundled conversations."""
    with trial_of(FOUNDING_BUG) as trial:
        trial.run("demo", steps=12)
        yield trial


@pytest.fixture(scope="module")
def content(trial: Trial) -> Content:
    return trial_content(FOUNDING_BUG, RESULTS, trial)


def test_the_mask_is_judged_by_the_oracle(content: Content) -> None:
    assert content.counts["assistant header"] == (4, 4, 0)
    assert content.counts["terminator"] == (4, 0, 4)
    assert content.counts["assistant"] == (111, 111, 111)
    assert "all 4 <|assistant|> headers (should be 0)" in content.headline.supervised


def test_losses_and_turns_are_those_of_the_recorded_run(content: Content) -> None:
    """The loss measured with the final adapter is a little below the last logged one, of one update earlier."""
    losses = [row.losses[at] for row in content.rows for at in row.targets]
    mean = sum(loss for loss in losses if loss is not None) / len(losses)
    last = content.curves.loss[-1]
    assert last is not None
    assert 0.5 * last < mean < last
    assert len(content.curves.loss) == 12
    assert [turn.exact for turn in content.turns] == [False] * 4
    assert content.turns[0].expected == "\n法国的首都是巴黎。<|user|>"


def test_the_first_stage_that_departs_comes_first() -> None:
    found = headline(RESULTS, "all of it.")
    assert (found.tone, found.text) == ("bad", "At stage rows: position 11.")
    assert found.happened == (
        "2 of 2 claims fail, of 1 cause, first at stage rows.",
        "mask is what the model must sample: position 11",
        "1 could not be judged.",
    )
    assert "Look at the code that turns a conversation into ids and labels." in found.remedies
    assert "failures at outcome may follow" in found.remedies[1]


def test_the_headline_is_one_sentence_of_cause() -> None:
    long = Result("c", "rows", "failed", "line 1 departs. " + "position 7, " * 50, 0.1)
    assert headline([long], "").text == "At stage rows: line 1 departs."
    endless = Result("c", "rows", "failed", "position 7, " * 50, 0.1)
    assert len(headline([endless], "").text) <= LONGEST_CAUSE + len("At stage rows: .")


def test_a_subject_without_a_failure_is_right_and_one_that_was_not_judged_is_unsure() -> None:
    passed = [Result("a", "rows", "passed", "", 0.1), Result("b", "rows", "expected-failure", "ours 1: x", 0.1)]
    assert (headline(passed, "").tone, headline(passed, "").text) == ("good", "1 of 2 claims hold, and none fails.")
    assert headline(RESULTS[1:2], "").tone == "unsure"


def test_a_failed_outcome_has_a_card_and_others_have_none(trial: Trial) -> None:
    card = explain_trial(FOUNDING_BUG, RESULTS, trial)
    assert len(card.split("\n")) <= MAX_LINES
    assert "<|assistant|> headers: 4 of 4 supervised, should be 0" in card
    assert card.endswith(f"reproduce  │ glm4ft check --subject {FOUNDING_BUG}")
    assert explain_trial(FOUNDING_BUG, RESULTS[:2], trial) == ""


def test_the_page_holds_claims_and_conversations(content: Content) -> None:
    page = render_page(content)
    assert "mask is what the model must sample" in page
    assert "bundled conversation 2" in page
    assert "\n::" not in page
