"""Runs that were recorded as they are serve as a baseline, like those of a subject.

Run: pytest tests/testing/baseline/test_recordings.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from glm4ft.cli.main import run
from glm4ft.errors import ConfigError, DataError, InputError, RunError
from glm4ft.testing.baseline.baseline_file import read_baseline
from glm4ft.testing.baseline.compare import Comparison, compare_again
from glm4ft.testing.baseline.recordings import measure_recordings, record_recordings
from glm4ft.testing.recording import environment
from glm4ft.testing.recording.attach import record_run
from glm4ft.testing.subject import make_plan
from glm4ft.testing.subjects.plain_loop import Subject
from glm4ft.testing.trial.trial import Trial

pytest_plugins = ["pytester"]

SEEDS, STEPS = 5, 3


class LargerGradient(Subject):
    """Trains on a loss that is a hundredth too large."""

    def loss_factor(self, batch: Any, num_targets: int, num_micro_batches: int) -> float:
        return 1.01 * super().loss_factor(batch, num_targets, num_micro_batches)


class Recorder:
    """Records runs of a loop into folders, one for each seed."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.base, self.folder = base, folder

    def __call__(
        self, name: str, kind: type[Subject] = Subject, *, seeds: Sequence[int] = range(SEEDS), data: Any = (),
        **changes: Any,
    ) -> list[Path]:  # fmt: skip
        folders = [self.folder / f"{name}-{seed}" for seed in seeds]
        for seed, folder in zip(seeds, folders, strict=True):
            subject, plan = kind(str(self.base)), make_plan(steps=STEPS, seed=seed, **changes)
            model = subject.build_model(str(self.base), seed)
            with record_run(folder, STEPS):
                subject.train(model, data, plan)
        return folders


@pytest.fixture(scope="module")
def recorder(healthy: Trial, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Path]]:
    recorder = Recorder(healthy.base_dir, tmp_path_factory.mktemp("recordings"))

    def record(name: str, *arguments: Any, data: Any = healthy.conversations, **changes: Any) -> list[Path]:
        return recorder(name, *arguments, data=data, **changes)

    return record


@pytest.fixture(scope="module")
def first(recorder: Callable[..., list[Path]]) -> list[Path]:
    return recorder("first")


@pytest.fixture(scope="module")
def again(recorder: Callable[..., list[Path]]) -> list[Path]:
    return recorder("again")


