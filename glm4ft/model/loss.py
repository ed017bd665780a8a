"""Token-mean cross entropy that computes logits at supervised positions only.

Shapes: B rows of a batch, T positions, N supervised positions of the batch, D hidden, V vocabulary.

GLM-4 has 151,552 tokens and in chats a quarter of the positions is supervised, so for three quarters of the positions
the head's computation, and the memory of its logits, would be wasted. A frozen head needs no logits in the backward
pass either: what a token's loss hands down depends on that token alone, and is known once its logits are.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from glm4ft.data.encoded_row import IGNORED

# Largest number of logits in memory at once, 256 MiB in fp32: 442 tokens of GLM-4's vocabulary, for which a matrix
# product is as quick as for more of them.
MAX_LOGITS = 2**26


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
    if not any(parameter.requires_grad for parameter in head.parameters()):
        return _FrozenHeadNll.apply(hidden_ND, head, targets_N, chunk), row_N  # type: ignore[no-untyped-call]
    # A sharded head is called once, whatever the number of targets: processes must gather it equally often.
    if len(targets_N) <= chunk or _is_sharded(head):
        return _nll(head, hidden_ND, targets_N), row_N
    pieces = [
        checkpoint(_nll, head, h, t, use_reentrant=False)
        for h, t in zip(hidden_ND.split(chunk), targets_N.split(chunk), strict=True)
    ]
    return torch.cat(pieces), row_N


def _nll(head: nn.Module, hidden_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    # fp32: in bf16 the gradient of a confident target is off by up to 20 % (Liger-Kernel 1329)
    return F.cross_entropy(head(hidden_ND).float(), targets_N, reduction="none")


class _FrozenHeadNll(torch.autograd.Function):
    """The same as ``_nll``, with the gradient of the hidden states computed beside it, so that no logits are kept."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, head: nn.Module, targets_N: torch.Tensor, chunk: int) -> Any:
        nll_N = hidden_ND.new_empty(len(targets_N), dtype=torch.float32)
        grad_ND = torch.empty_like(hidden_ND)
        is_trained = ctx.needs_input_grad[0]  # an evaluation needs no gradient
        with _gathered(head) as whole:
            for start in range(0, len(targets_N), chunk):
                piece = slice(start, start + chunk)
                hidden_nD = hidden_ND[piece].detach().requires_grad_(is_trained)
                with torch.set_grad_enabled(is_trained):  # called as a module: hooks, autocast, quantised weights work
                    logits_nV = whole(hidden_nD)
                nll_N[piece], grad_nV = _nll_and_gradient(logits_nV.detach().float(), targets_N[piece])
                if is_trained:
                    (grad_ND[piece],) = torch.autograd.grad(logits_nV, hidden_nD, grad_nV.to(logits_nV.dtype))
        ctx.save_for_backward(grad_ND)
        return nll_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: torch.Tensor) -> Any:
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grad_N[:, None].to(grad_ND.dtype), None, None, None


def _is_sharded(head: nn.Module) -> bool:
    """Whether this process holds a part of the head only: FSDP2 adds a method, the third stage of DeepSpeed an id."""
    return hasattr(head, "unshard") or any(hasattr(parameter, "ds_id") for parameter in head.parameters())


@contextlib.contextmanager
def _gathered(head: Any) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """The head, held whole for all of its calls: processes may have different numbers of them, or none."""
    if not _is_sharded(head):
        yield head
    elif hasattr(head, "unshard"):
        head.unshard()
        try:
            yield head.forward  # without the hooks, each of which would gather it anew
        finally:
            head.reshard()
    else:
        deepspeed: Any = importlib.import_module("deepspeed")
        with deepspeed.zero.GatheredParameters(list(head.parameters())):
            yield head.forward


def _nll_and_gradient(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's loss and its gradient, softmax - onehot, which takes the place of the fp32 logits.

    Not by ``torch.softmax``, which adds up the vocabulary in a few running sums on a CPU: over SmolLM2's 49,152 tokens
    its probabilities sum to 1 + 1.5e-5, and the gradient of the adapters is off by up to 7e-5 (x86-64, torch 2.13,
    2026-11-28). ``Tensor.sum`` adds in pairs.
    """
    logits_NV -= logits_NV.amax(dim=1, keepdim=True)
    targets_N1 = targets_N[:, None]
    target_logits_N1 = logits_NV.gather(1, targets_N1)
    odds_NV = logits_NV.exp_()
    total_N1 = odds_NV.sum(dim=1, keepdim=True)
    nll_N1 = total_N1.log() - target_logits_N1
    gradient_NV = odds_NV.div_(total_N1)
    gradient_NV.scatter_add_(1, targets_N1, -torch.ones_like(total_N1))
    return nll_N1[:, 0], gradient_NV
