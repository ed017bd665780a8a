"""The first module of a model that computes something else than it does in the base."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from glm4ft.testing.specification.lora_spec import base_name

InputAndOutput = tuple[torch.Tensor | None, torch.Tensor]


def describe_first_other_module(model: Any, base: Any, ids: Sequence[int], limit: float) -> str:
    """Where a forward pass of a model leaves that of its base.

    Modules are compared in the order in which they end, so the first that differs has had only right modules before
    it: if its input is the base's, it is at fault itself, and else what is computed between modules is (attention,
    positions, activations).

    Args:
        model: under test, adapters included; modules are matched by their names in the base.
        base: the plain model.
        ids: of one row.
        limit: largest relative difference that is rounding.
    Returns:
        A clause for a message; "" if no module that both have differs.
    """
    got, expected = _run(model, ids), _run(base, ids)
    for name, (given, output) in expected.items():
        if name not in got or _size(got[name][1], output) <= limit:
            continue
        if given is None or _size(got[name][0], given) <= limit:
            return (
                f"the first module to differ is {name}, {_size(got[name][1], output):.1e} off on the base's own input"
            )
        return (
            f"the first difference is in what {name} is given, {_size(got[name][0], given):.1e} off, "
            "where all modules before it give what they give in the base"
        )
    return ""


@torch.no_grad()
def _run(model: Any, ids: Sequence[int]) -> dict[str, InputAndOutput]:
    """First input and first output of each module that has a name in the base, in the order in which they end."""
    with _watched(model) as seen:
        model(input_ids=torch.tensor([list(ids)], device=next(model.parameters()).device))
    return seen


@contextmanager
def _watched(model: Any) -> Iterator[dict[str, InputAndOutput]]:
    seen = dict[str, InputAndOutput]()

    def watch(name: str) -> Any:
        def hook(_: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            result = _first_tensor([output] if isinstance(output, torch.Tensor) else output)
            if result is not None:
                given = _first_tensor([*args, *kwargs.values()])
                seen[name] = given, result  # an adapted layer ends behind the layer of the base that it wraps

        return hook

    hooks = [
        module.register_forward_hook(watch(base_name(name)), with_kwargs=True)
        for name, module in model.named_modules()
        if name and "lora_" not in name
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _first_tensor(values: Any) -> torch.Tensor | None:
    """The first of several values that is a tensor of numbers, on the CPU and in fp32."""
    items = values.values() if hasattr(values, "values") else values
    found = (v for v in items if isinstance(v, torch.Tensor) and v.is_floating_point())
    tensor = next(found, None)
    return None if tensor is None else tensor.detach().float().cpu()


def _size(got: torch.Tensor | None, expected: torch.Tensor) -> float:
    if got is None or got.shape != expected.shape:
        return math.inf
    return float((got - expected).norm() / expected.norm())
