"""Faults of the loss and of its reduction over tokens, micro-batches and processes, which change the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from glm4ft.data.encoded_row import IGNORED
from glm4ft.testing.faults.registry import MADE_UP, faults_at
from glm4ft.testing.subjects.plain_loop import LoopState, Subject, world_size
from glm4ft.testing.subjects.plain_loop_data import Batch

ESCAPES = (
    "Faults that occur only after the recorded steps, or only in a kernel that a CPU does not run, are not seen, nor "
    "is a deviation of the loss below a hundred-thousandth of the reference in fp32."
)

fault = faults_at("gradient")


@fault("loss-in-low-precision", evidence="Liger 1329, 1341", cause=r"logits are rounded to bfloat16")
class LossInLowPrecision(Subject):
    """Cross entropy is computed on logits in bf16."""

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return super().loss_sum(logits.bfloat16(), labels)


@fault("labels-not-shifted", evidence="transformers 25044, 27161, 17987", cause=r"not shifted")
class LabelsNotShifted(Subject):
    """The prediction at each position is compared with the token at the same position."""

    def shift(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return logits.flatten(0, 1), labels.flatten()


@fault("double-shift", evidence="torchtune 2613; transformers 44642, 32944", cause=r"shifted twice")
class DoubleShift(Subject):
    """Labels are shifted before the loss shifts them again, so the token after next is learnt."""

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return super().loss_sum(logits, F.pad(labels[:, 1:], (0, 1), value=IGNORED))


@fault("ignore-index-unused", evidence="Liger 974", cause=r"ignore|masked|class 0|id 0")
class IgnoreIndexUnused(Subject):
    """Ignored positions enter the loss with class 0."""

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return super().loss_sum(logits, labels.clamp_min(0))


class UnitGradient(torch.autograd.Function):
    """A fused loss that computes its gradient in the forward pass and ignores the upstream gradient."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The summed cross entropy; saves its gradient for the backward pass."""
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_(True)
            loss = F.cross_entropy(leaf, targets, ignore_index=IGNORED, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, leaf)
        ctx.save_for_backward(gradient)
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        """The saved gradient, whatever the upstream gradient is."""
        return ctx.saved_tensors[0], None


@fault("fused-loss-assumes-unit-grad", evidence="unsloth-zoo 434", cause=r"times the token mean")
class FusedLossAssumesUnitGrad(Subject):
    """A fused loss ignores the upstream gradient, so the sum over tokens is never divided by their number."""

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        apply: Any = UnitGradient.apply
        loss: torch.Tensor = apply(*self.shift(logits, labels))
        return loss


@fault(
    "gradient-counted-twice",
    evidence="unsloth-zoo 892",
    cause=r"twice|2 times|lora_B|q_proj",
    simulated="a hook doubles what the custom backward would have added a second time",
)
class GradientCountedTwice(Subject):
    """A custom backward pass adds to a weight's gradient and also returns it, so it counts twice."""

    def attach(self, base: Any, seed: int) -> Any:
        model = super().attach(base, seed)
        for name, parameter in model.named_parameters():
            if "q_proj.lora_B" in name:
                parameter.register_hook(lambda gradient: 2 * gradient)
        return model


@fault(
    "mean-of-micro-means",
    evidence="transformers 34191, 34242; axolotl 1980; torchtune 1875",
    cause=r"micro-batch means",
)
class MeanOfMicroMeans(Subject):
    """The loss is the mean of micro-batch means, so tokens of micro-batches with few targets weigh more."""

    def loss_factor(self, batch: Batch, num_targets: int, num_micro_batches: int) -> float:
        return 1 / max(1, self.count_targets([batch])) / num_micro_batches


@fault(
    "divided-twice", evidence="accelerate 3533; transformers 40052, 40709, 26312", cause=r"divided|times the token mean"
)
class DividedTwice(Subject):
    """The mean over all tokens is divided by the number of micro-batches once more."""

    def loss_factor(self, batch: Batch, num_targets: int, num_micro_batches: int) -> float:
        return super().loss_factor(batch, num_targets, num_micro_batches) / num_micro_batches


@fault("zero-grad-missing", evidence="stackoverflow 60335387", cause=r"not cleared")
class ZeroGradMissing(Subject):
    """Gradients are never cleared, so they accumulate over the steps."""

    def zero_grad(self, run: LoopState) -> None:
        pass


@fault("zero-grad-every-micro", evidence="TRL 407", cause=r"micro-batch")
class ZeroGradEveryMicro(Subject):
    """The gradient is cleared before every micro-batch, so that only the last one counts."""

    def train_micro_batch(self, run: LoopState, batch: Batch, num_targets: int, num_micro_batches: int) -> torch.Tensor:
        self.zero_grad(run)
        return super().train_micro_batch(run, batch, num_targets, num_micro_batches)


