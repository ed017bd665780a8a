"""A run tells its observers of each of its parts, and knows none of them by itself.

Run: pytest tests/train/test_observers.py
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from glm4ft.errors import ConfigError, RunError
from glm4ft.train.config import TrainConfig
from glm4ft.train.observer import PreparedRun, RunObserver
from glm4ft.train.run import run_training
from glm4ft.train.trainer import SupervisedTrainer

SHORT = TrainConfig(data=str(Path(__file__).with_name("two_short_talks.jsonl")), max_steps=8, save_every=0)


class Diary(RunObserver):
    """Notes what it is told, and what is on the disk then."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails, self.entries = fails, list[tuple[str, bool, bool]]()

    def on_prepared(self, run: PreparedRun) -> None:
        self._note("prepared", run)

    def on_begin(self, run: PreparedRun) -> None:
        self._note("begin", run)
        if self.fails:
            raise OSError("no room")

    def on_end(self, run: PreparedRun) -> None:
        self._note("end", run)

    def on_failure(self, run: PreparedRun, error: RunError) -> None:
        self._note(f"failure: {error}", run)

    def _note(self, what: str, run: PreparedRun) -> None:
        files = ("config.yaml", "adapter_model.safetensors")
        self.entries.append((what, *((run.output / name).exists() for name in files)))


def test_observers_are_told_of_each_part_of_a_run(tmp_path: Path) -> None:
    diary = Diary()
    config = replace(SHORT, max_steps=1, output=str(tmp_path / "run"))
    run_training(config, observers=[diary], say=lambda _: None)
    assert diary.entries == [("prepared", False, False), ("begin", False, False), ("end", True, True)]
    run_training(config, observers=[diary], say=lambda _: None, resume=True)
    assert len(diary.entries) == 3, "a run that is complete asks nothing of an observer that is done"


def test_observer_is_told_of_a_run_that_has_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise RunError("stopped")

    diary = Diary()
    monkeypatch.setattr(SupervisedTrainer, "training_step", stop)
    with pytest.raises(RunError, match="stopped"):
        run_training(replace(SHORT, output=str(tmp_path / "run")), observers=[diary], say=lambda _: None)
    assert diary.entries[-1] == ("failure: stopped", True, False)


@pytest.mark.parametrize("exists", [True, False])
def test_begin_that_fails_leaves_the_output_as_it_was(exists: bool, tmp_path: Path) -> None:
    output = tmp_path / "run"
    if exists:
        output.mkdir()
    with pytest.raises(ConfigError, match=r"(?s)the run cannot be written.*no room"):
        run_training(replace(SHORT, output=str(output)), observers=[Diary(fails=True)], say=lambda _: None)
    assert output.exists() == exists
    assert not exists or not any(output.iterdir())


def test_target_above_the_floor_needs_an_observer_that_knows_the_floor(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no observer computes the floor"):
        run_training(replace(SHORT, target_loss="floor+1", output=str(tmp_path / "run")), say=lambda _: None)
    assert not (tmp_path / "run").exists()


def test_trainer_loads_little_of_this_package() -> None:
    """No floors, no diagnosis, no report, no harness: a minimal trainer, of which the limits are part of its design."""
    code = (
        "import sys, glm4ft.train.run as run\n"
        "files = {n: m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'glm4ft'}\n"
        "print(len(files), sum(len(open(f, encoding='utf-8').readlines()) for f in files.values()), *files)"
    )
    num_modules, num_lines, *names = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert int(num_modules) <= 45
    assert int(num_lines) <= 6600
    assert {name.split(".")[1] for name in names if "." in name} == {
        "data", "errors", "files", "folders", "model", "reading", "train"
    }  # fmt: skip
