"""Finds the first module whose output differs between a model under test and its base."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from glm4ft.testing.specification.lora_spec import base_name

InputAndOutput = tuple[torch.Tensor | None, torch.Tensor]


def describe_first_differing_module(model: Any, base: Any, ids: Sequence[int], limit: float) -> str:
    """Name the first module whose output differs from that of the same module in the base.

    Modules are compared in the order in which their forward passes end, so every module before the first that differs
    is correct. If that module's input equals the base's, the module itself is wrong; otherwise the fault is in what is
    computed between modules (attention, positions, activations).

    Args:
        model: The model under test, adapters included; its modules are matched by their names in the base.
        base: The plain model.
        ids: The token ids of one row.
        limit: The largest relative difference that counts as rounding.
    Returns:
        A clause for a message; "" if no module that both models have differs.
    """
    got, expected = _run(model, ids), _run(base, ids)
    for name, (given, output) in expected.items():
        if name not in got or _size(got[name][1], output) <= limit:
            continue
        if given is None or _size(got[name][0], given) <= limit:
            off = f"{_size(got[name][1], output):.1e} off on the base's own input"
            words = _adapter_words(model, base, name, limit) or _input_words(base, name, given, got[name][1], limit)
            return f"the first module to differ is {name}, {off}{words}"
        return (
            f"the first difference is in the input of {name}, {_size(got[name][0], given):.1e} off, "
            "while the outputs of all modules before it equal the base's"
        )
    return ""


@torch.no_grad()
def _adapter_words(model: Any, base: Any, name: str, limit: float) -> str:
    """What lets a module's adapter act before training; "" if there is none, or it starts without effect."""
    adapted = next((m for n, m in model.named_modules() if base_name(n) == name and hasattr(m, "base_layer")), None)
    if adapted is None:
        return ""
    parameters = {n: p.float().cpu() for n, p in adapted.named_parameters() if "lora_" in n}
    started = [n for n, p in parameters.items() if "_B" in n if bool((p != 0).any())]
    if started:
        return f"; likely cause: its adapter acts before training, since {started[0]} is not zero"
    magnitudes = [p.flatten() for n, p in parameters.items() if "magnitude" in n]
    # fused experts, which have none, are no module with a weight
    norms = base.get_submodule(name).weight.float().cpu().norm(dim=1) if magnitudes else None
    if norms is not None and any(not _size(magnitude, norms) <= limit for magnitude in magnitudes):
        return "; likely cause: the magnitudes of its adapter (DoRA) are not the norms of its weight's rows"
    return ""


# The casts of a module's input that are tried as the cause of another output.
CASTS = {"integers, a packed weight's dtype": torch.int8, "bfloat16": torch.bfloat16}


@torch.no_grad()
def _input_words(base: Any, name: str, given: torch.Tensor | None, got: torch.Tensor, limit: float) -> str:
    """The cast of its activations that gives a module's output; "" if none does."""
    module = base.get_submodule(name)
    if given is None or not isinstance(module, torch.nn.Linear):
        return ""
    weight = module.weight.float().cpu()
    fitting = [words for words, dtype in CASTS.items() if _size(got, given.to(dtype).float() @ weight.T) <= limit]
    return f"; likely cause: its activations are cast to {fitting[0]}" if len(fitting) == 1 else ""


@torch.no_grad()
def _run(model: Any, ids: Sequence[int]) -> dict[str, InputAndOutput]:
    """The first input and output of each module, by its name in the base, in the order in which the modules end."""
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
                seen[name] = given, result  # an adapted layer ends after the base layer it wraps, and replaces it

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
    """The first floating-point tensor among several values, in fp32 on the CPU; None if there is none."""
    items = values.values() if hasattr(values, "values") else values
    found = (v for v in items if isinstance(v, torch.Tensor) and v.is_floating_point())
    tensor = next(found, None)
    return None if tensor is None else tensor.detach().float().cpu()


def _size(got: torch.Tensor | None, expected: torch.Tensor) -> float:
    if got is None or got.shape != expected.shape:
        return math.inf
    return float((got - expected).norm() / expected.norm())
