"""The report of a trial: which tokens the subject supervises, what the model learned, and which claims hold."""

from __future__ import annotations

import contextlib
import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch

from glm4ft.data.encoded_rows import TrainedRow
from glm4ft.diagnosis.measure import gather_evidence
from glm4ft.diagnosis.rules import Diagnosis, diagnose
from glm4ft.model.checkpoint import TINY, TINY_GLM4_IDS
from glm4ft.model.generation import OVERRUN, greedy
from glm4ft.report.content import Content, Curves, ShownRow, ShownTurn
from glm4ft.report.costly_tokens import part_counts
from glm4ft.report.failure_card import explain_failure
from glm4ft.report.wording import parts_sentence
from glm4ft.testing.specification import chat_template
from glm4ft.testing.specification.mask_oracle import IGNORED, Undecidable, control_ids, find_mistakes
from glm4ft.testing.specification.update_rule import clip_factor
from glm4ft.testing.trial.registry import Check
from glm4ft.testing.trial.runner import Result
from glm4ft.testing.trial.runs import RecordedRun
from glm4ft.testing.trial.stages import NotApplicable
from glm4ft.testing.trial.trial import LOSS_LIMIT, Trial
from glm4ft.testing.trial.turns import template_marks, turns_in
from glm4ft.testing.trial.wiring import unwired
from glm4ft.testing.trial.wording import has_failed, headline, shown_check

BUILT_IN = {
    TINY: "the built-in tiny GLM-4, written for this trial",
    TINY_GLM4_IDS: "the built-in tiny GLM-4 with the ids of GLM-4's own vocabulary, written for this trial",
}
LOSSES = 20  # the number of steps whose loss is computed if the subject returns no log


def trial_content(spec: str, results: Sequence[Result], trial: Trial, checks: Sequence[Check] = ()) -> Content:
    """Gather the content of the report of a trial.

    Args:
        spec: The subject as ``MODULE:ATTR``.
        results: The results of its checks.
        trial: The trial that they ran in; nothing is trained for the report.
        checks: The checks of the suite, whose motives the report shows.
    """
    run, why = trial.recorded("demo"), {check.name: check.incident for check in checks}
    rows = tuple(_rows(trial, run))
    diagnosis = _diagnose(trial, run) if run and has_failed(results, "outcome") else None
    floor = diagnosis.evidence.floor if diagnosis else None
    return Content(
        title=f"glm4ft check · {spec}",
        headline=headline(results, supervised_by(trial), diagnosis, unwired=unwired(trial.subject)),
        tokenizer=trial.subject.tokenizer,
        curves=_curves(run, floor.floor if floor else None) if run else Curves(),
        counts=part_counts(rows, trial.subject.tokenizer),
        rows=rows,
        num_rows=len(rows),
        turns=tuple(_turns(trial, run)) if run else (),
        checks=tuple(shown_check(result, why.get(result.check, "")) for result in results),
        facts=tuple(_facts(trial)),
        command=f"glm4ft check --subject {spec}" + f" --model {trial.base}" * (trial.base != TINY),
    )


def supervised_by(trial: Trial) -> str:
    """A sentence on which tokens of the bundled conversations the subject trains; "" if it cannot encode them."""
    counts = part_counts(_rows(trial, None), trial.subject.tokenizer)
    return parts_sentence(counts) if counts else ""


def explain_trial(spec: str, results: Sequence[Result], trial: Trial) -> str:
    """The failure card of a trial whose overfit run failed; "" if it did not fail, or was never run."""
    if not has_failed(results, "outcome") or trial.recorded("demo") is None:
        return ""
    return explain_failure(replace(trial_content(spec, results, trial), facts=()))


def _rows(trial: Trial, run: RecordedRun | None) -> Iterator[ShownRow]:
    """The bundled conversations as the subject encodes them; none if it cannot."""
    try:
        encoded = trial.rows(trial.demo)
    except Exception:  # a check has already reported it
        return
    for number, (conversation, (ids, labels)) in enumerate(zip(trial.demo, encoded, strict=True), start=1):
        supervised = [label != IGNORED for label in labels]
        expected = _expected(trial, conversation, ids, labels) or []
        losses, said = _measure(trial, run, ids) if run else ([], [])
        yield ShownRow(f"bundled conversation {number}", ids, supervised, expected, losses, said=said)


