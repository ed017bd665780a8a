"""A merged checkpoint gives in plain transformers what base and adapter give in peft; no failed merge leaves a file.

Run: HF_HUB_OFFLINE=1 pytest tests/model/test_merge.py
"""

from __future__ import annotations

import errno
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.control_tokens import STOPS
from glm4ft.data.reader import parse_conversation
from glm4ft.errors import ConfigError, InputError, ModelError, RunError
from glm4ft.model import base_model
from glm4ft.model.adapter import WEIGHTS
from glm4ft.model.base_model import load_base
from glm4ft.model.lora import attach_lora
from glm4ft.model.lora_options import LoraOptions
from glm4ft.model.merge import TOLERANCES, MergeReport, merge_adapter
from glm4ft.model.model_card import write_card
from glm4ft.model.tiny import write_tiny_base

# plain peft 0.21 on transformers 5.23 warns of its own call
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

TURNS = [("What is the capital of France?", "It is Paris."), ("你好", "你好! What can I do for you today?")]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module", autouse=True)
def _offline_on_the_cpu() -> Iterator[None]:
    """Run all tests on the CPU, where merges are reproducible bit for bit, and without the hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(base_model, "_default_device", lambda: torch.device("cpu"))
        yield


def randomise(model: PeftModel) -> None:
    """Give every trained parameter a random value in place of its initial one."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05


def overfit(model: PeftModel, chat_format: ChatFormat) -> None:
    """Train until both answers are reproduced: two seconds of plain torch, without a trainer."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0)
    records = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in TURNS]
    rows = [chat_format.encode(parse_conversation({"messages": messages})) for messages in records]
    for _ in range(25):
        for row in rows:
            loss = model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss
            (loss / len(rows)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1


@dataclass(frozen=True)
class Merged:
    """A base, an adapter trained on it, and the merge of both."""

    base: Path
    adapter: Path
    output: Path
    dtype: str
    report: MergeReport


@pytest.fixture(scope="module", params=[("Glm4ForCausalLM", "fp32"), ("GlmForCausalLM", "bf16")], ids=lambda p: p[1])
def merged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Merged:
    architecture, dtype = request.param
    folder = tmp_path_factory.mktemp(dtype)
    write_tiny_base(folder / "base", architecture=architecture, dtype=DTYPES[dtype], max_shard_size="200KB")
    edit_json(folder / "base" / "tokenizer_config.json", padding_side="left")  # as GLM-4 has it
    base = load_base(str(folder / "base"), dtype=dtype)
    model = attach_lora(base.model, LoraOptions(), seed=0)
    overfit(model, ChatFormat(base.format_name, base.tokenizer))
    model.save_pretrained(folder / "adapter")
    report = merge_adapter(folder / "adapter", folder / "merged")
    return Merged(folder / "base", folder / "adapter", folder / "merged", dtype, report)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Glm4 base in fp32; never changed."""
    return write_tiny_base(tmp_path_factory.mktemp("sound") / "base")


@pytest.fixture(scope="module")
def random_adapter(base_folder: Path) -> Path:
    """An adapter on all targets and a head of its own; never changed."""
    return make_adapter(base_folder, base_folder.parent / "adapter", options={"modules_to_save": ["lm_head"]})


@pytest.fixture
def adapter(random_adapter: Path, tmp_path: Path) -> Path:
    """A copy of the random adapter that a test may damage."""
    return Path(shutil.copytree(random_adapter, tmp_path / "adapter"))


def make_adapter(base: Path, folder: Path, change: Callable[[PeftModel], Any] = randomise, **options: Any) -> Path:
    model = attach_lora(load_base(str(base)).model, LoraOptions(**options), seed=0)
    change(model)
    model.save_pretrained(folder)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")


def plain(folder: Path, dtype: str = "fp32") -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()


def with_adapter(base: Path, adapter: Path, dtype: str = "fp32") -> Any:
    return PeftModel.from_pretrained(plain(base, dtype), str(adapter)).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(40, 104)[None], use_cache=False).logits.float()


def answers(model: Any, tokenizer: Any) -> list[str]:
    """Generate answers greedily by the model's own generation config, stop token included."""
    found = []
    for question, _ in TURNS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**ids, do_sample=False, max_new_tokens=32)
        found.append(tokenizer.decode(output[0, ids["input_ids"].shape[1] :]))
    return found


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


