"""What the student is trained on, as pure functions of predictions: DMM (arXiv:2504.12364) §3.4."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmm_core.diffusion import alphas_cumprod

MAX_WEIGHT = 10.0  # of a timestep, before the weights are brought to mean 1


def score_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Eq. 9: squared error between noise predictions (B, C, H, W), a mean a row: (B,), float32."""
    if student.dtype == teacher.dtype and student.dtype in (torch.bfloat16, torch.float16):
        return RowError.apply(student, teacher)
    return F.mse_loss(student.float(), teacher.float(), reduction="none").flatten(1).mean(1)


class RowError(torch.autograd.Function):
    """The same of half-precision maps, without copies in float32, which the backward pass would keep of every block."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        ctx.save_for_backward(student, teacher)
        difference = student - teacher
        axes = tuple(range(1, student.ndim))
        return torch.linalg.vector_norm(difference, dim=axes, dtype=torch.float32).square() / student[0].numel()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        student, teacher = ctx.saved_tensors
        scale = (2 / student[0].numel()) * gradient.view(-1, *[1] * (student.ndim - 1))
        return (student - teacher).mul_(scale), None  # a float32 product, rounded once


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Eq. 10: squared error between the blocks' outputs, each (B, ...), averaged over the blocks: (B,)."""
    if len(student) != len(teacher):
        raise ValueError(f"expected the same blocks, got {len(student)} and {len(teacher)}")
    return torch.stack([score_loss(s, t) for s, t in zip(student, teacher, strict=True)]).mean(0)


def timestep_weights(snr_power: float) -> Tensor:
    """Weight of the score loss at each timestep, SNR^-snr_power held within 1/10 … 10, with mean 1: (1000,).

    0 is Eq. 9 as it stands. An error in ε costs √(1/SNR) as much in x̂0 (Eq. 12), so 1 is the error of x̂0, and values
    between favour the early, noisy steps of sampling, where a picture's shapes are decided.
    """
    a = alphas_cumprod()
    weights = ((1 - a) / a).pow(snr_power).clamp(1 / MAX_WEIGHT, MAX_WEIGHT)
    return weights / weights.mean()


class BlockFeatures:
    """Collects what a diffusers UNet's down, mid and up blocks put out (4 + 1 + 4 in SD1.5) while it is entered.

    ``outputs`` holds the newest forward pass's feature maps (B, C, H, W), in the order of the blocks.
    """

    def __init__(self, unet: Any, enabled: bool = True) -> None:
        self.blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks] if enabled else []
        self.outputs: list[Tensor] = []

    def __enter__(self) -> BlockFeatures:
        self._handles = [block.register_forward_hook(self._keep) for block in self.blocks]
        return self

    def _keep(self, module: Any, inputs: Any, output: Any) -> None:
        # down blocks return (hidden states, residuals)
        self.outputs.append(output[0] if isinstance(output, tuple) else output)

    def take(self) -> list[Tensor]:
        """The collected outputs; the list starts anew."""
        outputs, self.outputs = self.outputs, []
        return outputs

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
