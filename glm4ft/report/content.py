"""The content of a report as plain data, shared by the HTML page, the Markdown summary and the failure card.

Texts, conversations included, are raw: the renderers make them safe. Losses are in nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from glm4ft.files import finite

Tone = Literal["good", "bad", "unsure"]
# Statuses of a check, the most severe first: a stage is shown with the most severe status of its checks.
STATUSES = ("error", "failed", "expected-failure", "passed", "skipped")


@dataclass(frozen=True)
class Headline:
    """The verdict of a report, for readers who read nothing else.

    Args:
        tone: The kind of verdict.
        text: The verdict in one sentence.
        supervised: The supervised tokens, in one sentence.
        happened: The results or faults of the run, a sentence each.
        remedies: The advice to the user, a sentence each.
    """

    tone: Tone
    text: str
    supervised: str = ""
    happened: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()


@dataclass(frozen=True)
class Curves:
    """The curves of a run, with one entry per optimizer step; None if a value was not finite or is not known.

    Args:
        steps: The numbers of the steps.
        loss: The mean loss over each step's supervised tokens.
        grad_norm: The global L2 norm of the gradient before clipping.
        rate: The learning rate of each update.
        evaluations: The step and loss of each evaluation.
        target: The loss to reach; None if there is no target.
        floor: The certified lower bound of the loss; None if there is none.
        clip: The norm to which gradients were clipped; None if they were not.
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
        """Make curves from the rows of a trajectory, or of transformers' log.

        Args:
            rows: Mappings with ``loss``, ``grad_norm``, and ``lr`` or ``learning_rate``; rows without ``step`` are
                numbered from 1.
            evaluations: Mappings with ``step`` and ``eval_loss``.
            **lines: The fields ``target``, ``floor`` and ``clip``.
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
    """One conversation as the model saw it; all sequences are as long as ``input_ids``, or empty if not known.

    Args:
        title: The name of the conversation, such as its line.
        input_ids: The token ids.
        supervised: True at each token that the loss counted as a target.
        expected: True at each token that should have been supervised.
        losses: The loss of each token given the tokens before it; None for the first.
        floors: The certified lower bound of each loss; None if the token is not a target.
        said: The id of the token that the model found likeliest at each position.
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
        """The positions of the supervised tokens."""
        return [at for at, keep in enumerate(self.supervised) if keep]

    @property
    def mean_loss(self) -> float | None:
        """The mean loss over the supervised tokens; None if there are none or a loss is not known."""
        known = [self.losses[at] for at in self.targets] if self.losses else []
        values = [loss for loss in known if loss is not None]
        return math.fsum(values) / len(values) if values and len(values) == len(known) else None


@dataclass(frozen=True)
class ShownTurn:
    """The result of generating an assistant turn again.

    Args:
        title: The title of the turn.
        expected: The text of the turn, with control tokens by name.
        generated: The generated text.
        exact: True if the whole turn was reproduced, the stop token included.
        trained: False if the turn was not trained.
        stop: The token on which generation stopped; None if it was cut off.
    """

    title: str
    expected: str
    generated: str
    exact: bool
    trained: bool = True
    stop: str | None = None


@dataclass(frozen=True)
class ShownCheck:
    """The result of a check of a pipeline.

    Args:
        stage: The stage of training that the check belongs to.
        claim: The claim about the pipeline, in words.
        status: The status of the check, as in the results' JSON.
        message: The message of a check that did not pass.
        why: The known incident behind the claim, such as an upstream issue; "" if there is none.
    """

    stage: str
    claim: str
    status: str
    message: str = ""
    why: str = ""


@dataclass(frozen=True)
class ShownOption:
    """A resolved option.

    Args:
        name: The name of the option.
        value: The value of the option.
        source: The source of the value, such as the command line or the default.
    """

    name: str
    value: str
    source: str


@dataclass(frozen=True)
class Content:
    """The content of a report; empty parts are left out.

    Args:
        title: The kind and name of the subject of the report.
        headline: The verdict.
        tokenizer: The tokenizer of ``rows``; None if there are no rows.
        curves: The curves of the run.
        runs: The names and curves of further runs.
        counts: A mapping of each kind of token to the number of tokens, of supervised tokens, and of tokens that should
            have been supervised (None if not known).
        rows: The conversations to show.
        num_rows: The number of all conversations.
        turns: The turns of the round trip.
        checks: The checks of the conformance suite.
        facts: The names and values of further facts about the run: adapter, data, device, versions.
        options: The resolved options.
        command: The command that reproduces the run or the check.
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
