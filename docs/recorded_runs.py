"""Writes docs/recorded-runs.md: unmodified training commands of real trainers, recorded, judged, and run again without.

Run: python docs/recorded_runs.py [NAME ...]      (needs tox; without names it runs all)

Each trainer lives alone in a tox environment, without glm4ft; its configuration or script is in peers/recorded/. What
was found is kept in docs/recorded-runs.json, so that a single trainer can be run again. The exit status is 1 if a
verdict is not the one that is expected, or recording changed the adapter that a run writes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from glm4ft.model.tiny import write_tiny_base

DOCS = Path(__file__).parent
CONFIGURATIONS = DOCS.parent / "peers" / "recorded"
STEPS, TIMEOUT_S = 4, 600
# Without a network, axolotl's telemetry waits at the end of a run without end.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "AXOLOTL_DO_NOT_TRACK": "1"}
SIGNS = {"passed": "agrees", "failed": "**departs**", "skipped": "·"}
COMMON = ("torch", "transformers", "peft")


@dataclass(frozen=True)
class Run:
    """A training command.

    Args:
        name: The trainer's name in the table.
        env: The tox environment, without ``record-``.
        command: The command's words; ``{base}``, ``{data}``, ``{folder}``, ``{out}`` and ``{config}`` are folders.
        packages: The packages whose versions are stated.
        departs: The stages that are expected to depart, with the reason.
        about: What a reader must know of the configuration.
    """

    name: str
    env: str
    command: tuple[str, ...]
    packages: tuple[str, ...]
    departs: Mapping[str, str] = field(default_factory=dict)
    about: str = ""


RUNS = (
    Run(
        "transformers.Trainer",
        "transformers",
        ("python", "{config}/transformers_script.py", "{base}", "{data}", "{out}"),
        COMMON,
        about="A script of 35 lines around `Trainer`, with `DataCollatorForSeq2Seq`.",
    ),
    Run(
        "TRL",
        "trl",
        ("trl", "sft", "--config", "{config}/trl.yml", "--model_name_or_path", "{base}", "--dataset_name",
         "{folder}/pairs", "--output_dir", "{out}"),
        ("trl", *COMMON),
        departs={"rows": "no terminator is trained, as on the scoreboard: the model never learns to stop."},
        about="Conversational prompt and completion, the documented way for a model whose template TRL does not know.",
    ),
    Run(
        "LLaMA-Factory",
        "llamafactory",
        ("llamafactory-cli", "train", "{config}/llamafactory.yml", "model_name_or_path={base}",
         "dataset_dir={folder}", "output_dir={out}"),
        ("llamafactory", *COMMON),
        about="Its terminator is `<|endoftext|>`, which is a stop token of the base.",
    ),
    Run(
        "ms-swift",
        "ms-swift",
        ("swift", "sft", "--model", "{base}", "--model_type", "glm4", "--template", "glm4", "--dataset", "{data}",
         "--output_dir", "{out}", "--add_version", "false", "--check_model", "false", "--torch_dtype", "float32",
         "--lora_rank", "8", "--lora_alpha", "16", "--lora_dropout", "0", "--target_modules", "all-linear",
         "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--max_steps", "6",
         "--learning_rate", "1e-3", "--lr_scheduler_type", "cosine", "--warmup_steps", "2", "--max_grad_norm", "0.3",
         "--split_dataset_ratio", "0", "--report_to", "none", "--use_cpu", "true", "--fp16", "false",
         "--bf16", "false"),
        ("ms-swift", *COMMON),
        {"rows": "the newline behind `<|assistant|>` is part of the prompt, in serving with ms-swift as well. A "
                 "convention, as on the scoreboard; servers that follow the checkpoint's template leave it to the "
                 "model."},
        "`fp16` is off: without it the arguments ask for fp16 beside `torch_dtype float32`, which is told at `model`.",
    ),
    Run(
        "axolotl",
        "axolotl",
        ("axolotl", "train", "{config}/axolotl.yml", "--base-model", "{base}", "--output-dir", "{out}"),
        ("axolotl", *COMMON),
        {"rows": "no terminator is trained: the template's end of a turn, the next role's token, is not axolotl's "
                 "`eos_token`. The newline is part of the prompt.",
         "gradient": "the accumulation of its default path is a mean of the micro-batches' means."},
        "Its fused LoRA kernels are off: they need a GPU. Clients of cloud stores are not installed.",
    ),
    Run(
        "Lightning",
        "lightning",
        ("python", "{config}/lightning_script.py", "{base}", "{data}", "{out}"),
        ("lightning", *COMMON),
        departs={"gradient": "`accumulate_grad_batches` takes the mean of the micro-batches' losses; each is already a "
                             "mean over its own tokens."},
        about="A `LightningModule` around the loss that the model returns, with `accumulate_grad_batches`.",
    ),
)  # fmt: skip


def conversations() -> list[dict[str, Any]]:
    """Conversations of unequal length, so that a mean over micro-batches is not one over tokens."""
    ask, say = "why is the sky blue at noon and red in the evening", "because short waves are scattered more than long"
    return [
        {"messages": [{"role": "user", "content": " ".join([f"question {i}", *ask.split()[: 1 + i % 5]])},
                      {"role": "assistant", "content": " ".join([f"answer {i}", *say.split()[: 1 + 7 * (i % 2)]])}]}
        for i in range(12)
    ]  # fmt: skip


def write_data(folder: Path) -> None:
    """The conversations in the shapes that the trainers read."""
    chats = conversations()
    lines = "".join(json.dumps(chat) + "\n" for chat in chats)
    (folder / "chats.jsonl").write_text(lines, "utf-8")
    columns = {"formatting": "sharegpt", "columns": {"messages": "messages"}, "file_name": "chats.jsonl"}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    (folder / "dataset_info.json").write_text(json.dumps({"chats": {**columns, "tags": tags}}), "utf-8")
    pairs = [{"prompt": c["messages"][:-1], "completion": c["messages"][-1:]} for c in chats]
    (folder / "pairs").mkdir()
    (folder / "pairs" / "train.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), "utf-8")


def environment_of(name: str) -> Path:
    """Make the tox environment where it is missing; returns the folder of its commands."""
    tox = [sys.executable, "-m", "tox"]
    subprocess.run([*tox, "run", "-e", f"record-{name}"], cwd=DOCS.parent, check=True)
    said = subprocess.run(
        [*tox, "config", "-e", f"record-{name}", "-k", "env_bin_dir"], cwd=DOCS.parent, check=True, text=True,
        stdout=subprocess.PIPE,
    ).stdout  # fmt: skip
    return Path(said.rpartition("=")[2].strip())


def record_and_judge(run: Run) -> dict[str, Any]:
    """Run a command with and without recording, and judge the recording."""
    commands = environment_of(run.env)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = write_tiny_base(folder / "base")
        write_data(folder)
        recorder = [
            sys.executable,
            "-m",
            "glm4ft",
            "record",
            "--steps",
            str(STEPS),
            "--output",
            str(folder / "recording"),
        ]

        def train(out: str, first: Sequence[str] = ()) -> None:
            places = {"base": base, "data": folder / "chats.jsonl", "folder": folder, "out": folder / out}
            program, *words = (word.format(config=CONFIGURATIONS, **places) for word in run.command)
            _call([*first, str(commands / program), *words], folder, commands)

        train("plain")
        train("recorded", recorder)
        same = "bit for bit" if same_adapter(folder / "plain", folder / "recorded") else ""
        if not same:
            train("again")
            if not same_adapter(folder / "plain", folder / "again"):
                same = "its own runs differ"
        judge = [sys.executable, "-m", "glm4ft", "judge", "recording", "--data", "chats.jsonl", "--fail_on", "nothing"]
        shown = _call([*judge, "--json", "verdict.json"], folder, commands)
        verdict = json.loads((folder / "verdict.json").read_text("utf-8"))
        about = json.loads((folder / "recording" / "rank-0" / "trace.json").read_text("utf-8"))
        return {
            "stages": verdict["checks"],
            "same": same,
            "overhead": about["overhead"],
            "shown": shown,
            "versions": versions(commands, run.packages),
        }


def _call(command: Sequence[str], folder: Path, commands: Path) -> str:
    """Run a command; its output, which is shown where it fails."""
    path = f"{commands}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **ENVIRONMENT, "PATH": path}
    done = subprocess.run(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=TIMEOUT_S,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


def same_adapter(plain: Path, recorded: Path) -> bool:
    """Whether two runs wrote the same adapter, bit for bit."""
    found = []
    for folder in (plain, recorded):
        file = max(folder.rglob("adapter_model.safetensors"), key=lambda path: path.stat().st_mtime)
        with safe_open(file, "pt") as tensors:
            found.append({name: tensors.get_tensor(name) for name in tensors.keys()})  # noqa: SIM118
    one, other = found
    return one.keys() == other.keys() and all(bool((one[name] == other[name]).all()) for name in one)


def versions(commands: Path, packages: Sequence[str]) -> dict[str, str]:
    """The versions of packages in an environment."""
    code = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    said = subprocess.run(
        [commands / "python", "-c", code, *packages], check=True, text=True, stdout=subprocess.PIPE
    ).stdout
    return {name: version.partition("+")[0] for name, version in json.loads(said).items()}


def page(runs: Sequence[Run], results: Mapping[str, Any]) -> Iterator[str]:
    """The lines of the page."""
    yield INTRODUCTION
    stages = [check["stage"] for check in next(iter(results.values()))["stages"]]
    yield "| trainer | " + " | ".join(stages) + " | same adapter | share of hooks |"
    yield "|---" * (len(stages) + 3) + "|"
    for run in runs:
        found = results[run.name]
        signs = [SIGNS.get(check["status"], check["status"]) for check in found["stages"]]
        cells = [f"[{run.name}](#{_anchor(run)})", *signs, found["same"] or "**no**", f"{_share(found):.0%}"]
        yield "| " + " | ".join(cells) + " |"
    for run in runs:
        yield from section(run, results[run.name])


def section(run: Run, found: Mapping[str, Any]) -> Iterator[str]:
    """The lines of one trainer."""
    names = {"base": "BASE", "data": "chats.jsonl", "folder": ".", "out": "OUT", "config": "peers/recorded"}
    yield f"\n## {run.name}\n"
    yield ", ".join(f"{name} {version}" for name, version in found["versions"].items()) + ". " + run.about + "\n"
    command = " ".join(word.format(**names) for word in run.command)
    yield f"```sh\nglm4ft record -- {command}\nglm4ft judge recording --data chats.jsonl\n```\n"
    yield "```text\n" + found["shown"].rstrip() + "\n```\n"
    yield from (f"* *{stage}*: {why}" for stage, why in run.departs.items())


def _share(found: Mapping[str, Any]) -> float:
    overhead = found["overhead"]
    return sum(overhead["hooks_s"]) / sum(overhead["step_s"])


def _anchor(run: Run) -> str:
    return run.name.lower().replace(".", "")


def unexpected(run: Run, found: Mapping[str, Any]) -> Iterator[str]:
    """What is not as expected."""
    departs = {check["stage"] for check in found["stages"] if check["status"] == "failed"}
    if departs != run.departs.keys():
        yield f"{run.name}: departs at {sorted(departs)}, expected {sorted(run.departs)}"
    if not found["same"]:
        yield f"{run.name}: recording changed the adapter"


INTRODUCTION = f"""# Recorded runs

