"""What is known of a run: the record that a diagnosis is drawn from, and that a report shows.

Losses are in nats. Texts of tokens are as they may be printed (``glm4ft.text.token_text``); HTML needs its escapes.
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
    """One token of a row and what the trained model makes of it.

    Args:
        line: of the conversation in its file; 0 if unknown.
        turn: number of the assistant turn it belongs to, from 0; None outside assistant turns.
        position: in the row.
        id: of the token.
        text: of the token; control tokens by name.
        role: whose token it is; a terminator belongs to the assistant, whose turn it ends; "" for the prefix.
        part: of the message.
        supervised: True if the run trained it.
        label: what the run trained here, if not the token itself; -100 where nothing.
        loss: of the trained model on the token itself, in nats.
        probability: ``exp(-loss)``.
        predicted_id: the token the model holds likeliest here.
        predicted: its text.
        base_loss: of the base without the adapter, in nats.
        share: of the summed loss of all supervised tokens; 0 if not supervised.
        floor: certified lower bound of the loss here, in nats; None if not computed or not supervised.
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
    """One row.

    Args:
        line: of the conversation in its file; 0 if unknown.
        tokens: all but the first of the row, in order: the first is never predicted.
        loss: mean over its supervised tokens; NaN if it has none, or nothing was measured.
    """

    line: int
    tokens: tuple[TokenEvidence, ...]
    loss: float

    @property
    def length(self) -> int:
        """Tokens of the row."""
        return len(self.tokens) + 1


@dataclass(frozen=True)
class RenderingDifference:
    """Where a row departs from what serving makes of the same conversation.

    Args:
        line: of the conversation in its file.
        position: of the first id that differs.
        trained: text of the row from there on, a few tokens of it.
        served: what serving has there.
    """

    line: int
    position: int
    trained: str
    served: str


@dataclass(frozen=True)
class CurvePoint:
    """One logged step; None where the log has no number, NaN or infinite where it was not finite.

    Args:
        step: from 1.
        loss: as logged, nats per supervised token.
        grad_norm: global L2 norm before clipping.
        lr: of the update.
    """

    step: int
    loss: float | None
    grad_norm: float | None
    lr: float | None


@dataclass(frozen=True)
class GradientHealth:
    """The gradient norms of a run in a few figures.

    Args:
        first: norm of the first step.
        last: of the last.
        median: of all that are finite.
        largest: of all that are finite.
        largest_step: where it stands.
        spike_ratio: largest ratio of a norm to the median of its neighbourhood.
        spike_step: where it stands.
        non_finite_steps: steps whose loss or norm is not finite.
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
    """Which adapters there are, and whether they do anything.

    Args:
        num_adapters: adapted modules.
        targets: last name of the adapted modules to their number.
        dead: names of adapters that add nothing: A or B is zero.
        non_finite: names of adapters with an entry that is not finite.
        num_trainable: parameters that require a gradient; None where the adapter was read from disk.
        wanted_but_missing: target names of the configuration that no adapter has.
    """

    num_adapters: int
    targets: Mapping[str, int]
    dead: tuple[str, ...]
    non_finite: tuple[str, ...]
    num_trainable: int | None = None
    wanted_but_missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class FirstLoss:
    """Where the run began, beside where it should have begun.

    Args:
        logged: loss of the first step; None without a log.
        base: mean loss of the base alone on the supervised tokens; None if it was not computed.
        uniform: ``ln V``, the loss of a model that knows nothing.
    """

    logged: float | None
    base: float | None
    uniform: float


@dataclass(frozen=True)
class Evidence:
    """Everything that was measured of one run.

    Args:
        curve: the logged steps.
        rows: token by token, for as many rows as were measured.
        first_loss: where the run began.
        gradients: None without logged norms.
        adapters: None without an adapter.
        round_trips: one per assistant turn tried; ``exact`` says whether it came back.
        floor: of the data as they were trained; None if it could not be computed.
        target_loss: that the run was to reach, or None.
        options: of the run as far as they are known, by our names (``learning_rate``, ``schedule``, ``max_steps``).
        differences: of rows whose ids are not those that serving sends and expects; empty also where that is not known.
        num_dropped: conversations that were left out.
        num_cut: conversations that lost turns, or their end, to the length limit.
        num_rows: of the data set, those that were not measured included; 0 if all were.
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

    @property
    def is_whole(self) -> bool:
        """Whether all rows were measured: so few that they are learnt by heart, and the loss comes down to its floor.

        Of a larger data set a model learns what its conversations have in common. Where its loss comes to rest nobody
        can say, batches differ, and some rows are easy from the start.
        """
        return len(self.rows) >= self.num_rows

    @property
    def supervised(self) -> Iterator[TokenEvidence]:
        """The tokens that were trained."""
        return (token for row in self.rows for token in row.tokens if token.supervised)

    @property
    def loss(self) -> float:
        """Mean loss of the trained model over the supervised tokens; where nothing was measured, the last logged."""
        losses = [token.loss for token in self.supervised if not math.isnan(token.loss)]
        if losses:
            return sum(losses) / len(losses)
        return next((p.loss for p in reversed(self.curve) if p.loss is not None), math.nan)

    @property
    def worst_tokens(self) -> list[TokenEvidence]:
        """The supervised tokens that were measured, those that hold most of the loss first."""
        return sorted((t for t in self.supervised if not math.isnan(t.loss)), key=lambda token: -token.loss)
