"""What a model makes of the targets of a row: the loss of each, and what it finds likeliest in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from glm4ft.model.loss import MAX_LOGITS


def measure_targets(
    model: Any, input_ids: Sequence[int], targets: Sequence[int]
) -> tuple[list[float | None], list[int | None]]:
    """Loss and likeliest token at some positions of a row, given the true tokens before each.

    Args:
        model: a causal language model or a PEFT model around one; left in the mode it was in.
        input_ids: of the row.
        targets: positions to measure, from 1 upwards.
    Returns:
        ``(losses, likeliest)``, each as long as the row, None where nothing was measured. Losses are fp32 nats.
    """
    losses: list[float | None] = [None] * len(input_ids)
    likeliest: list[int | None] = [None] * len(input_ids)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    was_training, positions = model.training, [at for at in targets if at > 0]
    model.eval()
    try:
        with torch.no_grad():
            ids_1T = torch.tensor([list(input_ids)], device=model.device)
            hidden_TD = base.model(input_ids=ids_1T, use_cache=False).last_hidden_state[0]
            for some in torch.tensor(positions, dtype=torch.long).split(_chunk(base)):
                logits_NV = base.lm_head(hidden_TD[some - 1]).float()
                nll_N = F.cross_entropy(logits_NV, ids_1T[0, some], reduction="none")
                for at, nll, best in zip(some.tolist(), nll_N.tolist(), logits_NV.argmax(-1).tolist(), strict=True):
                    losses[at], likeliest[at] = nll, best
    finally:
        model.train(was_training)
    return losses, likeliest


def _chunk(base: Any) -> int:
    """Targets whose logits are in memory at once: all of a true head's for a long row would take gigabytes."""
    return max(1, MAX_LOGITS // int(base.config.vocab_size))
