"""The plan of a recorded run: what its configuration states, and where it states nothing, what its objects show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glm4ft.testing.recording.trace import ParameterGroup, Step, Trace
from glm4ft.testing.specification.recovered_targets import split_rows
from glm4ft.testing.specification.update_rule import clip_factor
from glm4ft.testing.subject import make_plan

# The schedules of transformers that the specification has closed forms for, by lr_scheduler_type.
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}


def plan_of(trace: Trace, configuration: Mapping[str, Any], num_processes: int) -> dict[str, Any]:
    """The plan to judge a run by.

    Args:
        trace: The recording.
        configuration: What the run's own configuration states, by transformers' names.
        num_processes: The number of recorded processes.
    """
    own = own_settings(trace)
    asked = {ours: configuration[theirs] for ours, theirs in (
        ("learning_rate", "learning_rate"), ("max_grad_norm", "max_grad_norm"), ("weight_decay", "weight_decay"),
        ("eps", "adam_epsilon"), ("accumulation", "gradient_accumulation_steps"),
        ("steps", "total_steps"), ("warmup_steps", "warmup_steps"),
    ) if theirs in configuration}  # fmt: skip
    if {"adam_beta1", "adam_beta2"} <= configuration.keys():
        asked["betas"] = (configuration["adam_beta1"], configuration["adam_beta2"])
    asked["schedule"] = SCHEDULES.get(str(configuration.get("lr_scheduler_type")), "constant")
    if asked["schedule"] == "constant" and configuration.get("lr_scheduler_type") == "constant":
        asked["warmup_steps"] = 0  # transformers' constant schedule has none
    asked["learning_rate"] = float(asked.get("learning_rate") or own["learning_rate"])
    plan = make_plan(**{**own, **asked})
    decays = {n: float(g.settings.get("weight_decay", 0.0)) for g in holding(trace.steps[0]) for n in g.names}
    # none on norms and biases, as transformers.Trainer has it; all of them without any would be another matter
    without = {n: decay for n, decay in decays.items() if not decay} if any(decays.values()) else {}
    return {**plan, "weight_decays": without, "processes": num_processes, "is_only_run": True}


def own_settings(trace: Trace) -> dict[str, Any]:
    """The plan that a run's own optimizer and gradients state, as far as they do."""
    groups = [group.settings for group in holding(trace.steps[0])]
    settings = max(groups, key=lambda group: float(group.get("weight_decay", 0.0)))
    limits = [clip_factor(step.clipped, 0, step.norms.get("clipped"))[0] for step in trace.steps if _is_clipped(step)]
    return {
        "steps": len(trace.steps),
        "accumulation": max(1, len(trace.steps[0].forwards)),
        "learning_rate": float(groups[0]["lr"]) or 1.0,
        "max_grad_norm": max(limits, default=0.0),
        "packing": any(len(split_rows(f)) > len(f.input_ids_BT) for step in trace.steps for f in step.forwards),
        **{name: settings[name] for name in ("betas", "eps", "weight_decay") if name in settings},
    }


def holding(step: Step) -> list[ParameterGroup]:
    """The optimizer's groups that hold a parameter of the model."""
    return [group for group in step.groups if group.names]


def _is_clipped(step: Step) -> bool:
    raw, clipped = (clip_factor(getattr(step, part), 0, step.norms.get(part))[0] for part in ("raw", "clipped"))
    return clipped < (1 - 1e-5) * raw


def unjudged(trace: Trace, about: Mapping[str, Any], num_recorded: int) -> dict[str, str]:
    """The reason for each judge of the replay that has nothing to compare with, by judge."""
    configuration, factors = about["configuration"], about["model"]["factors"]
    found = {"schedule": why} if (why := _no_schedule(configuration)) else {}
    if number := about["model"].get("quantised"):
        why = f"{number} weights of the base are quantised, and hidden states are computed again with plain ones"
        found |= dict.fromkeys(("batches", "model", "gradient"), why)
    if why := _is_random(trace, configuration, factors):
        found |= dict.fromkeys(("batches", "model", "gradient"), why)
    if scaled := [name for name in ("final_logit_softcapping", "logits_scaling", "logit_scale")
                  if factors.get(name) not in (None, 1.0)]:  # fmt: skip
        why = f"the model's {scaled[0]} changes the logits behind the head"
        found |= dict.fromkeys(("loss", "gradient"), why)
    if configuration.get("label_smoothing_factor"):
        found |= dict.fromkeys(("loss", "gradient"), "label smoothing is asked for")
    if num_recorded < about["world_size"]:
        why = f"{num_recorded} of {about['world_size']} processes were recorded"
        found |= dict.fromkeys(("batches", "loss", "gradient", "clipping"), why)
    if trace.sampled and any(step.norms["raw"].keys() != trace.sampled.keys() for step in trace.steps):
        found["clipping"] = "a sample of the gradient is recorded, and its norm before clipping is not known"
    return found | _by_group(trace)


def _no_schedule(configuration: Mapping[str, Any]) -> str:
    """Why the schedule is not judged; "" if it is."""
    name = configuration.get("lr_scheduler_type")
    if name is None or "learning_rate" not in configuration:
        return "the run's configuration was not found"
    if name not in SCHEDULES or configuration.get("lr_scheduler_kwargs"):
        return f"the specification has no closed form of lr_scheduler_type {name} with its options"
    if configuration.get("resumed_at"):
        return f"the run was resumed at step {configuration['resumed_at']}"
    return "" if configuration.get("total_steps") else "the number of the run's steps is unknown"


def _is_random(trace: Trace, configuration: Mapping[str, Any], factors: Mapping[str, Any]) -> str:
    """Why hidden states cannot be computed again; "" if they can."""
    if configuration.get("neftune_noise_alpha"):
        return "the embeddings get random noise (NEFTune)"
    drops = [name for name in ("attention_dropout", "attn_pdrop") if factors.get(name)]
    if drops:
        return f"attention drops entries ({drops[0]} {factors[drops[0]]:g}), which no hook sees"
    if any(forward.kept is None for step in trace.steps for forward in step.forwards):
        return "dropout chose among too many entries to record them"
    if trace.dropout and any("magnitude_vector" in name for name in trace.trained):
        return "the specification of DoRA has no dropout"
    return ""


def _by_group(trace: Trace) -> dict[str, str]:
    """The reason for each judge to which the optimizer's class or its groups are unknown."""
    optimizers = {step.optimizer for step in trace.steps}
    if optimizers != {"AdamW"}:
        return {"update": f"the optimizer is {', '.join(sorted(optimizers))}, not AdamW"}
    rates, decays = (
        sorted({float(group.settings[name]) for group in holding(trace.steps[-1])}) for name in ("lr", "weight_decay")
    )
    found = {}
    if len([decay for decay in decays if decay]) > 1:
        found["update"] = f"the optimizer's groups have weight decays of {', '.join(f'{decay:g}' for decay in decays)}"
    if len(rates) > 1:
        found["schedule"] = f"the optimizer's groups have {len(rates)} learning rates, and one is configured"
    return found
