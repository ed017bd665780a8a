"""The memory of a training step by a counted formula, its error against measured steps, and docs/scale.md.

Run: python docs/memory_of_a_run.py     (half a minute on one CPU core)

The page's words are in docs/scale.template.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Glm4Config, Glm4ForCausalLM

from glm4ft.model.lora import attach_lora
from glm4ft.model.lora_options import LoraOptions
from glm4ft.model.loss import MAX_LOGITS, install_supervised_loss
from glm4ft.testing.bases.geometry import GEOMETRIES, num_parameters

HERE = Path(__file__).parent
FP32 = 4


@dataclass(frozen=True)
class Step:
    """A micro-batch.

    Args:
        tokens: The number of its tokens, padding included.
        supervised: The number of supervised tokens among them.
        checkpointing: Whether activations are recomputed.
        width: The bytes of an element of the base; with 2, the step runs under autocast.
        rank: The rank of the adapters.
    """

    tokens: int
    supervised: int
    checkpointing: bool = False
    width: int = 2
    rank: int = 16


def adapter_parameters(config: Mapping[str, Any], rank: int) -> int:
    """Those of the default targets of a dense GLM-4: each adds rank x (inputs + outputs)."""
    hidden, inner, query, key = _widths(config)
    layer = (hidden + query) + 2 * (hidden + key) + (query + hidden) + (hidden + 2 * inner) + (inner + hidden)
    return int(config["num_hidden_layers"] * rank * layer)


def kept_by_layer(config: Mapping[str, Any], step: Step) -> int:
    """Bytes that a layer keeps for backward per token, counted from the tensors that autograd saves."""
    hidden, inner, query, key = _widths(config)
    rotated = config["head_dim"] // 2
    norms = FP32 * 4 * (hidden + 1)  # in fp32 whatever the base: its input, and the inverse root of its square
    # Under autocast the inputs of the adapters of q, k and v are three copies. LoRA A keeps its input, LoRA B its own.
    adapters = hidden * (3 if step.width == 2 else 1) + query + hidden + inner + 6 * step.rank
    attention = 2 * query + 2 * key + 2 * rotated  # q, k, v, the result, sine and cosine
    mlp = 3 * inner  # gate and up, and what the activation makes of the gate
    return norms + step.width * (adapters + attention + mlp) + FP32 * config["num_attention_heads"]


def activations(config: Mapping[str, Any], step: Step) -> int:
    """The most bytes beyond weights, gradients and optimizer at once: what is kept, and the head or a layer at work."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    layer, layers = step.tokens * kept_by_layer(config, step), config["num_hidden_layers"]
    at_once = min(step.supervised, max(1, MAX_LOGITS // config["vocab_size"]))
    # the gradient of fp32 logits takes their place; a base in bf16 has logits and gradient in bf16 beside them
    head = (FP32 if step.width == FP32 else FP32 + 2 * step.width) * at_once * config["vocab_size"]
    backward = step.tokens * step.width * 2 * inner  # the gradient of gate and up, the widest within a layer
    if step.width == 2:
        backward += step.tokens * FP32 * 3 * hidden  # norms are fp32: the gradients of output, product and input
    if step.checkpointing:
        return layers * step.tokens * hidden * step.width + max(head, layer + backward)
    return layers * layer + max(head, backward)


def of_a_step(config: Mapping[str, Any], step: Step) -> dict[str, int]:
    """Bytes on one device that holds the whole model, by what they are for."""
    adapters = adapter_parameters(config, step.rank)
    return {
        "base": num_parameters(config) * step.width,
        "adapters, gradients, AdamW": adapters * FP32 * 4,
        "activations and logits": activations(config, step),
    }


def measured(config: Mapping[str, Any], step: Step) -> int:
    """The most bytes that torch allocated at once for forward and backward of a step on a CPU, gradients included."""
    options = {name: value for name, value in config.items() if name != "architecture"}
    torch.manual_seed(0)
    model = Glm4ForCausalLM(Glm4Config(**options, pad_token_id=0, eos_token_id=0, attn_implementation="sdpa"))
    model = model.to(torch.bfloat16 if step.width == 2 else torch.float32)
    install_supervised_loss(model)
    adapted = attach_lora(model, LoraOptions(rank=step.rank), seed=0).train()
    if step.checkpointing:
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(1, config["vocab_size"], (1, step.tokens))
    labels = ids.clone()
    labels[:, : step.tokens - step.supervised] = -100
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded,
        torch.autocast("cpu", torch.bfloat16, enabled=step.width == 2),
    ):
        adapted(input_ids=ids, labels=labels).loss.backward()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held, peak = 0, 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def small(hidden: int, inner: int, layers: int, vocabulary: int) -> dict[str, Any]:
    """A small dense GLM-4, with the shares of the published ones."""
    return {
        "architecture": "Glm4ForCausalLM",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "attention_bias": True,
    }


SMALL = [
    (small(128, 448, 4, 4000), Step(512, 128, width=4)),
    (small(256, 896, 3, 20_000), Step(512, 128, width=4)),
    (small(256, 896, 6, 2000), Step(1024, 1024, width=4)),
    (small(256, 896, 6, 8000), Step(1024, 256, width=4, checkpointing=True)),
    (small(512, 1792, 4, 2000), Step(512, 512, width=4, checkpointing=True)),
    (small(256, 896, 4, 8000), Step(768, 192)),
    (small(512, 1792, 3, 30_000), Step(512, 128)),
    (small(256, 896, 8, 8000), Step(1024, 256, checkpointing=True)),
    (small(768, 2688, 3, 2000), Step(512, 64, checkpointing=True)),
]


def compared(config: Mapping[str, Any], step: Step) -> tuple[int, int]:
    """What the formula says of a step on a CPU, and what was measured."""
    return activations(config, step) + adapter_parameters(config, step.rank) * FP32, measured(config, step)


def _widths(config: Mapping[str, Any]) -> tuple[int, int, int, int]:
    query, key = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    return config["hidden_size"], config["intermediate_size"], query, key


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.1f}"


