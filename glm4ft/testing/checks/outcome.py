"""Claims about what a run has learnt: two conversations by heart, with the end of each turn, and nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from glm4ft.data.encoded_rows import TrainedRow
from glm4ft.floors.find_floor import find_floor
from glm4ft.floors.head import frozen_head
from glm4ft.floors.target import describe_unreachable
from glm4ft.model.generation import greedy
from glm4ft.testing.checks.another_mean import explain_mean
from glm4ft.testing.recording.trace import Tensors
from glm4ft.testing.replay.tolerances import LIMITS, within
from glm4ft.testing.specification.mask_oracle import IGNORED, TurnSpan, Undecidable
from glm4ft.testing.specification.reference import LabelledIds
from glm4ft.testing.stability import assert_few_steps_clipped, assert_grad_norms_decay, assert_grad_norms_stable
from glm4ft.testing.trial.conversations import Conversations
from glm4ft.testing.trial.registry import check
from glm4ft.testing.trial.stages import CheckFailed, NotApplicable
from glm4ft.testing.trial.trial import LOSS_LIMIT, Trial
from glm4ft.testing.trial.turns import turns_in

NEEDS = ("build_model", "train")
# Accumulated, packed, and in batches that do not divide the rows.
EVALUATED_PLANS: tuple[dict[str, Any], ...] = (
    {"accumulation": 2, "schedule": "linear", "steps": 4},
    {"steps": 4, "packing": True, "micro_batch_size": 1},
    {"steps": 2, "micro_batch_size": 3},
)
# Nats. A right run raises the headers' mean loss (by 0.8 to 1.8 over 6 seeds on the built-in base, though that of a
# single header fell by up to 0.8); one that trains the header lowers it by 3 (x86-64 CPU, 2026-11-25).
HEADER_FALL_LIMIT = 1.0
# Relative; a fp32 mean over 300 tokens, summed in another order. Measured below 1e-6, and 1.1e-3 on a base in bf16
# against the specification in fp32 (x86-64 CPU, 2026-11-25).
EVAL_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 5e-3}


@check(stage="outcome", needs=NEEDS, incident="zai-org/GLM-4 342: two samples, the loss stops at 0.2")
def check_two_conversations_reach_a_loss_below_a_hundredth(trial: Trial) -> None:
    """Trained on two conversations, the final adapter has a mean loss below 0.01 on their supervised tokens.

    The harness computes the loss. If the certified floor of those targets is above the limit, the check fails before
    training.
    """
    _require_reachable(trial)
    with torch.no_grad():
        loss = float(trial.reference.loss(trial.rows(trial.demo), trial.overfit.trained))
    if not within("outcome: loss of two conversations", loss, LOSS_LIMIT):
        raise CheckFailed(
            f"the loss is {loss:.4f} after {trial.overfit_steps} steps on two conversations, not < {LOSS_LIMIT}"
        )


@check(stage="outcome", needs=NEEDS, incident="zai-org/GLM-4 342: the terminator is not trained; TRL 6044")
def check_every_turn_has_learned_to_stop(trial: Trial) -> None:
    """The model predicts the stop token of each assistant turn with near certainty (a loss below 0.1)."""
    nll = [(row, turn.end, _nll(trial, row)[turn.end]) for row, turn in _learnt_turns(trial)]
    row, at, worst = max(nll, key=lambda found: found[2])
    if not within("outcome: loss of a stop token", worst, 10 * LOSS_LIMIT):
        token = trial.subject.tokenizer.decode([row[0][at]])
        raise CheckFailed(f"the stop token {token} at position {at} has a loss of {worst:.2f}: it is not learnt")


@check(stage="outcome", needs=NEEDS, incident="zai-org/GLM-4 342: <|assistant|> as a target")
def check_header_is_not_learned(trial: Trial) -> None:
    """The mean loss of ``<|assistant|>`` does not fall, since inference provides it and it should not be trained."""
    if not getattr(trial.subject, "chat_format", None):
        raise NotApplicable("the subject names no GLM-4 chat format")
    falls = list[float]()
    for row, turn in _learnt_turns(trial):
        before, after = _nll(trial, row, {}), _nll(trial, row)
        falls.append(before[turn.header] - after[turn.header])
    if not falls:
        raise NotApplicable("no assistant turn of the two conversations has an end")
    if not within("outcome: fall of the headers' loss", statistics.fmean(falls), HEADER_FALL_LIMIT):
        raise CheckFailed(
            f"the loss of <|assistant|> fell by {statistics.fmean(falls):.2f} nats (mean of {len(falls)} headers): it "
            "is trained, though inference provides it"
        )


@check(stage="outcome", needs=NEEDS, incident="TRL 6044, axolotl 3754: loss near zero, generation never stops")
def check_every_turn_is_reproduced_and_stops(trial: Trial) -> None:
    """From the serving prompt, greedy decoding generates each trained answer and then its stop token.

    If the model can think, one conversation is asked for with thinking, and the other without.
    """
    model = trial.overfit.model.eval()
    for (ids, _), turn in _learnt_turns(trial):
        expected = list(ids[turn.start : turn.end + 1])
        got = greedy(model, list(ids[: turn.start]), trial.stop_ids or [expected[-1]], len(expected) + 16)
        require_said(trial, got, expected)


@check(
    stage="outcome", needs=(*NEEDS, "evaluate"), incident="LLaMA-Factory 6465: divided by accumulation; accelerate 578"
)
def check_evaluation_reports_the_loss(trial: Trial) -> None:
    """``evaluate`` returns the mean loss over all supervised tokens.

    Batches, an incomplete last batch and the accumulation of the preceding run make no difference.
    """
    run, data = trial.run_with_model(accumulation=2, schedule="linear", steps=4), trial.conversations[:7]
    both = [_figures(trial.subject.evaluate(run.model, data)) for _ in range(2)]
    if "loss" not in both[0]:
        raise NotApplicable("evaluate returns no loss")
    got, again = (figures["loss"] for figures in both)
    if got != again:
        raise CheckFailed(f"two evaluations of one model report losses of {got:.6g} and {again:.6g}")
    _require_loss(trial, got, trial.rows(data), run.trained, "evaluate reports a loss of")


@check(stage="outcome", needs=NEEDS, incident="LLaMA-Factory 6465: the evaluation of a run was divided by accumulation")
def check_logged_evaluation_loss_is_the_loss(trial: Trial) -> None:
    """The evaluation loss that a run logs is the mean loss with the parameters of that step."""
    for changes, run in trial.offered(EVALUATED_PLANS, eval_every=2):
        told = ", ".join(f"{key}={value}" for key, value in changes.items())
        for number, got in run.logged("eval_loss").items():
            words = f"after step {number} ({told}) the log says an evaluation loss of"
            _require_loss(trial, got, run.rows, run.at(number), words)


@check(
    stage="outcome", needs=(*NEEDS, "evaluate"), incident="TRL 5620 and 3821: accuracy of unshifted or masked tokens"
)
def check_accuracy_is_that_of_the_supervised_tokens(trial: Trial) -> None:
    """The accuracy of ``evaluate`` is the share of supervised tokens that the specification predicts correctly.

    Both on conversations that the model has learnt by heart and on others.
    """
    for conversations in (trial.demo, trial.conversations):
        figures = _figures(trial.subject.evaluate(trial.overfit.model, conversations))
        if "accuracy" not in figures:
            raise NotApplicable("evaluate returns no accuracy")
        least, most = _accuracy(trial, conversations)
        if not least - 1e-6 <= figures["accuracy"] <= most + 1e-6:
            raise CheckFailed(f"evaluate reports an accuracy of {figures['accuracy']:.4f}, it is {most:.4f}")


@check(stage="outcome", needs=NEEDS, incident="zai-org/GLM-4 342: a norm of 32.75 beside 0.01")
def check_gradient_norms_are_stable(trial: Trial) -> None:
    """Gradient norms are finite, have no spikes and decay, and only few steps are clipped."""
    norms = trial.grad_norms(trial.overfit)
    try:
        assert_grad_norms_stable(norms)
        assert_grad_norms_decay(norms)
        if not trial.overfit.weights:  # by which a loss has another scale than the token mean that the share is for
            assert_few_steps_clipped(norms, trial.overfit.plan["max_grad_norm"])
    except AssertionError as error:
        raise CheckFailed(str(error)) from error


def _require_reachable(trial: Trial) -> None:
    """Fail before training if the limit is below the certified floor, and name the tokens that cause it."""
    rows = [TrainedRow(number, ids, labels) for number, (ids, labels) in enumerate(trial.rows(trial.demo), start=1)]
    if all(label == IGNORED for row in rows for label in row.labels[1:]):
        raise CheckFailed("before training: no token of the two conversations is supervised")
    floor = find_floor(rows, trial.subject.tokenizer, frozen_head(trial.subject.build_model(str(trial.base_dir), 0)))
    if blocking := floor.blocking(LOSS_LIMIT):
        raise CheckFailed(f"before training: {describe_unreachable(floor, LOSS_LIMIT, blocking)}")


def _nll(trial: Trial, row: LabelledIds, trained: Tensors | None = None) -> list[float]:
    """Loss of each token of a row given the tokens before it; 0 for the first."""
    with torch.no_grad():
        return [0.0, *trial.reference.nll(row[0], trial.overfit.trained if trained is None else trained).tolist()]


def _learnt_turns(trial: Trial) -> Iterator[tuple[LabelledIds, TurnSpan]]:
    """The turns of the two conversations, each with its row."""
    for conversation, row in zip(trial.demo, trial.rows(trial.demo), strict=True):
        for turn in ended_turns(trial, conversation, row[0]):
            yield row, turn


def asked_turns(trial: Trial, conversation: Mapping[str, Any], ids: Sequence[int]) -> list[TurnSpan]:
    """The assistant turns of a row that serving asks for; that one has no terminator is for the rows' checks to say."""
    try:
        turns = turns_in(trial, conversation, ids)
    except Undecidable as error:
        raise CheckFailed(str(error)) from error
    return [turn for turn in turns if turn.asked]


