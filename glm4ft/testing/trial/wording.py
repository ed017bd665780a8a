"""What came of the checks of a subject, in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from glm4ft.report.content import Headline, ShownCheck
from glm4ft.report.plain_words import NOTHING_WRONG, sentence
from glm4ft.testing.trial.stages import STAGES

if TYPE_CHECKING:  # what judges the checks of a session may run where torch is missing
    from glm4ft.diagnosis.rules import Diagnosis


class Judged(Protocol):
    """The result of a check, wherever it comes from; members as in ``glm4ft.testing.trial.runner.Result``."""

    @property
    def check(self) -> str: ...  # noqa: D102
    @property
    def stage(self) -> str: ...  # noqa: D102
    @property
    def status(self) -> str: ...  # noqa: D102
    @property
    def message(self) -> str: ...  # noqa: D102


WRONG = ("failed", "error")
LOOK_AT = {
    "rows": "the code that turns a conversation into ids and labels",
    "batches": "collator, packing and sampler",
    "model": "how the base is loaded and the adapters are attached: targets, scale, dtype, mode",
    "gradient": "the loss: what it is divided by, over micro-batches and processes",
    "clipping": "the clipping of the gradient: which norm, and when",
    "schedule": "the schedule of the rate: warm-up, horizon, and how often it steps",
    "update": "the optimizer: its parameters, betas, epsilon and weight decay",
    "side-effects": "what logging, evaluating and saving leave behind",
    "persistence": "saving, loading, merging and resuming",
    "outcome": "the stages before; if all of them hold, what is left is the data or the budget of steps",
}


def shown_check(result: Judged, why: str = "") -> ShownCheck:
    """A result as a report shows it, with what motivates the check."""
    return ShownCheck(result.stage, result.check.replace("_", " "), result.status, result.message, why)


def has_failed(results: Sequence[Judged], stage: str) -> bool:
    """Whether a check of the stage failed, or broke down."""
    return any(result.stage == stage and result.status in WRONG for result in results)


def headline(results: Sequence[Judged], supervised: str, diagnosis: Diagnosis | None = None) -> Headline:
    """The verdict on a subject: the first stage that departs explains those after it.

    Args:
        results: of its checks.
        supervised: what it trains, in words.
        diagnosis: of the run that did not learn.
    """
    wrong = sorted((r for r in results if r.status in WRONG), key=lambda result: STAGES.index(result.stage))
    judged = [result for result in results if result.status != "skipped"]
    skipped = len(results) - len(judged)
    not_judged = (f"{skipped} could not be judged.",) if skipped else ()
    if not wrong:
        tone, known = "good" if judged else "unsure", sum(r.status == "expected-failure" for r in judged)
        text = f"{len(judged) - known} of {len(results)} claims hold, and none fails"
        return Headline("good" if tone == "good" else "unsure", f"{text}.", supervised, not_judged)
    first = wrong[0]
    same = [result for result in wrong if result.stage == first.stage]
    told = tuple(f"{result.check.replace('_', ' ')}: {_first_line(result.message)}" for result in same[:3])
    text = f"{len(wrong)} of {len(judged)} claims fail, first at stage {first.stage}."
    later = [stage for stage in STAGES if any(r.stage == stage for r in wrong)][1:]
    after = (f"Mend that first: failures at {', '.join(later)} may follow from it.",) if later else ()
    todo = (f"Look at {LOOK_AT[first.stage]}.", *after)
    if diagnosis is None or diagnosis.verdict in NOTHING_WRONG:
        return Headline("bad", text, supervised, (*told, *not_judged), todo)
    remedy = sentence(diagnosis.findings[0].remedy)
    return Headline("bad", text, supervised, (diagnosis.text, *told, *not_judged), (remedy, *todo))


def _first_line(message: str) -> str:
    return next((line.strip() for line in message.split("\n") if line.strip()), "")