def table_of_errors() -> str:
    """The formula against measured steps."""
    head = "hidden | layers | vocabulary | tokens | supervised | base | checkpointing | formula | measured | error"
    lines = [f"| {head} |"]
    lines.append("|---:|---:|---:|---:|---:|---|---|---:|---:|---:|")
    for config, step in SMALL:
        said, was = compared(config, step)
        kind = f"{'bf16' if step.width == 2 else 'fp32'} | {'yes' if step.checkpointing else 'no'}"
        lines.append(
            f"| {config['hidden_size']} | {config['num_hidden_layers']} | {config['vocab_size']:,} | {step.tokens:,} | "
            f"{step.supervised:,} | {kind} | {said / 2**20:.1f} | {was / 2**20:.1f} | {said / was - 1:+.1%} |"
        )
    return "\n".join(lines)


def table_of_sizes() -> str:
    """The formula for the published sizes."""
    head = "base | tokens | checkpointing | weights | adapters | activations, logits | one GPU | each of 8, FSDP2"
    lines = [f"| {head} |"]
    lines.append("|---|---:|---|---:|---:|---:|---:|---:|")
    for name in ("glm-4-9b-0414", "glm-4-32b-0414"):
        config = GEOMETRIES[name]
        for tokens in (4096, 16_384):
            for checkpointing in (False, True):
                parts = of_a_step(config, Step(tokens, tokens // 4, checkpointing))
                base, adapters, active = parts.values()
                # besides its eighth, a process holds the largest unit whole: embeddings or head, or two layers
                unit = max(config["vocab_size"] * config["hidden_size"] * 2, 2 * base / config["num_hidden_layers"])
                shard = (base + adapters) / 8 + unit + active
                cells = (base, adapters, active, base + adapters + active, shard)
                lines.append(
                    f"| {name} | {tokens:,} | {'yes' if checkpointing else 'no'} | "
                    + " | ".join(map(_gib, cells))
                    + " |"
                )
    return "\n".join(lines)


def page(errors: str) -> str:
    """The page, with the table of errors as it was measured."""
    text = (HERE / "scale.template").read_text("utf-8")
    return text.replace("{errors}", errors).replace("{sizes}", table_of_sizes())


if __name__ == "__main__":
    (HERE / "scale.md").write_text(page(table_of_errors()), "utf-8")
