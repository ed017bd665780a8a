"""QLoRA: a base in four bits is learnt from, resumed exactly, recorded, merged, talked to; or refused with the reason.

Run: tox -e quantised, or pytest tests/model/test_quantised.py where bitsandbytes is installed
"""

from __future__ import annotations

import builtins
import importlib.metadata
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from glm4ft.cli.main import run as glm4ft
from glm4ft.diagnosis.run_folder import explain_run
from glm4ft.errors import ConfigError
from glm4ft.floors.head import frozen_head
from glm4ft.model import base_model
from glm4ft.model.base_model import Base, load_base
from glm4ft.model.chat import load_chat
from glm4ft.model.checkpoint import TINY
from glm4ft.model.lora import attach_lora, audit_lora
from glm4ft.model.lora_options import LoraOptions
from glm4ft.model.merge import merge_adapter
from glm4ft.model.quantisation import quantisation_of_run, quantised_layers
from glm4ft.model.tiny import write_tiny_base
from glm4ft.report.observed_run import ObservedRun, train_observed
from glm4ft.testing.recording.attach import record_run
from glm4ft.testing.trial.recorded import judge_recording
from glm4ft.train.config import TrainConfig
from glm4ft.train.run import run_training

WEIGHTS = "adapter_model.safetensors"
NF4 = TrainConfig(
    data="demo", quantise="nf4", learning_rate=5e-3, schedule="constant", max_steps=60, target_loss=0.01,
    round_trip=True, save_every=10, keep_checkpoints=9,
)  # fmt: skip


@pytest.fixture(scope="module")
def bitsandbytes() -> None:
    try:
        importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs bitsandbytes (extra quantised), which is not installed")


