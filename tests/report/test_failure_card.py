"""Proves that the card of a failed run says on one screen what is wrong, and that no line of it acts.

Run: pytest tests/report/test_failure_card.py
"""

from __future__ import annotations

import re
from dataclasses import replace

from report_samples import founding_bug, hostile

from glm4ft.report.content import Content, Headline, ShownTurn
from glm4ft.report.failure_card import MAX_LINES, explain_difference, explain_failure

CARD = """\
FAILED     │ glm4ft training run · bug
           │ <|assistant|> is a target, and the frozen head cannot express it.
because    │ 4 headers hold 98% of the loss.
           │ The loss stopped at 0.19.
to do      │ Start the supervised span after the header.
loss       │ 7.47 ██▇▆▆▅▄▄▃▃▂▂▂▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁ 0.19  60 steps, target 0.01, certified floor 0.18
grad norm  │ 2.34 ████▇▇▇▇▆▆▆▅▅▅▅▄▄▄▄▃▃▃▂▂▂▂▁▁▁▁ 0.0458  largest 2.34 at step 1, median 0.327, 0 not finite
rate       │ 0.005 ▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁ 0.005
floor      │ no adapter below the frozen head gets under 0.1800; the target is below it
targets    │ line 1: 53 of 88 tokens, mean loss 0.2095
           │ line 2: 62 of 499 tokens, mean loss 0.1794
mask       │ <|assistant|> headers: 4 of 4 supervised, should be 0
           │ ends of assistant turns: 0 of 4 supervised, should be 4
tokens     │  99% <|assistant|> (<|assistant|> headers): 4 times, loss 5.5, the model says '+'
round trip │ 1 of 2 turns came back exactly
           │ line 1, messages[3], did not stop
   trained │ … through Paris. 塞纳河穿过巴黎。<|user|>
      said │ … through Paris. 塞纳河穿过巴黎。 cit fu
           │                                  ^
adapter    │ 12 adapters on 6 targets, 30,720 trained of 469,120 parameters (6.55 %)
reproduce  │ glm4ft train --config bug/config.yaml --output NEW_FOLDER"""


def test_the_founding_bug_has_this_card() -> None:
    assert explain_failure(founding_bug()) == CARD


def test_the_caret_stands_under_the_first_difference_whatever_the_width_of_the_characters() -> None:
    turn = ShownTurn("t", "塞纳河穿过巴黎。<|user|>", "塞纳河穿过巴黎。 cit", exact=False)
    trained, said, caret = explain_difference(turn)
    assert trained == "   trained │ 塞纳河穿过巴黎。<|user|>"
    assert said == "      said │ 塞纳河穿过巴黎。 cit"
    assert caret == "           │ " + " " * 16 + "^"


def test_a_long_answer_is_shown_around_the_difference() -> None:
    trained, said, caret = explain_difference(ShownTurn("t", "a" * 900 + "b" * 900, "a" * 900 + "c", exact=False))
    assert trained == "   trained │ …" + "a" * 24 + "b" * 40 + "…"
    assert said == "      said │ …" + "a" * 24 + "c"
    assert caret.index("^") == said.index("c")


def test_a_card_fits_one_screen_whatever_is_wrong() -> None:
    """The verdict stays at the top and the command at the bottom."""
    bug = founding_bug()
    long = "every word of this sentence is here to make it long " * 8
    crowded = replace(
        bug,
        headline=Headline("bad", long, long, (long,) * 9, (long,) * 9),
        rows=bug.rows * 40,
        turns=bug.turns * 40,
    )
    lines = explain_failure(crowded).split("\n")
    assert len(lines) == MAX_LINES
    assert lines[0].startswith("FAILED")
    assert lines[-1].startswith("reproduce")
    assert "more lines are left out" in lines[-2]


def test_hostile_text_acts_in_no_line() -> None:
    card = explain_failure(hostile())
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", card)
    assert r"\x1b[31m" in card
    for line in card.split("\n"):
        assert re.match(r"[a-zA-Z ]{11}│ ", line), line
        assert not line.lstrip().startswith("::")
        assert "##[" not in line


def test_what_is_not_known_is_left_out() -> None:
    card = explain_failure(Content("a run", Headline("bad", "The run stopped at step 1.")))
    assert card.split("\n") == ["FAILED     │ a run", "           │ The run stopped at step 1."]
