"""Folders of merge and train are read alike by transformers 4 and 5.

Run: pytest tests/model/test_portable.py  (with transformers 4 itself: tox run -e transformers4)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from glm4ft.data.control_tokens import STOPS
from glm4ft.errors import RunError
from glm4ft.model.base_model import load_base
from glm4ft.model.checkpoint import read_json
from glm4ft.model.lora import attach_lora
from glm4ft.model.lora_options import LoraOptions
from glm4ft.model.merge import merge_adapter
from glm4ft.model.portable import (
    TOKENIZER_CLASS,
    read_as_transformers_4,
    read_as_transformers_5,
    require_same_reading,
    write_tokenizer,
)
from glm4ft.model.tiny import write_tiny_base

LOGIT_TOLERANCE = 1e-5  # absolute, of logits of about 1 to 10 in fp32; 0 and 4e-7 were measured on transformers 4.55.4
PACKAGES = "GLM4FT_TRANSFORMERS4"  # a folder that `pip install --target` put transformers 4 into

# Each is a rope that configs of GLM-4 have: that of 0414, of 9b-chat, of 9b-chat-1m, and the one its card advises for
# long contexts. In the form of transformers 5, as `save_pretrained` writes it.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ROPES = {
    "plain": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "chat": {"rope_type": "default", "rope_theta": 5000000.0, "partial_rotary_factor": 0.5},
    "rotated-whole": {"rope_type": "default", "rope_theta": 100000000.0, "partial_rotary_factor": 1.0},
    "yarn": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, **YARN},
}
OLD_NAMES = ("rope_theta", "partial_rotary_factor", "rope_scaling", "torch_dtype")

# What a program with transformers 4 does with a folder. It must not import this project, which needs transformers 5.
READER = """
import sys, json, torch, transformers
from safetensors.torch import save_file
assert transformers.__version__.startswith("4."), transformers.__version__
folder, out = sys.argv[1:]
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
said = {"ids": tokenizer.apply_chat_template([{"role": "user", "content": "你好, how?"}], add_generation_prompt=True)}
if out:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        save_file({"logits": model(input_ids=torch.arange(40, 168)[None]).logits.float()}, out)
    said |= {"stops": model.generation_config.eos_token_id, "dtype": str(model.dtype)}
print(json.dumps(said))
"""


@pytest.fixture(scope="session")
def in_transformers_4() -> Callable[..., dict[str, Any]]:
    """Read a folder in a process with transformers 4; gives back what it said."""
    packages = os.environ.get(PACKAGES)
    if not packages:
        pytest.skip(f"needs transformers 4: {PACKAGES} is not set; tox run -e transformers4 installs it and sets it")

    def read(folder: Path, logits: Path | str = "") -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-c", READER, str(folder), str(logits)],
            env={**os.environ, "PYTHONPATH": packages},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return read


@pytest.fixture(scope="module", params=ROPES)
def merged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge into a base whose files have only the names of transformers 5."""
    folder = tmp_path_factory.mktemp(request.param)
    architecture = "GlmForCausalLM" if request.param == "chat" else "Glm4ForCausalLM"
    base = write_tiny_base(folder / "base", architecture=architecture)
    config = {k: v for k, v in read_json(base / "config.json").items() if k not in OLD_NAMES}
    (base / "config.json").write_text(json.dumps({**config, "rope_parameters": ROPES[request.param]}))
    edit(base / "tokenizer_config.json", tokenizer_class="TokenizersBackend")
    model = attach_lora(load_base(str(base)).model, LoraOptions(), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.02
    model.save_pretrained(folder / "adapter")
    merge_adapter(folder / "adapter", folder / "merged")
    return folder / "merged"


def edit(path: Path, *, without: tuple[str, ...] = (), **changes: Any) -> None:
    content = {k: v for k, v in {**read_json(path), **changes}.items() if k not in without}
    path.write_text(json.dumps(content), "utf-8")


# --- merged checkpoints ---


def test_merged_folder_is_read_alike_by_the_rules_of_both_versions(merged: Path) -> None:
    rope = ROPES[merged.parent.name.rstrip("0123456789")]
    four, five = read_as_transformers_4(merged), read_as_transformers_5(merged)
    assert four == five
    assert (four.rope_theta, four.rotary_share) == (rope["rope_theta"], rope["partial_rotary_factor"])
    assert four.rope_scaling["rope_type"] == rope["rope_type"]
    assert four.rope_scaling.get("factor") == rope.get("factor")
    assert four.tokenizer_class == TOKENIZER_CLASS
    assert list(four.stops) == sorted(AutoTokenizer.from_pretrained(merged).convert_tokens_to_ids(list(STOPS)))


def test_merged_folder_gives_the_same_logits_in_transformers_4(
    merged: Path, tmp_path: Path, in_transformers_4: Callable[..., dict[str, Any]]
) -> None:
    said = in_transformers_4(merged, tmp_path / "logits.safetensors")
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(merged)(input_ids=torch.arange(40, 168)[None]).logits.float()
    assert (load_file(tmp_path / "logits.safetensors")["logits"] - ours).abs().max() <= LOGIT_TOLERANCE
    tokenizer = AutoTokenizer.from_pretrained(merged)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "你好, how?"}], add_generation_prompt=True, return_dict=False
    )
    assert said["ids"] == prompt
    assert sorted(said["stops"]) == sorted(tokenizer.convert_tokens_to_ids(list(STOPS)))
    assert said["dtype"] == "torch.float32"


