"""Token-mean cross entropy that computes logits at supervised positions only.

Shapes: B rows of a batch, T positions, N supervised positions of the batch, D hidden, V vocabulary.

GLM-4 has 151,552 tokens and in chats a quarter of the positions is supervised, so for three quarters of the positions
the head's computation, and the memory of its logits, would be wasted.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from glm4ft.data.encoded_row import IGNORED

# Largest number of logits in memory at once: 1 GiB in fp32. For more the head runs in chunks, recomputed in backward.
MAX_LOGITS = 2**28


def install_supervised_loss(model: PreTrainedModel) -> None:
    """Make ``model(labels=...)`` return only the loss, computed at supervised positions, and no logits.

    Without labels the model's own forward runs, so generation is unchanged. The forward is replaced rather than
    bypassed so that wrappers of the model (PEFT, DDP, FSDP, autocast) still see every call.

    Args:
        model: A causal language model with a backbone ``model`` and a head ``lm_head``; changed in place. Its forward
            then accepts ``num_items_in_batch``, the number of supervised tokens of the whole optimizer step (by default
            of this call), and ``per_row``: if True it returns the summed loss of each row, shape B.
    """
    full_forward = model.forward

    @functools.wraps(full_forward)
    def forward(
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        per_row: bool = False,
        **kwargs: Any,
    ) -> Any:
        if labels is None:
            return full_forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)
        # A cache object would switch off the isolation of packed samples, which is inferred from the positions.
        hidden_BTD = model.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        nll_N, row_N = supervised_nll(model.lm_head, hidden_BTD, labels)
        if per_row:
            loss = nll_N.new_zeros(len(labels)).index_add(0, row_N, nll_N)
        else:
            loss = nll_N.sum() / (len(nll_N) if num_items_in_batch is None else num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss)

    model.forward = forward


def supervised_nll(
    head: nn.Module, hidden_BTD: torch.Tensor, labels_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the negative log likelihood of each supervised token.

    Args:
        head: The output head, which maps (N, D) to (N, V).
        hidden_BTD: The output of the final norm.
        labels_BT: The unshifted labels; -100 where a token is not supervised.
    Returns:
        ``(nll_N, row_N)``: fp32 nats of each supervised token in reading order, and the index of its row.
    """
    targets_BT = labels_BT[:, 1:]
    keep_BT = targets_BT != IGNORED
    hidden_ND, targets_N = hidden_BTD[:, :-1][keep_BT], targets_BT[keep_BT]
    row_N = keep_BT.nonzero()[:, 0]
    chunk = max(1, MAX_LOGITS // getattr(head, "out_features", MAX_LOGITS))
    if len(targets_N) <= chunk:
        return _nll(head, hidden_ND, targets_N), row_N
    pieces = [
        checkpoint(_nll, head, h, t, use_reentrant=False)
        for h, t in zip(hidden_ND.split(chunk), targets_N.split(chunk), strict=True)
    ]
    return torch.cat(pieces), row_N


def _nll(head: nn.Module, hidden_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    # fp32: in bf16 the gradient of a confident target is off by up to 20 % (Liger-Kernel 1329)
    return F.cross_entropy(head(hidden_ND).float(), targets_N, reduction="none")
