"""What a report shows, as plain data: the same for the page, the summary in Markdown and the card of a failed check.

Texts are as they come, conversations included; whoever renders them makes them safe. Losses are in nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from glm4ft.files import finite

Tone = Literal["good", "bad", "unsure"]
# Statuses of a check in order of weight: the first that a stage has among its checks decides how the stage is shown.
STATUSES = ("error", "failed", "expected-failure", "passed", "skipped")


@dataclass(frozen=True)
class Headline:
    """What somebody reads who reads nothing else.

    Args:
        tone: whether to worry.
        text: the verdict in one sentence.
        supervised: what was trained, in one sentence.
        happened: what came of it, or what went wrong, a sentence each.
        remedies: what to do, a sentence each.
    """

    tone: Tone
    text: str
    supervised: str = ""
    happened: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()


@dataclass(frozen=True)
class Curves:
    """One entry per optimizer step; None where a value was not finite or is not known.

    Args:
        steps: numbers of the steps.
        loss: mean over the step's supervised tokens.
        grad_norm: global L2 norm before clipping.
        rate: of the update.
        evaluations: step and loss of each evaluation.
        target: loss that was to be reached.
        floor: certified bound that the loss cannot go below; None if there is none.
        clip: norm to which gradients were scaled down; None if they were not.
    """

    steps: tuple[int, ...] = ()
    loss: tuple[float | None, ...] = ()
    grad_norm: tuple[float | None, ...] = ()
    rate: tuple[float | None, ...] = ()
    evaluations: tuple[tuple[int, float | None], ...] = ()
    target: float | None = None
    floor: float | None = None
    clip: float | None = None

    @classmethod
    def of(
        cls, rows: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]] = (), **lines: Any
    ) -> Curves:
        """From the rows of a trajectory, or of transformers' log.

        Args:
            rows: with ``loss``, ``grad_norm``, ``lr`` or ``learning_rate``, and ``step`` unless they are numbered.
            evaluations: with ``step`` and ``eval_loss``.
            **lines: ``target``, ``floor`` and ``clip``.
        """
        return cls(
            steps=tuple(int(row.get("step", number)) for number, row in enumerate(rows, 1)),
            loss=tuple(finite(row.get("loss")) for row in rows),
            grad_norm=tuple(finite(row.get("grad_norm")) for row in rows),
            rate=tuple(finite(row.get("lr", row.get("learning_rate"))) for row in rows),
            evaluations=tuple((int(row["step"]), finite(row["eval_loss"])) for row in evaluations),
            **lines,
        )


@dataclass(frozen=True)
class ShownRow:
    """One conversation as the model saw it; all sequences are as long as ``input_ids``, or empty where not known.

    Args:
        title: which one it is.
        input_ids: token ids.
        supervised: True where the loss counted the token as a target.
        expected: what should have been supervised.
        losses: of each token given what is before it; None for the first.
        floors: certified bound of that loss; None where there is no target.
        said: id of the token that the model found likeliest in its place.
    """

    title: str
    input_ids: Sequence[int]
    supervised: Sequence[bool]
    expected: Sequence[bool] = ()
    losses: Sequence[float | None] = ()
    floors: Sequence[float | None] = ()
    said: Sequence[int | None] = ()

    @property
    def targets(self) -> list[int]:
        """Positions that were supervised."""
        return [at for at, keep in enumerate(self.supervised) if keep]

    @property
    def mean_loss(self) -> float | None:
        """Over the supervised tokens; None without losses or targets."""
        known = [self.losses[at] for at in self.targets] if self.losses else []
        values = [loss for loss in known if loss is not None]
        return math.fsum(values) / len(values) if values and len(values) == len(known) else None


@dataclass(frozen=True)
class ShownTurn:
    """An assistant turn that was to be said back.

    Args:
        title: which one it is.
        expected: text, control tokens by name.
        generated: what came instead.
        exact: whether all of it came back, the stop token included.
        trained: False if nobody taught it.
        stop: token on which generation stopped; None if it had to be cut off.
    """

    title: str
    expected: str
    generated: str
    exact: bool
    trained: bool = True
    stop: str | None = None


@dataclass(frozen=True)
class ShownCheck:
    """A claim about a pipeline and what became of it; ``status`` as in the results' JSON."""

    stage: str
    claim: str
    status: str
    message: str = ""
    why: str = ""


@dataclass(frozen=True)
class ShownOption:
    """An option, its value, and where the value came from."""

    name: str
    value: str
    source: str


@dataclass(frozen=True)
class Content:
    """All that a report may show; what is empty is left out.

    Args:
        title: kind and name of what is reported on.
        headline: the verdict.
        tokenizer: names the tokens of ``rows``; None if there are none.
        curves: of the run.
        runs: names and curves of further runs.
        counts: kind of token to how many there are, how many were supervised, and how many should have been (or
            None).
        rows: conversations that are shown.
        num_rows: conversations in all.
        turns: of the round trip.
        checks: of the conformance suite.
        facts: name and value of what else is known of the run: adapter, data, device, versions.
        options: as resolved.
        command: reproduces it.
    """

    title: str
    headline: Headline
    tokenizer: Any = None
    curves: Curves = field(default_factory=Curves)
    runs: tuple[tuple[str, Curves], ...] = ()
    counts: Mapping[str, tuple[int, int, int | None]] = field(default_factory=dict)
    rows: tuple[ShownRow, ...] = ()
    num_rows: int = 0
    turns: tuple[ShownTurn, ...] = ()
    checks: tuple[ShownCheck, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    options: tuple[ShownOption, ...] = ()
    command: str = ""
