"""A certified floor under a head of GLM-4's true size, 151,552 x 4,096 in bf16 shards: seconds and memory.

The head is synthetic: ordinary rows N(0, 0.02^2), and one small common row for what is never sampled (headers, padding
rows), as in the built-in base. Two conversations with a supervised header each, so that the search over the whole head
is part of the measurement.

Run: tox run -e bench -- -k floor        (writes 1.3 GB to the temporary folder)
"""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from glm4ft.data.encoded_rows import TrainedRow
from glm4ft.floors.find_floor import find_floor
from glm4ft.floors.floor import Floor
from glm4ft.floors.head import HEAD, NORM, read_head
from glm4ft.model.checkpoint import INDEX
from glm4ft.model.tiny_tokenizer import tiny_tokenizer

ROWS, HIDDEN = 151_552, 4096
NEVER_SAMPLED = [*range(151_330, 151_336), 151_337, *range(151_343, ROWS)]
ASSISTANT, USER = 151_337, 151_336
LIMIT_S, LIMIT_BYTES = 120, 6e9


@pytest.fixture(scope="module")
def true_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, generator = tmp_path_factory.mktemp("head"), torch.Generator().manual_seed(0)
    head = torch.empty(ROWS, HIDDEN, dtype=torch.bfloat16)
    for start in range(0, ROWS, 8192):
        piece = head[start : start + 8192]
        piece.copy_(0.02 * torch.randn(piece.shape, generator=generator))
    common = 0.002 * torch.randn(HIDDEN, generator=generator)
    head[NEVER_SAMPLED] = (common + 1e-4 * torch.randn(len(NEVER_SAMPLED), HIDDEN, generator=generator)).bfloat16()
    save_file({HEAD: head}, folder / "model-00001-of-00002.safetensors")
    norm = torch.full((HIDDEN,), 2.0, dtype=torch.bfloat16)
    save_file({NORM: norm}, folder / "model-00002-of-00002.safetensors")
    weight_map = {HEAD: "model-00001-of-00002.safetensors", NORM: "model-00002-of-00002.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    return folder


def conversation(line: int, seed: int) -> TrainedRow:
    """A prompt of 20 tokens, a supervised header, an answer of 60 tokens, and its terminator."""
    ids = torch.randint(0, 151_000, (80,), generator=torch.Generator().manual_seed(seed)).tolist()
    row = [USER, *ids[:20], ASSISTANT, *ids[20:], USER]
    return TrainedRow(line, row, [-100] * 21 + row[21:])


def test_floor_of_two_conversations_under_a_head_of_true_size(benchmark: Any, true_size: Path) -> None:
    def certify() -> Floor:
        return find_floor([conversation(1, 1), conversation(2, 2)], tiny_tokenizer(), read_head(str(true_size)))

    floor = benchmark.pedantic(certify, rounds=1)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = round(benchmark.stats["max"], 1)
    benchmark.extra_info.update(seconds=seconds, peak_bytes=peak_bytes, floor=floor.floor, gap=floor.gap)
    print(
        f"floor {floor.floor:.4f} (gap {floor.gap:.1g}), {benchmark.stats['max']:.0f} s, peak {peak_bytes / 1e9:.1f} GB"
    )
    header = floor.tokens[0]
    assert (header.id, header.count) == (ASSISTANT, 2)
    assert header.floor > 4.5
    assert floor.gap < 0.03 * floor.floor
    assert benchmark.stats["max"] < LIMIT_S
    assert peak_bytes < LIMIT_BYTES
