"""A sound checkpoint loads frozen and exact; a damaged or foreign one is refused, by name, before it can train.

Run: HF_HUB_OFFLINE=1 pytest tests/model/test_base_model.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Glm4ForCausalLM, GlmForCausalLM, PreTrainedTokenizerFast

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.control_tokens import STOPS
from glm4ft.data.conversation import Message
from glm4ft.data.format_check import format_warnings
from glm4ft.errors import ConfigError, ModelError
from glm4ft.model import base_model, checkpoint
from glm4ft.model.base_model import load_base, load_format, load_tokenizer
from glm4ft.model.checkpoint import INDEX
from glm4ft.model.tiny import tiny_model, write_tiny_base
from glm4ft.model.tiny_tokenizer import tiny_tokenizer

FORMATS = {"Glm4ForCausalLM": "glm-4-0414", "GlmForCausalLM": "glm-4-9b-chat"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
IDS = torch.arange(40, 72)[None]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Glm4 checkpoint in eight shards; never changed."""
    return write_tiny_base(tmp_path_factory.mktemp("sound") / "base", max_shard_size="200KB")


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(sound, tmp_path / "base"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS.to(model.device), use_cache=False).logits


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys; None removes one."""
    content = {**json.loads(path.read_text("utf-8")), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), "utf-8")


# --- a sound checkpoint ---


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("asked", DTYPES)
@pytest.mark.parametrize("architecture", FORMATS)
def test_checkpoint_loads_with_its_weights_frozen_and_in_eval_mode(
    architecture: Any, stored: str, asked: str, tmp_path: Path
) -> None:
    folder = write_tiny_base(
        tmp_path / "base", 3, architecture=architecture, dtype=DTYPES[stored], max_shard_size="200KB"
    )
    base = load_base(str(folder), dtype=asked)
    assert (base.format_name, base.source, base.folder, base.warnings) == (
        FORMATS[architecture],
        str(folder),
        folder,
        (),
    )
    assert type(base.model).__name__ == architecture
    assert base.model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert not any(module.training for module in base.model.modules())
    expected = dict(tiny_model(3, architecture=architecture).named_parameters())
    for name, parameter in base.model.named_parameters():
        assert not parameter.requires_grad
        assert parameter.dtype == DTYPES[asked]
        assert torch.equal(parameter.cpu(), expected[name].to(DTYPES[stored]).to(DTYPES[asked])), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_built_in_base_says_what_its_written_copy_says(dtype: str, sound: Path) -> None:
    """Its logits are equal bit for bit, in bf16 too: the rotary frequencies are not rounded with the weights."""
    built_in, written = load_base("tiny", dtype=dtype, device="cpu"), load_base(str(sound), dtype=dtype, device="cpu")
    assert torch.equal(logits(built_in.model), logits(written.model))
    assert (built_in.source, built_in.folder, built_in.format_name, built_in.warnings) == (
        "tiny",
        None,
        "glm-4-0414",
        (),
    )


def test_seed_decides_the_built_in_base() -> None:
    first, again, other = (load_base("tiny", seed=seed).model.lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_device_that_was_asked_for_is_the_device() -> None:
    assert load_base("tiny", device="cpu").model.device.type == "cpu"


def test_auto_is_fp32_on_the_cpu_and_bf16_on_cuda() -> None:
    assert load_base("tiny", device="cpu").model.dtype == torch.float32
    assert base_model._torch_dtype("auto", torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize("local_rank", ["0", "3"])
def test_each_process_takes_its_own_device(local_rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert base_model._default_device() == torch.device("cuda", int(local_rank))


@pytest.mark.parametrize("dtype", ["fp16", "float16", "half"])
def test_half_precision_is_refused_with_the_reason(dtype: str) -> None:
    with pytest.raises(ConfigError, match="overflow in fp16") as caught:
        load_base("tiny", dtype=dtype)
    assert (caught.value.where, caught.value.found, caught.value.expected) == ("--dtype", dtype, "auto, bf16 or fp32")


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown dtype"):
        load_base("tiny", dtype="int8")


# --- where the checkpoint lies ---


def test_folder_is_found_again_from_any_working_directory(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peft stores ``name_or_path``, and the adapter may be loaded from another working directory."""
    monkeypatch.chdir(sound.parent)
    base = load_base("base")
    assert base.source == "base"
    assert base.model.name_or_path == str(sound)