@pytest.fixture(scope="module", autouse=True)
def _cpu() -> Any:
    """The CPU, where runs repeat bit for bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_model, "_default_device", lambda: torch.device("cpu"))
        yield


@pytest.fixture(scope="module")
def base(bitsandbytes: None) -> Base:
    return load_base(TINY, quantise="nf4")


@pytest.fixture(scope="module")
def learnt(bitsandbytes: None, tmp_path_factory: pytest.TempPathFactory) -> ObservedRun:
    said: list[str] = []
    output = tmp_path_factory.mktemp("quantised") / "run"
    result = train_observed(replace(NF4, output=str(output)), say=said.append)
    assert any("12 linear layers of the base are quantised" in line for line in said)
    return result


def test_linear_layers_are_quantised_and_head_embeddings_and_norms_are_not(base: Base) -> None:
    plain = load_base(TINY).model
    kinds = {name: p.dtype for name, p in base.model.named_parameters()}
    packed = {name for name, dtype in kinds.items() if dtype == torch.uint8}
    assert packed == {name for name, _ in plain.named_parameters() if "_proj.weight" in name}
    assert len(packed) == len(quantised_layers(base.model)) == 12
    weights = dict(plain.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in base.model.named_parameters() if name not in packed)


def test_floor_is_that_of_the_plain_base(base: Base) -> None:
    """A floor is certified for norm and head, and both are the same tensors."""
    plain, quantised = (
        frozen_head(attach_lora(load_base(TINY, quantise=how).model, LoraOptions(), seed=0)) for how in (None, "nf4")
    )
    assert plain is not None
    assert quantised is not None
    assert torch.equal(plain.weight, quantised.weight)
    assert torch.equal(plain.norm_D, quantised.norm_D)


def test_checkpoint_is_quantised_as_the_built_in_base_is(base: Base, tmp_path: Path) -> None:
    read = load_base(str(write_tiny_base(tmp_path / "base")), quantise="nf4")
    ids = torch.arange(200, 232)[None]
    with torch.no_grad():
        assert torch.equal(read.model(input_ids=ids).logits, base.model(input_ids=ids).logits)


def test_two_conversations_are_learnt_by_heart_in_four_bits(learnt: ObservedRun) -> None:
    losses = [row["loss"] for row in learnt.trajectory.steps]
    assert losses[-1] < 0.01  # after 37 steps on the CPU; in plain fp32 after 36
    assert len(learnt.round_trips) == 4
    assert learnt.is_reproduced


def test_adapters_are_fp32_and_counted_against_all_weights(bitsandbytes: None) -> None:
    model = attach_lora(load_base(TINY, quantise="nf4").model, LoraOptions(), seed=0)
    report = audit_lora(model, LoraOptions())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert report.num_total == report.num_trained + sum(p.numel() for p in load_base(TINY).model.parameters())


def test_gradients_are_the_same_after_an_evaluation(bitsandbytes: None) -> None:
    """bitsandbytes packs weights anew in eval mode on some CPUs, and then passes no gradient to the layers below."""
    model = attach_lora(load_base(TINY, quantise="nf4").model, LoraOptions(), seed=0)
    ids = torch.arange(200, 232)[None]

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    with torch.no_grad():
        model.eval()(input_ids=ids)
    after = gradients()
    # of each lora_B; that of each lora_A is 0 as long as B is
    assert sum("layers.0" in name and bool(gradient.any()) for name, gradient in after.items()) == 6
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_resumed_run_ends_with_the_same_adapter(learnt: ObservedRun, tmp_path: Path) -> None:
    output = Path(shutil.copytree(learnt.output, tmp_path / "run"))
    for name in ("complete", WEIGHTS, "report.html"):
        (output / name).unlink()
    for folder in output.glob("checkpoint-*"):
        if int(folder.name.rpartition("-")[2]) > 20:
            shutil.rmtree(folder)
    result = run_training(replace(NF4, output=str(output)), resume=True, say=lambda _: None)
    assert [row["loss"] for row in result.trajectory.steps] == [row["loss"] for row in learnt.trajectory.steps]
    saved, expected = load_file(output / WEIGHTS), load_file(learnt.output / WEIGHTS)
    assert all(torch.equal(saved[name], expected[name]) for name in expected)


def test_merge_goes_into_plain_weights_and_says_what_changes(learnt: ObservedRun, tmp_path: Path) -> None:
    report = merge_adapter(learnt.output, tmp_path / "merged")
    assert "trained on weights quantised to nf4 and is merged into the plain ones" in report.describe()
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    merged, plain = load_file(tmp_path / "merged" / "model.safetensors"), load_base(TINY).model.state_dict()
    assert torch.equal(merged["lm_head.weight"], plain["lm_head.weight"])
    assert merged.keys() == plain.keys()


def test_checkpoint_of_the_run_is_known_to_be_of_a_quantised_one(learnt: ObservedRun, tmp_path: Path) -> None:
    assert quantisation_of_run(learnt.output) == quantisation_of_run(learnt.output / "checkpoint-10") == "nf4"
    assert quantisation_of_run(tmp_path) is None


def test_card_and_report_say_it(learnt: ObservedRun) -> None:
    assert "| base while training | quantised to nf4;" in (learnt.output / "README.md").read_text("utf-8")
    assert "linear layers of the base are quantised to nf4" in (learnt.output / "report.html").read_text("utf-8")
    assert "bitsandbytes" in learnt.trajectory.header["libraries"]


def test_chat_and_explain_load_the_base_as_in_training(learnt: ObservedRun) -> None:
    model, _, _ = load_chat(str(learnt.output))
    assert quantised_layers(model)
    evidence = explain_run(learnt.output).evidence
    measured = [token.loss for row in evidence.rows for token in row.tokens if token.label >= 0]
    assert sum(measured) / len(measured) < 0.012  # measured 0.0085; with the adapter on the plain base 0.0176


def test_recording_is_judged_as_far_as_plain_weights_allow(bitsandbytes: None, tmp_path: Path) -> None:
    config = replace(NF4, max_steps=3, target_loss=None, round_trip=False, save_every=0, output=str(tmp_path / "run"))
    with record_run(tmp_path / "recording", steps=3):
        run_training(config, say=lambda _: None)
    judged = judge_recording(tmp_path / "recording", base_dir=str(write_tiny_base(tmp_path / "base")))
    assert not judged.verdict.departures
    assert "12 weights of the base are quantised" in judged.reason("model")
    assert {stage for stage in ("loss", "clipping", "update") if judged.reason(stage)} == set()


def test_base_with_experts_is_refused(bitsandbytes: None, tmp_path: Path) -> None:
    folder = write_tiny_base(tmp_path / "base", architecture="Glm4MoeForCausalLM")
    with pytest.raises(ConfigError, match="routed experts") as caught:
        load_base(str(folder), quantise="nf4")
    assert "--quantise" in str(caught.value)


def test_missing_library_is_told_before_anything_is_encoded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain_import = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "bitsandbytes":
            raise ModuleNotFoundError("No module named 'bitsandbytes'")
        return plain_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    status = glm4ft(["train", "--data=demo", "--quantise=nf4", f"--output={tmp_path / 'run'}"])
    told = capsys.readouterr().err
    assert status == 2
    assert "bitsandbytes is not installed" in told
    assert "pip install 'glm4ft[quantised]'" in told
    assert not (tmp_path / "run").exists()


def test_device_that_cannot_is_told(bitsandbytes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What bitsandbytes answers on a device without its kernels is the reason that is given."""
    from bitsandbytes.nn import Linear4bit

    def fails(*arguments: Any, **options: Any) -> Any:
        raise NotImplementedError("no kernel image is available for this device")

    monkeypatch.setattr(Linear4bit, "forward", fails)
    with pytest.raises(ConfigError, match="no kernel image is available") as caught:
        load_base(TINY, quantise="nf4")
    assert "on cpu" in str(caught.value)
