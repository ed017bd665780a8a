"""The numbers by which tensors of a run and of the specification are compared, over all parameters at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from glm4ft.data.encoded_row import IGNORED
from glm4ft.testing.recording.trace import Tensors
from glm4ft.testing.specification.reference import LabelledIds


def count_targets(rows: Sequence[LabelledIds]) -> int:
    """The number of supervised tokens in rows; a row's first token never counts."""
    return sum(label != IGNORED for _, labels in rows for label in labels[1:])


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference of two tensors over that of the expected one."""
    return float((got - expected).norm() / expected.norm())


def relative(got: Tensors, expected: Tensors) -> float:
    """The norm of the difference over the norm of the expected tensors, over all of them; inf if the names differ."""
    if got.keys() != expected.keys():
        return math.inf
    off = sum(float((got[name].double() - expected[name].double()).pow(2).sum()) for name in expected)
    size = sum(float(tensor.double().pow(2).sum()) for tensor in expected.values())
    return math.sqrt(off / size) if size else math.sqrt(off)


def dot(a: Tensors, b: Tensors) -> float:
    """The dot product over all entries of the tensors that both mappings hold."""
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a if name in b)
