"""The curves of runs that ``glm4ft record`` recorded, one recording for each seed: there is no subject and no plan.

Rows and labels are read back from the gradients of each recording, and what a plan would say from the run's own
configuration and its optimizer.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from glm4ft.errors import ConfigError, DataError
from glm4ft.testing.baseline.baseline_file import Baseline, write_baseline
from glm4ft.testing.baseline.curves import Curve, steps_of
from glm4ft.testing.baseline.identity import identity_of
from glm4ft.testing.baseline.measure import Measured, Progress, require_num_seeds, require_recordable
from glm4ft.testing.recording.environment import UNCOMMITTED
from glm4ft.testing.recording.merging import merge_ranks
from glm4ft.testing.recording.trace import Tensors, Trace
from glm4ft.testing.replay.matching import KnownRows
from glm4ft.testing.specification.reference import LabelledIds, Reference
from glm4ft.testing.trial.recorded import read_recording, reference_of
from glm4ft.testing.trial.recorded_plan import holding
from glm4ft.testing.trial.recorded_rows import trained_rows

# The options of an adapter that its user states, by peft's names; the others tell where it came from.
ADAPTER = (
    "peft_type", "r", "lora_alpha", "target_modules", "target_parameters", "lora_dropout", "use_rslora", "use_dora",
    "bias", "modules_to_save", "layers_to_transform", "rank_pattern", "alpha_pattern", "exclude_modules",
    "init_lora_weights",
)  # fmt: skip
SETTINGS = ("betas", "eps", "weight_decay")


def measure_recordings(folders: Sequence[Path], base_dir: str = "", progress: Progress = iter) -> Measured:
    """Read the curves of recorded runs.

    Args:
        folders: The folders that ``glm4ft record`` wrote. The runs differ in their seed alone; the first belongs to the
            first seed of a baseline, and so on.
        base_dir: The model folder of the base; by default the one that the first run loaded.
        progress: A function that passes the numbers of the seeds on and shows how far it is.
    Raises:
        InputError: If a folder has no recording, or the base is not there.
        DataError: If the runs differ in more than their seed.
    """
    curves, rows, first = list[Curve](), dict[tuple[int, ...], tuple[int, ...]](), None  # rows as they first appear
    for number in progress(range(len(folders))):
        traces, about = read_recording(folders[number])
        _require_whole(traces, about, folders[number])
        trace = merge_ranks(traces) if len(traces) > 1 else traces[0]
        if first is None:
            reference = reference_of(about, base_dir)
            first = about, _plan(trace, about), trace.steps[0].before
        _require_equal(first[1], _plan(trace, about), folders[0], folders[number])
        trained: list[LabelledIds] = [(row.ids, row.labels) for row in trained_rows(trace, reference)]
        rows |= {ids: labels for ids, labels in trained if ids not in rows}
        curves.append(_curve(number, trace, about, trained, reference))
    assert first is not None
    return _measured(*first, curves, list(rows.items()), reference)


def record_recordings(
    output: Path, folders: Sequence[Path], repeat: Path, base_dir: str = "", progress: Progress = iter
) -> Baseline:
    """Write the curves of recorded runs, for later comparisons.

    Args:
        output: The file to write or replace.
        folders: The recordings, as for ``measure_recordings``.
        repeat: A second recording of the first run.
        base_dir: The model folder of the base; by default the one that the first run loaded.
        progress: A function that passes the numbers of the seeds on and shows how far it is.
    Returns:
        What was written.
    Raises:
        ConfigError: If the number of recordings is out of range, or the runs began in a repository with files that
            were not committed.
        RunError: If a run is not finite, not whole, or its repetition differs in any bit.
    """
    require_num_seeds(len(folders), "--recordings")
    measured = measure_recordings([*folders, repeat], base_dir, progress)
    *curves, again = measured.baseline.curves
    found = replace(measured.baseline, curves=tuple(curves))
    if found.commit.endswith(UNCOMMITTED):
        raise ConfigError("the runs were recorded in a repository with files that are not committed, so its commit "
                          "does not say what was measured", where=str(folders[0]), found=found.commit,
                          fix="commit or stash them and record the runs again")  # fmt: skip
    require_recordable(replace(measured, baseline=found, again=again))
    write_baseline(output, found)
    return found


def _measured(
    about: Mapping[str, Any], plan: Mapping[str, Any], trained: Tensors, curves: Sequence[Curve],
    rows: list[LabelledIds], reference: Reference,
) -> Measured:  # fmt: skip
    adapter = about["model"]["adapter"] or {}
    adapters = {name: adapter[name] for name in ADAPTER if adapter.get(name)}
    identity = identity_of(Path(reference.base_dir), reference.tokenizer, plan, adapters, trained, rows)
    where = {**about["versions"], **about["machine"]}
    found = Baseline("", str(reference.base_dir), identity, where, about["commit"], about["recorded_at"], tuple(curves))
    return Measured(found, rows, reference.tokenizer)


def _curve(
    number: int, trace: Trace, about: Mapping[str, Any], rows: Sequence[LabelledIds], reference: Reference
) -> Curve:
    seconds = about["overhead"]["step_s"]
    return Curve(number, steps_of(trace, KnownRows(rows), reference), statistics.median(seconds) if seconds else 0.0)


def _plan(trace: Trace, about: Mapping[str, Any]) -> dict[str, Any]:
    """What the run's configuration states, and the settings of its optimizer."""
    asked = {name: value for name, value in about["configuration"].items() if name != "seed"}
    settings = holding(trace.steps[0])[0].settings
    own = {name: settings[name] for name in SETTINGS if name in settings}
    return {"steps": len(trace.steps), "processes": about["world_size"], "optimizer": trace.steps[0].optimizer,
            **asked, **own}  # fmt: skip


def _require_whole(traces: Sequence[Trace], about: Mapping[str, Any], folder: Path) -> None:
    if not traces[0].steps:
        raise DataError("the recorded run took no step of an optimizer that trains the model", where=str(folder))
    if len(traces) < about["world_size"]:
        raise DataError("not all processes of the run were recorded", where=str(folder), found=str(len(traces)),
                        expected=str(about["world_size"]))  # fmt: skip


def _require_equal(first: Mapping[str, Any], other: Mapping[str, Any], one: Path, another: Path) -> None:
    for name, was, now in _differences(first, other):
        raise DataError("the recorded runs differ in more than their seed", where=str(another),
                        found=f"{name} {now}", expected=f"{was}, as in {one}")  # fmt: skip


def _differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in sorted(first.keys() | other.keys()):
        if first.get(name) != other.get(name):
            yield name, first.get(name), other.get(name)
