"""The evidence of a run: the measurements that a diagnosis is based on and a report shows.

Losses are in nats. Texts of tokens are safe to print (``glm4ft.text.token_text``); in HTML they must still be escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from glm4ft.data.encoded_rows import TokenPart
from glm4ft.floors.floor import Floor
from glm4ft.model.generation import TurnRoundTrip


@dataclass(frozen=True)
class TokenEvidence:
    """One token of a row and the trained model's prediction of it.

    Args:
        line: The line of the conversation in its file, from 1; 0 if unknown.
        turn: The number of the token's assistant turn, from 0; None outside assistant turns.
        position: The position of the token in its row.
        id: The id of the token.
        text: The text of the token; the name of a control token.
        role: The role of the token's message; "" for the prefix. A terminator belongs to the assistant, whose turn it
            ends.
        part: The part of the message that the token belongs to.
        supervised: True if the run trained the token.
        label: The id that the run trained at this position; -100 if none.
        loss: The trained model's loss on the token, in nats.
        probability: The trained model's probability of the token, ``exp(-loss)``.
        predicted_id: The id of the token that the model finds likeliest at this position.
        predicted: The text of that token.
        base_loss: The loss of the base without the adapter, in nats.
        share: The token's share of the summed loss of all supervised tokens; 0 if not supervised.
        floor: The certified lower bound of the loss at this position, in nats; None if not computed or not supervised.
    """

    line: int
    turn: int | None
    position: int
    id: int
    text: str
    role: str
    part: TokenPart
    supervised: bool
    label: int
    loss: float
    probability: float
    predicted_id: int
    predicted: str
    base_loss: float
    share: float
    floor: float | None = None


@dataclass(frozen=True)
class RowEvidence:
    """The tokens of one row and their mean loss.

    Args:
        line: The line of the conversation in its file, from 1; 0 if unknown.
        tokens: All tokens of the row but the first, which is never predicted, in order.
        loss: The mean loss over the supervised tokens, in nats; NaN if there are none, or nothing was measured.
    """

    line: int
    tokens: tuple[TokenEvidence, ...]
    loss: float

    @property
    def length(self) -> int:
        """The number of tokens of the row, the first one included."""
        return len(self.tokens) + 1


@dataclass(frozen=True)
class RenderingDifference:
    """The first difference between a row as trained and the same conversation as serving encodes it.

    Args:
        line: The line of the conversation in its file.
        position: The position of the first id that differs.
        trained: The text of the next few tokens of the trained row.
        served: The text of the next few tokens as serving encodes them.
    """

    line: int
    position: int
    trained: str
    served: str


@dataclass(frozen=True)
class CurvePoint:
    """One logged step; a value is None if the log does not have it, and NaN or infinite if it was not finite.

    Args:
        step: The number of the step, from 1.
        loss: The logged loss, nats per supervised token.
        grad_norm: The global L2 norm of the gradient before clipping.
        lr: The learning rate of the update.
        epoch: The number of passes over the data up to this step.
    """

    step: int
    loss: float | None
    grad_norm: float | None
    lr: float | None
    epoch: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """One evaluation on held-out conversations.

    Args:
        step: The number of the step after which it was made.
        loss: The mean loss, in nats; NaN or infinite if it was not finite.
    """

    step: int
    loss: float


@dataclass(frozen=True)
class GradientHealth:
    """A summary of a run's gradient norms.

    Args:
        first: The norm of the first step.
        last: The norm of the last step.
        median: The median of the finite norms.
        largest: The largest finite norm.
        largest_step: The step of the largest norm.
        spike_ratio: The largest ratio of a norm to the running median of the norms before it.
        spike_step: The step of that ratio.
        non_finite_steps: The steps whose loss or norm is not finite.
    """

    first: float
    last: float
    median: float
    largest: float
    largest_step: int
    spike_ratio: float
    spike_step: int
    non_finite_steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class AdapterAudit:
    """The adapters of a model, and those among them that have no effect.

    Args:
        num_adapters: The number of adapted modules.
        targets: A mapping of the modules' last name components to their numbers of adapters.
        dead: The names of adapters without effect, because A or B is zero.
        non_finite: The names of adapters with an entry that is not finite.
        num_trainable: The number of parameters that require a gradient; None if the adapter was read from disk.
        wanted_but_missing: The configured targets that have no adapter.
    """

    num_adapters: int
    targets: Mapping[str, int]
    dead: tuple[str, ...]
    non_finite: tuple[str, ...]
    num_trainable: int | None = None
    wanted_but_missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class FirstLoss:
    """The first loss of a run, and the losses to compare it with, in nats.

    Args:
        logged: The loss of the first step; None without a log.
        base: The mean loss of the base alone on the supervised tokens; None if it was not computed.
        uniform: The loss of a uniform prediction, ``ln V``; None if the vocabulary is not known.
    """

    logged: float | None
    base: float | None
    uniform: float | None


@dataclass(frozen=True)
class Sources:
    """What a diagnosis looked at, and what it did not.

    Args:
        looked_at: The files and conversations that were looked at.
        unread: What the run's folder has and nobody looked at, though it may show a fault: its weights.
        unknown: What else would say more, and how to name it.
        checkpoints: The steps of which the folder has a checkpoint.
        resumed: The steps at which the log goes back to an earlier one, hence the run was resumed.
    """

    looked_at: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    checkpoints: tuple[int, ...] = ()
    resumed: tuple[int, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """All measurements of one run.

    Args:
        curve: The logged steps.
        evaluations: The evaluations that the log has.
        rows: The rows that were measured, token by token.
        first_loss: The first loss of the run, and the losses to compare it with.
        gradients: The summary of the gradient norms; None without logged norms.
        adapters: The audit of the adapters; None without an adapter.
        round_trips: The results of the assistant turns that were generated again; ``exact`` is True for a turn that was
            reproduced.
        floor: The floor of the data as trained; None if it could not be computed.
        target_loss: The loss that the run was to reach; None if it had no target.
        options: The known options of the run, by our names (``learning_rate``, ``schedule``, ``accumulation``).
        differences: The rows whose ids differ from those that serving sends and expects; empty also if unknown.
        num_dropped: The number of conversations that were left out.
        num_cut: The number of conversations that lost turns, or their end, to the length limit.
        num_rows: The number of rows of the data set, unmeasured ones included; 0 if all were measured.
        has_head: Whether the floor takes the frozen head into account.
        sources: What was looked at.
    """

    curve: tuple[CurvePoint, ...]
    rows: tuple[RowEvidence, ...]
    first_loss: FirstLoss
    gradients: GradientHealth | None = None
    adapters: AdapterAudit | None = None
    round_trips: tuple[TurnRoundTrip, ...] = ()
    floor: Floor | None = None
    target_loss: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    differences: tuple[RenderingDifference, ...] = ()
    num_dropped: int = 0
    num_cut: int = 0
    num_rows: int = 0
    has_head: bool = False
    evaluations: tuple[Evaluation, ...] = ()
    sources: Sources = field(default_factory=Sources)

    @property
    def is_whole(self) -> bool:
        """Whether the rows at hand are all that the run was trained on.

        A data set that small can be memorised, so its loss falls to the floor. From a larger data set a model learns
        what its conversations have in common: the final loss cannot be predicted, batches differ, and some rows are
        easy from the start.
        """
        return bool(self.rows) and len(self.rows) >= max(self.num_rows, self.num_rows_logged)

    @property
    def num_rows_logged(self) -> int:
        """The number of rows that the run had at least, by the epochs of its log; 0 if the log does not show it."""
        last = next((p for p in reversed(self.curve) if p.epoch), None)
        size = int(self.options.get("rows_per_step") or 1)
        # an epoch may end with a batch that is not full
        return math.floor((last.step / last.epoch - 1) * size) if last and last.epoch else 0

    @property
    def losses(self) -> list[float]:
        """The logged losses that are finite."""
        return [p.loss for p in self.curve if p.loss is not None and math.isfinite(p.loss)]

    @property
    def is_measured(self) -> bool:
        """Whether the trained model's loss on its rows was measured, in place of read in a log."""
        return any(not math.isnan(token.loss) for token in self.supervised)

    @property
    def supervised(self) -> Iterator[TokenEvidence]:
        """The supervised tokens of all measured rows."""
        return (token for row in self.rows for token in row.tokens if token.supervised)

    @property
    def loss(self) -> float:
        """The trained model's mean loss over the supervised tokens; the last logged loss if none was measured."""
        losses = [token.loss for token in self.supervised if not math.isnan(token.loss)]
        if losses:
            return sum(losses) / len(losses)
        return next((p.loss for p in reversed(self.curve) if p.loss is not None), math.nan)

    @property
    def worst_tokens(self) -> list[TokenEvidence]:
        """The supervised tokens that were measured, the largest losses first."""
        return sorted((t for t in self.supervised if not math.isnan(t.loss)), key=lambda token: -token.loss)
