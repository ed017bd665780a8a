"""DeepSpeed's second and third stage, by accelerate's configuration alone, compute what one process computes.

The second shards gradients and optimizer states, the third the weights too.

Run: tox run -e deepspeed
"""

from __future__ import annotations

import importlib.util
import subprocess

import pytest
import yaml
from launches import PROCESSES, Launches, require_equal

from glm4ft.train.run_folder import last_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed; found none"),
]
CONFIG = {"distributed_type": "DEEPSPEED", "num_processes": PROCESSES, "use_cpu": True, "mixed_precision": "no"}


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    return Launches(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module", params=[2, 3], ids=["second-stage", "third-stage"])
def launched(request: pytest.FixtureRequest, launches: Launches) -> tuple[str, subprocess.CompletedProcess[str]]:
    """The prefix of the runs' names, and what was said."""
    name, stage = f"zero{request.param}", {"zero_stage": request.param, "zero3_init_flag": False}
    path = launches.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, "deepspeed_config": stage}))
    jobs = [
        launches.job(launches.padded, f"{name}-padded", fault="stopped", at=9, status=143),
        {"argv": ["train", "--resume", str(launches.folder / f"{name}-padded")]},
        launches.job(launches.packed, f"{name}-packed"),
        launches.job(launches.padded, f"{name}-killed", fault="killed", at=7),
    ]
    return name, launches.launch("accelerate.commands.launch", f"--config_file={path}", jobs=jobs)


def test_stopped_and_resumed_run_is_that_of_one_process(
    launches: Launches, launched: tuple[str, subprocess.CompletedProcess[str]]
) -> None:
    """In the last step of an epoch a process has no row; its head must be gathered all the same."""
    output = launches.folder / f"{launched[0]}-padded"
    require_equal(output, launches.one["padded"])
    assert (output / "checkpoint-20" / "global_step20").is_dir()


def test_packed_run_is_that_of_one_process(
    launches: Launches, launched: tuple[str, subprocess.CompletedProcess[str]]
) -> None:
    require_equal(launches.folder / f"{launched[0]}-packed", launches.one["packed"])


def test_killed_process_ends_all(launches: Launches, launched: tuple[str, subprocess.CompletedProcess[str]]) -> None:
    name, ended = launched
    output = launches.folder / f"{name}-killed"
    assert ended.returncode != 0
    assert "SIGKILL" in ended.stderr
    assert f"--resume {output}" in ended.stderr
    assert last_checkpoint(output) == output / "checkpoint-5"