@fault("micro-batch-lost", evidence="DeepSpeed 6550", cause=r"micro-batch")
class MicroBatchLost(Subject):
    """From the second step on, the second micro-batch's gradient replaces the first one's instead of being added."""

    def train_step(self, run: LoopState, batches: list[Batch]) -> dict[str, Any]:
        self.done = 0
        return super().train_step(run, batches)

    def train_micro_batch(self, run: LoopState, batch: Batch, num_targets: int, num_micro_batches: int) -> torch.Tensor:
        self.done += 1
        if run.step > 0 and self.done == 2:
            run.optimizer.zero_grad()
        return super().train_micro_batch(run, batch, num_targets, num_micro_batches)


@fault("log-scaled-backward-not", evidence="verl 436", cause=r"not divided|times the token mean|micro-batch means")
class LogScaledBackwardNot(Subject):
    """The logged loss is divided by the number of micro-batches, the differentiated loss is not."""

    def loss_factor(self, batch: Batch, num_targets: int, num_micro_batches: int) -> float:
        return super().loss_factor(batch, num_targets, num_micro_batches) * num_micro_batches


@fault(
    "wrapper-bypassed", processes=2, evidence="jxmnop on X 2024 (TrainCheck set)", cause=r"not averaged|ranks?|process"
)
class WrapperBypassed(Subject):
    """The model is called instead of its DDP wrapper, so gradients are not averaged over processes."""

    def wrap(self, model: Any) -> Any:
        super().wrap(model)
        return model


@fault(
    "hooks-lost-after-move",
    processes=2,
    evidence="pytorch 104336 (TrainCheck set)",
    cause=r"not averaged|ranks?|process",
    simulated="there is no other device to move to, so the wrapper's switch for reduction is turned off",
)
class HooksLostAfterMove(Subject):
    """Moving a wrapped model drops the hooks that average its gradients."""

    def wrap(self, model: Any) -> Any:
        wrapped = super().wrap(model)
        wrapped.require_backward_grad_sync = False
        return wrapped


@fault(
    "gradients-averaged-too-early",
    processes=2,
    evidence="FunASR 3472; picotron 5; build-nanogpt 30",
    cause=r"not averaged|ranks?|process",
)
class GradientsAveragedTooEarly(Subject):
    """Gradients are averaged over processes in the first micro-batch of a step instead of in the last."""

    def train_step(self, run: LoopState, batches: list[Batch]) -> dict[str, Any]:
        run.wrapped.require_backward_grad_sync = True
        return super().train_step(run, batches)

    def train_micro_batch(self, run: LoopState, batch: Batch, num_targets: int, num_micro_batches: int) -> torch.Tensor:
        loss = super().train_micro_batch(run, batch, num_targets, num_micro_batches)
        run.wrapped.require_backward_grad_sync = False
        return loss


@fault(
    "world-size-factor-lost",
    processes=2,
    evidence="torchtune 2172, 2687; ms-swift 6597",
    cause=r"times the token mean|process|world",
)
class WorldSizeFactorLost(Subject):
    """The loss is divided by the tokens of all processes, and DDP averages over the processes again."""

    def loss_factor(self, batch: Batch, num_targets: int, num_micro_batches: int) -> float:
        return super().loss_factor(batch, num_targets, num_micro_batches) / world_size()


@fault(
    "mean-over-processes",
    processes=2,
    evidence=MADE_UP,
    cause=r"cause: [^(]*process|averaged over (the )?processes|(each|per) process",
)
class MeanOverProcesses(Subject):
    """Each process divides by the number of its own targets, so tokens of a process with few targets weigh more."""

    num_own = 1

    def count_targets(self, batches: Sequence[Batch]) -> int:
        self.num_own = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
        return super().count_targets(batches)

    def loss_factor(self, batch: Batch, num_targets: int, num_micro_batches: int) -> float:
        return 1 / self.num_own


@fault("divided-by-all-positions", evidence=MADE_UP, cause=r"all positions|padding|number of positions|masked")
class DividedByAllPositions(Subject):
    """The loss is divided by all positions of the step, with prompts and padding, instead of by the targets."""

    def count_targets(self, batches: Sequence[Batch]) -> int:
        return sum(batch["labels"].numel() for batch in batches)


@fault("last-micro-batch-logged", evidence=MADE_UP, cause=r"last micro-batch alone")
class LastMicroBatchLogged(Subject):
    """The logged loss is that of the step's last micro-batch."""

    def train_micro_batch(self, run: LoopState, batch: Batch, num_targets: int, num_micro_batches: int) -> torch.Tensor:
        part = super().train_micro_batch(run, batch, num_targets, num_micro_batches)
        self.last = float(part) * num_targets / max(1, self.count_targets([batch]))
        return part

    def log_entry(self, run: LoopState, loss: float, grad_norm: float) -> dict[str, Any]:
        return super().log_entry(run, self.last, grad_norm)
