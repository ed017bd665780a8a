"""Records a run in several processes on one machine, and merges the traces into that of an equivalent single process.

As a module it is one of those processes, in torchrun's environment: `python -m glm4ft.testing.recording.ranks JOB`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from glm4ft.testing.recording.recorder import record
from glm4ft.testing.recording.trace import Step, Tensors, Trace
from glm4ft.testing.recording.trace_file import read_trace, write_trace
from glm4ft.testing.subject import load_subject

TIMEOUT_S = 300


@dataclass(frozen=True)
class Job:
    """The run that every process executes, handed over as a JSON file.

    Args:
        spec: The subject as ``MODULE:ATTR``.
        base_dir: The model folder of the base.
        conversations: The conversations to train on.
        plan: The plan of the run; ``micro_batch_size`` and ``accumulation`` are those of one process.
        folder: The folder for the traces and logs.
    """

    spec: str
    base_dir: str
    conversations: Sequence[Mapping[str, Any]]
    plan: Mapping[str, Any]
    folder: str


def run_ranks(job: Job, num_processes: int) -> list[Trace]:
    """Run a job in several processes, with gloo on the CPU.

    Returns:
        The trace of each process.
    Raises:
        RuntimeError: If a process fails; the message holds the last lines of its output.
    """
    path = Path(job.folder) / "job.json"
    path.write_text(json.dumps(vars(job)), "utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [_start(path, rank, num_processes, port) for rank in range(num_processes)]
    try:
        for rank, process in enumerate(processes):
            if process.wait(TIMEOUT_S):
                said = _log(job.folder, rank).read_text("utf-8", "replace").strip().splitlines()
                raise RuntimeError(f"process {rank} of {num_processes} failed: " + " | ".join(said[-3:]))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [read_trace(Path(job.folder) / f"rank-{rank}")[0] for rank in range(num_processes)]


def _start(job: Path, rank: int, num_processes: int, port: int) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    with _log(str(job.parent), rank).open("wb") as log:
        command = [sys.executable, "-m", "glm4ft.testing.recording.ranks", str(job)]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _log(folder: str, rank: int) -> Path:
    return Path(folder) / f"rank-{rank}.log"


def merge_ranks(traces: Sequence[Trace]) -> Trace:
    """Merge the traces of several processes into the trace that one process would have recorded.

    Each process records the gradient of its own rows, which the distributed wrapper then averages over all processes.
    So its gradient at the final norm enters with a weight of one over the number of processes.

    Args:
        traces: The trace of each process, over the same steps.
    """
    steps = [_merge_step([trace.steps[i] for trace in traces]) for i in range(min(len(t.steps) for t in traces))]
    return replace(traces[0], steps=steps)


def _merge_step(steps: Sequence[Step]) -> Step:
    count = len(steps)
    forwards = [
        replace(f, gradient_BTD=None if f.gradient_BTD is None else f.gradient_BTD / count)
        for step in steps
        for f in step.forwards
    ]
    names = set.intersection(*(set(step.raw) for step in steps))
    raw = {name: torch.stack([step.raw[name].double() for step in steps]).mean(0) for name in sorted(names)}
    return replace(steps[0], forwards=forwards, raw=raw)


def first_difference(traces: Sequence[Trace]) -> tuple[int, str]:
    """The first step after which the processes' parameters differ, and the name of one that differs; else (0, "")."""
    for number, steps in enumerate(zip(*(trace.steps for trace in traces), strict=False), start=1):
        first: Tensors = steps[0].after
        for name, tensor in first.items():
            if any(not torch.equal(tensor, step.after[name]) for step in steps[1:]):
                return number, name
    return 0, ""


def _main(path: str) -> None:
    job = Job(**json.loads(Path(path).read_text("utf-8")))
    subject = load_subject(job.spec, Path(job.base_dir))
    model = subject.build_model(job.base_dir, job.plan["seed"])
    with record(model, job.plan["steps"]) as trace:
        subject.train(model, list(job.conversations), dict(job.plan))
    write_trace(trace, Path(job.folder) / f"rank-{os.environ['RANK']}", {})
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _main(sys.argv[1])
