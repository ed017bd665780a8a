"""Records a run in several processes on one machine.

As a module it is one of those processes, in torchrun's environment: `python -m glm4ft.testing.recording.ranks JOB`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glm4ft.testing.recording.record import record
from glm4ft.testing.recording.trace import Trace
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