def test_tilde_is_the_home_folder(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(sound.parent))
    assert load_base("~/base").model.name_or_path == str(sound)


def test_folder_called_tiny_can_be_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.rename(folder.parent / "tiny")
    monkeypatch.chdir(folder.parent)
    (folder.parent / "tiny" / "chat_template.jinja").write_text("x")
    assert load_tokenizer("./tiny").chat_template == "x"
    assert load_tokenizer("tiny").chat_template != "x"


@pytest.mark.parametrize(
    "model", ["./none", "../none", "~/none", "/none/at/all", "a/b/c", "none/", "two words", "a\\b"]
)
def test_path_that_does_not_exist_never_asks_the_hub(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ModelError, match="no such folder") as caught:
        load_base(model)
    assert caught.value.found == model


def test_file_in_place_of_a_folder_is_named_as_such(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is reported although its bare name could be a hub id."""
    monkeypatch.chdir(sound)
    with pytest.raises(ModelError, match="no such folder") as caught:
        load_base("config.json")
    assert caught.value.found == "config.json, a file"


def test_hub_id_without_a_network_is_one_readable_error() -> None:
    with pytest.raises(ModelError, match="hub") as caught:
        load_base("zai-org/never-downloaded")
    assert caught.value.found.startswith("zai-org/never-downloaded: ")
    assert "\n" not in caught.value.found


def test_hub_refusal_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise OSError("401 Client Error.\n\nCannot access gated repo for url ...\n" + "x" * 1000)

    monkeypatch.setattr(checkpoint, "snapshot_download", refuse)
    with pytest.raises(ModelError) as caught:
        load_tokenizer("zai-org/gated")
    assert caught.value.found.startswith("zai-org/gated: 401 Client Error. Cannot access gated repo")
    assert len(caught.value.found) < 400
    assert "hf auth login" in caught.value.fix


def test_weights_of_a_hub_id_are_fetched_only_once_the_rest_is_right(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, fetched = tmp_path / "cache", []

    def download(repo: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        fetched.append(allow_patterns)
        for pattern in allow_patterns:
            for path in sound.glob(pattern):
                cache.mkdir(exist_ok=True)
                shutil.copy(path, cache)
        return str(cache)

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    base = load_base("zai-org/glm")
    assert (base.source, base.model.name_or_path, base.folder) == ("zai-org/glm", "zai-org/glm", cache)
    assert ["*.safetensors" in patterns for patterns in fetched] == [False, True]
    shutil.rmtree(cache)
    fetched.clear()
    load_format("zai-org/glm")
    assert not list(cache.glob("*.safetensors"))


# --- damaged and foreign checkpoints ---


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Join the shards into one file, changed."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        tensors.update(load_file(shard))
        shard.unlink()
    (folder / INDEX).unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def only_pickles(folder: Path) -> None:
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    (folder / INDEX).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def only_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def without_control_tokens(folder: Path) -> None:
    spec = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in ("<|observation|>", "<sop>")]
    (folder / "tokenizer.json").write_text(json.dumps(spec), "utf-8")


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def write(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def remove(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


@dataclass(frozen=True)
class Damage:
    id: str
    do: Callable[[Path], Any]
    told: tuple[str, ...]  # contained in the message
    needs_weights: bool = False  # True if the fault shows only when the weights are read


DAMAGES = [
    Damage("no-config", remove("config.json"), ("has no config.json",)),
    Damage("config-not-json", write("config.json", b"{'a': 1}"), ("not JSON", "config.json", "line 1 column 2")),
    Damage("config-not-an-object", write("config.json", b"[]"), ("no JSON object", "list")),
    Damage("config-not-text", write("config.json", b"\xff\xfe"), ("not JSON", "config.json")),
    Damage("config-invalid-value", config(hidden_size="wide"), ("configuration cannot be used", "hidden_size")),
    Damage("kernel", config(attn_implementation="evil/kernel"), ("code from elsewhere", "evil/kernel")),
    Damage(
        "kernel-by-revision", config(_attn_implementation_internal="a/b@main:f"), ("code from elsewhere", "a/b@main")
    ),
    Damage("experts-kernel", config(experts_implementation={"": "a/b"}), ("code from elsewhere", "experts_")),
    Damage("gemma", config(architectures=["GemmaForCausalLM"]), ("not a GLM-4", "GemmaForCausalLM")),
    Damage("glm-4.1v", config(architectures=["Glm4vForConditionalGeneration"]), ("GLM-4.1V: it sees images",)),
    Damage("glm-4.5v", config(architectures=["Glm4vMoeForConditionalGeneration"]), ("GLM-4.5V: it sees images",)),
    Damage(
        "unknown-vision", config(architectures=["GlmXForConditionalGeneration"], vision_config={}), ("sees images",)
    ),
    Damage("glm-5", config(architectures=["GlmMoeDsaForCausalLM"]), ("GLM-5 has a chat format of its own",)),
    Damage("no-architecture", config(architectures=None), ("not a GLM-4", "no architectures")),
    Damage(
        "remote-code",
        config(architectures=["ChatGLMModel"], _name_or_path="THUDM/glm-4-9b-chat-1m"),
        ("remote code", "zai-org/glm-4-9b-chat-1m-hf"),
    ),
    Damage(
        "remote-code-unnamed",
        config(architectures=["ChatGLMForConditionalGeneration"], padded_vocab_size=151552),
        ("remote code", "of glm-4-9b, glm-4-9b-chat and glm-4-9b-chat-1m there are converted checkpoints (-hf)"),
    ),
    Damage(
        "remote-code-older",
        config(architectures=["ChatGLMModel"], padded_vocab_size=65024, _name_or_path="THUDM/chatglm3-6b"),
        ("remote code", "not supported"),
    ),
    Damage(
        "remote-code-vision",
        config(architectures=["ChatGLMForConditionalGeneration"], padded_vocab_size=151552, vision_config={}),
        ("remote code", "a model with vision is not supported"),
    ),
    Damage("quantised", config(quantization_config={"bits": 4}), ("quantised", "plain weights")),
    Damage("adapter", only_adapter, ("an adapter, not a base", "merge the two")),
    Damage("adapter-beside-base", write("adapter_config.json", b"{}"), ("an adapter, not a base", "folder of its own")),
    Damage("no-tokenizer", remove("tokenizer.json"), ("no tokenizer.json",)),
    Damage("tokenizer-not-json", write("tokenizer.json", b"{"), ("tokenizer cannot be read",)),
    Damage("no-control-tokens", without_control_tokens, ("lacks control tokens", "no <sop>, <|observation|>")),
    Damage("vocabulary-too-small", config(vocab_size=480), ("no row for", "480", "489")),
    Damage("pickles", only_pickles, ("pickle files", "pytorch_model.bin", "model.safetensors")),
    Damage("no-weights", lambda f: (only_pickles(f), (f / "pytorch_model.bin").unlink()), ("has no weights",)),
    Damage("index-not-json", write(INDEX, b""), ("not JSON", INDEX)),
    Damage("index-empty", write(INDEX, b'{"weight_map": {}}'), ("index of the shards is malformed", INDEX)),
    Damage("shard-missing", remove("model-00003-of-00008.safetensors"), ("incomplete", "1 of 8", "model-00003-of")),
    Damage(
        "shard-truncated",
        lambda f: first_shard(f).write_bytes(first_shard(f).read_bytes()[:-1]),
        ("truncated or corrupt", "model-00001-of-00008.safetensors", "bytes"),
    ),
    Damage("shard-empty", lambda f: first_shard(f).write_bytes(b""), ("truncated or corrupt", "0 bytes")),
    Damage(
        "git-lfs-pointer",
        lambda f: first_shard(f).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        ("git-lfs pointer", "git lfs pull"),
    ),
    Damage(
        "tensor-missing",
        lambda f: change_tensors(f, lambda tensors: tensors.pop("model.norm.weight")),
        ("tensors are missing", "1: model.norm.weight"),
        needs_weights=True,
    ),
    Damage(
        "tensor-foreign",
        lambda f: change_tensors(f, lambda tensors: tensors.update({"value_head.weight": torch.ones(2)})),
        ("unknown tensors", "1: value_head.weight"),
        needs_weights=True,
    ),
    Damage(
        "tensor-of-another-shape",
        lambda f: change_tensors(f, lambda tensors: tensors.update({"model.norm.weight": torch.ones(127)})),
        ("weights cannot be loaded",),
        needs_weights=True,
    ),
    Damage(
        "other-architecture",
        config(architectures=["GlmForCausalLM"], model_type="glm"),
        ("unknown tensors", "4: model.layers.0.post_mlp_layernorm.weight"),
        needs_weights=True,
    ),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.id)
def test_damaged_checkpoint_is_refused(damage: Damage, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the place and the fault, and where possible no weight is read before."""
    damage.do(folder)
    if not damage.needs_weights:
        for model_class in (Glm4ForCausalLM, GlmForCausalLM):
            monkeypatch.setattr(model_class, "from_pretrained", lambda *_, **__: pytest.fail("read the weights"))
    with pytest.raises(ModelError) as caught:
        load_base(str(folder))
    assert caught.value.where.startswith(str(folder))
    for text in damage.told:
        assert text in str(caught.value)


@pytest.mark.parametrize(("stated", "used"), [("flash_attention_2", "sdpa"), ("eager", "eager"), (None, "sdpa")])
def test_attention_is_transformers_own(stated: str | None, used: str, folder: Path) -> None:
    """A flash attention that is not installed would be loaded from the hub."""
    edit_json(folder / "config.json", attn_implementation=stated)
    assert load_base(str(folder)).model.config._attn_implementation == used


# --- stop tokens ---


def test_checkpoint_without_generation_config_stops_where_its_config_says(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    base = load_base(str(folder))
    assert base.warnings == ()
    assert sorted(base.model.generation_config.eos_token_id) == stop_ids(base.tokenizer)


@pytest.mark.parametrize(
    ("stated", "lacking"),
    [
        ("<|endoftext|>", "<|user|> and <|observation|>"),
        (["<|user|>"], "<|endoftext|> and <|observation|>"),
        (["<|endoftext|>", "<|user|>", "<eop>"], "<|observation|>"),
        (None, "<|endoftext|> and <|user|> and <|observation|>"),
    ],
)
@pytest.mark.parametrize("name", ["generation_config", "config"])
def test_missing_stop_token_is_warned_of_and_added(name: str, stated: Any, lacking: str, folder: Path) -> None:
    """It is added to both configs, since engines differ in which one they read; other ids are kept."""
    ids = tiny_tokenizer().convert_tokens_to_ids(stated) if stated else "null"
    path = folder / f"{name}.json"
    content = {**json.loads(path.read_text("utf-8")), "eos_token_id": None if stated is None else ids}
    path.write_text(json.dumps(content), "utf-8")
    base = load_base(str(folder))
    [warning] = base.warnings
    assert f"eos_token_id of {name} lacks {lacking}, so" in warning
    expected = {*stop_ids(base.tokenizer), *([] if stated is None else [ids] if isinstance(ids, int) else ids)}
    assert sorted(getattr(base.model, name).eos_token_id) == sorted(expected)


def stop_ids(tokenizer: Any) -> list[int]:
    return sorted(tokenizer.convert_tokens_to_ids(list(STOPS)))


# --- tokenizer and chat format ---


def test_tokenizer_stays_as_it_is_but_for_a_missing_pad_token(folder: Path) -> None:
    """GLM-4's tokenizer pads left, for generation in batches; a tokenizer saved later must still do so."""
    edit_json(folder / "tokenizer_config.json", padding_side="left", pad_token=None)
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", "<|endoftext|>")


@pytest.mark.parametrize("name", ["chatglm3-6b", "glm-4v-9b", "glm-4-9b-chat", "glm4-9b"])
def test_the_converted_checkpoint_is_named_only_where_there_is_one(name: str, folder: Path, tmp_path: Path) -> None:
    """ChatGLM3 and GLM-4V have the same architecture as GLM-4-9B, but no checkpoint whose name ends in -hf."""
    edit_json(folder / "config.json", architectures=["ChatGLMForConditionalGeneration"])
    named = folder.rename(tmp_path / name)
    with pytest.raises(ModelError, match="remote code") as caught:
        load_base(str(named))
    assert ("-hf" in caught.value.fix) == (name in ("glm-4-9b-chat", "glm4-9b"))


@pytest.mark.parametrize("architecture", FORMATS)
def test_format_is_known_without_weights(architecture: Any, tmp_path: Path) -> None:
    folder = write_tiny_base(tmp_path / "base", architecture=architecture)
    (folder / "model.safetensors").unlink()
    tokenizer, name = load_format(str(folder))
    assert name == FORMATS[architecture]
    assert ChatFormat(name, tokenizer).prompt([Message("user", "hi")])


def test_format_that_is_named_needs_a_tokenizer_only(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / "tokenizer.json", bare)
    assert load_format(str(bare), "glm-4-9b-chat")[1] == "glm-4-9b-chat"
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_format(str(bare))


def test_format_that_is_named_wins(sound: Path) -> None:
    assert load_base(str(sound), chat_format="glm-4-9b-chat").format_name == "glm-4-9b-chat"
    assert load_format("tiny", "glm-4-9b-chat")[1] == "glm-4-9b-chat"


def test_unknown_format_is_refused() -> None:
    with pytest.raises(ModelError, match="unknown chat format"):
        load_format("tiny", "chatml")


def test_format_that_the_template_contradicts_has_to_be_forced(folder: Path) -> None:
    """GLM-Z1's template asks for reasoning: rows without it would be trained for prompts that no server sends."""
    with (folder / "chat_template.jinja").open("a") as template:
        template.write("{% if add_generation_prompt %}\n<think>{% endif %}")
    for asked in (None, "glm-4-0414", "glm-4-9b-chat", "glm-z1-0414"):
        with pytest.raises(ModelError, match="contradicts the chat format"):
            load_format(str(folder), asked)
        with pytest.raises(ModelError, match="contradicts the chat format"):
            load_base(str(folder), chat_format=asked)
    assert load_base(str(folder), chat_format="glm-4-0414", force_format=True).format_name == "glm-4-0414"


def test_base_without_a_template_is_taken_with_a_warning(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    base = load_base(str(folder))
    (warning,) = format_warnings(base.format_name, base.tokenizer, where=str(folder))
    assert "no chat template" in warning
    assert "chat_template.jinja" in warning
    assert isinstance(base.tokenizer, PreTrainedTokenizerFast)


def test_chatml_base_is_trained_in_the_format_that_its_own_template_writes(tmp_path: Path) -> None:
    """LoRA adapts all linear layers of its decoder layers, whose gate and up projection are two modules."""
    from glm4ft.model.lora import attach_lora
    from glm4ft.model.lora_options import LLAMA_TARGETS, LoraOptions
    from glm4ft.testing.bases.chatml_base import END, write_chatml_base

    base = load_base(str(write_chatml_base(tmp_path / "base")))
    assert base.format_name == "template"
    assert base.model.generation_config.eos_token_id in (base.tokenizer.eos_token_id, [base.tokenizer.eos_token_id])
    assert base.tokenizer.eos_token == END
    assert LoraOptions().for_model(base.model).targets == list(LLAMA_TARGETS)
    assert attach_lora(base.model, LoraOptions(), seed=0)
    assert LoraOptions(targets=["q_proj"]).for_model(base.model).targets == ["q_proj"]