def ended_turns(trial: Trial, conversation: Mapping[str, Any], ids: Sequence[int]) -> list[TurnSpan]:
    """The assistant turns of a row that serving asks for and that have a terminator."""
    return [turn for turn in asked_turns(trial, conversation, ids) if turn.end < len(ids)]


def require_said(trial: Trial, got: list[int], expected: list[int]) -> None:
    """Fail if the model generated other tokens than it learnt.

    Args:
        trial: The trial of the subject.
        got: The generated ids.
        expected: The ids of the answer and its stop token.
    Raises:
        CheckFailed: If they differ.
    """
    if got != expected:
        said, meant = (trial.subject.tokenizer.decode(ids) for ids in (got, expected))
        is_cut = got == expected[: len(got)]
        cause = f": cut after {len(got)} new tokens, under the limit" * is_cut
        raise CheckFailed(f"the model says {said!r} where it learnt {meant!r}{cause}")


def _figures(result: Any) -> dict[str, float]:
    figures = result if isinstance(result, Mapping) else {"loss": result}
    return {name: float(value) for name, value in figures.items()}


def _require_loss(trial: Trial, got: float, rows: Sequence[LabelledIds], trained: Tensors, words: str) -> None:
    with torch.no_grad():
        losses = [trial.reference.nll(ids, trained)[torch.tensor(labels[1:]) != IGNORED] for ids, labels in rows]
    sums, counts = [float(nll.sum()) for nll in losses], [len(nll) for nll in losses]
    expected = sum(sums) / sum(counts)
    if not within("outcome: loss of an evaluation", abs(got / expected - 1), EVAL_LIMIT[trial.dtype]):
        found = explain_mean(got, sums, counts, EVAL_LIMIT[torch.float32])
        cause = f"; likely cause: of {len(rows)} rows {found}" if found else ""
        raise CheckFailed(f"{words} {got:.6g}, it is {expected:.6g}: {got / expected:.4g} times as much{cause}")


def _accuracy(trial: Trial, conversations: Conversations) -> tuple[float, float]:
    """Share of supervised tokens that are the likeliest: for certain, and where rounding may decide a tie for them."""
    sure = possible = total = 0
    for ids, labels in trial.rows(conversations):
        with torch.no_grad():
            hidden = trial.reference.hidden(ids, trial.overfit.trained)[:-1]
            logits_TV = trial.reference.logits(hidden, trial.overfit.trained)
        targets = torch.tensor(labels[1:])
        keep = targets != IGNORED
        own_T = logits_TV.gather(1, targets.clamp_min(0)[:, None])
        others_TV = logits_TV.scatter(1, targets.clamp_min(0)[:, None], -torch.inf)
        margin_T = own_T[:, 0] - others_TV.amax(1)
        rounding = LIMITS[trial.dtype] * float(logits_TV.abs().max())
        sure += int((margin_T > rounding)[keep].sum())
        possible += int((margin_T >= -rounding)[keep].sum())
        total += int(keep.sum())
    return sure / total, possible / total
