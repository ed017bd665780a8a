"""A model's loss on each target of a row, and its likeliest token at the same position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from glm4ft.model.loss import MAX_LOGITS


def measure_targets(
    model: Any, input_ids: Sequence[int], targets: Sequence[int]
) -> tuple[list[float | None], list[int | None]]:
    """Measure the loss and the likeliest token at some positions of a row, given the true tokens before each.

    Args:
        model: A causal language model or a PEFT model around one; its train or eval mode is kept.
        input_ids: The token ids of the row.
        targets: The positions to measure, from 1; others are ignored.
    Returns:
        ``(losses, likeliest)``, each as long as the row and None at positions that were not measured. Losses are in
        nats, computed in fp32.
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
    """Return how many targets to compute logits for at once: all of a long row's would take gigabytes."""
    return max(1, MAX_LOGITS // int(base.config.vocab_size))
