"""One recorded step together with the specification: everything that the judges of a step need, computed once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch

from glm4ft.data.encoded_row import IGNORED
from glm4ft.testing.recording.sampling import norms, samples
from glm4ft.testing.recording.trace import Step, Tensors
from glm4ft.testing.replay.comparison import count_targets, distance, relative
from glm4ft.testing.replay.departure import Departure
from glm4ft.testing.replay.history import History
from glm4ft.testing.replay.matching import RowMatches
from glm4ft.testing.replay.seen_row import SeenHidden, SeenRow
from glm4ft.testing.replay.tolerances import LIMITS, MIN_LOSS_SCALE, SHALLOW, SURE, UNEVEN, WEIGHT_LIMITS
from glm4ft.testing.specification.recovered_targets import Targets, recover_targets
from glm4ft.testing.specification.reference import LabelledIds
from glm4ft.testing.specification.update_rule import clip_factor


class ReplayedStep:
    """A recorded step and what the specification states about it.

    Args:
        number: The number of the step, from 1.
        step: The recorded step.
        history: The specification and the results of the earlier steps.
    """

    def __init__(self, number: int, step: Step, history: History) -> None:
        self.number, self.step, self.history, self.reference = number, step, history, history.reference
        self.removes_factor = False  # whether the loss has a factor that the optimizer's gradient has not
        self.expected_norms = dict[str, float]()  # of the gradient that it should have
        self.is_undecided = False  # whether it may have: see _is_clipped_sum

    def depart(self, stage: str, text: str, cause: str = "", size: float | None = None, **more: Any) -> Departure:
        """A departure of this step; further arguments as in ``Departure``."""
        return Departure(stage, self.number, text, cause, size, **more)

    def limit(self, stage: str) -> float:
        """The largest relative departure of a stage that counts as rounding.

        What follows the backward pass is computed from the recorded gradient in the dtype of the trained parameters.
        """
        if stage in ("clipping", "schedule", "update"):
            is_fp32 = all(t.dtype in (torch.float32, torch.float64) for t in self.step.before.values())
            return LIMITS[torch.float32] if is_fp32 else LIMITS[self.history.dtype]
        is_deep = stage == "gradient" and self.history.dtype == torch.float32
        depth = max(1.0, self.reference.num_layers / SHALLOW) if is_deep else 1.0
        return self.history.limits.get(stage, LIMITS[self.history.dtype] * depth)

    @cached_property
    def row_matches(self) -> list[RowMatches]:
        """The known rows found in each forward pass."""
        return [self.history.known.find_in(forward) for forward in self.step.forwards]

    @cached_property
    def targets(self) -> list[list[Targets]]:
        """The recovered targets of each sequence of each forward pass."""
        weight_VD = self.reference.head_weight(self.step.weights).double()  # once for all sequences
        found = []
        for forward in self.step.forwards:
            assert forward.gradient_BTD is not None
            pairs = zip(forward.hidden_BTD, forward.gradient_BTD, strict=True)
            found.append([recover_targets(hidden_TD, gradient_TD, weight_VD) for hidden_TD, gradient_TD in pairs])
        return found

    @cached_property
    def seen(self) -> list[SeenRow]:
        """The known rows of the step, in order."""
        if not self.has_weights:
            return []  # without the head's weight, labels cannot be read back
        return [
            SeenRow(p, i, forward.hidden_BTD[p.b][p.positions], self.targets[i][p.b].at(p.targets))
            for i, (forward, matches) in enumerate(zip(self.step.forwards, self.row_matches, strict=True))
            for p in matches.rows
        ]

    @cached_property
    def has_finite_loss(self) -> bool:
        """Whether the loss's gradient at the final norm is finite everywhere."""
        gradients = [forward.gradient_BTD for forward in self.step.forwards]
        return all(bool(torch.isfinite(gradient).all()) for gradient in gradients if gradient is not None)

    @cached_property
    def not_finite(self) -> str:
        """The first recorded tensor with an entry that is not finite; "" if there is none."""
        step = self.step
        for what, tensors in (
            ("parameter before the step", step.before), ("accumulated gradient", step.raw),
            ("gradient after clipping", step.clipped), ("parameter after the step", step.after),
        ):  # fmt: skip
            for name, tensor in tensors.items():
                if not bool(torch.isfinite(tensor).all()):
                    return f"{what} {name}"
        return "" if self.has_finite_loss else "gradient of the loss"

    def labels_of(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """The encoded labels of a known row, with the first token ignored, since nothing predicts it."""
        return (IGNORED, *self.history.known.labels[ids][1:])

    def rows(self, forward: int | None = None) -> list[LabelledIds]:
        """The ids and labels of the known rows of the step, or of one of its forward passes."""
        return [(row.ids, self.labels_of(row.ids)) for row in self.seen if forward in (None, row.forward)]

    def token_weights(self, ids: tuple[int, ...]) -> torch.Tensor:
        """The weight (T,) of each token of a known row, 0 where it is not supervised."""
        given = torch.tensor(self.history.known.weights[ids], dtype=torch.float64)
        return given * (torch.tensor(self.labels_of(ids)) != IGNORED)

    def divisor(self, rows: Iterable[LabelledIds] | None = None) -> float:
        """What the weighted sum over the supervised tokens of rows, by default of all, is divided by.

        It is the sum of the weights, or the number of those tokens, whichever the loss of this step was divided by.
        """
        rows = list(self.rows() if rows is None else rows)
        return float(count_targets(rows) if self.is_over_count else self.weight(rows))

    def weight(self, rows: Iterable[LabelledIds]) -> float:
        """The sum of the weights of the supervised tokens of rows."""
        return sum(float(self.token_weights(ids).sum()) for ids, _ in rows)

    @cached_property
    def is_over_count(self) -> bool:
        """Whether a sum with weights is divided by the number of supervised tokens, as ms-swift's loss scale is."""
        weight, count, found = self.weight(self.rows()), self.num_targets, self._median_share
        return weight != count and found > 0 and abs(math.log(found * count)) < abs(math.log(found * weight))

    def is_unsure(self, row: SeenRow) -> torch.Tensor:
        """Where (T,) the probability of a row's target is low enough for its gradient to be measurable."""
        expected = torch.tensor(self.labels_of(row.ids))
        probability = torch.zeros(len(expected))
        logits = self.reference.logits(row.hidden_TD[: len(expected) - 1], self.step.weights)
        probability[1:] = logits.softmax(1).gather(1, expected[1:].clamp_min(0)[:, None])[:, 0]
        return probability < SURE

    @cached_property
    def has_unstated_weights(self) -> bool:
        """Whether tokens of one row differ in their weight, and nothing says which weights were asked for."""
        if not self.history.plan.get("is_only_run") or not self.has_finite_loss:
            return False
        for row in self.seen:
            weights = row.targets.weights_T[self.is_unsure(row) & (row.targets.labels_T != IGNORED)]
            if len(weights) > 2 and float((weights / weights.median() - 1).abs().max()) > UNEVEN:
                return True
        return False

    def shares(self, row: SeenRow) -> list[float]:
        """The recovered weight of each trained token of a row, over the weight that it should have in the sum."""
        is_trained, given = row.targets.labels_T != IGNORED, self.token_weights(row.ids)
        given[given == 0] = 1.0  # trained, but not supervised: judged with the rows
        return [float(share) for share in (row.targets.weights_T / given)[is_trained]]

    @cached_property
    def _median_share(self) -> float:
        """The median of all shares of the step; 0 if nothing is trained."""
        shares = sorted(share for row in self.seen for share in self.shares(row) if share > 0)
        return shares[len(shares) // 2] if shares else 0.0

    def mean_weights(self, rows: Sequence[LabelledIds]) -> list[torch.Tensor]:
        """The weight (T,) of each token in the mean over some rows; empty if all supervised tokens weigh the same."""
        weights, divisor = [self.token_weights(ids) for ids, _ in rows], self.divisor(rows)
        is_plain = all(((w == 0) | (w == 1)).all() for w in weights)
        return [] if is_plain else [w / divisor for w in weights]

    def gradient(self, forward: int | None = None, *, in_fp32: bool = False) -> Tensors:
        """The gradient of the mean over the supervised tokens of the step's rows, or of one of its forward passes.

        Args:
            forward: The index of the forward pass; None for all of them.
            in_fp32: Whether softmax is torch's in fp32, as in ``Reference.loss``.
        """
        kept, rows = [self.kept(row) for row in self.seen if forward in (None, row.forward)], self.rows(forward)
        whole = self.reference.gradient(rows, self.step.weights, kept, self.mean_weights(rows), in_fp32=in_fp32)
        if forward is None:
            self.expected_norms = norms(whole, self.history.sampled)
        return self.sampled(whole)

    def sampled(self, whole: Tensors) -> Tensors:
        """The entries of tensors that are recorded."""
        return samples(whole, self.history.sampled)

    def norms(self, part: str) -> dict[str, float]:
        """The exact norms of the gradients of which a sample is recorded, without the loss scale.

        Args:
            part: ``raw`` or ``clipped``.
        """
        scale = self.loss_scale if part == "raw" else 1.0
        return {name: norm / scale for name, norm in self.step.norms.get(part, {}).items()}

    def norms_off(self) -> float:
        """The largest difference of a gradient's norm from what ``gradient`` found, relative to the whole gradient."""
        got, expected = self.norms("raw"), self.expected_norms
        size = clip_factor(self.raw, 0, got)[0]
        return max((abs(got[n] - expected[n]) / size for n in got if n in expected), default=0.0)

    @property
    def has_weights(self) -> bool:
        """Whether the trained parameters are known as a whole, as those of a sample are before the first step."""
        return not self.history.sampled or self.step.whole is not None

    @cached_property
    def num_targets(self) -> int:
        """The number of supervised tokens in the whole step."""
        return count_targets(self.rows())

    @cached_property
    def hidden_states(self) -> list[SeenHidden]:
        """Each row with how far its hidden states are from those of the row alone."""
        found = []
        for row in self.seen:
            with torch.no_grad():
                alone_TD = self.reference.hidden(row.ids, self.step.weights, self.kept(row))[: len(row.hidden_TD)]
            size = distance(row.hidden_TD, alone_TD)
            # rounding, and far below the departure of the whole row, which is spread unevenly over its tokens
            right = min(self.limit("model"), size / 100)
            is_right_T = (row.hidden_TD - alone_TD).norm(dim=1) <= right * alone_TD.norm(dim=1)
            found.append(SeenHidden(row, size, int(is_right_T.cumprod(0).sum())))
        return found

    def size_off(self, row: SeenRow, trained: Tensors) -> float:
        """The relative departure of a row's hidden states from those that other trained parameters give."""
        with torch.no_grad():
            alone_TD = self.reference.hidden(row.ids, trained, self.kept(row))[: len(row.hidden_TD)]
        return distance(row.hidden_TD, alone_TD)

    def kept(self, row: SeenRow) -> Tensors:
        """What dropout multiplied each entry (T, D) of a row by, by the dropout layer."""
        found = {}
        for name, kept_BTD in (self.step.forwards[row.forward].kept or {}).items():
            factor_TD = kept_BTD[row.span.b][row.span.positions].float() / (1 - self.history.dropout[name])
            missing = len(row.ids) - len(factor_TD)  # of the last token, see RowSpan.is_short
            found[name] = torch.nn.functional.pad(factor_TD, (0, 0, 0, missing), value=1.0)
        return found

    @cached_property
    def loss_scale(self) -> float:
        """The loss scale: the factor on the loss that fp16 training applies and divides out again; 1 without it."""
        ratio = self._loss_factor
        if not 0 < ratio < math.inf:
            return 1.0
        if self.history.plan.get("factor_is_removed") or self._is_removed(ratio):
            self.removes_factor = abs(ratio - 1) > WEIGHT_LIMITS[self.history.dtype]
            return self._removed_factor(ratio)
        self.is_undecided = bool(self.history.plan.get("is_only_run")) and self._is_clipped_sum(ratio)
        if self.is_undecided:
            return ratio
        nearest = 2.0 ** round(math.log2(ratio))
        is_scale = nearest >= MIN_LOSS_SCALE and abs(ratio / nearest - 1) <= WEIGHT_LIMITS[self.history.dtype]
        return nearest if is_scale else 1.0

    @cached_property
    def _loss_factor(self) -> float:
        """The median weight of a token in the loss, as a multiple of its weight in the token mean."""
        return self._median_share * self.divisor() if self._median_share else 1.0

    @property
    def is_token_mean(self) -> bool:
        """Whether the loss has no factor beside the token mean."""
        return abs(self._loss_factor - 1) <= WEIGHT_LIMITS[self.history.dtype]

    def _is_removed(self, factor: float) -> bool:
        """Whether the optimizer received the gradient divided by a factor that the loss was multiplied by."""
        if abs(factor - 1) <= WEIGHT_LIMITS[self.history.dtype]:
            return False
        expected = {name: tensor / factor for name, tensor in self.step.raw.items()}
        return relative(self.step.clipped, expected) <= WEIGHT_LIMITS[self.history.dtype]

    def _removed_factor(self, ratio: float) -> float:
        """The factor that was divided out: a ratio of weights to rounding, or exactly where nothing was clipped."""
        raw, clipped = (clip_factor(tensors, 0)[0] for tensors in (self.step.raw, self.step.clipped))
        limit = self.history.plan["max_grad_norm"] or math.inf
        return raw / clipped if 0 < clipped < limit * (1 - WEIGHT_LIMITS[self.history.dtype]) else ratio

    def _is_clipped_sum(self, factor: float) -> bool:
        """Whether the loss is a sum over tokens, and the optimizer receives the same whether that is divided or not.

        Dividing the gradient by the number of tokens before clipping, as torchtune does, is right; but it leaves no
        trace where clipping to a norm makes both equally long.
        """
        limit, plan = WEIGHT_LIMITS[self.history.dtype], self.history.plan
        if not any(
            abs(factor * n - self.num_targets) <= limit * self.num_targets for n in (1, plan.get("processes", 1))
        ):
            return False
        norm, clipped = clip_factor(self.step.raw, plan["max_grad_norm"], self.step.norms.get("raw"))
        expected = {name: clipped * tensor for name, tensor in self.step.raw.items()}
        return 0 < plan["max_grad_norm"] < norm / factor and relative(self.step.clipped, expected) <= limit

    @cached_property
    def raw(self) -> Tensors:
        """The accumulated gradient by parameter, with the loss scale divided out."""
        return {name: tensor / self.loss_scale for name, tensor in self.step.raw.items()}
