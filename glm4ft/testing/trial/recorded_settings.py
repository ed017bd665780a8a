"""Compares what a run's configuration asked for with what the recording shows: sizes, precision, adapters, dropout."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from glm4ft.testing.recording.trace import Trace
from glm4ft.testing.replay.departure import Departure
from glm4ft.testing.replay.tolerances import LIMITS
from glm4ft.testing.specification.lora_spec import base_name
from glm4ft.testing.specification.recovered_targets import split_rows
from glm4ft.testing.specification.reference import Reference

# The number of standard deviations by which the share of dropped entries may differ from the probability. Over all
# layers and steps, chance exceeds it in one of a billion runs.
SIX_SIGMA = 6.0


def settings_departures(
    trace: Trace, about: Mapping[str, Any], reference: Reference, is_packed: bool
) -> Iterator[Departure]:
    """Report each setting that was asked for and did not happen.

    Args:
        trace: The recording, merged over processes.
        about: What is known of the run beside its tensors.
        reference: The specification on the run's base, with the run's own adapter configuration.
        is_packed: Whether a sequence of the run holds several rows.
    """
    if not is_packed:  # of a packed batch, neither rows nor sequences are what was asked for
        yield from _wrong_sizes(trace, about["configuration"])
    yield from _wrong_precision(trace, about["configuration"])
    yield from _wrong_optimizer(trace, about["configuration"])
    yield from _wrong_decay(trace, about["configuration"])
    if about["model"]["adapter"] is not None:
        yield from _wrong_adapters(trace, about["model"], reference)
        yield from _wrong_dropout(trace, float(about["model"]["adapter"].get("lora_dropout") or 0.0))


def _wrong_optimizer(trace: Trace, configuration: Mapping[str, Any]) -> Iterator[Departure]:
    """Adam in place of AdamW takes weight decay as a part of the gradient, which Adam then scales."""
    asked, found = str(configuration.get("optim", "")), {step.optimizer for step in trace.steps}
    if asked.startswith("adamw") and configuration.get("weight_decay") and found == {"Adam"}:
        text = f"{asked} was asked for with a weight decay of {configuration['weight_decay']:g}; the optimizer is Adam"
        yield Departure("update", 1, text, "the decay is added to the gradient instead of decoupled from it")


def _wrong_decay(trace: Trace, configuration: Mapping[str, Any]) -> Iterator[Departure]:
    """Groups of different weight decay: norms and biases may do without, matrices may not.

    One weight decay for all parameters is judged with the update.
    Source: transformers' ``Trainer.get_decay_parameter_names``.
    """
    first, asked = trace.steps[0], configuration.get("weight_decay")
    decays = {name: float(g.settings.get("weight_decay", 0.0)) for g in first.groups for name in g.names}
    if asked is None or len(set(decays.values())) < 2:
        return
    wrong = [name for name, decay in decays.items() if decay != asked and _is_matrix(trace, name)]
    if wrong:
        text = f"the weight_decay of {len(wrong)} matrices is {decays[wrong[0]]:g}, not {asked:g}, e.g. {wrong[0]}"
        yield Departure("update", 1, text, "the optimizer's groups divide the weight decay another way than asked for")


def _is_matrix(trace: Trace, name: str) -> bool:
    return len(trace.sampled.get(name, trace.steps[0].before[name].shape)) > 1


def _wrong_sizes(trace: Trace, configuration: Mapping[str, Any]) -> Iterator[Departure]:
    """The sequences of a step, against batch size, accumulation and processes; an epoch's last step may be short."""
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    is_packed = any(len(split_rows(f)) > len(f.input_ids_BT) for step in trace.steps for f in step.forwards)
    if is_packed or not all(name in configuration for name in names):
        return
    sizes = [configuration[name] for name in names]
    asked = math.prod(sizes) * int(configuration.get("world_size") or 1)
    got = {n: sum(len(forward.input_ids_BT) for forward in step.forwards)
           for n, step in enumerate(trace.steps, start=1) if step.forwards}  # fmt: skip
    too_few = min(got) if got and max(got.values()) < asked else 0
    if not (wrong := next((n for n, count in got.items() if count > asked), too_few)):
        return
    if min(got.values()) == asked and got[wrong] % asked == 0:
        text = f"{got[wrong]} sequences went through the model before it, not {asked}"
        later = ("gradient", "schedule")  # which count what was left out as a part of this step
        yield Departure("update", wrong, text, "an update was left out, of a step before it", hides_later=later)
    else:
        text = f"{got[wrong]} sequences, not {asked}: {' times '.join(map(str, sizes))} of {' and '.join(names)}"
        yield Departure("batches", wrong, text, "batch size or accumulation do not reach the trainer")