def _expected(trial: Trial, conversation: dict[str, Any], ids: Sequence[int], labels: Sequence[int]) -> list[bool]:
    """Whether each token should be supervised; empty if the oracle cannot decide it."""
    wrong: set[int] = set()
    try:
        if getattr(trial.subject, "chat_format", None):
            controls = control_ids(trial.subject.tokenizer)
            turns = turns_in(trial, conversation, ids)
            wrong = {mistake.position for mistake in find_mistakes(ids, labels, turns, controls)}
        else:
            found = chat_template.find_mistakes(trial.subject.tokenizer, ids, labels, template_marks(trial))
            wrong = {mistake.position for mistake in found if mistake.kind != "prefix"}
    except (Undecidable, NotApplicable):
        return []
    return [(label != IGNORED) != (at in wrong) for at, label in enumerate(labels)]


def _measure(trial: Trial, run: RecordedRun, ids: Sequence[int]) -> tuple[list[float | None], list[int | None]]:
    with torch.no_grad():
        hidden_TD = trial.reference.hidden(ids, run.trained)
        logits_TV = trial.reference.logits(hidden_TD[:-1], run.trained)
        nll_T = torch.nn.functional.cross_entropy(logits_TV, torch.tensor(list(ids[1:])), reduction="none")
    return [None, *nll_T.tolist()], [None, *logits_TV.argmax(-1).tolist()]


def _diagnose(trial: Trial, run: RecordedRun) -> Diagnosis | None:
    """Diagnose the run from its own figures; None if its model cannot be measured."""
    rows = [TrainedRow(number, ids, labels) for number, (ids, labels) in enumerate(run.rows, start=1)]
    try:
        return diagnose(
            gather_evidence(run.model, rows, trial.subject.tokenizer, _figures(run), target_loss=LOSS_LIMIT)
        )
    except Exception:  # the model is foreign code, and the claims have been judged without the diagnosis
        return None


def _curves(run: RecordedRun, floor: float | None) -> Curves:
    return Curves.of(_figures(run), target=LOSS_LIMIT, floor=floor, clip=run.plan["max_grad_norm"] or None)


def _figures(run: RecordedRun) -> list[dict[str, Any]]:
    """The logged loss, or else the loss before every few steps; gradient norm and learning rate as recorded."""
    logged = {int(e.get("step", i)): e["loss"] for i, e in enumerate(run.log, start=1) if e.get("loss") is not None}
    stride = math.ceil(len(run.trace.steps) / LOSSES)
    steps = list(enumerate(run.trace.steps, start=1))
    if not logged:
        with torch.no_grad():
            logged = {number: float(run.reference.loss(run.rows, step.before)) for number, step in steps[::stride]}
    return [
        {"step": i, "loss": logged[i], "grad_norm": clip_factor(s.raw, 0)[0], "lr": s.groups[0].settings.get("lr")}
        for i, s in steps
        if i in logged
    ]


def _turns(trial: Trial, run: RecordedRun) -> Iterator[ShownTurn]:
    """Each assistant turn of the bundled conversations, with what the subject's model generates for it."""
    tokenizer, model = trial.subject.tokenizer, run.model.eval()
    with contextlib.suppress(Undecidable, NotApplicable):
        for number, (conversation, (ids, _)) in enumerate(zip(trial.demo, run.rows, strict=True), start=1):
            for turn in [turn for turn in turns_in(trial, conversation, ids) if turn.asked]:
                expected = list(ids[turn.start : turn.end + 1])
                stops = trial.stop_ids or expected[-1:]
                got = greedy(model, list(ids[: turn.start]), stops, len(expected) + OVERRUN)
                stop = tokenizer.convert_ids_to_tokens(got[-1]) if got and got[-1] in stops else None
                yield ShownTurn(
                    f"bundled conversation {number}, messages[{turn.message}]",
                    str(tokenizer.decode(expected)),
                    str(tokenizer.decode(got)),
                    exact=got == expected,
                    stop=None if stop is None else str(stop),
                )


def _facts(trial: Trial) -> Iterator[tuple[str, str]]:
    yield "subject", f"{trial.subject.name} ({trial.spec})"
    yield "base", BUILT_IN.get(trial.base, trial.base)
    yield "chat format", str(getattr(trial.subject, "chat_format", None) or "that of the tokenizer's template")
    yield "versions", ", ".join(f"{name} {version(name)}" for name in ("glm4ft", "torch", "transformers", "peft"))
    yield "system", f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
