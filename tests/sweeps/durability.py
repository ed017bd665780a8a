"""Kills, damaged files, double starts and damaged caches: nothing silently wrong, no traceback, no dead end.

Run: python tests/sweeps/durability.py [--kills 200] [--points 40] [--damages 123] [--starts 5] [--caches 35]
Every run is a forked copy of this process, which has loaded torch once. Prints a line per kind, one for each case that
went wrong, and exits with status 1 if there was one.

A run that was killed or damaged has to end, after one more start, with the trajectory and the adapter of a run that
was left alone, bit for bit; or with an error that says how to go on.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glm4ft.cli.main import run as command
from glm4ft.data.cache import entries
from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.dataset import prepare_rows
from glm4ft.folders import COMPLETE_MARKER
from glm4ft.model.tiny import tiny_tokenizer
from glm4ft.train.run import run_training  # noqa: F401  imported before the forks, once

STEPS, SAVE_EVERY = 6, 2
SILENT, TRACEBACK, DEAD_END = "silently wrong", "traceback", "dead end"
CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}


@dataclass(frozen=True)
class End:
    """How a forked command ended.

    Args:
        status: The exit status; negative if a signal ended it.
        text: What it printed.
    """

    status: int
    text: str


class Forked:
    """A command in a forked copy of this process.

    Args:
        argv: The arguments of glm4ft.
        log: The file for what it prints.
        before: A function to call in the copy first.
    """

    def __init__(self, argv: list[str], log: Path, before: Callable[[], object] = lambda: None) -> None:
        self.log = log
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(argv, before)

    def _run(self, argv: list[str], before: Callable[[], object]) -> None:
        status = 1
        try:
            file = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            before()
            status = command(argv)
            sys.stdout.flush()
        except BaseException as error:
            import traceback

            traceback.print_exception(error)
            sys.stderr.flush()
        finally:
            os._exit(status)

    def end(self) -> End:
        """Wait for the command."""
        _, status = os.waitpid(self.pid, 0)
        return End(os.waitstatus_to_exitcode(status), self.log.read_text("utf-8", "replace"))


class Sweep:
    """Runs the cases, and counts how they end.

    Args:
        folder: A folder for everything that is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = write_talks(folder / "talks.jsonl")
        self.outcomes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.whole = folder / "whole"
        began_s = time.monotonic()
        ended = self.train(self.whole)
        self.run_s = time.monotonic() - began_s
        if ended.status:
            raise SystemExit(ended.text)

    def argv(self, output: Path) -> list[str]:
        """The command of every run."""
        options = [f"--max_steps={STEPS}", f"--save_every={SAVE_EVERY}", "--lora.dropout=0.1", "--micro_batch_size=1"]
        return ["train", f"--data={self.data}", f"--output={output}", *options]

    def start(self, argv: list[str], name: str = "log", before: Callable[[], object] = lambda: None) -> Forked:
        """Start a command."""
        return Forked(argv, self.folder / name, before)

    def train(self, output: Path) -> End:
        """Begin a run, or go on with the one that there is."""
        begun = (output / "config.yaml").exists()
        return self.start(["train", "--resume", str(output)] if begun else self.argv(output)).end()

    def judge(self, kind: str, case: str, output: Path, ended: End, *, may_fail: bool = False) -> None:
        """Count how a case ended; print it if it went wrong."""
        if "Traceback" in ended.text:
            outcome = TRACEBACK
        elif ended.status == 0:
            outcome = "same" if results(output) == results(self.whole) else SILENT
        elif may_fail and re.search(r"glm4ft: error: (?s:.*)  fix: ", ended.text):
            outcome = "refused, with a fix"
        else:
            outcome = DEAD_END
        self.outcomes[kind][outcome] += 1
        if outcome in (SILENT, TRACEBACK, DEAD_END):
            print(f"{kind}, {case}: {outcome}\n{ended.text[-1500:]}", flush=True)

    def new(self, name: str = "run") -> Path:
        """An output that does not exist."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return self.folder / name


def kills(sweep: Sweep, num: int) -> None:
    """SIGKILL at a random time; every third run is killed again when it is resumed."""
    rng = random.Random(0)
    for case in range(num):
        output = sweep.new()
        for _ in range(1 + (case % 3 == 0)):
            begun = (output / "config.yaml").exists()
            running = sweep.start(["train", "--resume", str(output)] if begun else sweep.argv(output))
            time.sleep(rng.uniform(0, sweep.run_s))
            os.kill(running.pid, signal.SIGKILL)
            running.end()
        sweep.judge("kills", str(case), output, sweep.train(output))


def points(sweep: Sweep, num: int) -> None:
    """A kill just before a change of the file system below the output, evenly over the run's life."""
    rest = range(14, total_changes(sweep))
    chosen = [*range(14), *rest[:: max(1, len(rest) // max(1, num - 14))]][:num]  # the first ones are its beginning
    for number in chosen:
        output = sweep.new()
        sweep.start(sweep.argv(output), before=lambda at=number, to=output: kill_at(to, at)).end()
        sweep.judge("points", str(number), output, sweep.train(output))


def total_changes(sweep: Sweep) -> int:
    """The number of changes below its output that a whole run makes."""
    output, file = sweep.new(), sweep.folder / "changes"

    def count() -> None:
        def note(event: str, arguments: tuple[Any, ...]) -> None:
            if is_change(event, arguments, output):
                os.write(descriptor, b".")

        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        sys.addaudithook(note)

    sweep.start(sweep.argv(output), before=count).end()
    return file.stat().st_size


def kill_at(output: Path, number: int) -> None:
    """Have this process end at a change of the file system."""
    seen = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if is_change(event, arguments, output):
            if seen == number:
                os._exit(9)
            seen += 1

    sys.addaudithook(count)


def is_change(event: str, arguments: tuple[Any, ...], output: Path) -> bool:
    """Whether an audit event changes a file below a folder."""
    if event not in CHANGES or not any(str(output) in str(argument) for argument in arguments[:2]):
        return False
    return event != "open" or bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def damages(sweep: Sweep, num: int) -> None:
    """Every file of a stopped run and of a finished one, missing, cut and with a bit flipped."""
    stopped = shutil.copytree(sweep.whole, sweep.new("stopped"))
    for name in (COMPLETE_MARKER, "adapter_config.json", "adapter_model.safetensors"):
        (stopped / name).unlink()
    cases = [
        (source, path.relative_to(source), harm)
        for source in (stopped, sweep.whole)
        for path in sorted(source.rglob("*"))
        if path.is_file()
        for harm in (remove, cut, flip)
    ]
    step = max(1, len(cases) // num)
    for source, name, harm in cases[::step][:num]:
        output = shutil.copytree(source, sweep.new())
        harm(output / name)
        ended = sweep.start(["train", "--resume", str(output)]).end()
        case = f"{harm.__name__} {source.name}/{name}"
        if ended.status == 0 and name.parts[0] not in MATTERS and not name.parts[0].startswith("checkpoint-"):
            sweep.outcomes["damages"]["of no consequence for the run"] += 1
        else:
            sweep.judge("damages", case, output, ended, may_fail=True)


MATTERS = ("config.yaml", "trajectory.jsonl", "adapter_config.json", "adapter_model.safetensors", COMPLETE_MARKER)


def starts(sweep: Sweep, num: int) -> None:
    """Two commands at once on one folder: one of them does its work, the other one is refused."""
    stopped = sweep.folder / "stopped"
    if not stopped.exists():
        shutil.copytree(sweep.whole, stopped)
        (stopped / COMPLETE_MARKER).unlink()

    def pairs() -> Iterator[tuple[str, Path, list[str], list[str]]]:
        new, resumed = sweep.folder / "run", sweep.folder / "resumed"
        resume, merge = ["train", "--resume", str(resumed)], ["merge", str(sweep.whole), f"--output={new}"]
        yield "train, train", new, sweep.argv(new), sweep.argv(new)
        yield "resume, resume", resumed, resume, resume
        yield "train, merge", new, sweep.argv(new), merge
        yield "merge, merge", new, merge, merge
        yield "resume, train", resumed, resume, sweep.argv(resumed)

    for number, (case, output, *both) in enumerate(pairs()):
        if number >= num:
            break
        shutil.rmtree(output, ignore_errors=True)
        if output.name == "resumed":
            shutil.copytree(stopped, output)
        ends = [running.end() for running in [sweep.start(argv, f"log{i}") for i, argv in enumerate(both)]]
        done, refused = sorted(ends, key=lambda end: end.status)
        is_right = (done.status, refused.status) == (0, 2) and "Traceback" not in done.text + refused.text
        is_said = "another process is writing" in refused.text or "already in use" in refused.text
        if is_right and is_said and (output / "trajectory.jsonl").exists():
            sweep.judge("starts", case, output, done)
        else:
            outcome = "same" if is_right and is_said else SILENT
            sweep.outcomes["starts"][outcome] += 1
            if outcome == SILENT:
                print(f"starts, {case}: {[end.status for end in ends]}\n{done.text[-900:]}\n{refused.text[-900:]}")


def caches(sweep: Sweep, num: int) -> None:
    """Every file of an entry, damaged in five ways: the rows that come back are the file's."""
    cache, chat_format = sweep.folder / "cache", ChatFormat("glm-4-0414", tiny_tokenizer())
    digest = prepare_rows(sweep.data, chat_format, max_length=100, cache=cache)[0].sha256()
    (entry,) = entries(cache)
    names = sorted(path.name for path in entry.folder.iterdir() if path.name != COMPLETE_MARKER)
    for name, harm in [(name, harm) for name in names for harm in (remove, cut, flip, blank, grow)][:num]:
        harm(entry.folder / name)
        rows, report = prepare_rows(sweep.data, chat_format, max_length=100, cache=cache)
        is_right = rows.sha256() == digest and report.damage
        sweep.outcomes["caches"]["same" if is_right else SILENT] += 1
        if not is_right:
            print(f"caches, {harm.__name__} {name}: {SILENT}")


def remove(path: Path) -> None:
    """The file is missing."""
    path.unlink()


def cut(path: Path) -> None:
    """The second half of the file is missing."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """One bit in the middle of the file is another one."""
    content = bytearray(path.read_bytes() or b"\0")
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def blank(path: Path) -> None:
    """The file is as long as it was, of zeros."""
    path.write_bytes(bytes(path.stat().st_size))


def grow(path: Path) -> None:
    """The file has one byte more."""
    path.write_bytes(path.read_bytes() + b"\0")


def results(output: Path) -> tuple[Any, ...]:
    """What a run computed: the figures of its trajectory, and the bytes of its adapter."""
    names = ("type", "step", "loss", "grad_norm", "lr", "supervised_tokens", "tokens")
    rows = [json.loads(line) for line in (output / "trajectory.jsonl").read_text("utf-8").splitlines()[1:]]
    weights = (output / "adapter_model.safetensors").read_bytes()
    return [tuple(row.get(name) for name in names) for row in rows], weights


def write_talks(path: Path) -> Path:
    """Ten conversations of different lengths."""
    records = [
        [("user", f"question {i} " + "why " * (7 * i % 11)), ("assistant", f"answer {i} " + "so " * (5 * i % 13))]
        for i in range(10)
    ]
    talks = [{"messages": [{"role": role, "content": text} for role, text in record]} for record in records]
    path.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    return path


SWEEPS: dict[str, tuple[Callable[[Sweep, int], None], int]] = {
    "kills": (kills, 200), "points": (points, 40), "damages": (damages, 123), "starts": (starts, 5),
    "caches": (caches, 35),
}  # fmt: skip


def main() -> None:
    """Run all sweeps, and print how their cases ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, (_, num) in SWEEPS.items():
        parser.add_argument(f"--{name}", type=int, default=num)
    options = vars(parser.parse_args())
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as name:
        os.environ["GLM4FT_CACHE"] = str(Path(name, "glm4ft-cache"))
        sweep = Sweep(Path(name).resolve())
        for kind, (run_cases, _) in SWEEPS.items():
            if options[kind]:
                began_s = time.monotonic()
                run_cases(sweep, options[kind])
                counts = ", ".join(f"{num} {outcome}" for outcome, num in sweep.outcomes[kind].items())
                print(f"{kind}: {counts} ({time.monotonic() - began_s:.0f} s)", flush=True)
    wrong = sum(sweep.outcomes[kind][outcome] for kind in SWEEPS for outcome in (SILENT, TRACEBACK, DEAD_END))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