DAMAGES: dict[str, Callable[[Path], None]] = {
    "rope_theta": lambda folder: edit(folder / "config.json", rope_theta=2.0),
    "rotary_share": lambda folder: edit(folder / "config.json", partial_rotary_factor=0.25),
    # transformers 4 would take 32768 / 64 for the factor
    "rope_scaling": lambda folder: edit(folder / "config.json", rope_scaling=YARN),
    "dtype": lambda folder: edit(folder / "config.json", without=("torch_dtype",), dtype="bfloat16"),
    "tokenizer_class": lambda folder: edit(folder / "tokenizer_config.json", tokenizer_class="TokenizersBackend"),
    "special_tokens": lambda folder: edit(folder / "tokenizer_config.json", extra_special_tokens=["<sop>"]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_folder_that_the_versions_read_differently_is_refused(name: str, tmp_path: Path) -> None:
    """Each field of the comparison can fail."""
    folder = write_tiny_base(tmp_path / "base")
    require_same_reading(folder)
    DAMAGES[name](folder)
    with pytest.raises(RunError, match=f"nothing written.*{name}"):
        require_same_reading(folder)


# --- tokenizers ---


@pytest.mark.parametrize(
    "stated",
    [
        {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<sop>", "<|user|>"]},
        {"tokenizer_class": "ChatGLM4Tokenizer", "auto_map": {"AutoTokenizer": ["tokenization_chatglm.X", None]}},
        {"tokenizer_class": None},
    ],
    ids=["transformers-5", "remote-code", "no-class"],
)
def test_tokenizer_that_transformers_4_cannot_load_is_translated(stated: dict[str, Any], tmp_path: Path) -> None:
    base = write_tiny_base(tmp_path / "base")
    edit(base / "tokenizer_config.json", **stated, padding_side="left")
    before = AutoTokenizer.from_pretrained(base) if "auto_map" not in stated else None
    (tmp_path / "out").mkdir()
    write_tokenizer(load_base(str(base)).tokenizer, base, tmp_path / "out")
    written = read_json(tmp_path / "out" / "tokenizer_config.json")
    assert written["tokenizer_class"] == TOKENIZER_CLASS
    assert "auto_map" not in written
    assert "extra_special_tokens" not in written
    assert written.get("additional_special_tokens") == stated.get("extra_special_tokens")
    assert written["padding_side"] == "left"
    after = AutoTokenizer.from_pretrained(tmp_path / "out")
    if before is not None:
        assert after.extra_special_tokens == before.extra_special_tokens
        assert after.chat_template == before.chat_template


def test_tokenizer_that_both_can_load_is_copied_byte_for_byte(tmp_path: Path) -> None:
    base = write_tiny_base(tmp_path / "base")
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps({**read_json(path), "padding_side": "left"}, indent=7))
    (tmp_path / "out").mkdir()
    write_tokenizer(load_base(str(base)).tokenizer, base, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_base_without_a_tokenizer_config_gets_one(tmp_path: Path) -> None:
    """Beside an adapter there is no config.json from which a reader could guess the class."""
    base = write_tiny_base(tmp_path / "base")
    tokenizer = load_base(str(base)).tokenizer
    (base / "tokenizer_config.json").unlink()
    (tmp_path / "out").mkdir()
    write_tokenizer(tokenizer, base, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


# --- the folder of a run ---


def test_run_holds_the_bases_tokenizer_all_stops_and_no_blank_card(learnt: Any) -> None:
    output = learnt.output
    assert read_json(output / "tokenizer_config.json")["tokenizer_class"] == TOKENIZER_CLASS
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(output / "base").chat_template
    stops = read_json(output / "generation_config.json")["eos_token_id"]
    assert sorted(stops) == sorted(tokenizer.convert_tokens_to_ids(list(STOPS)))
    card = (output / "README.md").read_text("utf-8")
    assert "More Information Needed" not in card
    assert "115 of 587 tokens supervised" in card
    assert "4 of 4 assistant turns came back word for word" in card
    assert str(output) not in card


def test_run_is_read_by_transformers_4(learnt: Any, in_transformers_4: Callable[..., dict[str, Any]]) -> None:
    """The tokenizer of the run, and the base that it wrote for those who load the adapter."""
    assert in_transformers_4(learnt.output)["ids"] == in_transformers_4(learnt.output / "base")["ids"]


def test_real_tokenizer_is_read_by_transformers_4(
    glm4ft_tokenizer: str, real_tokenizer: Any, tmp_path: Path, in_transformers_4: Callable[..., dict[str, Any]]
) -> None:
    """As transformers 5 saves it, transformers 4 finds neither its class nor a mapping of special tokens."""
    write_tokenizer(real_tokenizer, Path(glm4ft_tokenizer), tmp_path)
    ids = real_tokenizer.apply_chat_template(
        [{"role": "user", "content": "你好, how?"}], add_generation_prompt=True, return_dict=False
    )
    assert in_transformers_4(tmp_path)["ids"] == ids
