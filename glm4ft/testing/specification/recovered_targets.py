"""What a recorded forward pass was trained on: its rows, and the labels and weights that its loss gave them.

Shapes: T positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from glm4ft.data.encoded_row import IGNORED
from glm4ft.testing.recording.trace import Forward

# A gradient that is smaller than the largest of its sequence by this factor is rounding: bf16 keeps 8 bits of mantissa.
ZERO_GRADIENT = 1e-6
CHUNK = 64  # tokens whose logits are held at a time


@dataclass(frozen=True)
class Targets:
    """The labels and weights of a sequence's tokens in the loss, recovered from the gradient at the final norm.

    Args:
        labels_T: The unshifted labels, -100 where no gradient arrives.
        weights_T: The weight of each target in the loss; 0 where there is no target.
        fit_T: The cosine between the gradient and that of cross entropy with the found label; 1 is a perfect fit.
    """

    labels_T: torch.Tensor
    weights_T: torch.Tensor
    fit_T: torch.Tensor

    def at(self, positions: torch.Tensor) -> Targets:
        """The targets at the given positions."""
        return Targets(self.labels_T[positions], self.weights_T[positions], self.fit_T[positions])


def split_rows(forward: Forward) -> list[tuple[int, torch.Tensor]]:
    """Split a forward pass into rows: padded rows by the mask, packed rows where the position ids restart.

    Returns:
        For each row, the index of its sequence in the batch and the row's positions (T,) in that sequence.
    """
    rows = []
    for b, ids_T in enumerate(forward.input_ids_BT):
        mask = forward.attention_mask
        if mask is not None and mask.dim() == 2:
            real = mask[b, -len(ids_T) :].bool()  # with a cache it begins with the tokens of earlier passes
        else:
            real = torch.ones(len(ids_T), dtype=torch.bool)
        used = real.nonzero()[:, 0]
        if forward.positions_BT is None:
            rows.append((b, used))
            continue
        positions = forward.positions_BT[min(b, len(forward.positions_BT) - 1)][used]
        starts = [i for i in range(len(used)) if i == 0 or positions[i] <= positions[i - 1]]
        ends = [*starts[1:], len(used)]
        rows += [(b, used[start:end]) for start, end in zip(starts, ends, strict=True)]
    return rows


def recover_targets(hidden_TD: torch.Tensor, gradient_TD: torch.Tensor, weight_VD: torch.Tensor) -> Targets:
    """Recover the label and the weight of every token from the loss's gradient at the final norm.

    For cross entropy that gradient is ``w * W^T (p - e_y)``. Given the hidden state, only ``w`` and ``y`` are unknown,
    and ``y`` is the token whose direction ``W^T p - W_y`` is that of the gradient.

    Args:
        hidden_TD: The output of the final norm for a sequence.
        gradient_TD: The gradient of the loss with respect to that output.
        weight_VD: The weight of the output head.
    Returns:
        The targets by the position of the token that is predicted, T + 1 of them: the last position predicts a token
        behind the sequence.
    """
    weight_VD = weight_VD.detach().double()
    hidden, gradient = (tensor.double().to(weight_VD.device) for tensor in (hidden_TD, gradient_TD))
    labels, weights = torch.full((len(hidden) + 1,), IGNORED), torch.zeros(len(hidden) + 1, dtype=torch.float64)
    size = gradient.norm(dim=1)
    active = (size > ZERO_GRADIENT * size.max()).nonzero()[:, 0] if size.max() > 0 else torch.zeros(0, dtype=torch.long)
    fit = torch.ones(len(hidden) + 1, dtype=torch.float64)
    lengths_V = (weight_VD * weight_VD).sum(1)
    for chunk in active.split(CHUNK):
        expected_TD = (hidden[chunk] @ weight_VD.T).softmax(1) @ weight_VD
        # |W^T p - W_y|^2 and its product with the gradient, without the V directions themselves
        squares_TV = (expected_TD * expected_TD).sum(1)[:, None] - 2 * expected_TD @ weight_VD.T + lengths_V
        products_TV = (expected_TD * gradient[chunk]).sum(1)[:, None] - gradient[chunk] @ weight_VD.T
        # the squares are differences of large numbers: below this they are rounding
        best_T = (products_TV / squares_TV.clamp_min(1e-14 * lengths_V.max()).sqrt()).argmax(1)
        directions_TD = expected_TD - weight_VD[best_T]
        lengths_T = directions_TD.norm(dim=1).clamp_min(1e-300)
        fit[chunk + 1] = ((directions_TD * gradient[chunk]).sum(1) / (lengths_T * size[chunk])).cpu()
        labels[chunk + 1] = best_T.cpu()
        weights[chunk + 1] = (size[chunk] / lengths_T).cpu()
    return Targets(labels, weights, fit)
