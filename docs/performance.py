"""Keeps what the benchmarks measured in docs/performance.json, and writes docs/performance.md from it.

Run: tox run -e bench [-- -k NAME]        (it measures, compares with what was kept, and calls this script)
Or:  python docs/performance.py [MEASURED.json]        (a file that pytest-benchmark wrote)

What was measured elsewhere, or with other versions, is dropped: all figures of the page are of one machine.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
KEPT = DOCS / "performance.json"
TEXT = """# Performance

Written by `tox run -e bench`, on {cpu}, {cores} cores, no GPU. {versions}. Speed on a GPU is not measured.

Ratios are times of another trainer over ours: above 1 we are faster. Both run in one process, one right after the
other, in every round; the table has the median of the rounds, and the smallest and the largest in brackets. A ratio
holds for the machine's memory as much as for its arithmetic: what a trainer writes to fresh memory costs more on a
virtual machine than on bare metal.

## One optimizer step

LoRA of rank 8 on a GLM-4 with its true vocabulary of 151,552 and a small body, in fp32: forward, backward, clipping,
AdamW. All trainers compute the same loss to 1e-5. *Products* is the time that the matrix products of our step take when
they are computed alone, attention included, as a share of the step: what is left to gain. That there are no products
that LoRA does not need is checked by a count.

| model | rows | supervised | our step | transformers.Trainer | TRL | products |
|---|---|---|---|---|---|---|
{steps}

The difference is the head: GLM-4's head has 151,552 rows, and logits are computed where a token is supervised, in
pieces, with their gradient, so that none are kept ([`glm4ft/model/loss.py`](../glm4ft/model/loss.py)). The fewer tokens
are supervised, the larger the ratio.

## Peak memory

The most that a process holds while it trains two steps, libraries and weights included.

| model | rows | supervised | ours | transformers.Trainer | TRL |
|---|---|---|---|---|---|
{memory}

## Everything else

| what | measured |
|---|---|
{others}
"""
TRAINERS = ("transformers", "trl")
ROWS = {"equal": "2 of 512", "padded": "512 and 256", "packed": "4 of 256 packed"}


def main() -> None:
    """Keep new figures, if there are any, and write the page."""
    kept = json.loads(KEPT.read_text("utf-8")) if KEPT.exists() else {"machine_info": None}
    for path in sys.argv[1:]:
        measured = json.loads(Path(path).read_text("utf-8"))
        names = {one["fullname"] for one in measured["benchmarks"]}
        same = kept["benchmarks"] if kept["machine_info"] == measured["machine_info"] else []
        others = [one for one in same if one["fullname"] not in names]
        kept = {**measured, "benchmarks": [*others, *measured["benchmarks"]]}
        kept["benchmarks"].sort(key=lambda one: one["fullname"].partition("::")[0])
        KEPT.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
    machine, found = kept["machine_info"], {one["name"]: one["extra_info"] for one in kept["benchmarks"]}
    versions = ", ".join(f"{name} {version}" for name, version in machine["libraries"].items() if name != "glm4ft")
    (DOCS / "performance.md").write_text(
        TEXT.format(
            cpu=machine["cpu"]["brand_raw"],
            cores=machine["cpu"]["count"],
            versions=f"Python {machine['python_version']}, {versions}",
            steps="\n".join(step_rows(found)),
            memory="\n".join(memory_rows(found)),
            others="\n".join(f"| {what} | {measured} |" for what, measured in other_rows(found)),
        ),
        "utf-8",
    )


def step_rows(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A line for each case of the training step."""
    for name, info in found.items():
        if name.startswith("test_training_step"):
            ratios = [spread(info.get(f"{trainer} / glm4ft")) for trainer in TRAINERS]
            share = f"{statistics.median(info['products / glm4ft']):.0%}"
            yield f"| {case(name)} | {info['step_s']:.2f} s | {ratios[0]} | {ratios[1]} | {share} |"


def memory_rows(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A line for each case of the peak memory."""
    for name, info in found.items():
        if name.startswith("test_peak_memory"):
            peaks = [info.get(f"{trainer} MB") for trainer in ("glm4ft", *TRAINERS)]
            yield f"| {case(name)} | " + " | ".join(f"{peak / 1e3:.1f} GB" if peak else "·" for peak in peaks) + " |"


def other_rows(found: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """What was measured of everything else, and the figure."""
    if encoding := found.get("test_encoding_against_the_chat_template"):
        yield "encoding with mask, against the raw tokenizer", spread(encoding["raw tokenizer / glm4ft"])
        chat_template = spread(encoding["apply_chat_template / glm4ft"])
        yield "encoding with mask, against `apply_chat_template`, which yields ids alone", chat_template
    if start := found.get("test_first_step_of_the_demo"):
        yield "`glm4ft train` on its demo, to the first step", f"{spread(start['first step s'])} s"
        imports = f"{spread(start['import of the libraries s'])} s"
        yield "importing torch, peft and transformers.Trainer alone", imports
    for name, info in found.items():
        if name.startswith("test_recorded_step_against_a_plain_one"):
            base = "the built-in base" if "tiny" in name else "hidden 1,024, 8 layers, vocabulary 151,552"
            text = f"{info['recorded / plain']:.2f} times a plain one, {info['afterwards / plain']:.2f} afterwards"
            yield f"a step under `glm4ft record`, on {base}", f"{text}; {info['recorder MB']:,.1f} MB held"
    if floor := found.get("test_floor_of_two_conversations_under_a_head_of_true_size"):
        text = f"{floor['seconds']:.0f} s, {floor['peak_bytes'] / 1e9:.1f} GB"
        yield "`glm4ft floor` of two conversations under a head of 151,552 x 4,096", text


def case(name: str) -> str:
    """The columns that describe a case, from the name of its test."""
    body, share, rows = name.partition("[")[2].rstrip("]").rsplit("-", 2)
    hidden, layers = body.split("x")
    return f"hidden {hidden}, {layers} layers | {ROWS[rows]} | {share}"


def spread(ratios: Sequence[float] | None) -> str:
    """The median, and the smallest and the largest; a dot if nothing was measured."""
    if not ratios:
        return "·"
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    main()
