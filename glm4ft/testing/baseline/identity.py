"""What has to be the same before two sets of curves may be compared: plan, base, tokenizer, adapters and rows."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from glm4ft.testing.checks.base import NOT_ARITHMETIC
from glm4ft.testing.recording.trace import Tensors
from glm4ft.testing.specification.reference import LabelledIds

# Relative. Random weights are drawn with other last bits by other builds of torch; another seed changes them wholly.
SAME_WEIGHTS = 1e-4


@dataclass(frozen=True)
class Identity:
    """What was trained, and how.

    Args:
        plan: The plan of the runs, without seed and folder.
        config: The fields of the base's ``config.json`` that affect what the model computes.
        weights: The norm of each tensor of the base, and its product with a fixed pattern of signs.
        tokenizer: The digest of the tokenizer's vocabulary and chat template.
        adapters: The requested adapters, by peft's names.
        trained: The shape of each trained parameter: another version of peft may make others of the same request.
        rows: The digest of the ids and labels of each row.
    """

    plan: Mapping[str, Any]
    config: Mapping[str, Any]
    weights: Mapping[str, tuple[float, float]]
    tokenizer: str
    adapters: Mapping[str, Any]
    trained: Mapping[str, tuple[int, ...]]
    rows: tuple[str, ...] = field(default=())


def identity_of(
    base_dir: Path, tokenizer: Any, plan: Mapping[str, Any], adapters: Mapping[str, Any], trained: Tensors,
    rows: Sequence[LabelledIds],
) -> Identity:  # fmt: skip
    """The identity of runs.

    Args:
        base_dir: The folder of the base.
        tokenizer: The tokenizer of the rows.
        plan: The plan of the runs; seed and folder do not take part.
        adapters: The requested adapters, by peft's names.
        trained: The trained parameters.
        rows: The rows, in their order.
    """
    config = json.loads((base_dir / "config.json").read_text("utf-8"))
    spelled = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template], ensure_ascii=False)
    return Identity(
        plan=_plain({name: value for name, value in plan.items() if name not in ("seed", "output_dir")}),
        config={name: value for name, value in sorted(config.items()) if name not in NOT_ARITHMETIC},
        weights=dict(_weights(base_dir)),
        tokenizer=_digest(spelled),
        adapters=_plain({name: _in_order(value) for name, value in adapters.items()}),
        trained={name: tuple(parameter.shape) for name, parameter in sorted(trained.items())},
        rows=tuple(_digest(json.dumps([list(ids), list(labels)])) for ids, labels in rows),
    )


def _in_order(value: Any) -> Any:
    """Names of modules mean the same in any order."""
    return sorted(value) if isinstance(value, (list, tuple, set, frozenset)) else value


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as they are read back from JSON, in which a tuple is a list."""
    found: dict[str, Any] = json.loads(json.dumps(dict(options), default=str))
    return found


def _weights(base_dir: Path) -> Iterator[tuple[str, tuple[float, float]]]:
    for shard in sorted(base_dir.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for name in sorted(file.keys()):
                entries = file.get_tensor(name).double().flatten()
                signs = torch.ones_like(entries)
                signs[1::2] = -1
                yield name, (float(entries.norm()), float(entries @ signs))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def difference(before: Identity, now: Identity, rows: Sequence[LabelledIds], tokenizer: Any) -> str:
    """What makes curves incomparable, in words; "" if nothing does.

    Args:
        before: The identity of the baseline.
        now: The identity of the current runs.
        rows: The current rows, to show the first that differs.
        tokenizer: The tokenizer that shows it.
    """
    for what, old, new in (("another plan", before.plan, now.plan), ("other adapters", before.adapters, now.adapters)):
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                return f"{what}: {name} is {new.get(name)}, in the baseline {old.get(name)}"
    for name in sorted(before.trained.keys() | now.trained.keys()):
        shapes = [list(side.trained[name]) if name in side.trained else "not there" for side in (now, before)]
        if shapes[0] != shapes[1]:
            return f"other adapters: the trained parameter {name} is {shapes[0]}, in the baseline {shapes[1]}"
    for name in sorted(before.config.keys() & now.config.keys()):  # other versions of transformers write more fields
        if before.config[name] != now.config[name]:
            found = f"{name} of config.json is {now.config[name]}, in the baseline {before.config[name]}"
            return f"another base: {found}"
    for name in sorted(before.weights.keys() | now.weights.keys()):
        pairs = before.weights.get(name), now.weights.get(name)
        if None in pairs:
            return f"another base: {name} is in {'the current one' if pairs[0] is None else 'the baseline'} alone"
        if not _is_near(*pairs):  # type: ignore[arg-type]
            return f"another base: the weights of {name} differ"
    if before.tokenizer != now.tokenizer:
        return "another tokenizer: its vocabulary or chat template differs"
    return _other_row(before.rows, now.rows, rows, tokenizer)


def _is_near(before: tuple[float, float], now: tuple[float, float]) -> bool:
    size = max(before[0], now[0])
    return all(abs(a - b) <= SAME_WEIGHTS * size for a, b in zip(before, now, strict=True)) and math.isfinite(size)


def _other_row(before: tuple[str, ...], now: tuple[str, ...], rows: Sequence[LabelledIds], tokenizer: Any) -> str:
    known = set(before)
    new = [number for number, digest in enumerate(now, start=1) if digest not in known]
    if new:
        shown = tokenizer.decode(list(rows[new[0] - 1][0]))
        return f"other data: ids or labels of row {new[0]} differ ({len(new)} like it); it is now {shown!r}"
    if sorted(before) != sorted(now):
        return f"other data: {len(now)} rows, in the baseline {len(before)}"
    return "" if before == now else "other data: the same rows in another order"
