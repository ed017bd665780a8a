"""A training command is recorded as it is: not a number changes, and the recording can be judged.

Run: pytest tests/testing/recording/test_record_command.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from glm4ft.cli.main import run
from glm4ft.errors import InputError
from glm4ft.testing.recording import attach, recorder
from glm4ft.testing.recording.attach import record_run
from glm4ft.testing.recording.description import describe
from glm4ft.testing.trial.recorded import judge_recording
from glm4ft.testing.trial.recorded_text import lines
from glm4ft.testing.trial.trial import Trial

STEPS, ACCUMULATION = 3, 2


def train(base_dir: str, output: str, *, means: bool = False, decay: float = 0.0, dies_at: int = 0) -> None:
    """Training as a script has it, without anything of glm4ft.

    Args:
        base_dir: The folder of the base.
        output: The folder for the adapter.
        means: Whether the loss is the mean of the micro-batches' means, and not of the tokens.
        decay: Whatever is taken from the parameters after each step, as a share.
        dies_at: The step before which the run raises an error; 0 for none.
    """
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_dir), lora).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for step in range(1, STEPS + 1):
        if step == dies_at:
            raise RuntimeError("the run dies")
        batches = [encoded(tokenizer, f"question {step} {i}", f"answer {7 * i}" + " so" * 4 * i) for i in (0, 1)]
        counts = [int((batch["labels"] != -100).sum()) for batch in batches]
        for batch, count in zip(batches, counts, strict=True):
            logits = model(input_ids=batch["input_ids"]).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, batch["labels"][0, 1:], reduction="sum")
            (loss / (count * ACCUMULATION if means else sum(counts))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for parameter in optimizer.param_groups[0]["params"]:
                parameter *= 1 - decay
    model.save_pretrained(output)


def encoded(tokenizer: Any, question: str, answer: str) -> dict[str, torch.Tensor]:
    prompt, rest = (tokenizer.encode(text, add_special_tokens=False) for text in (question, " " + answer))
    labels = [-100] * len(prompt) + rest
    return {"input_ids": torch.tensor([prompt + rest]), "labels": torch.tensor([labels])}


def script_of(folder: Path, first: str = "") -> Path:
    """The training above as a script of its own, which ends with status 3; ``first`` is run before it."""
    script = folder / "script.py"
    source = Path(__file__).read_text("utf-8")
    begin, end = source.index("def train("), source.index("def script_of")
    script.write_text(
        "import sys\nfrom typing import Any\nimport torch\nfrom peft import LoraConfig, get_peft_model\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"STEPS, ACCUMULATION = {STEPS}, {ACCUMULATION}\ntorch.set_num_threads({torch.get_num_threads()})\n"
        f"{first}\n{source[begin:end]}\ntrain(*sys.argv[1:3])\nprint('done')\nsys.exit(3)\n",
        "utf-8",
    )
    return script


def test_command_is_recorded_unchanged_and_judged(
    healthy: Trial, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In a process of its own, as ``glm4ft record`` starts it; the adapter is that of a run without recording."""
    base, plain, recorded = str(healthy.base_dir), str(tmp_path / "plain"), str(tmp_path / "recorded")
    train(base, plain)
    script = script_of(tmp_path)
    command = [sys.executable, str(script), base, recorded]
    with pytest.raises(SystemExit) as ended:
        run(["record", "--steps", "2", "--output", str(tmp_path / "recording"), "--", *command])
    assert ended.value.code == 3
    assert "done" in capfd.readouterr().out
    one, other = (load_file(Path(folder) / "adapter_model.safetensors") for folder in (plain, recorded))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)

    assert run(["judge", str(tmp_path / "recording"), "--json", str(tmp_path / "verdict.json")]) == 0
    verdict = json.loads((tmp_path / "verdict.json").read_text("utf-8"))
    assert (verdict["steps"], verdict["first_departure"]) == (2, None)
    statuses = {check["stage"]: check["status"] for check in verdict["checks"]}
    assert statuses == {**dict.fromkeys(statuses, "passed"), "rows": "skipped", "schedule": "skipped"}
    assert verdict["subject"].endswith(f"script.py {base} {recorded}")
    told = capfd.readouterr().out
    assert "question 1 0[ answer 0]" in told
    assert "gradient  agrees" in told


