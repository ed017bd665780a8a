"""Judges the recording of any training command: there is no subject and no plan, only what the run itself did.

Rows and labels are read back from the recording: ids from the embedding, labels and weights from the loss's gradient at
the final norm. What a plan would state (settings of the optimizer, clipping limit) is taken from the run's own objects,
so a stage is judged for agreement with itself and with the specification, not with a request that nobody made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm4ft.data.encoded_row import IGNORED
from glm4ft.errors import InputError
from glm4ft.testing.recording.attach import NOTE
from glm4ft.testing.recording.ranks import first_difference, merge_ranks
from glm4ft.testing.recording.trace import Step, Trace
from glm4ft.testing.recording.trace_file import read_trace
from glm4ft.testing.replay.replay import JUDGES, Verdict, replay
from glm4ft.testing.replay.step import Departure
from glm4ft.testing.specification.lora_spec import LoraSpec
from glm4ft.testing.specification.reference import (
    LabelledIds,
    Reference,
    clip_factor,
    recover_targets,
    split_rows,
)
from glm4ft.testing.subject import make_plan


@dataclass(frozen=True)
class JudgedRecording:
    """The verdict on a recorded run.

    Args:
        verdict: The result of the replay.
        rows: The rows that the run trained on, with the labels that it trained.
        not_judged: The reason for each stage that was not judged, by stage.
        num_steps: The number of recorded optimizer steps.
        num_processes: The number of processes that were recorded.
        reference: The specification on the run's base.
    """

    verdict: Verdict
    rows: list[LabelledIds]
    not_judged: Mapping[str, str] = field(default_factory=dict)
    num_steps: int = 0
    num_processes: int = 1
    reference: Reference | None = None


def judge_recording(folder: Path, base_dir: str = "") -> JudgedRecording:
    """Compare a recorded run with the specification.

    Args:
        folder: The folder that ``glm4ft record`` wrote.
        base_dir: The model folder of the base; by default the one that the run loaded.
    Raises:
        InputError: If nothing was recorded, or the base is not there.
    """
    traces, about = _read(folder)
    trace = merge_ranks(traces) if len(traces) > 1 else traces[0]
    reference = Reference(_base(base_dir or about["base"]), _adapter(about))
    rows = recorded_rows(trace, reference)
    not_judged = {"schedule": "the recording does not state the schedule", **_unjudged(trace, about, len(traces))}
    verdict = replay(trace, reference, list(rows.items()), inferred_plan(trace, len(traces)), skip=not_judged)
    number, name = first_difference(traces)
    if number:
        text = f"after step {number} the {len(traces)} processes hold different parameters, e.g. {name}"
        verdict.add(Departure("gradient", number, text, "their gradients are not averaged"))
    return JudgedRecording(verdict, list(rows.items()), not_judged, len(trace.steps), len(traces), reference)


def recorded_rows(trace: Trace, reference: Reference) -> dict[tuple[int, ...], tuple[int, ...]]:
    """The labels of each row that went through the model, by its ids; -100 where no token was trained."""
    rows: dict[tuple[int, ...], tuple[int, ...]] = {}
    for step in trace.steps:
        weight_VD = reference.head_weight(step.before)
        for forward in step.forwards:
            if forward.gradient_BTD is None:
                continue
            pairs = zip(forward.hidden_BTD, forward.gradient_BTD, strict=True)
            targets = [recover_targets(hidden_TD, gradient_TD, weight_VD) for hidden_TD, gradient_TD in pairs]
            for b, positions in split_rows(forward):
                ids = forward.input_ids_BT[b][positions].tolist()
                trained = (targets[b].labels_T[positions] != IGNORED).tolist()
                labels = [id if is_trained else IGNORED for id, is_trained in zip(ids, trained, strict=True)]
                rows.setdefault(tuple(ids), (IGNORED, *labels[1:]))
    return rows


def inferred_plan(trace: Trace, num_processes: int) -> dict[str, Any]:
    """The plan that a run's own optimizer and gradients state, as far as they do."""
    settings = next(group.settings for group in trace.steps[0].groups if group.size)
    limits = [clip_factor(step.clipped, 0)[0] for step in trace.steps if _is_clipped(step)]
    plan = make_plan(
        steps=len(trace.steps),
        accumulation=max(1, len(trace.steps[0].forwards) // num_processes),
        learning_rate=float(settings["lr"]) or 1.0,
        max_grad_norm=max(limits, default=0.0),
        packing=any(len(split_rows(f)) > len(f.input_ids_BT) for step in trace.steps for f in step.forwards),
        **{name: settings[name] for name in ("betas", "eps", "weight_decay") if name in settings},
    )
    return {**plan, "processes": num_processes}


def _is_clipped(step: Step) -> bool:
    raw, clipped = (clip_factor(gradients, 0)[0] for gradients in (step.raw, step.clipped))
    return clipped < (1 - 1e-5) * raw


def _unjudged(trace: Trace, about: Mapping[str, Any], num_recorded: int) -> dict[str, str]:
    """The reason for each judge of the replay that has nothing to compare with, by judge."""
    found: dict[str, str] = {}
    if about["dropout"]:
        why = f"the run drops entries ({about['dropout']:g}), so hidden states and gradients are random"
        found |= dict.fromkeys(("batches", "model", "gradient"), why)
    if num_recorded < about["processes"]:
        why = f"{num_recorded} of {about['processes']} processes were recorded"
        found |= dict.fromkeys(("loss", "gradient", "clipping"), why)
    groups = [group for step in trace.steps for group in step.groups if group.size]
    optimizers = {step.optimizer for step in trace.steps}
    if optimizers != {"AdamW"}:
        found["update"] = f"the optimizer is {', '.join(sorted(optimizers))}, not AdamW"
    elif len({(group.settings["lr"], group.settings["weight_decay"]) for group in trace.steps[0].groups}) > 1:
        found["update"] = f"{len(groups)} parameter groups have several learning rates or weight decays"
    return {judge: why for judge, why in found.items() if judge in JUDGES}


def _read(folder: Path) -> tuple[list[Trace], dict[str, Any]]:
    """The trace of each process, and what the first knew of its model."""
    ranks = sorted(folder.glob("rank-*"), key=lambda path: int(path.name.partition("-")[2]))
    notes = [(rank / NOTE).read_text("utf-8").strip() for rank in ranks if (rank / NOTE).exists()]
    found = [read_trace(rank) for rank in ranks if (rank / "trace.json").exists()]
    if not found or not any(trace.steps for trace, _ in found):
        raise InputError(
            "nothing was recorded", where=str(folder), found="; ".join(notes) or f"{len(ranks)} recorded processes",
            expected="a folder of glm4ft record, of a command that took an optimizer step",
        )  # fmt: skip
    return [trace for trace, _ in found], found[0][1]


def _base(name: str) -> Path:
    if not (name and Path(name, "config.json").is_file()):
        raise InputError(
            "the base is not a model folder on this machine", found=name or "nothing", expected="a model folder",
            fix="name it with --model",
        )  # fmt: skip
    return Path(name)


def _adapter(about: Mapping[str, Any]) -> LoraSpec:
    try:
        return LoraSpec.of(about["adapter"] or {"r": 1, "lora_alpha": 1})
    except ValueError as error:
        raise InputError(
            "the run's adapter cannot be judged", found=str(error), expected="LoRA, rsLoRA or DoRA"
        ) from None
