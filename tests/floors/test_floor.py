"""The floor of a data set is correct in total, per token, part and row, for heads of any size and any file layout.

Run: pytest tests/floors/test_floor.py
"""

from __future__ import annotations

import io
import json
import math
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file

from glm4ft.cli.main import run
from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.encoded_rows import TrainedRow, TurnMarkers
from glm4ft.data.inputs import DEMO_DATA, data_inputs
from glm4ft.errors import ModelError
from glm4ft.floors import bounds as head_bounds
from glm4ft.floors.bounds import Target, bound_targets
from glm4ft.floors.find_floor import find_floor
from glm4ft.floors.flat_rows import FlatRows
from glm4ft.floors.floor import Floor
from glm4ft.floors.head import HEAD, NORM, Head, frozen_head, read_head
from glm4ft.floors.prefix_targets import group_targets
from glm4ft.floors.solver import BF16
from glm4ft.floors.stops import stop_warnings
from glm4ft.model.base_model import load_base
from glm4ft.model.lora import attach_lora
from glm4ft.model.lora_options import LoraOptions
from glm4ft.model.tiny import write_tiny_base
from glm4ft.model.tiny_tokenizer import tiny_tokenizer
from glm4ft.report.floor_view import encoded_rows, print_floor
from glm4ft.testing.subjects.founding_bug import FoundingBugFormat

GATE = 0.01  # the loss limit of the overfit test


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def head() -> Head:
    return read_head("tiny")


@pytest.fixture(scope="module")
def founding(tokenizer: Any, head: Head) -> Floor:
    rows = encoded_rows(data_inputs(DEMO_DATA), FoundingBugFormat("glm-4-0414", tokenizer), 4096)
    return find_floor(rows, tokenizer, head)


def conversations(path: Path, *answers: str) -> Path:
    talks = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}] for answer in answers]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return path


def test_founding_bug_is_certified_before_training_at_ten_times_the_gate(founding: Floor) -> None:
    """Its plateau is 0.1813 after 200 steps (see test_overfit.py), within 1 % of the bound."""
    assert founding.floor >= 10 * GATE
    assert founding.gap < 1e-4
    worst = founding.tokens[0]
    assert (worst.text, worst.count) == ("<|assistant|>", 4)
    assert worst.floor > 5
    assert founding.parts["assistant header"] == pytest.approx(worst.floor)
    assert [token.text for token in founding.blocking(GATE)] == ["<|assistant|>"]


def test_right_mask_has_no_floor(tokenizer: Any, head: Head) -> None:
    floor = find_floor(encoded_rows(data_inputs(DEMO_DATA), ChatFormat("glm-4-0414", tokenizer), 4096), tokenizer, head)
    assert floor.floor + floor.gap < 1e-5
    assert not floor.blocking(GATE)


@pytest.mark.parametrize("with_head", [True, False])
def test_token_without_a_floor_has_no_sign(with_head: bool, tokenizer: Any, head: Head) -> None:
    """``-0.0`` would be shown as ``-0.00``."""
    floor = find_floor(
        encoded_rows(data_inputs(DEMO_DATA), ChatFormat("glm-4-0414", tokenizer), 4096),
        tokenizer,
        head if with_head else None,
    )
    values = [*floor.per_target.tolist(), *(value for token in floor.tokens for value in (token.floor, token.head))]
    assert all(math.copysign(1, value) == 1 for value in values)


def test_entropy_of_contradictory_samples_is_the_closed_form(tmp_path: Path, tokenizer: Any, head: Head) -> None:
    """One prompt has two answers that differ from the first letter on, which costs ln 2 at one position of each."""
    data = conversations(tmp_path / "two.jsonl", "Hello", "Good day")
    rows = list(encoded_rows(data_inputs(data), ChatFormat("glm-4-0414", tokenizer), 4096))
    num_targets = sum(label != -100 for row in rows for label in row.labels)
    floor = find_floor(rows, tokenizer, head)
    closed = 2 * math.log(2) / num_targets
    assert abs(floor.entropy - closed) <= 1e-9
    assert closed - 1e-12 <= floor.floor <= closed + 1e-3
    assert floor.floor + floor.gap <= closed + 1e-3


def test_trained_head_leaves_the_entropy_alone(tmp_path: Path, tokenizer: Any) -> None:
    data = conversations(tmp_path / "three.jsonl", "Hello", "Hello", "Good day")
    floor = find_floor(encoded_rows(data_inputs(data), ChatFormat("glm-4-0414", tokenizer), 4096), tokenizer, None)
    assert floor.head == 0
    assert floor.floor == floor.entropy > 0
    assert "entropy" in floor.label


