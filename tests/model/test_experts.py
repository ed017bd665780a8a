"""LoRA on the models with experts: what is adapted, what it learns, and that resume, merge and packing are exact.

Run: pytest tests/model/test_experts.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from glm4ft.errors import ConfigError
from glm4ft.model.base_model import load_base
from glm4ft.model.lora import attach_lora, audit_lora
from glm4ft.model.lora_options import LoraOptions
from glm4ft.model.loss import install_supervised_loss
from glm4ft.model.merge import merge_adapter
from glm4ft.model.tiny import tiny_model, write_tiny_base
from glm4ft.model.tiny_tokenizer import FORMAT_OF
from glm4ft.report.observed_run import train_observed
from glm4ft.train.config import TrainConfig
from glm4ft.train.run import run_training

ARCHITECTURES = ("Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM")
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
TARGETS = {
    "Glm4MoeForCausalLM": ["q_proj", "k_proj", "v_proj", "o_proj", *EXPERTS],
    "Glm4MoeLiteForCausalLM": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", *EXPERTS],
}
CALLS = [{"function": {"name": "f", "arguments": json.dumps({"x": city})}} for city in ("Rome", "Oslo")]
RECORDS = [
    {
        "messages": [
            {"role": "user", "content": "which river?"},
            {"role": "assistant", "content": "one"},
            {"role": "user", "content": "and today?"},
            {"role": "assistant", "content": "It runs.", "reasoning_content": "so"},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "content": "I ask.", "reasoning_content": "two", "tool_calls": CALLS},
            {"role": "tool", "content": "31"},
            {"role": "tool", "content": "12"},
            {"role": "assistant", "content": "hot", "reasoning_content": "31"},
        ],
        "tools": [{"name": "f"}],
    },
]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"), architecture=request.param)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "two.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def architecture_of(base: Path) -> Any:
    return json.loads((base / "config.json").read_text())["architectures"][0]


@pytest.fixture(scope="module")
def learnt(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    config = TrainConfig(
        data=str(data), model=str(base), output=str(tmp_path_factory.mktemp("run") / "run"), learning_rate=3e-3,
        max_steps=200, target_loss=0.005, round_trip=True, save_every=15, keep_checkpoints=9,
    )  # fmt: skip
    said: list[str] = []
    return train_observed(config, say=lambda line: said.append(str(line))), "\n".join(said)


@pytest.mark.slow
def test_two_conversations_are_learnt_and_said_back(learnt: Any) -> None:
    """With both stop tokens, reasoning and parallel calls.

    At a rate of 5e-3 the loss was below 0.01 after 54 and 39 steps, but jumped to 0.17 when tokens changed experts
    (x86-64 CPU, 2026-11-26); so the rate is lower here, and the target too.
    """
    result, _ = learnt
    assert result.reached_target
    assert len(result.round_trips) == 4
    assert result.is_reproduced


def test_what_is_adapted_is_said(learnt: Any, base: Path) -> None:
    _, said = learnt
    named = ", ".join(TARGETS[architecture_of(base)])
    assert f"on {named}; routers are frozen, no auxiliary loss is added" in said


def test_the_format_is_that_of_the_base(base: Path) -> None:
    assert load_base(str(base)).format_name == FORMAT_OF[architecture_of(base)]


@pytest.fixture
def adapted(base: Path) -> Any:
    return attach_lora(load_base(str(base)).model, LoraOptions(), seed=0)


def test_attention_and_experts_are_adapted_and_nothing_else(adapted: Any, base: Path) -> None:
    report = audit_lora(adapted, LoraOptions())
    assert dict(report.num_adapted) == {
        target: 1 if target in EXPERTS else 2 for target in TARGETS[architecture_of(base)]
    }
    assert all(".self_attn." in name or ".experts." in name for name in report.trained)
    assert not any("mlp.gate." in name or "shared_experts" in name for name in report.trained)


@pytest.mark.parametrize("target", ["down_proj", "gate_proj", "shared_experts.up_proj", "mlp.gate"])
def test_a_name_that_peft_takes_for_the_experts_is_refused(target: str, base: Path) -> None:
    """peft 0.21 adapts the fused experts instead, and leaves the named MLP alone, without a word."""
    with pytest.raises(ConfigError, match="takes this name for that of the fused experts") as caught:
        attach_lora(load_base(str(base)).model, LoraOptions(targets=["o_proj", target]), seed=0)
    assert caught.value.expected == ", ".join(TARGETS[architecture_of(base)])


def test_a_trained_router_is_refused(base: Path) -> None:
    with pytest.raises(ConfigError, match="router has to stay frozen"):
        attach_lora(load_base(str(base)).model, LoraOptions(options={"modules_to_save": ["gate"]}), seed=0)


def test_dropout_that_experts_cannot_have_is_refused(base: Path) -> None:
    with pytest.raises(ConfigError, match="peft refuses the adapter"):
        attach_lora(load_base(str(base)).model, LoraOptions(dropout=0.1), seed=0)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(learnt: Any, tmp_path: Path) -> None:
    """Loss and gradient norm of every later step are bitwise the same."""
    result, _ = learnt
    copy = tmp_path / "run"
    shutil.copytree(result.output, copy)
    late = sorted(copy.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[2:]
    for folder in late:
        shutil.rmtree(folder)
    (copy / "complete").unlink(missing_ok=True)
    config = yaml.safe_load((copy / "config.yaml").read_text())
    options = {**config, "output": str(copy), "lora": LoraOptions(**config["lora"])}
    again = run_training(TrainConfig(**options), resume=True, say=lambda _: None)
    steps = [[(s["step"], s["loss"], s["grad_norm"]) for s in r.trajectory.steps] for r in (result, again)]
    assert steps[0] == steps[1]


def test_merged_experts_give_the_same_logits(learnt: Any, base: Path, tmp_path: Path) -> None:
    result, _ = learnt
    report = merge_adapter(result.output, tmp_path / "merged", model=str(base))
    assert report.error < 1e-5
    names = set(dict(load_base(str(tmp_path / "merged")).model.named_parameters()))
    assert names == set(dict(load_base(str(base)).model.named_parameters()))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_gradient_leaks_between_packed_rows(adapted: Any, checkpointing: bool) -> None:
    """Experts see each token alone, so that packed rows stay apart if attention keeps them apart."""
    model = adapted
    install_supervised_loss(model.get_base_model())
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    embeddings = model.get_input_embeddings()
    seen: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    handle = embeddings.register_forward_hook(keep)
    ids = torch.arange(40).remainder(30)[None] + 40
    labels = ids.clone()
    labels[:, :21] = -100
    positions = torch.cat([torch.arange(20), torch.arange(20)])[None]
    model(input_ids=ids, labels=labels, position_ids=positions, use_cache=False).loss.backward()
    handle.remove()
    assert seen[0].grad is not None
    assert float(seen[0].grad[0, :20].abs().max()) == 0.0
    assert float(seen[0].grad[0, 20:].abs().max()) > 0.0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_tiny_router_spreads_the_tokens(architecture: Any) -> None:
    """No expert is idle or gets more than three tenths of the tokens; by chance each would get an eighth."""
    model = tiny_model(architecture=architecture)
    experts: Any = model.model.layers[1].mlp.experts  # type: ignore[union-attr, index]
    counts = torch.zeros(8)

    def count(module: Any, args: Any) -> None:
        counts.add_(torch.bincount(args[1].flatten(), minlength=8))  # the experts that the router chose

    experts.register_forward_pre_hook(count)
    with torch.no_grad():
        model(torch.randint(0, 200, (4, 200), generator=torch.Generator().manual_seed(0)))
    assert float((counts / counts.sum()).min()) > 0.02
    assert float((counts / counts.sum()).max()) < 0.3