Training commands of trainers by others, none of them changed, recorded by `glm4ft record` and judged by `glm4ft judge`:
no adapter is written and no code of a trainer is patched. Each runs on a CPU in fp32, on the built-in base of
GLM-4-0414's architecture, with 12 conversations of unequal length in micro-batches of 2, two of which make a step.
{STEPS} steps of 6 are recorded. Each command is run twice, with recording and without, and the adapters that the two
runs write are compared bit for bit; where they differ, the command is run a third time, without recording, to see
whether its own runs differ. `python docs/recorded_runs.py` writes this page; the configurations lie in
[`peers/recorded`](../peers/recorded).

"agrees": the stage was judged, and nothing departs · "·": not judged, the reason is in the trainer's section · share of
hooks: the part of the recorded steps' time that went into recording, on steps of some milliseconds.
"""


def main(names: Sequence[str]) -> int:
    """Record and judge the named trainers, or all without names, and write the page; returns the exit status."""
    store = DOCS / "recorded-runs.json"
    results = json.loads(store.read_text("utf-8")) if store.exists() else {}
    for run in RUNS:
        if not names or run.name in names:
            print(f"{run.name} ...", flush=True)
            results[run.name] = record_and_judge(run)
            store.write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n", "utf-8")
    known = [run for run in RUNS if run.name in results]
    (DOCS / "recorded-runs.md").write_text("\n".join(page(known, results)).rstrip() + "\n", "utf-8")
    bad = [text for run in known for text in unexpected(run, results[run.name])]
    print("\n".join(bad))
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