@pytest.mark.parametrize("is_trainable", [True, False])
@pytest.mark.parametrize(
    "options",
    [LoraOptions(targets=["q_proj", "lm_head"]), LoraOptions(options={"modules_to_save": ["lm_head"]})],
    ids=["adapter", "copy"],
)
def test_trained_head_is_not_taken_for_a_frozen_one(options: LoraOptions, is_trainable: bool, tmp_path: Path) -> None:
    """This holds also for a model read from disk to be explained, in which no parameter requires a gradient."""
    attach_lora(load_base("tiny").model, options, seed=0).save_pretrained(tmp_path)
    adapted = PeftModel.from_pretrained(load_base("tiny").model, tmp_path, is_trainable=is_trainable)
    assert frozen_head(adapted) is None
    attach_lora(load_base("tiny").model, LoraOptions(), seed=0).save_pretrained(tmp_path / "below")
    below = PeftModel.from_pretrained(load_base("tiny").model, tmp_path / "below", is_trainable=is_trainable)
    assert frozen_head(below) is not None


def test_floor_is_the_mean_of_its_tokens_parts_and_rows(founding: Floor) -> None:
    num_targets = sum(token.count for token in founding.tokens)
    assert founding.floor == pytest.approx(founding.entropy + founding.head, abs=1e-12)
    assert founding.floor == pytest.approx(sum(t.floor * t.count for t in founding.tokens) / num_targets)
    assert founding.floor == pytest.approx(sum(s.floor * s.supervised_tokens for s in founding.samples) / num_targets)
    assert founding.floor == pytest.approx(float(founding.per_target.mean()))
    assert set(founding.parts) == {"assistant header", "assistant body"}


@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=6), min_size=1, max_size=6))
def test_targets_share_a_distribution_exactly_if_they_share_their_prefix(rows: list[list[tuple[int, bool]]]) -> None:
    """The reference counts the continuations of each whole prefix, by definition."""
    trained = [TrainedRow(0, [i for i, _ in row], [i if keep else -100 for i, keep in row]) for row in rows]
    following: dict[tuple[int, ...], list[int]] = {}
    for row in trained:
        for at in range(1, len(row.labels)):
            if row.labels[at] != -100:
                following.setdefault(tuple(row.input_ids[:at]), []).append(row.labels[at])
    flat = FlatRows.of(trained, TurnMarkers({}))
    groups = group_targets(flat)
    places = [
        (row, at) for row, ids in enumerate(trained) for at in range(1, len(ids.labels)) if ids.labels[at] != -100
    ]
    assert len(groups.pair_N) == sum(map(len, following.values()))
    for (row, at), token, pair in zip(places, flat.token_N, groups.pair_N, strict=True):
        tokens = following[tuple(trained[row].input_ids[:at])]
        target = groups.distributions[groups.pair_distribution_P[pair]]
        assert target.ids == tuple(sorted(set(tokens)))
        assert target.weights == pytest.approx([tokens.count(i) / len(tokens) for i in target.ids])
        assert target.ids[groups.pair_member_P[pair]] == token


def test_pieces_of_a_large_data_set_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [TrainedRow(i, [i % 3, 1, 2, i % 5, 4], [-100, 1, 2 if i % 4 else -100, i % 5, 4]) for i in range(30)]
    rows.insert(7, TrainedRow(99, [1, 2], [-100, -100]))
    whole = find_floor(rows, tiny_tokenizer(), None)
    monkeypatch.setattr("glm4ft.floors.flat_rows._CHUNK", 5)
    parts = find_floor(rows, tiny_tokenizer(), None)
    assert list(parts.samples) == list(whole.samples)
    assert (parts.floor, parts.parts, parts.tokens) == (whole.floor, pytest.approx(whole.parts), whole.tokens)


def test_memory_of_a_data_set_is_that_of_its_tokens() -> None:
    """5,000 rows of 30 tokens, 15 of them targets, take 1.5 MB; as lists of Python's integers they took 4.4 KB each."""
    ids = ([7, *range(i % 100, i % 100 + 29)] for i in range(5000))
    rows = (TrainedRow(line, row, [-100] * 15 + row[15:]) for line, row in enumerate(ids))
    tracemalloc.start()
    floor = find_floor(rows, tiny_tokenizer(), None)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert floor.num_targets == 5000 * 15
    assert peak < 5000 * 700  # lists of the rows alone: 5000 * 2500
    assert kept < 5000 * 200


@pytest.fixture
def search_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the tiny head as too large to solve whole."""
    monkeypatch.setattr(head_bounds, "SMALL_HEAD", 10)
    monkeypatch.setattr("glm4ft.floors.head_passes._CANDIDATES", 60)


@pytest.mark.usefixtures("search_everywhere")
def test_search_on_a_subset_bounds_what_the_whole_head_reaches(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds from a subset of rows hold for the whole head, and the upper bounds are actually reached."""
    targets = [
        Target((484,), (1.0,)),
        Target((10,), (1.0,)),
        Target((10, 20), (0.5, 0.5)),
        Target((484, 20), (0.1, 0.9)),
    ]
    searched = bound_targets(head, targets)
    monkeypatch.setattr(head_bounds, "SMALL_HEAD", 10_000)
    for found, whole in zip(searched, bound_targets(head, targets), strict=True):
        assert found.lower <= whole.upper + 1e-9
        assert found.upper >= whole.lower - 1e-4  # computed in fp32
        assert found.upper - found.lower <= max(1e-4, 0.05 * found.lower)
    assert searched[0].lower > 5


