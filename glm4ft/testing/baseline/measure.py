"""Runs a subject with several seeds and records its curves, and refuses what cannot be a baseline."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from glm4ft.errors import ConfigError, RunError
from glm4ft.model.checkpoint import find_checkpoint
from glm4ft.testing.baseline.baseline_file import Baseline, write_baseline
from glm4ft.testing.baseline.curves import Curve, first_unequal, steps_of
from glm4ft.testing.baseline.environment import environment
from glm4ft.testing.baseline.identity import identity_of
from glm4ft.testing.baseline.repository import commit, uncommitted
from glm4ft.testing.baseline.sign_flips import MAX_SEEDS, MIN_SEEDS
from glm4ft.testing.baseline.training_data import conversations_of
from glm4ft.testing.recording.trace import Tensors
from glm4ft.testing.session.gpu_lane import TINY, Bases
from glm4ft.testing.specification.lora_spec import LoraSpec
from glm4ft.testing.specification.reference import Reference
from glm4ft.testing.subject import load_subject, make_plan
from glm4ft.testing.trial.runs import RecordedRun
from glm4ft.testing.trial.stages import NotApplicable
from glm4ft.testing.trial.trial import Trial
from glm4ft.train.trainer import peak_memory_bytes

# What a baseline's runs do: accumulation, warm-up, decay of rate and weights, and clipping all take part.
PLAN: Mapping[str, Any] = {
    "steps": 10, "accumulation": 2, "schedule": "linear", "warmup_steps": 2, "weight_decay": 0.01,
}  # fmt: skip
PACKED: Mapping[str, Any] = {**PLAN, "packing": True, "micro_batch_size": 1}
DATA = "baseline"  # the name of the conversations in the trial
SEEDS = 8
Progress = Callable[[Sequence[int]], Iterable[int]]  # passes the seeds on, and shows how far it is


@dataclass(frozen=True)
class Measured:
    """Curves that were measured just now.

    Args:
        baseline: The curves, with identity and origin.
        rows: The rows of the runs, to show one that changed.
        tokenizer: The tokenizer that shows it.
        again: A second run of the first seed in the same environment; None if there is none.
    """

    baseline: Baseline
    rows: list[tuple[tuple[int, ...], tuple[int, ...]]]
    tokenizer: Any
    again: Curve | None = None


def measure(
    subject: str,
    model: str = TINY,
    *,
    plan: Mapping[str, Any] = PLAN,
    seeds: Sequence[int] = tuple(range(SEEDS)),
    progress: Progress = iter,
) -> Measured:
    """Run a subject once for each seed, and the first once more, and collect its curves.

    Args:
        subject: The subject as ``MODULE:ATTR``.
        model: The base, as for ``--glm4ft-model``.
        plan: The changes of the standard plan.
        seeds: The seeds.
        progress: A function that passes the seeds on and shows how far it is.
    """
    with _trial(subject, model) as trial:
        return measure_trial(trial, model, plan=plan, seeds=seeds, progress=progress)


def measure_trial(
    trial: Trial, model: str, *, plan: Mapping[str, Any], seeds: Sequence[int], progress: Progress = iter
) -> Measured:
    """Run the subject of a trial once for each seed, and the first once more, and collect its curves.

    Args:
        trial: The subject on its base.
        model: What the base is called in the file.
        plan: The changes of the standard plan.
        seeds: The seeds.
        progress: A function that passes the seeds on and shows how far it is.
    """
    trial.data[DATA] = conversations_of(trial)
    rows = trial.rows(trial.data[DATA])
    curves, trained = list[Curve](), Tensors()
    for seed in progress((*seeds, seeds[0])):
        run, curve = _run(trial, seed, plan)
        curves.append(curve)
        trained = trained or (run.trace.steps[0].before if run.trace.steps else {})
    now = datetime.now(UTC).isoformat(timespec="seconds")
    subject = trial.subject
    adapters = getattr(subject, "lora", None) or {}
    identity = identity_of(trial.base_dir, subject.tokenizer, make_plan(**plan), adapters, trained, rows)
    found = Baseline(trial.spec, model, identity, environment(), commit(Path.cwd()), now, tuple(curves[:-1]))
    return Measured(found, rows, subject.tokenizer, curves[-1])


@contextlib.contextmanager
def _trial(subject: str, model: str) -> Iterator[Trial]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as for `glm4ft check`: the base's matrices are too small for several threads
    try:
        with tempfile.TemporaryDirectory(prefix="glm4ft-baseline-") as name:
            base_dir = find_checkpoint(Bases(model, Path(name)).get(), weights=True)
            yield Trial(load_subject(subject, base_dir), base_dir, Path(name), subject)
    finally:
        torch.set_num_threads(num_threads)


def _run(trial: Trial, seed: int, plan: Mapping[str, Any]) -> tuple[RecordedRun, Curve]:
    began_s = time.perf_counter()
    run = trial.run_anew(DATA, **plan, seed=seed)
    seconds = time.perf_counter() - began_s
    steps = steps_of(run.trace, run.known, _reference_of(trial))
    return run, Curve(seed, steps, seconds / max(1, len(steps)), peak_memory_bytes())


def _reference_of(trial: Trial) -> Reference:
    """The base, for the rows of its head; adapters that the specification does not cover leave the head alone."""
    try:
        return trial.reference
    except NotApplicable:
        return Reference(trial.base_dir, LoraSpec(rank=1, alpha=1))


def record_baseline(
    output: Path, subject: str, model: str, plan: Mapping[str, Any], num_seeds: int, progress: Progress = iter
) -> Baseline:
    """Measure a subject and write its curves, for later comparisons.

    Args:
        output: The file to write or replace.
        subject: The subject as ``MODULE:ATTR``.
        model: The base, as for ``--glm4ft-model``.
        plan: The changes of the standard plan.
        num_seeds: The number of seeds.
        progress: A function that passes the seeds on and shows how far it is.
    Returns:
        What was written.
    Raises:
        ConfigError: If the number of seeds is out of range, or files of the repository are not committed, so that the
            commit does not say what was measured.
        RunError: If a run is not finite, not whole, or does not repeat bit for bit.
    """
    require_num_seeds(num_seeds, "--seeds")
    changed = [name for name in uncommitted(Path.cwd()) if not _is_below(Path(name), output.parent)]
    if changed:
        raise ConfigError("the repository has changes that are not committed, so its commit does not say what is "
                          "measured", found=", ".join(changed[:3]), fix="commit or stash them first")  # fmt: skip
    measured = measure(subject, model, plan=plan, seeds=range(num_seeds), progress=progress)
    require_recordable(measured)
    write_baseline(output, measured.baseline)
    return measured.baseline


def require_num_seeds(num_seeds: int, option: str) -> None:
    """Refuse a number of seeds that the test of the curves does not take.

    Args:
        num_seeds: The number.
        option: The option that gave it, for the message.
    Raises:
        ConfigError: If it is out of range.
    """
    if not MIN_SEEDS <= num_seeds <= MAX_SEEDS:
        raise ConfigError("a number of seeds that the test does not take", where=option, found=str(num_seeds),
                          expected=f"{MIN_SEEDS} to {MAX_SEEDS}")  # fmt: skip


def _is_below(file: Path, folder: Path) -> bool:
    return file.absolute().is_relative_to(folder.absolute())


def require_recordable(measured: Measured) -> None:
    """Refuse curves that later ones could not be compared with.

    Args:
        measured: The curves, with a second run of the first seed.
    Raises:
        RunError: If a figure is not finite, a step is missing, or the second run differs.
    """
    found = measured.baseline
    wanted = int(found.identity.plan["steps"])
    for curve in found.curves:
        if len(curve.steps) != wanted:
            raise RunError(f"seed {curve.seed} took {len(curve.steps)} optimizer steps of {wanted}: not a baseline")
        if not curve.is_finite:
            raise RunError(f"seed {curve.seed} has figures that are not finite: not a baseline")
    if words := not_repeated(measured):
        raise RunError(f"{words}, so no later run could be told from it; draw all random numbers from the seed")


def not_repeated(measured: Measured) -> str:
    """How the second run of the first seed differs from the first, in words; "" if it does not."""
    first, again = measured.baseline.curves[0], measured.again
    words = first_unequal(first.steps, again.steps) if again else ""
    return f"two runs of seed {first.seed} in one environment differ, {words}: the run does not repeat" if words else ""
