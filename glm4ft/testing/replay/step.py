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
from glm4ft.testing.replay.loss_factor import LossFactor, find_loss_factor
from glm4ft.testing.replay.matching import RowMatches
from glm4ft.testing.replay.rounding import rounded
from glm4ft.testing.replay.seen_row import SeenHidden, SeenRow
from glm4ft.testing.replay.tolerances import LIMITS, SHALLOW, SURE, UNEVEN
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
        self._unsure = dict[int, torch.Tensor]()  # see is_unsure
        self.own_limits = dict[str, float]()  # by stage, where rounding was measured on this very step
        self.expected_norms = dict[str, float]()  # of the gradient that it should have

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
        return {**self.history.limits, **self.own_limits}.get(stage, LIMITS[self.history.dtype] * depth)

    @cached_property
    def gradient_rounding(self) -> float:
        """What rounding in the dtype of the run changes of the step's gradient, relative to it; 0 in fp32."""
        if self.history.dtype == torch.float32:
            return 0.0
        with rounded(self.reference, self.history.rounded_to):
            other = self.gradient()
        return relative(other, self.gradient())

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
        if id(row) not in self._unsure:  # rows live as long as the step
            expected = torch.tensor(self.labels_of(row.ids))
            probability = torch.zeros(len(expected))
            logits = self.reference.logits(row.hidden_TD[: len(expected) - 1], self.step.weights)
            probability[1:] = logits.softmax(1).gather(1, expected[1:].clamp_min(0)[:, None])[:, 0]
            self._unsure[id(row)] = probability < SURE
        return self._unsure[id(row)]

    @cached_property
    def odd_tokens(self) -> list[tuple[SeenRow, int, float]]:
        """The tokens whose weight in the loss is another than most of their row have: row, position, and times as much.

        None are found where weights were asked for: which of them are applied, the gradient tells.
        """
        found = []
        for row in self.seen if self.has_finite_loss and not self.mean_weights(self.rows()) else ():
            at_N = (self.is_unsure(row) & (row.targets.labels_T != IGNORED)).nonzero()[:, 0]
            times_N = row.targets.weights_T[at_N] / row.targets.weights_T[at_N].median() if len(at_N) > 2 else at_N[:0]
            found += [(row, int(t), float(x)) for t, x in zip(at_N, times_N, strict=False) if not abs(x - 1) <= UNEVEN]
        return found

    @property
    def has_unstated_weights(self) -> bool:
        """Whether tokens of one row differ in their weight, and nothing says which weights were asked for."""
        return bool(self.history.plan.get("is_only_run") and self.odd_tokens)

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

    def gradient(self, forward: int | None = None, *, dtype: torch.dtype = torch.float64) -> Tensors:
        """The gradient of the mean over the supervised tokens of the step's rows, or of one of its forward passes.

        Args:
            forward: The index of the forward pass; None for all of them.
            dtype: The dtype that logits are rounded to, as in ``Reference.loss``.
        """
        kept, rows = [self.kept(row) for row in self.seen if forward in (None, row.forward)], self.rows(forward)
        whole = self.reference.gradient(rows, self.step.weights, kept, self.mean_weights(rows), dtype=dtype)
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
        scale = self.loss_factor.scale if part == "raw" else 1.0
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
    def loss_factor(self) -> LossFactor:
        """The factor of the loss beside the token mean, and whether it is taken out of the gradient again."""
        ratio = self._median_share * self.divisor() if self._median_share else 1.0
        return find_loss_factor(self.step, self.history, ratio, self.num_targets)

    @cached_property
    def raw(self) -> Tensors:
        """The accumulated gradient by parameter, with the loss scale divided out."""
        return {name: tensor / self.loss_factor.scale for name, tensor in self.step.raw.items()}
