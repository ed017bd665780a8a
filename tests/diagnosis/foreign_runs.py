"""Makes folders of runs as other trainers leave them: curves of known cause, from a seed, in each trainer's format.

A curve has the noise of batches that differ, the learning rate of its schedule, and gradient norms with a noise of
their own. A fault changes it the way its mechanism does. A writer puts it on the disk as a trainer does.
"""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

NAN = math.nan


@dataclass(frozen=True)
class Run:
    """A run as its log tells it.

    Args:
        points: one mapping per logged step: step, loss, grad_norm, lr, epoch.
        evaluations: pairs of step and loss.
        options: of the run, by transformers' names.
        checkpoints: steps with a checkpoint.
        planned: number of steps that the run was to make; 0 if as many as it made.
    """

    points: tuple[dict[str, float], ...]
    evaluations: tuple[tuple[int, float], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    checkpoints: tuple[int, ...] = ()
    planned: int = 0


def healthy(
    seed: int = 0,
    *,
    steps: int = 400,
    every: int = 5,
    start: float = 1.9,
    end: float = 1.1,
    pace: float = 0.12,
    scatter: float = 0.06,
    rate: float = 1e-4,
    schedule: str = "cosine",
    epochs: float = 3.0,
    evaluate: int = 50,
) -> Run:
    """A run that does what it should: the loss falls fast, then slowly, and batches differ."""
    draw = random.Random(seed)
    points = []
    for step in range(every, steps + 1, every):
        done = step / steps
        warm = min(1.0, step / max(1, 0.05 * steps))
        lr = rate * warm * (0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1.0)
        level = end + (start - end) * math.exp(-done / pace)
        loss = level * math.exp(draw.gauss(0, scatter) / math.sqrt(min(every, 4)))
        norm = (0.4 + 0.8 * math.exp(-done / pace)) * math.exp(draw.gauss(0, 0.25))
        points.append({"step": step, "loss": loss, "grad_norm": norm, "lr": lr, "epoch": epochs * done})
    evaluations = [
        (step, 1.04 * (end + (start - end) * math.exp(-step / steps / pace)) * math.exp(draw.gauss(0, 0.003)))
        for step in range(evaluate, steps + 1, evaluate)
    ]
    return Run(tuple(points), tuple(evaluations))


def changed(run: Run, change: Callable[[int, dict[str, float]], Mapping[str, float]], **more: Any) -> Run:
    """The run with each point changed; called with the point's index."""
    points = tuple({**point, **change(i, point)} for i, point in enumerate(run.points))
    return replace(run, **{"points": points, **more})


def write(trainer: str, run: Run, folder: Path) -> Path:
    """Write the run as a trainer does, and return the folder that its user would name."""
    return WRITERS[trainer](run, folder)


def _history(run: Run) -> list[dict[str, Any]]:
    """As transformers' state keeps it: evaluations between the steps."""
    entries: list[tuple[float, int, dict[str, Any]]] = []
    for number, point in enumerate(run.points):
        names = {"lr": "learning_rate"}
        entry = {names.get(name, name): value for name, value in point.items()}
        entries.append((number, 0, {**entry, "step": int(point["step"])}))
    for step, loss in run.evaluations:
        number = max((i for i, p in enumerate(run.points) if p["step"] <= step), default=-1)
        entry = {"eval_loss": loss, "eval_runtime": 3.2, "eval_samples_per_second": 31.0, "step": step}
        entries.append((number, 1, entry))
    return [entry for _, _, entry in sorted(entries, key=lambda found: found[:2])]


def _state(run: Run) -> dict[str, Any]:
    last = int(run.points[-1]["step"])
    return {
        "best_metric": None,
        "epoch": run.points[-1].get("epoch"),
        "global_step": last,
        "log_history": _history(run),
        "logging_steps": int(run.points[0]["step"]),
        "max_steps": run.planned or last,
        "save_steps": 500,
        "train_batch_size": 2,
    }


def _end(run: Run) -> dict[str, Any]:
    """The entry that transformers adds when a run ends."""
    return {"train_runtime": 812.3, "train_loss": 1.7, "total_flos": 1.0e17, "step": int(run.points[-1]["step"])}


def _checkpoints(run: Run, folder: Path, *, with_state: bool = True) -> None:
    for step in run.checkpoints:
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        points = tuple(point for point in run.points if point["step"] <= step)
        if with_state and points:
            (checkpoint / "trainer_state.json").write_text(json.dumps(_state(replace(run, points=points))))


def _transformers(run: Run, folder: Path) -> Path:
    _checkpoints(run, folder)
    state = _state(run)
    (folder / "trainer_state.json").write_text(json.dumps({**state, "log_history": [*state["log_history"], _end(run)]}))
    (folder / "training_args.bin").write_bytes(b"PK")
    return folder


def _llamafactory(run: Run, folder: Path) -> Path:
    """A run that was killed: its log has no gradient norms, and no state stands beside it."""
    planned = run.planned or int(run.points[-1]["step"])
    lines = []
    for entry in _history(run):
        names = {"step": "current_steps", "learning_rate": "lr"}
        kept = {
            names.get(n, n): v for n, v in entry.items() if n in ("step", "loss", "eval_loss", "learning_rate", "epoch")
        }
        lines.append({"total_steps": planned, **kept, "percentage": 12.5, "elapsed_time": "0:01:02"})
    if not run.planned:
        lines.append({"current_steps": planned, "total_steps": planned, "epoch": 3.0, "percentage": 100.0})
    (folder / "trainer_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _swift(run: Run, folder: Path) -> Path:
    """The user names what was given as output_dir; the run lies below it, and its numbers may be text."""
    version = folder / "v0-20260101-120000"
    version.mkdir(parents=True)
    planned = run.planned or int(run.points[-1]["step"])
    lines = []
    for entry in _history(run):
        step = entry.pop("step")
        shown = {name: value if name == "eval_loss" else f"{value:.4g}" for name, value in entry.items()}
        lines.append({**shown, "global_step/max_steps": f"{step}/{planned}", "memory(GiB)": 20.1})
    lines.append({"train_runtime": 12.0, "train_loss": 1.7, "global_step/max_steps": f"{planned}/{planned}"})
    lines.append({"last_model_checkpoint": None, "global_step": planned, "log_history": _history(run)})
    (version / "logging.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (version / "args.json").write_text(
        json.dumps({"model": "ZhipuAI/GLM-4-9B-0414", "per_device_train_batch_size": 1, **run.options})
    )
    _checkpoints(run, version, with_state=False)
    return folder


def _axolotl(run: Run, folder: Path) -> Path:
    """State below checkpoints only, and a log of the terminal."""
    last = int(run.points[-1]["step"])
    _checkpoints(replace(run, checkpoints=tuple(dict.fromkeys((*run.checkpoints, last)))), folder)
    lines = ["[2026-01-01 12:00:00,000] [INFO] [axolotl.train] Starting trainer...\n", *_printed_lines(run)]
    (folder / "debug.log").write_text("".join(lines))
    return folder


def _printed_lines(run: Run) -> list[str]:
    lines = []
    for entry in _history(run):
        entry.pop("step")
        lines.append(str({n: f"{v:.4g}" for n, v in entry.items()}) + "\n")
        lines.append("  3%|▎         | 12/400 [00:31<17:02,  2.63s/it]\r")
    return lines


def _terminal(run: Run, folder: Path) -> Path:
    """What ``nohup`` keeps of a run; older versions of transformers print numbers, not text."""
    lines = [str({n: v for n, v in entry.items() if n != "step"}) + "\n" for entry in _history(run)]
    (folder / "nohup.out").write_text("Loading checkpoint shards: 100%\n" + "".join(lines))
    return folder


def _lightning(run: Run, folder: Path) -> Path:
    version = folder / "lightning_logs" / "version_0"
    version.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for entry in _history(run):
        step = entry["step"] - 1
        if "eval_loss" in entry:
            rows.append({"epoch": 0, "step": step, "val_loss": entry["eval_loss"]})
            rows.append({"epoch": 0, "step": step, "train_loss_epoch": 1.5})
        else:
            rows.append({"epoch": int(entry["epoch"]), "step": step, "train_loss_step": entry["loss"]})
            rows.append({"step": step, "lr-AdamW": entry["learning_rate"]})
    names = sorted({name for row in rows for name in row})
    with (version / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    (version / "hparams.yaml").write_text("learning_rate: 0.0001\n")
    return folder


def _torchtune(run: Run, folder: Path) -> Path:
    lines = [
        f"Step {int(p['step'])} | loss:{p['loss']} lr:{p['lr']} tokens_per_second:812.3 grad_norm:{p['grad_norm']} \n"
        for p in run.points
    ]
    (folder / "log_1767268800.txt").write_text("".join(lines))
    return folder


WRITERS: Mapping[str, Callable[[Run, Path], Path]] = {
    "transformers": _transformers,
    "llamafactory": _llamafactory,
    "swift": _swift,
    "axolotl": _axolotl,
    "lightning": _lightning,
    "torchtune": _torchtune,
    "terminal": _terminal,
}
