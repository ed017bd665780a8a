"""A repository that has just met glm4ft: green on a healthy pipeline, red at the right stage once a line is broken.

The wheel is built, installed into an environment of its own, ``glm4ft init`` renders the template into an empty folder,
and ``tox`` runs it there, in yet another environment. Minutes, and several gigabytes on a machine with CUDA builds.

Run: tox run -e downstream
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from glm4ft.testing.trial.stages import STAGES

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Break:
    """One line of a pipeline, broken.

    Args:
        trainer: of the template.
        old: text of the rendered adapter.
        new: what it becomes.
        stage: at which the verdict has to name it first.
    """

    trainer: str
    old: str
    new: str
    stage: str


LABELS, COUNT = '"labels": row.labels}', 'reduction="sum") / count'
YOURS = "# YOURS: "
DECAYING = "train = lambda self, model, data, plan: super().train(model, data, {**plan, 'weight_decay': 0.5})"
BREAKS = (
    Break("transformers", LABELS, '"labels": row.input_ids}', "rows"),
    Break(
        "transformers", "**training_arguments(plan)", "**{**training_arguments(plan), 'max_grad_norm': 9}", "clipping"
    ),
    Break("trl", LABELS, '"labels": [*row.labels[:-1], -100]}', "rows"),
    Break("trl", "**training_arguments(plan)", "**training_arguments({**plan, 'schedule': 'constant'})", "schedule"),
    Break("loop", COUNT, 'reduction="mean")', "gradient"),
    Break("loop", "            scheduler.step()\n", "", "schedule"),
    Break("loop", 'weight_decay=plan["weight_decay"]', "weight_decay=0.01", "update"),
    Break("llamafactory", YOURS, f"{DECAYING}  # ", "update"),
    Break("swift", YOURS, f"{DECAYING}  # ", "update"),
)
# What asks for versions of its own runs in an environment that this repository has for it anyway.
ENVIRONMENTS = {"llamafactory": "llamafactory", "swift": "ms-swift"}


def run(*command: object, folder: Path, expected: int | None = 0) -> str:
    """Run a command and give back what it printed."""
    environment = {**os.environ, "PIP_CONSTRAINT": str(ROOT / "constraints.txt"), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([str(c) for c in command], cwd=folder, env=environment, capture_output=True, text=True)
    text = done.stdout + done.stderr
    assert expected is None or done.returncode == expected, text[-6000:]
    return text


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` folder of an environment with the wheel and tox."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, ROOT, folder=folder)
    run(sys.executable, "-m", "venv", folder / "venv", folder=folder)
    (wheel,) = folder.glob("*.whl")
    # torch first and by itself: only a version that the constraints name is sure to be the machine's own build
    run(folder / "venv/bin/pip", "install", "torch", folder=folder)
    run(folder / "venv/bin/pip", "install", f"glm4ft[init] @ {wheel.as_uri()}", "tox", folder=folder)
    return folder / "venv" / "bin"


@pytest.fixture(scope="session", params=["transformers", "trl", "loop", *ENVIRONMENTS])
def healthy(request: pytest.FixtureRequest, installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository in which the template has just been rendered."""
    folder = tmp_path_factory.mktemp(request.param) / "demo"
    (wheel,) = installed.parents[1].glob("*.whl")
    required = f"glm4ft @ {wheel.as_uri()}"  # as no repository should have it: it is not released
    run(installed / "glm4ft", "init", folder, "--trainer", request.param, "--requirement", required, folder=installed)
    return folder


def trainer_of(repository: Path) -> str:
    """What the template was rendered for."""
    return repository.parent.name.rstrip("0123456789")


def put_on_trial(repository: Path, installed: Path, expected: int) -> str:
    """What ``glm4ft init`` says one should run; what it printed."""
    tox, environment = installed / "tox", ENVIRONMENTS.get(trainer_of(repository))
    if environment is None:
        return run(tox, "run", "-e", "conformance", folder=repository, expected=expected)
    run(tox, "run", "--notest", "-e", environment, folder=ROOT)
    python = ROOT / ".tox" / environment / "bin" / "python"
    return run(python, "-m", "pytest", "conformance", "-m", "not gpu", folder=repository, expected=expected)


def test_fresh_repository_is_green(healthy: Path, installed: Path) -> None:
    text = put_on_trial(healthy, installed, expected=0)
    assert re.search(r"\d+ passed", text)
    assert not re.search(r"\d+ (failed|error)", text)


@pytest.mark.parametrize("broken", BREAKS, ids=lambda b: f"{b.trainer}-{b.stage}")
def test_broken_line_is_red_at_its_stage(broken: Break, healthy: Path, installed: Path) -> None:
    adapter = healthy / "conformance" / "adapter.py"
    text = adapter.read_text()
    if broken.trainer != trainer_of(healthy):
        pytest.skip("a line of another trainer's adapter")
    assert text.count(broken.old) == 1
    try:
        adapter.write_text(text.replace(broken.old, broken.new))
        said = put_on_trial(healthy, installed, expected=1)
    finally:
        adapter.write_text(text)
    failed = re.findall(r"^FAILED \S+\[([a-z-]+?)-[a-z0-9]+_\S*\]", said, re.MULTILINE)
    assert failed, said[-3000:]
    assert min(failed, key=STAGES.index) == broken.stage, failed