@pytest.fixture(scope="module")
def file(first: list[Path], again: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("baselines") / "script.jsonl"
    folders = map(str, first)
    command = ["baseline", "record", "--output", str(path), "--recordings", *folders, "--repeat", str(again[0])]
    assert run(command) == 0
    return path


def compared(file: Path, recordings: Sequence[Path]) -> Comparison:
    return compare_again(file, recordings=recordings)


def test_figures_are_those_of_the_recorded_runs(file: Path, healthy: Trial) -> None:
    """Losses, norms and labels read back from the gradients equal those of a run whose rows are known."""
    from glm4ft.testing.baseline.curves import steps_of

    known = healthy.run_anew(steps=STEPS, seed=1)
    expected = steps_of(known.trace, known.known, healthy.reference)
    found = read_baseline(file)
    assert [curve.seed for curve in found.curves] == list(range(SEEDS))
    assert found.curves[1].steps == expected
    assert found.environment["device"]
    assert found.identity.adapters["r"] == 8


def test_equal_recordings_are_identical_and_can_be_kept(file: Path, again: list[Path], tmp_path: Path) -> None:
    command = ["baseline", "compare", str(file), "--recordings", *map(str, again), "--keep", str(tmp_path)]
    assert run([*command, "--json", str(tmp_path / "c.json")]) == 0
    (record,) = json.loads((tmp_path / "c.json").read_text("utf-8"))["comparisons"]
    assert (record["outcome"], record["effect"]) == ("identical", 0.0)
    assert run(["baseline", "history", str(file), str(tmp_path / "script.jsonl")]) == 0


def test_a_change_of_the_script_is_an_alarm(file: Path, recorder: Callable[..., list[Path]]) -> None:
    found = compared(file, recorder("larger", LargerGradient))
    assert found.is_alarm
    assert "at step 1, the gradient norm is 1.00% higher" in found.text


def test_one_character_more_is_told_as_data_with_the_row(
    file: Path, recorder: Callable[..., list[Path]], healthy: Trial
) -> None:
    talk = healthy.conversations[2]
    longer = [{**talk["messages"][0], "content": talk["messages"][0]["content"] + "!"}, *talk["messages"][1:]]
    data = [*healthy.conversations[:2], {**talk, "messages": longer}, *healthy.conversations[3:]]
    found = compared(file, recorder("character", data=data))
    assert found.outcome == "not comparable"
    assert "(1 like it)" in found.text
    assert "question 2" in found.text


def test_another_setting_is_told_before_any_curve(file: Path, recorder: Callable[..., list[Path]]) -> None:
    found = compared(file, recorder("decay", weight_decay=0.1))
    assert found.text.endswith("another plan: weight_decay is 0.1, in the baseline 0.0")


def test_runs_that_differ_in_more_than_their_seed_are_refused(
    first: list[Path], recorder: Callable[..., list[Path]]
) -> None:
    other = recorder("epsilon", seeds=[1], eps=1e-6)
    with pytest.raises(DataError, match=r"more than their seed(?s:.*)eps 1e-06(?s:.*)1e-08, as in"):
        measure_recordings([first[0], *other])


def test_a_run_that_does_not_repeat_is_refused(first: list[Path], again: list[Path], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="two runs of seed 0 in one environment differ, first at step 1"):
        record_recordings(tmp_path / "b.jsonl", first, again[1])


def test_runs_of_a_dirty_repository_are_refused(
    first: list[Path], again: list[Path], recorder: Callable[..., list[Path]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(environment.COMMIT, "0123abc+")
    dirty = recorder("dirty", seeds=[0])
    with pytest.raises(ConfigError, match=r"not committed(?s:.*)0123abc\+"):
        record_recordings(tmp_path / "b.jsonl", [*dirty, *first[1:]], again[0])


def test_each_seed_needs_its_recording(file: Path, again: list[Path]) -> None:
    for folders in ((), again[:-1]):
        with pytest.raises(ConfigError, match=f"{len(folders)} recordings(?s:.*)one for each of its 5 seeds"):
            compared(file, folders)


def test_a_folder_without_a_recording_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing was recorded"):
        measure_recordings([tmp_path])


def test_a_process_that_was_not_recorded_is_missed(recorder: Callable[..., list[Path]]) -> None:
    (folder,) = recorder("processes", seeds=[0])
    about = json.loads((folder / "rank-0/trace.json").read_text("utf-8"))
    (folder / "rank-0/trace.json").write_text(json.dumps({**about, "world_size": 2}), "utf-8")
    with pytest.raises(DataError, match=r"not all processes(?s:.*)expected: 2"):
        measure_recordings([folder])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--recordings", "r"], "nothing shows that the recorded runs repeat"),
        (["--recordings", "r", "--repeat", "r", "--steps", "3"], "recorded runs state this themselves"),
        (["--recordings", "r", "--repeat", "r"], "a number of seeds that the test does not take"),
        (["--repeat", "r"], "an option of recorded runs"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["baseline", "record", "--output", "b.jsonl", *options]) == 2
    assert words in capsys.readouterr().err


def test_the_fixture_takes_recordings(file: Path, again: list[Path], pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        f"""
        def test_curves(glm4ft_baseline): glm4ft_baseline("script", recordings={[str(path) for path in again]})
        """
    )
    pytester.runpytest_inprocess(f"--glm4ft-baseline={file.parent}").assert_outcomes(passed=1)
