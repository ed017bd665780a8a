r"""The convex problem below a certified loss floor, solved for many target distributions at once.

Behind a final RMSNorm with weight g, a head W reaches exactly the logits ``A u`` with ``A = W diag(g)`` and
``|u| <= sqrt(D)``. For a target distribution q the loss ``f(u) = logsumexp(A u) - q.A u`` is convex, so any point u
gives a lower bound of the loss at every other point, the Frank-Wolfe bound

    ``f(u) - u.grad - R |grad|``,  ``grad = A^T (softmax(A u) - q)``,

and descent only tightens it. The bound holds whenever the descent stops.

Shapes: B target distributions, M rows of the head, D hidden.
Source: M. Jaggi, "Revisiting Frank-Wolfe", ICML 2013, for the gap as a certificate; E. Birgin, J. Martinez and
M. Raydan, "Nonmonotone spectral projected gradient methods", SIAM J. Optim. 10 (2000), for the descent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

TOLERANCE = 1e-4  # nats between bound and infimum: a hundredth of the 0.01 that an overfit run has to reach
MAX_STEPS = 2000  # the 500 random heads of the tests take 43 at most; a mixed target on rows of norm 16 took 1,337
_MEMORY = 10  # recent losses that a step is compared with: spectral steps are fast because the loss may rise briefly
_ARMIJO = 1e-4
_SHORTER = 0.2


@dataclass(frozen=True)
class Precision:
    """The largest error of a real forward pass's logits, relative to exact arithmetic.

    Args:
        name: The name of the precision, as shown.
        widening: The factor by which the hidden state may exceed the ball, because the entries of the normed state and
            their products with the norm weight are rounded.
        rounding: The largest error of rounding a logit, as a fraction of ``|row| |hidden|``.
        summing: The largest error of summing a logit, per term of the sum, as a fraction of ``|row| |hidden|``.
    """

    name: str
    widening: float
    rounding: float
    summing: float


EXACT = Precision("exact", 1.0, 0.0, 0.0)
# bf16 rounds to nearest within u / (1 + u), u = 2^-8: twice (norm, times weight) stays below 1 + 2^-7 and leaves room
# for the fp32 arithmetic before. A logit is rounded once, after a sum in fp32 with an error below 2^-23 per term.
# Source: C.-P. Jeannerod and S. Rump, "On relative errors of floating-point operations", Math. Comp. 87 (2018).
BF16 = Precision("bf16", 1 + 2**-7, 2**-8, 2**-23)


@dataclass(frozen=True)
class HeadRows:
    """Rows of the head, multiplied by the norm weight, some of which may represent several rows by their mean.

    ``logsumexp`` over the logits of several rows is at least the logarithm of their number plus their mean logit
    (Jensen), so the bound still holds if a mean row with that constant replaces them.

    Args:
        vectors_MD: The rows times the norm weight, float64.
        log_counts_M: The logarithm of the number of rows that each row represents; 0 for a single row.
        norms_M: The mean Euclidean norm of the rows that each row represents.
    """

    vectors_MD: torch.Tensor
    log_counts_M: torch.Tensor
    norms_M: torch.Tensor

    @classmethod
    def of(cls, vectors_MD: torch.Tensor) -> HeadRows:
        """Make single rows, each of which represents only itself."""
        vectors_MD = vectors_MD.double()
        return cls(vectors_MD, vectors_MD.new_zeros(len(vectors_MD)), vectors_MD.norm(dim=1))


@dataclass(frozen=True)
class Solution:
    """The bounds found for each target distribution.

    Args:
        lower_B: The certified bound: no hidden state behind the norm has a smaller loss.
        upper_B: The loss at ``hidden_BD``.
        hidden_BD: The best hidden state found, inside the ball, norm weight not applied.
    """

    lower_B: torch.Tensor
    upper_B: torch.Tensor
    hidden_BD: torch.Tensor


def solve(
    rows: HeadRows,
    targets_BM: torch.Tensor,
    radius: float,
    *,
    precision: Precision = EXACT,
    tolerance: float = TOLERANCE,
    max_steps: int = MAX_STEPS,
) -> Solution:
    """Bound the loss of each target distribution from below.

    Args:
        rows: The rows of the head.
        targets_BM: The target distributions over the rows, float64, each summing to 1; 0 on rows that represent
            several.
        radius: The radius of the ball of hidden states, ``sqrt(D)`` behind an RMSNorm.
        precision: The precision of the forward pass that the bound is for.
        tolerance: The distance between exact bound and loss found at which descent ends, nats.
        max_steps: The largest number of descent steps; if it is reached, the bound is less tight.
    Returns:
        Bounds, losses and hidden states. A bound is never below the entropy of its distribution.
    """
    descent = _Descent(rows, targets_BM, radius, precision)
    active = descent.is_open(tolerance)
    for step in range(max_steps):
        if not active.any():
            break
        descent.step(active.nonzero()[:, 0], step)
        active = descent.is_open(tolerance)
    return Solution(descent.lower_B, descent.best_B, descent.best_hidden_BD)


class _Descent:
    """Spectral projected gradient descent on all distributions in parallel, each with its own step length."""

    def __init__(self, rows: HeadRows, targets_BM: torch.Tensor, radius: float, precision: Precision) -> None:
        self.rows, self.targets_BM, self.radius, self.precision = rows, targets_BM, radius, precision
        start_BD = targets_BM @ rows.vectors_MD
        self.hidden_BD = radius * start_BD / start_BD.norm(dim=1, keepdim=True).clamp_min(1e-300)
        # 0 - x: of a certain token -x is -0.0, which would be shown with its sign
        entropy_B = (0 - torch.xlogy(targets_BM, targets_BM).sum(dim=1)).clamp_min(0)
        self.lower_B, self.exact_lower_B = entropy_B.clone(), entropy_B.clone()
        everything = torch.arange(len(targets_BM))
        self.loss_B, self.gradient_BD, lower_B, exact_B = self._look(self.hidden_BD, everything)
        self._raise_bounds(everything, lower_B, exact_B)
        self.best_B, self.best_hidden_BD = self.loss_B.clone(), self.hidden_BD.clone()
        self.recent_BK = self.loss_B[:, None].repeat(1, _MEMORY)
        # 1 / curvature, which the squared norm of a row bounds up to a factor of 4
        self.length_B = (1 / rows.norms_M.max().square().clamp_min(1e-300)).repeat(len(targets_BM))

    def is_open(self, tolerance: float) -> torch.Tensor:
        """Mark the distributions whose exact bound is further than the tolerance from the loss found."""
        return ~(self.best_B - self.exact_lower_B <= tolerance)

    def step(self, at: torch.Tensor, number: int) -> None:
        """Try a step for the distributions ``at``: accepted if below the largest recent loss, otherwise shortened."""
        before_ND, length_N = self.hidden_BD[at], self.length_B[at]
        after_ND = self._project(before_ND - length_N[:, None] * self.gradient_BD[at])
        loss_N, gradient_ND, lower_N, exact_N = self._look(after_ND, at)
        self._raise_bounds(at, lower_N, exact_N)
        is_best = loss_N < self.best_B[at]
        self.best_B[at[is_best]], self.best_hidden_BD[at[is_best]] = loss_N[is_best], after_ND[is_best]
        moved_ND, turned_ND = after_ND - before_ND, gradient_ND - self.gradient_BD[at]
        limit_N = self.recent_BK[at].amax(dim=1) + _ARMIJO * (self.gradient_BD[at] * moved_ND).sum(dim=1)
        is_taken = loss_N <= limit_N + 1e-13
        spectral_N = _spectral_length(moved_ND, turned_ND, length_N, is_long=number % 2 == 1)
        self.length_B[at] = torch.where(is_taken, spectral_N, length_N * _SHORTER)
        taken = at[is_taken]
        self.hidden_BD[taken], self.gradient_BD[taken] = after_ND[is_taken], gradient_ND[is_taken]
        self.recent_BK[taken, number % _MEMORY] = loss_N[is_taken]

    def _look(
        self, hidden_ND: torch.Tensor, at: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the loss, the gradient, the bound for the precision and the exact bound at hidden states."""
        targets_NM = self.targets_BM[at]
        logits_NM = hidden_ND @ self.rows.vectors_MD.T
        biased_NM = logits_NM + self.rows.log_counts_M
        total_N = torch.logsumexp(biased_NM, dim=1)
        loss_N = total_N - (targets_NM * logits_NM).sum(dim=1)
        surplus_NM = torch.exp(biased_NM - total_N[:, None]) - targets_NM
        gradient_ND = surplus_NM @ self.rows.vectors_MD
        slope_N, steepness_N = (gradient_ND * hidden_ND).sum(dim=1), gradient_ND.norm(dim=1)
        exact_N = loss_N - slope_N - self.radius * steepness_N
        # logits that are off by at most this share of |row| |hidden| move the tangent by no more than error_N
        share = self.precision.rounding + self.precision.summing * hidden_ND.shape[1]
        widened = self.radius * self.precision.widening
        error_N = share * widened * (surplus_NM.abs() * self.rows.norms_M).sum(dim=1)
        return loss_N, gradient_ND, loss_N - slope_N - widened * steepness_N - error_N, exact_N

    def _raise_bounds(self, at: torch.Tensor, lower_N: torch.Tensor, exact_N: torch.Tensor) -> None:
        # fmax: a bound that overflowed to NaN raises nothing
        self.lower_B[at] = torch.fmax(self.lower_B[at], lower_N)
        self.exact_lower_B[at] = torch.fmax(self.exact_lower_B[at], exact_N)

    def _project(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        norm_N1 = hidden_ND.norm(dim=1, keepdim=True).clamp_min(1e-300)
        scale_N1: torch.Tensor = self.radius / norm_N1
        return hidden_ND * scale_N1.clamp_max(1)


def _spectral_length(
    moved_ND: torch.Tensor, turned_ND: torch.Tensor, otherwise_N: torch.Tensor, *, is_long: bool
) -> torch.Tensor:
    """Return the next step length, 1 / curvature along the last step.

    Args:
        moved_ND: The change of the hidden states by the last step.
        turned_ND: The change of the gradients by the last step.
        otherwise_N: The step length where the curvature is not positive or the new length not finite.
        is_long: Whether to use the longer of Barzilai and Borwein's two formulas.
    """
    across_N = (moved_ND * turned_ND).sum(dim=1)
    length_N = moved_ND.square().sum(dim=1) / across_N if is_long else across_N / turned_ND.square().sum(dim=1)
    is_usable = (across_N > 0) & length_N.isfinite()
    return torch.where(is_usable, length_N.clamp(1e-8, 1e8), otherwise_N)