@pytest.mark.parametrize(
    ("mistake", "stage", "cause"),
    [({"means": True}, "gradient", "a mean of micro-batch means"), ({"decay": 0.01}, "update", "")],
    ids=["means", "decay"],
)
def test_mistake_of_a_run_is_named(
    mistake: dict[str, Any], stage: str, cause: str, healthy: Trial, tmp_path: Path
) -> None:
    with record_run(tmp_path / "recording"):
        train(str(healthy.base_dir), str(tmp_path / "adapter"), **mistake)
    judged = judge_recording(tmp_path / "recording")
    assert list(judged.verdict.departures) == [stage]
    assert cause in judged.verdict.departures[stage].cause
    assert any(f"{stage:9} DEPARTS" in line for line in lines(judged))


def test_run_that_dies_leaves_what_was_recorded(healthy: Trial, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the run dies"), record_run(tmp_path / "recording"):
        train(str(healthy.base_dir), str(tmp_path / "adapter"), dies_at=3)
    judged = judge_recording(tmp_path / "recording")
    assert (judged.num_steps, judged.verdict.departures) == (2, {})


def test_error_of_the_recorder_does_not_reach_the_run(
    healthy: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "copy_of", lambda tensor: 1 / 0)
    with record_run(tmp_path / "recording"):
        train(str(healthy.base_dir), str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    with pytest.raises(InputError, match="cannot be recorded: ZeroDivisionError"):
        judge_recording(tmp_path / "recording")


# Kills the process once the tensors of the second step are in place and its JSON is not: nothing can catch that.
KILL = """
import os, signal
replace = os.replace

def replace_and_die(source, target):
    has_json = os.path.exists(os.path.join(os.path.dirname(target), "trace.json"))
    replace(source, target)
    if has_json and str(target).endswith("step-2.safetensors"):
        os.kill(os.getpid(), signal.SIGKILL)

os.replace = replace_and_die
"""


def test_killed_run_leaves_a_trace_that_can_be_judged(healthy: Trial, tmp_path: Path) -> None:
    command = [sys.executable, str(script_of(tmp_path, KILL)), str(healthy.base_dir), str(tmp_path / "adapter")]
    with pytest.raises(SystemExit) as ended:
        run(["record", "--steps", "3", "--output", str(tmp_path / "recording"), "--", *command])
    assert ended.value.code == 128 + 9
    judged = judge_recording(tmp_path / "recording")
    assert (judged.num_steps, judged.verdict.departures) == (1, {})


def test_run_whose_copies_would_fill_the_memory_is_left_alone(
    healthy: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attach.os, "sysconf", lambda name: 100)  # 10 kB
    with record_run(tmp_path / "recording"):
        train(str(healthy.base_dir), str(tmp_path / "output"))
    assert (tmp_path / "output" / "adapter_model.safetensors").exists()
    with pytest.raises(InputError, match=r"4 steps of .* GB of trained parameters .* record fewer steps"):
        judge_recording(tmp_path / "recording")


def test_run_that_trains_nothing_is_told(tmp_path: Path) -> None:
    with record_run(tmp_path / "recording"):
        torch.nn.Linear(2, 2)(torch.zeros(1, 2))
    with pytest.raises(InputError, match="nothing was recorded"):
        judge_recording(tmp_path / "recording")


def test_base_that_the_run_did_not_name_is_asked_for(
    healthy: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nameless(model: Any, configuration: Any) -> dict[str, Any]:
        about = describe(model, configuration)
        return {**about, "model": {**about["model"], "base": ""}}

    monkeypatch.setattr(attach, "describe", nameless)
    with record_run(tmp_path / "recording"):
        train(str(healthy.base_dir), str(tmp_path / "adapter"))
    with pytest.raises(InputError, match="name it with --model"):
        judge_recording(tmp_path / "recording")
    assert not judge_recording(tmp_path / "recording", str(healthy.base_dir)).verdict.departures


def test_command_has_to_be_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["record", "--output", str(tmp_path / "a")]) == 2
    assert "there is no command to record" in capsys.readouterr().err
    assert run(["record", "--output", str(tmp_path / "a"), "--", "no-such-command"]) == 2
    assert "no such command" in capsys.readouterr().err
