"""Random bases have the geometry of published checkpoints, and a head that makes a wrong mask visible.

Run: pytest tests/testing/bases/test_random_base.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from glm4ft.errors import ConfigError
from glm4ft.model.architectures import MODEL_CLASSES
from glm4ft.model.base_model import load_base
from glm4ft.model.tiny import never_sampled_ids
from glm4ft.model.tiny_tokenizer import tiny_tokenizer
from glm4ft.testing.bases.geometry import GEOMETRIES, geometry, num_parameters, size_of
from glm4ft.testing.bases.random_base import NUM_PADDING_IDS, random_config, write_random_base
from glm4ft.testing.session.gpu_lane import Bases

# changes that make a copy so small that it is written in a tenth of a second
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
    "vocab_size": 2000,
}


@pytest.mark.parametrize(
    ("name", "billions"), [("glm-4-9b", 9.400), ("glm-4-9b-0414", 9.400), ("glm-4-32b-0414", 32.566)]
)
def test_a_geometry_is_that_of_its_checkpoint(name: str, billions: float) -> None:
    """The number of parameters of transformers' model equals the formula's and the published one."""
    architecture = geometry(f"random:{name}")["architecture"]
    config = random_config(f"random:{name}", tiny_tokenizer(architecture))
    with torch.device("meta"):
        model = MODEL_CLASSES[architecture](config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == num_parameters(GEOMETRIES[name]) == size_of(f"random:{name}")
    assert count / 1e9 == pytest.approx(billions, abs=5e-4)


def test_a_geometry_that_does_not_exist_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="random:glm-4-9b-0414"):
        geometry("random:glm-4-9b-414")


def test_the_size_of_a_folder_is_read_and_that_of_a_hub_id_unknown(tmp_path: Path) -> None:
    """A base of unknown size is treated as a large one, not as a small one."""
    folder = write_random_base("random:glm-4-9b", tmp_path / "base", dtype=torch.float32, **SMALL)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        stored = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118  # not a dict
    assert size_of(str(folder)) == stored
    assert size_of("zai-org/GLM-4-9B-0414") == math.inf
    (folder / "config.json").write_text("{}")
    assert size_of(str(folder)) == math.inf


@pytest.fixture(scope="module", params=["glm-4-9b", "glm-4-9b-0414"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small copy in bf16, as this project loads it."""
    folder = tmp_path_factory.mktemp("random") / "base"
    write_random_base(f"random:{request.param}", folder, dtype=torch.bfloat16, **SMALL)
    return load_base(str(folder), dtype="bf16")


def test_a_random_base_is_a_checkpoint_like_any_other(small: Any) -> None:
    formats = {"GlmForCausalLM": "glm-4-9b-chat", "Glm4ForCausalLM": "glm-4-0414"}
    assert small.format_name == formats[type(small.model).__name__]
    assert small.warnings == ()
    config = json.loads((small.folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_tokens_that_are_never_sampled_share_a_head_row_and_no_other_does(small: Any) -> None:
    """As on the built-in base: their loss has a floor that no adapter below the head can lower."""
    head = small.model.lm_head.weight.float()
    alike = [*never_sampled_ids(small.tokenizer), *range(len(head) - NUM_PADDING_IDS, len(head))]
    common = head[alike].mean(0)
    off = (head - common).norm(dim=1) / common.norm()
    assert off[alike].max() < 0.1
    ordinary = torch.ones(len(head), dtype=torch.bool)
    ordinary[alike] = False
    assert off[ordinary].min() > 5


def test_logits_spread_alike_at_any_width(small: Any) -> None:
    """Logits spread at hidden size 256 as on the built-in base with 128; at a fixed scale the first loss would grow."""
    hidden_norm = math.sqrt(small.model.config.hidden_size)  # of the final norm's output
    assert float(small.model.lm_head.weight.float().std()) * hidden_norm == pytest.approx(0.2 * math.sqrt(128), rel=0.1)


@pytest.mark.parametrize("spec", ["tiny", "random:glm-4-9b"])
def test_a_base_is_written_in_the_dtype_that_was_asked_for(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glm4ft.testing.bases.geometry.GEOMETRIES", {"glm-4-9b": {**GEOMETRIES["glm-4-9b"], **SMALL}})
    folder = Bases(spec, tmp_path).get("bf16")
    with safe_open(Path(folder) / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118  # not a dict


def test_a_checkpoint_stays_where_it_is(tmp_path: Path) -> None:
    assert Bases(str(tmp_path), tmp_path / "bases").get("fp32") == str(tmp_path)
    assert not (tmp_path / "bases").exists()


def test_a_base_is_written_once(tmp_path: Path) -> None:
    """The default dtype is fp32; writing a base of the true size takes half a minute and 19 GB."""
    bases = Bases("tiny", tmp_path)
    assert bases.get() == bases.get("fp32")
    assert [folder.name for folder in tmp_path.iterdir()] == ["tiny-fp32"]
