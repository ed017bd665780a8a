"""The result of a run in plain words, as the headline of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from glm4ft.data.data_report import DataReport
from glm4ft.diagnosis.finding import CERTAIN
from glm4ft.diagnosis.rules import Diagnosis
from glm4ft.model.generation import TurnRoundTrip
from glm4ft.report.content import Headline, Tone
from glm4ft.report.plain_words import NOTHING_WRONG, OPEN_VERDICTS, number_of, sentence

MORE_FINDINGS = 1
Counts = Mapping[str, tuple[int, int, int | None]]
NAMES = {
    "assistant": ("token of the assistant's text", "tokens of the assistant's text"),
    "terminator": ("end of an assistant turn", "ends of assistant turns"),
    "assistant header": ("<|assistant|> header", "<|assistant|> headers"),
    "header": ("other header", "other headers"),
    "prefix": ("prefix token", "prefix tokens"),
    "system": ("token of system text", "tokens of system text"),
    "user": ("token of user text", "tokens of user text"),
    "observation": ("token of tool results", "tokens of tool results"),
}


def supervised_sentence(data: DataReport, counts: Counts, *, num_shown: int) -> str:
    """Describe the supervised tokens in one sentence.

    Args:
        data: The totals over all conversations.
        counts: The token counts of the conversations shown, by part.
        num_shown: The number of conversations shown.
    """
    total = f"{data.supervised_tokens:,} of {data.tokens:,} tokens in {number_of(data.rows, 'conversation')}"
    where = "" if num_shown == data.rows else f" in the {num_shown} shown"
    return f"{total}{where and ';'}{where}: {parts_sentence(counts)}"


def parts_sentence(counts: Counts) -> str:
    """Describe how many tokens of each part were supervised, and how many should have been if that differs."""
    told = []
    for part, (tokens, supervised, should) in counts.items():
        wrong = f" (should be {_all(should, tokens)})" if should is not None and should != supervised else ""
        if supervised or wrong:
            told.append(f"{_share(supervised, tokens)} {NAMES.get(part, (part, part))[tokens != 1]}{wrong}")
    return (", ".join(told) or "nothing at all") + "."


def finished_run(
    steps: Sequence[Mapping[str, Any]],
    target: float | None,
    round_trips: Sequence[TurnRoundTrip],
    supervised: str,
    evaluations: str = "",
) -> Headline:
    """Make the headline of a run that finished; ``evaluations`` is what ``describe_evaluations`` says of them."""
    last = steps[-1]["loss"]
    wrong = [turn for turn in round_trips if turn.supervised and not turn.exact]
    happened = [f"The loss went from {steps[0]['loss']:.3g} to {last:.3g} in {number_of(len(steps), 'step')}."]
    if evaluations:
        happened.append(sentence(evaluations))
    if target is not None:
        happened.append(f"It was to fall below {target:g}, and {'did' if last < target else 'did not'}.")
    if round_trips:
        exact = sum(turn.exact for turn in round_trips)
        happened.append(f"{exact} of {number_of(len(round_trips), 'assistant turn')} came back word for word.")
    missed = target is not None and not last < target
    if missed or wrong:
        text = f"The loss stopped at {last:.3g}" if missed else f"{number_of(len(wrong), 'turn')} did not come back"
        return Headline("bad", text, supervised, tuple(happened))
    is_proven = target is not None or bool(round_trips)
    text = f"Learnt: the loss is {last:.3g}" if is_proven else f"Trained: the loss is {last:.3g}"
    return Headline("good" if is_proven else "unsure", text, supervised, tuple(happened))


def diagnosed_run(diagnosis: Diagnosis, account: Headline) -> Headline:
    """Make the headline of a run that was diagnosed.

    Args:
        diagnosis: The diagnosis of the run.
        account: The headline from ``finished_run`` or ``failed_run``, which is returned if no fault was found.
    """
    first, *others = diagnosis.findings
    sure = [finding for finding in others if finding.strength >= CERTAIN][:MORE_FINDINGS]
    if first.verdict in NOTHING_WRONG and not sure:
        return account
    text, _, more = first.text.partition(". ")
    told = (more, *first.evidence, *(finding.text for finding in sure), *account.happened)
    todo = dict.fromkeys(finding.remedy for finding in (first, *sure))
    tone: Tone = "unsure" if first.verdict in OPEN_VERDICTS and account.tone != "bad" else "bad"
    return Headline(
        tone,
        sentence(text),
        account.supervised,
        tuple(sentence(fact) for fact in told if fact),
        tuple(sentence(remedy) for remedy in todo if remedy),
    )


def failed_run(error: str, supervised: str) -> Headline:
    """Make the headline of a run that had to stop."""
    first, _, rest = error.partition("; ")
    return Headline("bad", f"The run stopped: {first}", supervised, (error,) if rest else ())


def _share(part: int, whole: int) -> str:
    return f"all {whole:,}" if part == whole and whole > 1 else f"{part:,} of {whole:,}"


def _all(part: int, whole: int) -> str:
    return f"all {whole:,}" if part == whole and whole > 1 else f"{part:,}"
