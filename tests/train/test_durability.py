"""A run that was stopped, killed or damaged goes on from what is intact and says so, or is refused with the reason.

Run: pytest tests/train/test_durability.py
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from glm4ft.cli.main import run as command
from glm4ft.errors import ConfigError, InputError, Interrupted, RunError
from glm4ft.folders import COMPLETE_MARKER, damage, only_writer, require_unused
from glm4ft.report.observed_run import ObservedRun, train_observed
from glm4ft.train import run_folder
from glm4ft.train.config import TrainConfig
from glm4ft.train.run_folder import last_checkpoint
from glm4ft.train.trainer import SupervisedTrainer

DATA = Path(__file__).with_name("two_short_talks.jsonl")
CONFIG = TrainConfig(data=str(DATA), max_steps=4, save_every=2)


def train(output: Path, said: list[str] | None = None, **kwargs: Any) -> ObservedRun:
    says = said if said is not None else []
    return train_observed(replace(CONFIG, output=str(output)), say=says.append, **kwargs)


def figures(result: ObservedRun) -> list[tuple[float, ...]]:
    return [tuple(row[name] for name in ("step", "loss", "grad_norm", "lr")) for row in result.trajectory.steps]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> ObservedRun:
    """A finished run of four steps with checkpoints after 2 and 4."""
    return train(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def stopped(whole: ObservedRun, tmp_path: Path) -> Path:
    """A copy of the run as a kill before its adapter was written leaves it."""
    output = shutil.copytree(whole.output, tmp_path / "run")
    for name in (COMPLETE_MARKER, *run_folder.ADAPTER_FILES):
        (output / name).unlink()
    return output


def remove(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [remove, cut, flip])
def test_no_file_of_a_checkpoint_can_be_damaged_unnoticed(harm: Callable[[Path], None], stopped: Path) -> None:
    """Optimizer, scheduler and random state included: without one of them transformers would train on, differently."""
    newest = stopped / "checkpoint-4"
    names = sorted(path.name for path in newest.iterdir())
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", COMPLETE_MARKER} <= set(names)
    for name in names:
        kept = (newest / name).read_bytes()
        harm(newest / name)
        assert last_checkpoint(stopped) == stopped / "checkpoint-2", name
        (newest / name).write_bytes(kept)
    assert last_checkpoint(stopped) == newest


def test_damaged_checkpoint_is_passed_over_aloud_for_the_one_before(stopped: Path, whole: ObservedRun) -> None:
    flip(stopped / "checkpoint-4" / "optimizer.pt")
    cut(stopped / "base" / "config.json")
    said: list[str] = []
    resumed = train(stopped, said, resume=True)
    assert figures(resumed) == figures(whole)
    (warning,) = [line for line in said if line.startswith("warning: checkpoint-4 is damaged: optimizer.pt")]
    assert "going on from checkpoint-2; it is kept as damaged-checkpoint-4" in warning
    assert "damaged" not in " ".join(path.name for path in stopped.glob("checkpoint-*"))
    for name in run_folder.ADAPTER_FILES:
        assert (stopped / name).read_bytes() == (whole.output / name).read_bytes().replace(
            str(whole.output).encode(), str(stopped).encode()
        )


def test_run_without_an_intact_checkpoint_begins_again(stopped: Path) -> None:
    for step in (2, 4):
        remove(stopped / f"checkpoint-{step}" / "scheduler.pt")
    said: list[str] = []
    run_folder.rewind_run(stopped, said.append)
    assert len(said) == 2
    assert all("going on from the beginning" in line for line in said)
    assert len((stopped / "trajectory.jsonl").read_text().splitlines()) == 1


def test_checkpoint_that_outlived_the_trajectory_is_passed_over(stopped: Path) -> None:
    """A machine that crashes may lose the rows of steps whose checkpoint it kept."""
    rows = (stopped / "trajectory.jsonl").read_text().splitlines(keepends=True)
    (stopped / "trajectory.jsonl").write_text("".join(rows[:4]))
    assert last_checkpoint(stopped) == stopped / "checkpoint-2"


def test_checkpoint_after_a_row_that_was_changed_is_passed_over(stopped: Path) -> None:
    """A digit of a loss that is another one shows in no type and no gap."""
    rows = (stopped / "trajectory.jsonl").read_text().splitlines(keepends=True)
    rows[3] = re.sub(r'("loss": \d\.)(\d)', lambda match: match[1] + str(9 - int(match[2])), rows[3])
    (stopped / "trajectory.jsonl").write_text("".join(rows))
    assert last_checkpoint(stopped) == stopped / "checkpoint-2"


@pytest.mark.parametrize("name", run_folder.ADAPTER_FILES)
def test_finished_run_with_a_damaged_adapter_is_refused(
    name: str, whole: ObservedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = shutil.copytree(whole.output, tmp_path / "run")
    flip(output / name)
    assert command(["train", "--resume", str(output)]) == 2
    assert command(["merge", str(output), f"--output={tmp_path / 'merged'}"]) == 2
    error = capsys.readouterr().err
    assert error.count(f"{name} is not what was written") == 2
    assert "checkpoint-4" in error
    assert not (tmp_path / "merged").exists()


def test_checkpoint_with_another_damage_can_be_merged(stopped: Path, tmp_path: Path) -> None:
    checkpoint = stopped / "checkpoint-4"
    flip(checkpoint / "optimizer.pt")
    assert command(["merge", str(checkpoint), f"--output={tmp_path / 'merged'}", f"--model={stopped / 'base'}"]) == 0


def test_older_checkpoint_goes_only_when_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a single one kept, a kill between the two would otherwise leave none."""
    monkeypatch.setattr("glm4ft.train.trainer.complete_checkpoint", kill_at_second_call())
    config = replace(CONFIG, keep_checkpoints=1, output=str(tmp_path / "run"))
    with pytest.raises(SystemExit):
        train_observed(config, say=lambda _: None)
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"


