"""What the processes of a launcher run in test_processes.py: commands of glm4ft one after the other, each with a fault.

Run by: torchrun --nproc-per-node=2 in_processes.py JOBS.json
    or accelerate launch --config_file FILE in_processes.py JOBS.json
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType

from glm4ft.cli import main as cli
from glm4ft.train.trainer import SupervisedTrainer

training_step = SupervisedTrainer.training_step


def shard_on_cpus() -> None:
    """Let accelerate shard over gloo: on CPUs it ignores a configuration of FSDP, and trains with DDP in silence."""
    original = PartialState.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = init


def strike(fault: str) -> None:
    """Let a fault befall the last process."""
    if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        whom = os.getppid() if fault == "launcher terminated" else os.getpid()
        os.kill(whom, signal.SIGKILL if fault == "killed" else signal.SIGTERM)


def main() -> None:
    """Run the jobs, each an ``argv`` with an optional ``fault`` in the midst of the step after ``at``."""
    signal.signal(signal.SIGTERM, cli._interrupt)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpus()
    for job in json.loads(Path(sys.argv[1]).read_text("utf-8")):

        def step(self: Any, *args: Any, job: Any = job, **kwargs: Any) -> Any:
            loss = training_step(self, *args, **kwargs)
            if self.state.global_step == job.get("at"):
                strike(job["fault"])
            return loss

        SupervisedTrainer.training_step = step
        status = cli.run(job["argv"])
        if status != job.get("status", 0):
            sys.exit(status)


main()