# --- what the merged checkpoint says ---


def test_merged_model_gives_the_adapters_text_and_stops(merged: Merged) -> None:
    tokenizer = AutoTokenizer.from_pretrained(merged.output)
    expected = [f"\n{answer}<|user|>" for _, answer in TURNS]
    assert answers(plain(merged.output, merged.dtype), tokenizer) == expected
    assert answers(with_adapter(merged.base, merged.adapter, merged.dtype), tokenizer) == expected


def test_merged_model_gives_the_adapters_logits(merged: Merged) -> None:
    expected = logits(with_adapter(merged.base, merged.adapter, merged.dtype))
    assert_close(logits(plain(merged.output, merged.dtype)), expected, TOLERANCES[merged.dtype])


def test_merging_rounds_once(merged: Merged) -> None:
    """The written weights equal base plus adapter in fp32, rounded once, bit for bit, in bf16 as well."""
    model = with_adapter(merged.base, merged.adapter, "fp32").merge_and_unload()
    written = plain(merged.output, merged.dtype).state_dict()
    assert all(torch.equal(written[name], p.to(DTYPES[merged.dtype])) for name, p in model.named_parameters())


def test_dtype_is_that_of_the_stored_base(merged: Merged) -> None:
    stored = {tensor.dtype for path in merged.output.glob("*.safetensors") for tensor in load_file(path).values()}
    assert stored == {DTYPES[merged.dtype]}
    assert merged.report.dtype == merged.dtype
    config = json.loads((merged.output / "config.json").read_text("utf-8"))
    assert DTYPES[merged.dtype] == getattr(torch, config["dtype"])