def kill_at_second_call() -> Callable[[Path, int], None]:
    def complete(output: Path, step: int) -> None:
        if step > 2:
            raise SystemExit
        run_folder.complete_checkpoint(output, step)

    return complete


@pytest.fixture(autouse=True)
def _interrupts_arrive() -> Iterator[None]:
    """A shell lets background processes ignore SIGINT, and pytest in one of them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_ends_the_run_with_a_checkpoint(
    number: int,
    status: int,
    tmp_path: Path,
    whole: ObservedRun,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where no checkpoints were asked for; the command that is printed finishes the run, bit for bit."""
    training_step = SupervisedTrainer.training_step

    def signalled(self: SupervisedTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            os.kill(os.getpid(), number)
        return training_step(self, *args, **kwargs)

    output = tmp_path / "a run"
    with monkeypatch.context() as patch:
        patch.setattr(SupervisedTrainer, "training_step", signalled)
        argv = ["train", f"--data={DATA}", "--max_steps=4", "--save_every=0", f"--output={output}"]
        assert command(argv) == status
    (line,) = re.findall(r"go on after the last checkpoint: glm4ft (.*)", capsys.readouterr().err)
    assert last_checkpoint(output) == output / "checkpoint-3"
    assert command(shlex.split(line)) == 0
    rows = [json.loads(row) for row in (output / "trajectory.jsonl").read_text().splitlines()[1:]]
    assert [tuple(row[name] for name in ("step", "loss", "grad_norm", "lr")) for row in rows] == figures(whole)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_second_signal_ends_the_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def signalled(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on")

    monkeypatch.setattr(SupervisedTrainer, "training_step", signalled)
    with pytest.raises(Interrupted):
        train(tmp_path / "run")
    assert last_checkpoint(tmp_path / "run") is None


# --- one writer ---


def test_folder_that_another_process_writes_is_refused(
    stopped: Path, whole: ObservedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"
    before = (stopped / "trajectory.jsonl").read_bytes()
    with only_writer(stopped, "config.yaml"), only_writer(new, "config.yaml"):
        assert command(["train", "--resume", str(stopped)]) == 2
        assert command(["train", "--data=demo", f"--output={new}"]) == 2
        assert command(["merge", str(whole.output), f"--output={new}"]) == 2
    assert capsys.readouterr().err.count("another process is writing to the folder") == 3
    assert (stopped / "trajectory.jsonl").read_bytes() == before
    assert not new.exists()
    assert not (stopped / ".lock").exists()


def test_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from glm4ft.folders import only_writer\n"
        "with only_writer(Path(sys.argv[1]), 'config.yaml'): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match="another process"), only_writer(tmp_path / "run", "config.yaml"):
        pytest.fail("two writers")
    process.kill()
    process.wait()
    assert (tmp_path / "run" / ".lock").exists()
    with only_writer(tmp_path / "run", "config.yaml"):
        require_unused(tmp_path / "run")
    assert (tmp_path / "run").is_dir()


CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link"}


def test_run_killed_while_it_begins_is_begun_again_or_resumed(tmp_path: Path) -> None:
    """At each change of the file system: the folder is unused for the next writer, or holds a whole run."""

    def write_rest(folder: Path) -> None:
        (folder / "base").mkdir()
        (folder / "base" / "weights").write_text("w")
        (folder / "rows.jsonl").write_text("{}\n")

    def begin(output: Path, kill_at: int) -> None:
        num_changes = 0

        def count(event: str, _: Any) -> None:
            nonlocal num_changes
            num_changes += event in CHANGES
            if num_changes == kill_at:
                os._exit(9)

        with only_writer(output, "config.yaml"):
            sys.addaudithook(count)
            run_folder.begin(output, CONFIG, {"type": "header"}, write_rest)

    outcomes = []
    for kill_at in range(1, 100):
        output = tmp_path / str(kill_at)
        child = os.fork()
        if child == 0:
            begin(output, kill_at)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        with only_writer(output, "config.yaml"):
            if run_folder.is_run(output):
                assert {path.name for path in output.iterdir()} == {
                    ".lock", "base", "config.yaml", "rows.jsonl", "trajectory.jsonl"
                }  # fmt: skip
                assert (output / "base" / "weights").read_text() == "w"
                run_folder.require_same_run(output, CONFIG, {"rows_sha256": None})
            else:
                require_unused(output)
            outcomes.append(run_folder.is_run(output))
        if status == 0:
            break
    assert len(outcomes) > 14
    assert outcomes == sorted(outcomes)
    assert outcomes[-2]  # a kill in the midst of the move


def test_failed_beginning_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError("no room")

    (tmp_path / "there").mkdir()
    for name in ("there", "new"):
        output = tmp_path / name
        with pytest.raises(ConfigError, match="no room"), only_writer(output, "config.yaml"):
            run_folder.begin(output, CONFIG, {"type": "header"}, fail)
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


# --- what was edited ---


def test_edited_options_are_named(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder may move, and so may the data: they are known by their digest."""
    path = stopped / "config.yaml"
    options = yaml.safe_load(path.read_text())
    options["learning_rate"], options["lora"]["rank"], options["data"] = 0.25, 3, f"{DATA.parent}/./{DATA.name}"
    options["lora"]["options"]["use_rslora"] = True
    path.write_text(yaml.safe_dump(options))
    assert command(["train", "--resume", str(stopped)]) == 2
    error = capsys.readouterr().err
    assert "learning_rate: 0.25, was None" in error
    assert "lora.rank: 3, was 8" in error
    assert "lora.options: {'use_rslora': True}, was {}" in error
    assert "data:" not in error


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"type": "step", "step": 4, "loss": 1.0}', "gap"),
        ('{"type": "step", "step": "3", "loss": 1.0}', "line 4: step"),
        ('{"type": "step", "step": 3, "loss": [1.0]}', "line 4: loss"),
        ('{"type": "step", "step": 3, "loss": NaN}', "NaN"),
        ('{"type": "step", "step": 3}', "line 4: loss"),
        ('{"type": "step", "step": 3, "loss": ' + "1" * 5000 + "}", "integer string conversion"),
        ("[" * 100_000, "nested too deeply"),
        ("3", "no JSON object"),
    ],
)
def test_wrong_row_of_a_trajectory_is_an_error_with_its_line(line: str, says: str, stopped: Path) -> None:
    path = stopped / "trajectory.jsonl"
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*rows[:3], line + "\n", *rows[4:]]))
    with pytest.raises(InputError, match=r"trajectory\.jsonl, line 4") as raised:
        train(stopped, resume=True)
    assert says in str(raised.value)


def test_disk_that_fills_up_within_torch_save_is_one_error(
    stopped: Path, whole: ObservedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's archive writer reports it in words of its own, from its end too."""
    text = "[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"

    def fill(*_: Any, **__: Any) -> None:
        raise RuntimeError(text)

    with monkeypatch.context() as patch:
        patch.setattr("torch.save", fill)
        run_folder.rewind_run(stopped, lambda _: None)
        shutil.rmtree(stopped / "checkpoint-4")
        with pytest.raises(RunError, match=r"cannot be written.*last good checkpoint: .*checkpoint-2"):
            train(stopped, resume=True)
    assert figures(train(stopped, resume=True)) == figures(whole)
    assert damage(stopped) == ""


def test_name_that_is_not_utf8_is_kept_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Data of such a name can be read; safetensors and tokenizers could open nothing in such a folder."""
    name = os.fsdecode(b"a\xff")
    data = Path(shutil.copy(DATA, tmp_path / f"{name}.jsonl"))
    argv = ["train", f"--data={data}", "--max_steps=1"]
    assert command([*argv, f"--output={tmp_path / 'run'}"]) == 0
    assert command(["train", "--resume", str(tmp_path / "run")]) == 0
    assert command([*argv, f"--output={tmp_path / name}"]) == 2
    assert command([*argv, f"--output={tmp_path / 'other'}", f"--model={tmp_path / name}"]) == 2
    assert capsys.readouterr().err.count("the name of the folder is not UTF-8") == 2
