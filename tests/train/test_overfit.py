"""Two conversations are learnt by heart: loss below 0.01, every turn said back exactly, stopped; a wrong mask fails.

Run: pytest tests/train/test_overfit.py
On a GPU: pytest tests/train/test_overfit.py -m gpu --glm4ft-model=PATH
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from glm4ft.diagnosis.run_folder import explain_run
from glm4ft.report.failure_card import MAX_LINES, explain_failure
from glm4ft.report.observed_run import ObservedRun, train_observed
from glm4ft.testing.session.gpu_lane import is_large
from glm4ft.testing.stability import assert_grad_norms_decay, assert_grad_norms_stable, spike_ratios
from glm4ft.testing.subjects.founding_bug import FoundingBugFormat
from glm4ft.train.config import TrainConfig

OVERFIT = TrainConfig(
    data="demo", learning_rate=5e-3, schedule="constant", max_steps=60, target_loss=0.01, round_trip=True, save_every=0
)


@dataclass(frozen=True)
class Case:
    """One way to learn the two conversations; each took at most ``steps`` / 1.5 when measured on an x86-64 CPU."""

    id: str
    config: TrainConfig
    steps: int


# As it is, it is the bundled demo, which the fixture `learnt` ran.
CASES = [
    Case("packed", replace(OVERFIT, packing=True), steps=60),
    Case(
        "bf16, accumulated, checkpointing",
        replace(OVERFIT, dtype="bf16", micro_batch_size=1, accumulation=2, gradient_checkpointing=True),
        steps=60,
    ),
]


def assert_learnt_by_heart(result: ObservedRun) -> None:
    """Finite norms, loss below target, exact round trip, stop; whatever fails comes with the run's card."""
    try:
        _assert_learnt_by_heart(result)
    except AssertionError as error:
        assert result.content
        raise AssertionError(f"{error}\n{explain_failure(result.content)}") from None


def _assert_learnt_by_heart(result: ObservedRun) -> None:
    # in the order in which failures explain each other
    norms = [row["grad_norm"] for row in result.trajectory.steps]
    assert_grad_norms_stable(norms)
    losses = [row["loss"] for row in result.trajectory.steps]
    assert losses[-1] < 0.01, f"loss stopped at {losses[-1]:.4f} after {len(losses)} steps"
    assert_grad_norms_decay(norms)
    assert result.round_trips
    wrong = [turn.describe() for turn in result.round_trips if not (turn.exact and turn.stop)]
    assert not wrong, "\n".join(wrong)


def test_bundled_demo_is_learnt_by_heart(learnt: ObservedRun) -> None:
    assert_learnt_by_heart(learnt)
    assert len(learnt.trajectory.steps) <= 60
    assert sum(row["supervised_tokens"] for row in learnt.trajectory.steps[:1]) <= 200


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_two_conversations_are_learnt_by_heart(case: Case, tmp_path: Path) -> None:
    result = train_observed(replace(case.config, output=str(tmp_path / "run"), max_steps=case.steps))
    assert_learnt_by_heart(result)


@pytest.mark.gpu
def test_two_conversations_are_learnt_by_heart_on_a_gpu(
    tmp_path: Path, glm4ft_model: str, glm4ft_record_run: Callable[..., None]
) -> None:
    """The same on CUDA in bf16, on the base at --glm4ft-model; a large one needs a lower rate and more steps."""
    config = replace(OVERFIT, model=glm4ft_model, dtype="bf16", output=str(tmp_path / "run"))
    if is_large(glm4ft_model):
        config = replace(config, learning_rate=1e-3, max_steps=200, gradient_checkpointing=True)
    result = train_observed(config)
    glm4ft_record_run(result.trajectory.steps)
    assert_learnt_by_heart(result)


@pytest.fixture(scope="module")
def buggy_run(tmp_path_factory: pytest.TempPathFactory) -> ObservedRun:
    """A run with the bug where it occurred: in the code that encodes the training data."""
    folder = tmp_path_factory.mktemp("founding_bug")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glm4ft.train.run.make_format", FoundingBugFormat)
        return train_observed(replace(OVERFIT, packing=True, max_steps=90, output=str(folder / "run")))


def test_founding_bug_stops_within_five_per_cent_of_its_certified_floor(buggy_run: ObservedRun) -> None:
    """The negative control: the overfit test would see the bug that this project was founded on.

    Four of 115 targets are headers that the frozen head cannot tell from the 74 other rows it shares: at 5.19 nats each
    that is 0.1807, certified before training (test_floor.py). Measured: 0.1961 after 60 steps, 0.1850 after 90, 0.1818
    after 150.
    """
    losses = [row["loss"] for row in buggy_run.trajectory.steps]
    assert len(losses) == 90
    assert 0.1806 < losses[-1] < 1.05 * 0.1807
    assert not buggy_run.reached_target