@pytest.fixture(scope="module")
def head_with_twins() -> Head:
    """A head as a pretrained one is: 24 rows that were never trained, almost equal and short, among 9,000 others."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(9000, 256, generator=generator)
    dead = torch.randn(1, 256, generator=generator) * 0.05 + 1e-5 * torch.randn(24, 256, generator=generator)
    return Head(torch.cat([dead, rows]), torch.ones(256, dtype=torch.float64), 9024)


def test_token_that_was_never_trained_shares_its_probability_with_its_twins(head_with_twins: Head) -> None:
    """In its direction hundreds of other rows are likelier than its twins, which a search by likelihood misses."""
    (bound,) = bound_targets(head_with_twins, [Target((3,), (1.0,))])
    assert bound.lower > 8
    assert bound.upper < 9


def test_bounds_of_a_target_do_not_depend_on_its_companions(head_with_twins: Head) -> None:
    targets = [Target((i,), (1.0,)) for i in (0, 1, 5, 100, 2000, 9000)]
    together = bound_targets(head_with_twins, targets)
    for target, bound in zip(targets, together, strict=True):
        (alone,) = bound_targets(head_with_twins, [target])
        assert (alone.lower, alone.upper) == pytest.approx((bound.lower, bound.upper), abs=1e-3)


def test_head_is_that_of_the_file_which_training_loads(tmp_path: Path) -> None:
    """A folder may hold both a single file and shards with an index, for example after a merge into it."""
    folder = bf16_shards(tmp_path / "both")
    weights = {name: t + 1 for name, t in load_base(str(folder), dtype="fp32").model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    trained = load_base(str(folder), dtype="fp32").model.get_output_embeddings().weight
    assert torch.equal(read_head(str(folder)).weight[:].float(), trained.detach())


def test_target_whose_search_ends_early_is_undecided_and_never_shown_as_reachable(
    head_with_twins: Head, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    monkeypatch.setattr(head_bounds, "_MAX_ROUNDS", 0)
    floor = find_floor([TrainedRow(1, [7, 3], [-100, 3])], tokenizer, head_with_twins)
    (token,) = floor.undecided
    assert (token.id, token.head) == (3, 0.0)
    assert token.head_reaches > 1
    console = Console(width=200, file=io.StringIO(), highlight=False)
    print_floor(floor, "data", console, [])
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert "UNDECIDED: Of one token (1 targets) it is not known whether the head can express them" in told


def bf16_shards(folder: Path, **changes: torch.Tensor) -> Path:
    """A tiny base in bf16 shards, some of its tensors replaced."""
    write_tiny_base(folder, dtype=torch.bfloat16, max_shard_size="100KB")
    for name, tensor in changes.items():
        path = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
        save_file({**load_file(path), name: tensor}, path, metadata={"format": "pt"})
    return folder


def test_head_is_read_from_bf16_shards(tmp_path: Path, head: Head) -> None:
    folder = bf16_shards(tmp_path / "base", **{NORM: torch.full((128,), 2.0, dtype=torch.bfloat16)})
    read = read_head(str(folder))
    assert (read.num_rows, read.width) == (head.num_rows, 128)
    expected_VD = 2 * head.weight.bfloat16().double()
    assert torch.equal(read.rows(list(range(head.num_rows))), expected_VD)
    pieces = [rows * read.norm_D.float() for _, rows in read.chunks("test")]
    assert torch.equal(torch.cat(pieces), expected_VD.float())


def test_base_in_four_bits_has_a_floor_as_long_as_its_head_is_in_bf16(tmp_path: Path) -> None:
    """Such a base cannot be trained here, but a floor needs only its head."""
    folder = bf16_shards(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    output = tmp_path / "floor.json"
    assert run(["floor", "demo", f"--model={folder}", "--dtype=bf16", f"--json={output}"]) == 0
    assert json.loads(output.read_text())["floor"] < GATE


def test_quantised_head_is_refused(tmp_path: Path) -> None:
    folder = bf16_shards(tmp_path / "base", **{HEAD: torch.zeros(10, 1, dtype=torch.uint8)})
    with pytest.raises(ModelError, match="quantised"):
        read_head(str(folder))


def test_head_packed_in_other_tensors_is_said_to_be_quantised(tmp_path: Path) -> None:
    """GPTQ, AWQ and compressed-tensors keep no ``lm_head.weight`` at all."""
    folder = write_tiny_base(tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.qweight"] = weights.pop(HEAD).to(torch.int32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="quantised") as caught:
        read_head(str(folder))
    assert caught.value.found == "lm_head.qweight"


@pytest.mark.parametrize("said", [True, None], ids=["by-config", "by-default"])
def test_tied_head_is_the_embeddings_and_is_said_to_be(said: bool | None, tmp_path: Path, tokenizer: Any) -> None:
    folder = write_tiny_base(tmp_path / "base")
    # copies: older versions of safetensors map the file, which is written over
    weights = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    del weights[HEAD]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "gemma"} if said is None else {"tie_word_embeddings": said}
    (folder / "config.json").write_text(json.dumps(config))
    head = read_head(str(folder))
    assert torch.equal(head.weight, weights["model.embed_tokens.weight"])
    label = find_floor([TrainedRow(1, [7, 3], [-100, 3])], tokenizer, head).label
    assert "tied to the embeddings" in label


@pytest.mark.usefixtures("search_everywhere")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_row_that_is_not_finite_is_named_with_tensor_and_file(value: float, tmp_path: Path) -> None:
    head = read_head("tiny").weight.clone()
    head[[5, 300], 7] = value
    folder = bf16_shards(tmp_path / "base", **{HEAD: head.bfloat16()})
    shard = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][HEAD]
    for target in (5, 20):  # a target's own row is read first, the others in the pass over the head
        with pytest.raises(ModelError, match="NaN or infinite") as caught:
            bound_targets(read_head(str(folder)), [Target((target,), (1.0,))])
        assert caught.value.where == f"{folder / shard}: {HEAD}"
        assert caught.value.found == f"2 of {len(head)} rows: 5, 300"


def test_row_that_is_not_finite_is_named_for_a_head_solved_whole(head: Head) -> None:
    weight = head.weight.clone()
    weight[9] = float("nan")
    with pytest.raises(ModelError, match="NaN or infinite"):
        bound_targets(replace(head, weight=weight), [Target((20,), (1.0,))])


def test_norm_that_is_not_finite_is_named(tmp_path: Path) -> None:
    folder = bf16_shards(tmp_path / "base", **{NORM: torch.full((128,), float("nan"), dtype=torch.bfloat16)})
    with pytest.raises(ModelError, match="final norm") as caught:
        read_head(str(folder))
    assert caught.value.where.endswith(f": {NORM}")
    assert caught.value.found.startswith("128 of 128 entries")


def test_truncated_shard_is_refused(tmp_path: Path) -> None:
    folder = bf16_shards(tmp_path / "base")
    path = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][HEAD]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match="truncated"):
        read_head(str(folder))


def test_stop_token_that_the_head_cannot_say_is_warned_of_by_name(tokenizer: Any, head: Head) -> None:
    """A base model's chat stop token is an example (QwenLM/Qwen3 1064): its row is as untrained as those of headers."""
    user = tokenizer.get_added_vocab()["<|user|>"]
    weight = head.weight.clone()
    weight[user] = weight[tokenizer.get_added_vocab()["<|system|>"]] + 1e-3
    rows = list(encoded_rows(data_inputs(DEMO_DATA), ChatFormat("glm-4-0414", tokenizer), 4096))
    floor = find_floor(rows, tokenizer, Head(weight, head.norm_D, head.num_rows))
    (warning,) = stop_warnings(floor.tokens, [user])
    assert warning.startswith("WARNING: <|user|> ends turns here, but the frozen head cannot say it")
    assert "--final_stop endoftext" in warning
    assert not list(stop_warnings(find_floor(rows, tokenizer, head).tokens, [user]))


def test_bf16_floor_lies_below_the_exact_one(tokenizer: Any, head: Head, founding: Floor) -> None:
    rows = encoded_rows(data_inputs(DEMO_DATA), FoundingBugFormat("glm-4-0414", tokenizer), 4096)
    floor = find_floor(rows, tokenizer, head.in_dtype(torch.bfloat16), precision=BF16)
    assert 0.95 * founding.floor < floor.floor < founding.floor
    assert "bf16" in floor.label


def test_command_keeps_the_contract(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = conversations(tmp_path / "two.jsonl", "Hello", "\x1b[31mGood")
    assert run(["floor", str(data), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["schema"] == 1
    assert record["floor"] == pytest.approx(record["entropy"] + record["head"])
    assert record["gap"] >= 0
    assert {"id", "text", "count", "floor"} <= set(record["tokens"][0])
    assert [set(sample) for sample in record["samples"]] == [{"line", "floor", "supervised_tokens"}] * 2
    assert run(["floor", str(data)]) == 0
    printed = capsys.readouterr().out
    assert "cannot go below" in printed
    assert "\x1b" not in printed