def test_tokenizer_and_template_are_the_bases_byte_for_byte(merged: Merged) -> None:
    """Our padding side does not leak into the checkpoint."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (merged.output / name).read_bytes() == (merged.base / name).read_bytes()


def test_folder_is_an_ordinary_one_and_nothing_lies_beside_it(merged: Merged) -> None:
    assert sorted(path.name for path in merged.output.parent.iterdir()) == ["adapter", "base", "merged"]
    assert merged.output.stat().st_mode == merged.base.stat().st_mode
    assert not list(merged.output.glob("adapter*"))


def test_account_says_what_was_done(merged: Merged) -> None:
    report = merged.report
    assert (report.output, report.base, report.warnings) == (merged.output, str(merged.base), ())
    assert report.effect > 0.1
    assert report.error < TOLERANCES[merged.dtype]
    assert report.describe().startswith(
        f"merged into {merged.base} in {merged.dtype}: the adapter moves logits by up to"
    )
    assert report.describe().endswith(f"merged checkpoint: {merged.output}")


@pytest.mark.parametrize(
    "options",
    [
        {"options": {"use_rslora": True}},
        {"options": {"use_dora": True}},
        {"options": {"bias": "all"}},
        {"options": {"modules_to_save": ["lm_head", "embed_tokens"]}},
        {"options": {"layers_to_transform": [1]}, "rank": 3},
        {"options": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 4}}},
        {"targets": ["q_proj", "lm_head"]},
        {"targets": ["embed_tokens"]},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*save_embedding_layers")
def test_every_kind_of_adapter_is_merged_whole(options: dict[str, Any], base_folder: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base_folder, tmp_path / "adapter", **options)
    report = merge_adapter(adapter, tmp_path / "merged")
    assert report.effect > 0.01
    found, expected = logits(plain(tmp_path / "merged")), logits(with_adapter(base_folder, adapter))
    assert_close(found, expected, TOLERANCES["fp32"])


def test_built_in_base_can_be_merged_into(adapter: Path, base_folder: Path, tmp_path: Path) -> None:
    merge_adapter(adapter, tmp_path / "merged", model="tiny")
    assert torch.equal(
        logits(plain(tmp_path / "merged")), logits(with_adapter(base_folder, adapter).merge_and_unload())
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base_folder).chat_template


def test_named_base_and_dtype_win(adapter: Path, base_folder: Path, tmp_path: Path) -> None:
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="/gone")
    report = merge_adapter(adapter, tmp_path / "merged", model=str(base_folder), dtype="bf16")
    assert (report.dtype, plain(tmp_path / "merged", "bf16").dtype) == ("bf16", torch.bfloat16)


@pytest.mark.parametrize("damage", ["drop", "one"])
def test_merged_checkpoint_stops_at_all_three_though_its_base_did_not(
    damage: str, random_adapter: Path, base_folder: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(base_folder, tmp_path / "base"))
    one = load_base("tiny").tokenizer.eos_token_id
    edit_json(base / "config.json", eos_token_id=one)
    edit_json(base / "generation_config.json", eos_token_id=one)
    if damage == "drop":
        (base / "generation_config.json").unlink()
    report = merge_adapter(random_adapter, tmp_path / "merged", model=str(base))
    assert len(report.warnings) == 2
    stops = sorted(AutoTokenizer.from_pretrained(base).convert_tokens_to_ids(list(STOPS)))
    for name in ("config.json", "generation_config.json"):
        assert sorted(json.loads((tmp_path / "merged" / name).read_text("utf-8"))["eos_token_id"]) == stops


def test_base_with_settings_of_a_sampling_that_is_off_can_be_merged_into(
    random_adapter: Path, base_folder: Path, tmp_path: Path
) -> None:
    """Published configs have them; transformers refuses to save them beside stop tokens that were added."""
    base = Path(shutil.copytree(base_folder, tmp_path / "base"))
    one = load_base("tiny").tokenizer.eos_token_id
    edit_json(base / "generation_config.json", eos_token_id=one, do_sample=False, temperature=0.8, top_p=0.8)
    merge_adapter(random_adapter, tmp_path / "merged", model=str(base))
    written = json.loads((tmp_path / "merged" / "generation_config.json").read_text("utf-8"))
    assert len(written["eos_token_id"]) == 3
    assert "temperature" not in written


def test_card_names_base_and_figures_and_tells_how_the_adapter_was_trained(
    learnt: Any, merged: Merged, tmp_path: Path
) -> None:
    card = (merged.output / "README.md").read_text("utf-8")
    assert f"{merged.report.effect:.2g} of the largest logit" in card
    assert "More Information Needed" not in card  # of the card that peft wrote beside the adapter
    assert str(merged.base) not in card
    merge_adapter(learnt.output, tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text("utf-8")
    assert card.count("---\n") == 2
    assert "4 of 4 assistant turns came back word for word" in card


@pytest.mark.parametrize(
    ("base", "expected"),
    [("zai-org/GLM-4-9B-0414", "base_model: zai-org/GLM-4-9B-0414\nbase_model_relation: finetune\n"), ("/a/b", "")],
)
def test_card_gives_the_hub_only_bases_that_it_has(base: str, expected: str, tmp_path: Path) -> None:
    write_card(tmp_path, ["# x"], base=base, library="transformers", relation="finetune")
    front = (tmp_path / "README.md").read_text("utf-8").split("---\n")[1]
    assert front == expected + "library_name: transformers\npipeline_tag: text-generation\ntags:\n- glm4ft\n- lora\n"


def test_checkpoint_whose_format_must_be_chosen_can_be_merged_into(
    random_adapter: Path, base_folder: Path, tmp_path: Path
) -> None:
    """Merging needs no chat format, so a reasoning checkpoint is no reason to refuse."""
    base = Path(shutil.copytree(base_folder, tmp_path / "base"))
    with (base / "chat_template.jinja").open("a") as template:
        template.write("{% if add_generation_prompt %}<think>{% endif %}")
    merge_adapter(random_adapter, tmp_path / "merged", model=str(base))
    assert (tmp_path / "merged" / "config.json").exists()


def test_adapter_without_effect_is_merged_with_a_warning(base_folder: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base_folder, tmp_path / "adapter", change=lambda model: None)
    report = merge_adapter(adapter, tmp_path / "merged")
    assert report.effect == 0
    assert report.warnings == ("the adapter has no effect: the merged model gives the logits of the base",)
    assert f"warning: {report.warnings[0]}" in report.describe()


def test_adapter_lost_in_rounding_is_merged_with_a_warning(base_folder: Path, tmp_path: Path) -> None:
    def faint(model: PeftModel) -> None:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(2e-5)

    adapter = make_adapter(base_folder, tmp_path / "adapter", change=faint)
    assert "rounding" in merge_adapter(adapter, tmp_path / "bf16", dtype="bf16").warnings[0]
    assert merge_adapter(adapter, tmp_path / "fp32").warnings == ()


def test_empty_folder_may_be_written_to(random_adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    merge_adapter(random_adapter, tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").exists()


# --- what is refused; nothing is written ---


def change_tensors(adapter: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(adapter / WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda adapter: edit_json(adapter / "adapter_config.json", **changes)


def renaming(rename: Callable[[str], str]) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[rename(name)] = tensors.pop(name)

    return lambda adapter: change_tensors(adapter, change)


def into_checkpoints(adapter: Path) -> None:
    for step in (10, 20):
        shutil.copytree(adapter, adapter.parent / f"checkpoint-{step}")
    shutil.rmtree(adapter)
    adapter.mkdir()
    for step in (10, 20):
        (adapter.parent / f"checkpoint-{step}").rename(adapter / f"checkpoint-{step}")


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@dataclass(frozen=True)
class Damage:
    id: str
    do: Callable[[Path], Any]
    told: tuple[str, ...]  # contained in the message
    error: type[Exception] = ModelError


DAMAGES = [
    Damage("no-folder", shutil.rmtree, ("not the folder of an adapter", "no such folder")),
    Damage(
        "no-config", lambda a: (a / "adapter_config.json").unlink(), ("not the folder of an adapter", "no adapter_c")
    ),
    Damage("unfinished-run", into_checkpoints, ("not the folder of an adapter", "checkpoint-10, checkpoint-20")),
    Damage(
        "config-not-json", lambda a: (a / "adapter_config.json").write_text("{"), ("not JSON", "adapter_config.json")
    ),
    Damage("module", config(megatron_config={"a": 1}, megatron_core="evil"), ("a module to import", "megatron_config")),
    Damage("not-lora", config(peft_type="IA3"), ("not a LoRA adapter", "IA3")),
    Damage("no-weights", lambda a: (a / WEIGHTS).unlink(), ("the adapter has no weights", WEIGHTS)),
    Damage("pickle", lambda a: (a / WEIGHTS).rename(a / "adapter_model.bin"), ("pickle", "adapter_model.bin", WEIGHTS)),
    Damage(
        "truncated",
        lambda a: (a / WEIGHTS).write_bytes((a / WEIGHTS).read_bytes()[:-1]),
        ("truncated or corrupt", WEIGHTS),
    ),
    Damage(
        "tensor-missing",
        lambda a: change_tensors(a, lambda tensors: tensors.pop(f"{Q_PROJ}.lora_B.weight")),
        ("lacks tensors", f"1: {Q_PROJ}.lora_B.weight"),
    ),
    Damage(
        "head-missing",
        lambda a: change_tensors(a, lambda tensors: tensors.pop("base_model.model.lm_head.weight")),
        ("does not fit the base", "lm_head.weight"),
    ),
    Damage(
        "tensor-foreign",
        lambda a: change_tensors(
            a, lambda t: t.update({f"{Q_PROJ}x.lora_A.weight": torch.ones(8, 128), "y": torch.ones(1)})
        ),
        ("without a place", "2: base_model.model.model.layers.0.self_attn.q_projx.lora_A.weight, y"),
    ),
    Damage("other-rank", config(r=4), ("does not fit the base", "size mismatch", "its r")),
    Damage(
        "remote-code",
        config(target_modules=["query_key_value", "dense_h_to_4h"]),
        ("query_key_value is q_proj, k_proj and v_proj", "dense_h_to_4h is gate_up_proj", "128 of q, 64 of k, 64 of v"),
    ),
    Damage(
        "split-gate", config(target_modules=["gate_proj", "up_proj"]), ("fused as gate_up_proj", "gate_proj, up_proj")
    ),
    Damage(
        "other-model", config(target_modules=["c_attn"]), ("layers that the base does not have", "c_attn", "--model")
    ),
    Damage(
        "named-tensors",
        renaming(lambda name: name.replace(".weight", ".default.weight") if "lora_" in name else name),
        ("in their place 24 others", "down_proj.lora_A.default.weight", "the name of the adapter", "save_pretrained"),
    ),
    Damage("wrapped", renaming(lambda name: f"module.{name}"), ("a wrapper", "module.base_model.model")),
    Damage(
        "without-prefix",
        renaming(lambda name: name.removeprefix("base_model.model.")),
        ("missing prefix base_model.model", "as lm_head.weight"),
    ),
    Damage(
        "deeper",
        lambda a: change_tensors(
            a, lambda t: t.update({f"{Q_PROJ.replace('.0.', '.40.')}.lora_A.weight": torch.ones(8, 128)})
        ),
        ("without a place", "trained on a deeper one"),
    ),
    Damage("fewer-targets", config(target_modules=["q_proj"]), ("without a place", "20: ")),
    Damage("base-unnamed", config(base_model_name_or_path=None), ("does not name its base", "--model")),
    Damage(
        "base-gone",
        config(base_model_name_or_path="/gone/base"),
        (
            "the adapter's base cannot be used: there is no such folder",
            "base_model_name_or_path",
            "/gone/base",
            "--model",
        ),
    ),
    Damage(
        "not-finite",
        lambda a: change_tensors(a, lambda tensors: tensors[f"{Q_PROJ}.lora_B.weight"].fill_(float("nan"))),
        ("nothing written", "nan"),
        RunError,
    ),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.id)
def test_adapter_that_does_not_fit_is_refused(damage: Damage, adapter: Path, tmp_path: Path) -> None:
    damage.do(adapter)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(damage.error) as caught:
        merge_adapter(adapter, tmp_path / "merged")
    for text in damage.told:
        assert text in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_targets_of_which_the_base_has_some_are_merged(adapter: Path, tmp_path: Path) -> None:
    """A list that was written for any model names layers that this one never had; peft trains the others."""
    named = json.loads((adapter / "adapter_config.json").read_text("utf-8"))["target_modules"]
    config(target_modules=[*named, "gate_proj", "up_proj"])(adapter)
    assert merge_adapter(adapter, tmp_path / "merged").effect > 0


@pytest.mark.parametrize("options", [{"alora_invocation_tokens": [10]}, {"lora_bias": True}], ids=str)
@pytest.mark.filterwarnings("ignore:.*(lora_bias|invalid shape)")
def test_adapter_that_no_weights_can_stand_for_is_refused(
    options: dict[str, Any], base_folder: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(base_folder, tmp_path / "adapter", options=options)
    with pytest.raises(ModelError, match="peft cannot merge this adapter"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("occupant", ["file", "folder"])
def test_output_that_is_in_use_is_refused_first(occupant: str, tmp_path: Path) -> None:
    """It is refused before the adapter is read."""
    output = tmp_path / "merged"
    if occupant == "file":
        output.write_text("mine")
    else:
        output.mkdir()
        (output / "mine").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="already in use"):
        merge_adapter(tmp_path / "none", output)
    assert sorted(tmp_path.rglob("*")) == before


def test_half_precision_is_refused(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="overflow in fp16"):
        merge_adapter(adapter, tmp_path / "merged", dtype="fp16")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
def test_wrong_merge_is_caught_before_anything_is_written(
    factor: float, dtype: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge that loses, halves or doubles the adapters."""
    true_delta = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: factor * true_delta(self, name))
    with pytest.raises(RunError, match="nothing written"):
        merge_adapter(adapter, tmp_path / "merged", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


# --- writing ---


@pytest.fixture
def _no_large_files() -> Any:
    """No file may grow beyond 1 MiB: the same write fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("_no_large_files")
def test_disk_that_refuses_the_weights_leaves_nothing_behind(random_adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written") as caught:
        merge_adapter(random_adapter, tmp_path / "new" / "merged")
    assert str(tmp_path / "new" / "merged") in str(caught.value)
    assert not (tmp_path / "new").exists()


@dataclass(frozen=True)
class Interruption:
    raised: BaseException
    seen: type[BaseException]


@pytest.mark.parametrize(
    "interruption",
    [
        Interruption(OSError(errno.ENOSPC, "No space left on device"), ConfigError),
        Interruption(KeyboardInterrupt(), KeyboardInterrupt),
        Interruption(ValueError("some bug"), ValueError),
    ],
    ids=lambda interruption: type(interruption.raised).__name__,
)
def test_interrupted_write_leaves_nothing_behind(
    interruption: Interruption, random_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with weights but without a tokenizer must not remain."""

    def interrupt(*_: Any) -> None:
        raise interruption.raised

    monkeypatch.setattr(shutil, "copyfile", interrupt)
    with pytest.raises(interruption.seen):
        merge_adapter(random_adapter, tmp_path / "merged")
    assert not list(tmp_path.iterdir())