def test_founding_bug_is_explained_by_header_floor_and_terminator(buggy_run: ObservedRun) -> None:
    """The first finding names both: what is trained and unreachable, and what is not trained and so never learned."""
    diagnosis = explain_run(buggy_run.output)
    assert (diagnosis.verdict, diagnosis.stage) == ("header-supervised", "rows")
    assert "<|assistant|> is trained as a target" in diagnosis.text
    assert "unreachable target: 5.19 nats" in diagnosis.text
    assert "<|user|> or <|observation|>, which ends the turn, is not trained: the terminator is never learned" in (
        diagnosis.text
    )
    assert [f.verdict for f in diagnosis.findings[1:3]] == ["terminator-never-learned", "unreachable-target"]
    assert {token.text for token in diagnosis.evidence.worst_tokens[:4]} == {"<|assistant|>"}
    assert sum(token.share for token in diagnosis.evidence.worst_tokens[:4]) > 0.9


def test_a_failed_overfit_assertion_shows_the_card_of_the_run(buggy_run: ObservedRun) -> None:
    """What kept the loss up, what came back, and how to see it again."""
    with pytest.raises(AssertionError, match=r"loss stopped at 0\.") as caught:
        assert_learnt_by_heart(buggy_run)
    told = str(caught.value)
    card = told[told.index("FAILED") :].split("\n")
    assert len(card) <= MAX_LINES
    assert any("<|assistant|> headers: 4 of 4 supervised, should be 0" in line for line in card)
    assert any(line.endswith("0 of 4 turns came back exactly") for line in card)
    assert "<|assistant|> is trained as a target" in card[1]
    assert any("no adapter below the frozen head gets under 0.18" in line for line in card)
    assert card[-1].startswith("reproduce  │ glm4ft train --config ")


def test_founding_bug_never_learns_to_stop(buggy_run: ObservedRun) -> None:
    """What a user sees: the words come back, the end does not."""
    replies = [turn for turn in buggy_run.round_trips if turn.expected.endswith("<|user|>")]
    assert all(turn.generated.startswith(turn.expected.removesuffix("<|user|>")) for turn in replies)
    assert not any(turn.exact for turn in replies)
    assert not buggy_run.is_reproduced


def test_jump_of_the_founding_report_is_called_unstable() -> None:
    """A norm of 32.75 beside 0.01 at a loss of 0.25."""
    with pytest.raises(AssertionError, match=r"step 31 is 32\.75, 3275\.0 times the median"):
        assert_grad_norms_stable([0.01] * 30 + [32.75] + [0.01] * 10)


def test_spike_ratio_tells_the_right_mask_from_the_founding_bug() -> None:
    """Norms of two runs at a rate of 2e-2, around the largest jump of each (tests/sweeps/stability_control.py).

    Over 110 steps (seed 0, x86-64 CPU, 2026-11-25) the ratio stays at 1.57 with the right mask. The founding bug looks
    just as calm for 100 steps, at a loss that its header keeps up; then the norm jumps to 28 times the median.
    """
    right = [1.86, 2.25, 3.23, 2.03]
    wrong = [
        0.00226, 0.00215, 0.00205, 0.00199, 0.00199, 0.00201, 0.00192, 0.00185, 0.00183, 0.0018, 0.00172, 0.0017,
        0.00173, 0.00168, 0.00161, 0.00155, 0.00154, 0.00157, 0.00157, 0.00174, 0.00226, 0.00392, 0.00842, 0.0193,
        0.0438, 0.0491,
    ]  # fmt: skip
    assert max(spike_ratios(right)) <= 1.8
    assert max(spike_ratios(wrong)) >= 5.2
    assert_grad_norms_stable(right)
    with pytest.raises(AssertionError, match=r"step 25 is 0\.0438, 2\d\.\d times the median"):
        assert_grad_norms_stable(wrong)


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_norm_that_is_not_finite_is_called_unstable(bad: float | None) -> None:
    with pytest.raises(AssertionError, match="step 3 is not finite"):
        assert_grad_norms_stable([1.0, 0.9, bad, 0.8])


def test_norm_that_does_not_decay_is_not_a_healthy_overfit_run() -> None:
    with pytest.raises(AssertionError, match=r"from 1 to 0\.5 over 2 steps"):
        assert_grad_norms_decay([1.0, 0.5])


def test_target_below_the_floor_is_warned_of_before_training(tmp_path: Path) -> None:
    """With the tokens that keep the loss up; given as floor+..., the target is what can be reached."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLM4FT_CACHE", str(tmp_path / "cache"))
        patch.setattr("glm4ft.train.run.make_format", FoundingBugFormat)
        train_observed(replace(OVERFIT, output=str(tmp_path / "run"), max_steps=1, round_trip=False), say=said.append)
        above = replace(OVERFIT, target_loss="floor + 8", output=str(tmp_path / "above"), round_trip=False)
        result = train_observed(above, say=said.append)
    (warning,) = [line for line in said if line.startswith("warning: a mean loss of 0.01 cannot be reached")]
    assert "0.1807" in warning
    assert "<|assistant|> (4 times, 5.19 each)" in warning
    assert result.result.target_loss == pytest.approx(8.1807, abs=1e-3)
    assert result.reached_target
    assert yaml.safe_load((tmp_path / "above" / "config.yaml").read_text())["target_loss"] == result.result.target_loss
