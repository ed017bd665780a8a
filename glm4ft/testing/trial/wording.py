"""Words the results of a subject's checks as a headline for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from glm4ft.report.content import Headline, ShownCheck
from glm4ft.report.plain_words import NOTHING_WRONG, sentence
from glm4ft.testing.trial.stages import STAGES
from glm4ft.testing.trial.verdicts import Judged, group_failures

if TYPE_CHECKING:  # a session's report may be written where torch is not installed
    from glm4ft.diagnosis.rules import Diagnosis


LONGEST_CAUSE = 160  # characters; what is longer stands below the headline
WIRE_IT = "Let the lines marked YOURS in the adapter call your own code."
WRONG = ("failed", "error")
LOOK_AT = {
    "rows": "the code that turns a conversation into ids and labels",
    "batches": "collator, packing and sampler",
    "model": "how the base is loaded and the adapters are attached: targets, scale, dtype, mode",
    "gradient": "the loss: what it is divided by, over micro-batches and processes",
    "clipping": "gradient clipping: which norm, and when",
    "schedule": "the learning rate schedule: warm-up, horizon, and how often it steps",
    "update": "the optimizer: its parameters, betas, epsilon and weight decay",
    "side-effects": "what logging, evaluating and saving change in the run",
    "persistence": "saving, loading, merging and resuming",
    "outcome": "the earlier stages; if all of them hold, the data or the number of steps",
}


def shown_check(result: Judged, why: str = "") -> ShownCheck:
    """A result in the form that a report shows, with the motive of the check."""
    return ShownCheck(result.stage, result.check.replace("_", " "), result.status, result.message, why)


def has_failed(results: Sequence[Judged], stage: str) -> bool:
    """Whether a check of the stage failed, or the subject raised an error in it."""
    return any(result.stage == stage and result.status in WRONG for result in results)


def headline(
    results: Sequence[Judged], supervised: str, diagnosis: Diagnosis | None = None, *, unwired: str = ""
) -> Headline:
    """The verdict on a subject; the first stage that fails comes first, since it may explain the later ones.

    Args:
        results: The results of the subject's checks.
        supervised: A sentence on which tokens the subject trains.
        diagnosis: The diagnosis of the overfit run, if that did not learn; None otherwise.
        unwired: The sentence that the subject is not wired yet, which then is the verdict; "" if it is.
    """
    wrong = sorted((r for r in results if r.status in WRONG), key=lambda result: STAGES.index(result.stage))
    judged = [result for result in results if result.status != "skipped"]
    skipped = len(results) - len(judged)
    not_judged = (f"{skipped} could not be judged.",) if skipped else ()
    if unwired and any(r.status in WRONG for r in results):
        not_judged = (unwired, *not_judged)
    if not wrong:
        tone, known = "good" if judged else "unsure", sum(r.status == "expected-failure" for r in judged)
        text = f"{len(judged) - known} of {len(results)} claims hold, and none fails"
        if unwired:
            return Headline("unsure", unwired, supervised, (f"{text}.", *not_judged), (WIRE_IT,))
        return Headline("good" if tone == "good" else "unsure", f"{text}.", supervised, not_judged)
    first = wrong[0]
    same = [result for result in wrong if result.stage == first.stage]
    told = tuple(f"{result.check.replace('_', ' ')}: {_first_line(result.message)}" for result in same[:3])
    num_causes = len(group_failures(wrong))
    causes = f", of {num_causes} cause{'s' * (num_causes != 1)}" if len(wrong) > 1 else ""
    count = f"{len(wrong)} of {len(judged)} claims fail{causes}, first at stage {first.stage}."
    later = [stage for stage in STAGES if any(r.stage == stage for r in wrong)][1:]
    after = (f"Fix that first: failures at {', '.join(later)} may follow from it.",) if later else ()
    todo = (f"Look at {LOOK_AT[first.stage]}.", *after)
    if diagnosis is None or diagnosis.verdict in NOTHING_WRONG:
        text = f"At stage {first.stage}: {_first_sentence(_first_line(first.message))}"
        return Headline("bad", text, supervised, (count, *told, *not_judged), todo)
    remedy, (cause, _, more) = sentence(diagnosis.findings[0].remedy), diagnosis.text.partition(". ")
    happened = (count, *([more] if more else []), *told, *not_judged)
    return Headline("bad", sentence(cause), supervised, happened, (remedy, *todo))


def _first_sentence(text: str) -> str:
    first = text.partition(". ")[0].rstrip(".")
    return f"{first if len(first) <= LONGEST_CAUSE else first[: LONGEST_CAUSE - 1] + '…'}."


def _first_line(message: str) -> str:
    return next((line.strip() for line in message.split("\n") if line.strip()), "")