def _wrong_precision(trace: Trace, configuration: Mapping[str, Any]) -> Iterator[Departure]:
    if "bf16" not in configuration:
        return
    asked = "bfloat16" if configuration["bf16"] else "float16" if configuration.get("fp16") else None
    if asked and trace.autocast is None and trace.dtype == torch.float32:
        yield Departure("model", 1, f"{asked} was asked for, but forward passes ran in float32 without autocast")
    if asked is None and trace.autocast is not None:
        yield Departure("model", 1, f"forward passes ran under {trace.autocast} autocast, which was not asked for")


def _wrong_adapters(trace: Trace, model: Mapping[str, Any], reference: Reference) -> Iterator[Departure]:
    """The trained adapters, against the run's peft configuration: modules, ranks, dtype, and saved modules."""
    before, trained = trace.steps[0].before, [_module(name) for name in trace.trained]
    spec, found = reference.lora_spec, reference.adapters(before)
    targets = (spec.targets if isinstance(spec.targets, tuple) else ()) + spec.parameters
    every = [f".{name}" for name in (*reference.modules, *reference.weights)]
    for words, names in (
        ("is a target, but no module of the base has that name",
         {t for t in targets if not any(name.endswith(f".{t}") for name in every)}),
        ("is to be adapted, but no matrix of it is trained", set(spec.modules_of(reference.model)) - set(found)),
        ("is adapted and trained, but was not asked for", set(found) - set(spec.modules_of(reference.model))),
        ("has one trained matrix of two", {name for name, pair in found.items() if not {"A", "B"} <= pair.keys()}),
        ("is among modules_to_save, but is not trained",
         {m for m in model["adapter"].get("modules_to_save") or () if not any(n.endswith(m) for n in trained)}),
    ):  # fmt: skip
        if names:
            yield Departure("model", 1, f"{min(names)} {words} ({len(names)} like it)")
    for module, pair in found.items():
        ranks = reference.rank_of(module, pair, before)
        if ranks != {spec.rank_of(module)}:
            yield Departure("model", 1, f"the adapter of {module} has rank {min(ranks)}, not {spec.rank_of(module)}")
            return
        if "magnitude_vector" in pair and not model.get("quantised"):  # those of rounded weights are other ones
            norms_O = reference.weights[f"{module}.weight"].norm(dim=1)
            size = float((before[pair["magnitude_vector"]].float() - norms_O).norm() / norms_O.norm())
            text = f"the magnitudes of {module} are {size:.1e} off the norms of its weight's rows, where they start"
            if not size <= LIMITS[torch.bfloat16]:
                yield Departure("model", 1, text, "they were not initialised", size)
                return
    coarse = [n for pair in found.values() for n in pair.values() if before[n].dtype in (torch.bfloat16, torch.float16)]
    if coarse:
        text = f"{len(coarse)} adapter matrices are trained in {str(before[coarse[0]].dtype).removeprefix('torch.')}"
        yield Departure("model", 1, text, "steps below half an ulp are rounded away: keep adapters in float32")


def _module(parameter: str) -> str:
    """The name in the base of a parameter's module."""
    return base_name(parameter).rpartition(".")[0]


def _wrong_dropout(trace: Trace, asked: float) -> Iterator[Departure]:
    """The share of entries that the adapters' dropout kept, against the requested probability."""
    if not all(forward.kept is not None and forward.training for step in trace.steps for forward in step.forwards):
        return  # not recorded, or in the wrong mode, which is judged with the model
    masks = [kept for step in trace.steps for forward in step.forwards for name, kept in (forward.kept or {}).items()
             if "lora_dropout" in name]  # fmt: skip
    total = sum(mask.numel() for mask in masks)
    dropped = 1 - sum(int(mask.sum()) for mask in masks) / total if total else 0.0
    spread = math.sqrt(asked * (1 - asked) / total) if total else 0.0
    if not abs(dropped - asked) <= SIX_SIGMA * spread:
        text = f"the adapters drop {dropped:.3g} of their inputs, lora_dropout {asked:g} was asked for"
        yield Departure("model", 1, text, "" if total else "the dropout layers do not act")
