"""Faults and benign variations of the catalogue in a training script that is recorded as any command is, and judged.

Run: python tests/sweeps/record_faults.py [ID ...] [--bf16] [--command] [--processes 1] [--workers 2] [--json FILE]
The script has transformers' TrainingArguments and a loop of its own. Each fault is tried under a few configurations
until the verdict departs; a variation must be silent under two of them. The recorder is opened in this process; with
--command each run is a process of its own, started by glm4ft record, which takes thirty times longer, and with
--processes it is several, under torchrun. Exits with 1 if fewer than 95 % of the faults are named at their stage, or a
variation raises an alarm.

Faults that the first steps of a run cannot show are left out, with the reason; see UNSEEN and UNSEEN_IN_BF16.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glm4ft.testing.faults.registry import all_faults
from glm4ft.testing.faults.variations import all_variations
from glm4ft.testing.faults.warm import in_parallel, warm_base
from glm4ft.testing.subject import make_plan
from glm4ft.testing.trial.bank import BANK, FLAGGED, THINKING, answer, user
from glm4ft.testing.trial.conversations import all_conversations

DENSE = "Glm4ForCausalLM"
STAGES = ("rows", "batches", "model", "gradient", "clipping", "schedule", "update")
STEPS, TOTAL_STEPS = 8, 20  # recorded, and of the run: two epochs, and a schedule that goes on
COMMON = {"learning_rate": 5e-3, "weight_decay": 0.1, "max_grad_norm": 0.1, "max_steps": TOTAL_STEPS}
# By name of configuration: options of TrainingArguments, and what the loop reads beside them.
CONFIGURATIONS: Mapping[str, Mapping[str, Any]] = {
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "warmup_steps": 4,
                    "lr_scheduler_type": "linear"},
    "packed": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "lr_scheduler_type": "cosine",
               "packing": True},
    "two packs": {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 2, "lr_scheduler_type": "linear",
                  "packing": True},
    "checkpointed": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3, "warmup_steps": 2,
                     "lr_scheduler_type": "constant_with_warmup", "gradient_checkpointing": True, "max_grad_norm": 0.0},
    "single": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1, "lr_scheduler_type": "linear"},
}  # fmt: skip

PACKING = {"collate_packed", "pack", "pack_length", "positions"}  # parts of the loop that act in packing alone

# Faults of the recorded stages that a recording of a run's first steps cannot show, and why.
_ASKED = "what was asked for is lost before it reaches any object of the run"
_SEED = "one run does not show what another seed would have given"
_EVALUATION = "evaluation is not recorded"
_LOG = "what the run logs is not recorded"
_WEIGHTS = "a recording does not say which weights of tokens were asked for, and is not judged by equal ones"
UNSEEN: Mapping[str, str] = {
    "stale-token-cache": "one run does not show what another tokenizer would have given",
    "pad-id-zero-is-falsy": "the padding id of this base is not 0",
    "set-epoch-missing": "the same order in every epoch may be what was asked for",
    "new-token-rows-untrained": "the conversations of this sweep have no word that the base lacks",
    "row-over-the-limit-is-cut": "no conversation of this sweep has 8,192 tokens",
    "rank-alpha-pattern-ignored": _ASKED,
    "layer-index-regex-greedy": _ASKED,
    "lora-dropout-never-applied": _ASKED,
    "lora-dropout-at-another-rate": _ASKED,
    "exclude-modules-ignored": _ASKED,
    "dora-asked-and-plain-lora-built": _ASKED,
    "adapters-ignore-the-seed": _SEED,
    "adapters-not-repeatable": _SEED,
    "norm-logged-after-clip": _LOG,
    "token-weights-ignored": _WEIGHTS,
    "token-weights-not-shifted": _WEIGHTS,
    "token-weights-applied-twice": _WEIGHTS,
    "token-weights-mean-of-micro-means": _WEIGHTS,
    "lora-dropout-on-in-evaluation": _EVALUATION,
    "dropout-left-on-in-evaluation": _EVALUATION,
}

# The same under bf16 autocast, with --bf16.
UNSEEN_IN_BF16: Mapping[str, str] = {
    "norm-eps-differs": "it moves the final norm's output by 3.4e-5, which bf16 rounds by 8.6e-3",
    "autocast-that-nobody-asked-for": "it is asked for",
    "fp32-where-bf16-was-asked": "the sweep turns autocast on",
    "loss-in-low-precision": "the head's logits are in bf16 already",
}

# Variations that a recording cannot judge, and why.
UNJUDGED_IN_PROCESSES: Mapping[str, str] = {
    "gradients-in-a-buffer": "what a process's buffer sums is not what DDP averaged, so neither is known to be meant",
}


@dataclass(frozen=True)
class Outcome:
    """What the verdict on one fault or variation was.

    Args:
        id: Its id.
        stage: The stage that the verdict must name; "" for a variation.
        found: The stage of the first departure; "" if there was none.
        configuration: The configuration under which it departed.
        text: The departure, or the error.
    """

    id: str
    stage: str
    found: str
    configuration: str
    text: str

    @property
    def is_right(self) -> bool:
        """Whether the verdict is the expected one."""
        return self.found == self.stage


# A flag in each spelling that means one thing; tags of reasoning, and two messages of one role; no answer to learn; a
# long answer.
FLAGS = [user("hi"), answer("a", loss=0), user("b"), answer("c", loss=1), user("d"), answer("e", loss="false"),
         user("f"), answer("g", loss=None)]  # fmt: skip
REASONING = [user("and"), user("why?"), answer("<think>so</think>it is"), user("and?"), answer("no</think>yes")]
SILENT = [user("psst"), answer("shh", loss=0)]
LONG = [user("go on"), answer("a long way " * 76)]


def write_data(path: Path, *, with_reasoning: bool = False) -> None:
    """Write conversations: of the bank of the checks of rows, with two tools, and of many lengths."""
    sets, taken = (
        all_conversations(),
        ("several turns", "system", "ends with a tool call", "marker text", "white space"),
    )
    talks = [{"messages": list(t.messages), "tools": list(t.tools) if t.tools else None} for t in BANK if t.id in taken]
    more = [{"messages": m, "tools": None} for m in (list(FLAGGED.messages), FLAGS, REASONING, LONG, SILENT)]
    thoughts = [{"messages": list(t.messages), "tools": list(t.tools) if t.tools else None} for t in THINKING]
    if with_reasoning:  # in the other formats there is no place for it
        more = thoughts
    rows = [*talks, *more, *sets["mixed"][:2], *sets["short"][1:5:2]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def train(id: str, configuration: str, base: str, data: str, output: str, *, bf16: bool = False) -> None:
    """The training script: options, a loop, and one fault or variation in it."""
    from transformers import TrainingArguments

    options = {**COMMON, **CONFIGURATIONS[configuration]}
    packing = options.pop("packing", False)
    under_autocast, bf16 = bf16, bf16 or getattr(_kind(id), "autocast", None) == "bf16"
    args = TrainingArguments(output_dir=output, report_to=[], use_cpu=True, bf16=bf16, **options)
    shape = str(args.lr_scheduler_type.value)
    plan = make_plan(
        steps=args.max_steps, micro_batch_size=args.per_device_train_batch_size, packing=packing,
        accumulation=args.gradient_accumulation_steps, learning_rate=args.learning_rate, warmup_steps=args.warmup_steps,
        schedule="constant" if shape == "constant_with_warmup" else shape, max_grad_norm=args.max_grad_norm,
        weight_decay=args.weight_decay, output_dir=output, gradient_checkpointing=args.gradient_checkpointing,
    )  # fmt: skip
    subject = _stopping(_kind(id), under_autocast)(base)
    conversations = [json.loads(line) for line in Path(data).read_text("utf-8").splitlines()]
    subject.train(subject.build_model(base, plan["seed"]), conversations, plan)


def _kind(id: str) -> Any:
    return (all_faults().get(id) or all_variations()[id]).subject


def _stopping(kind: Any, under_autocast: bool) -> Any:
    """The loop, which ends when enough is recorded."""
    import torch

    class Stopping(kind):  # type: ignore[misc,valid-type]
        def last_step(self, run: Any) -> int:  # the rest of the run is not recorded
            return min(STEPS, int(super().last_step(run)))

    if not under_autocast:
        return Stopping

    class UnderAutocast(Stopping):
        def forward(self, model: Any, batch: Any) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(model, batch).float()  # type: ignore[no-any-return]

    return UnderAutocast


def try_one(task: tuple[str, bool, int]) -> Outcome:
    """Record and judge one fault or variation under the configurations in turn, until a verdict departs."""
    id, bf16, processes = task
    fault = all_faults().get(id)
    stage = fault.stage if fault else ""
    with tempfile.TemporaryDirectory(prefix="glm4ft-recorded-") as name:
        architecture = getattr(_kind(id), "architecture", DENSE)
        folder, base = Path(name), str(warm_base(architecture=architecture))
        write_data(folder / "data.jsonl", with_reasoning=architecture != DENSE)
        for configuration in _tried(id):
            recording = folder / configuration
            arguments = [id, configuration, base, str(folder / "data.jsonl"), str(folder / "output")]
            try:
                _record(recording, arguments, bf16, processes)
                found, text = _verdict(recording, base, folder / "data.jsonl")
            except Exception as error:
                found, text = "error", f"{type(error).__name__}: {error}"
            if found:
                return Outcome(id, stage, found, configuration, text)
            shutil.rmtree(folder / "output", ignore_errors=True)
    return Outcome(id, stage, "", "", "")


def _tried(id: str) -> list[str]:
    """The configurations to try, those that a fault of packing shows under first; a variation under the first two."""
    own = {
        name for kind in _kind(id).__mro__ if kind.__module__.startswith("glm4ft.testing.faults") for name in vars(kind)
    }
    is_packed = {name: options.get("packing", False) for name, options in CONFIGURATIONS.items()}
    names = sorted(CONFIGURATIONS, key=lambda name: is_packed[name] != bool(own & PACKING))
    return names if id in all_faults() else names[:2]


def _record(recording: Path, arguments: Sequence[str], bf16: bool, processes: int) -> None:
    """Record a run; in this process if ``processes`` is 0, otherwise as a command."""
    import torch

    from glm4ft.testing.recording.attach import record_run

    if processes:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        own = [
            sys.executable,
            *(torchrun if processes > 1 else []),
            __file__,
            "--train",
            *arguments,
            *(["--bf16"] if bf16 else []),
        ]
        record = [sys.executable, "-m", "glm4ft", "record", "--steps", str(STEPS), "--output", str(recording), "--"]
        done = subprocess.run([*record, *own], capture_output=True, text=True, check=False)
        if done.returncode and not list(recording.glob("rank-0/*")):
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        return
    torch.manual_seed(0)
    with record_run(recording, STEPS):
        train(*arguments, bf16=bf16)  # type: ignore[arg-type]


def _verdict(recording: Path, base: str, data: Path) -> tuple[str, str]:
    from glm4ft.errors import InputError
    from glm4ft.testing.trial.recorded import judge_recording

    try:
        first = judge_recording(recording, base, data).verdict.departure
    except InputError as error:
        # what is refused with the reason that the fault is counts as told, at the stage that the reason is about
        return ("model" if "none of its parameters is trained" in str(error) else "error"), str(error)
    return (first.stage, str(first)) if first else ("", "")


def seen_faults(distributed: bool = False, bf16: bool = False) -> list[str]:
    """The faults that a recording can show: those of the stages of a step, in one process or in several."""
    unseen = {*UNSEEN, *(UNSEEN_IN_BF16 if bf16 else ())}
    faults = [fault for fault in all_faults().values() if fault.stage in STAGES and fault.id not in unseen]
    return [fault.id for fault in faults if fault.subject.distributed == distributed]


def outcomes(ids: Sequence[str], *, bf16: bool, processes: int, workers: int) -> Iterator[Outcome]:
    """Try faults and variations, several at a time."""
    yield from in_parallel(try_one, [(id, bf16, processes) for id in ids], workers)


def main() -> int:
    """Sweep and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("ids", nargs="*")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--command", action="store_true")
    parser.add_argument("--processes", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--train", action="store_true", help="be the recorded script; for --command")
    options = parser.parse_args()
    if options.train:
        train(*options.ids, bf16=options.bf16)
        return 0
    is_one = options.processes <= 1
    variations = [id for id in all_variations() if is_one or id not in UNJUDGED_IN_PROCESSES]
    ids = options.ids or [*seen_faults(not is_one, options.bf16), *variations]
    found = []
    for outcome in outcomes(
        ids, bf16=options.bf16, processes=options.processes or int(options.command), workers=options.workers
    ):
        found.append(outcome)
        mark = "" if outcome.is_right else f"   WRONG, should be {outcome.stage or 'silent'}"
        print(
            f"{outcome.id:45} {outcome.found or '-':10} {outcome.configuration:12}{mark}  {outcome.text[:300]}",
            flush=True,
        )
    faults = [outcome for outcome in found if outcome.stage]
    alarms = [outcome for outcome in found if not outcome.stage and outcome.found]
    right = sum(outcome.is_right for outcome in faults)
    told = sum(bool(outcome.found) for outcome in faults)
    alike = f"{len(faults)} faults: {told} told, {right} at their stage"
    print(f"{alike}; {len(found) - len(faults)} variations, {len(alarms)} alarms")
    if options.json:
        options.json.write_text(json.dumps([asdict(outcome) for outcome in found], indent=1), "utf-8")
    return int(bool(alarms) or right < 0.95 * len(faults))


if __name__ == "__main__":
    raise SystemExit(main())
