"""GroupNorm with SiLU, and GEGLU, in one pass over the feature map each: what torch does in several.

Torch's GroupNorm on CUDA knows maps with the channels first alone: each one turns its map over, and the convolution
after it turns it back. On an H200 (24 × 320 × 64 × 64, bfloat16, forward and backward) norm and SiLU took 1.26 ms where
the convolution beside them took 0.9 (docs/results.md). Without CUDA, or without a Triton that works, the modules here
do what torch's do.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEP = 32  # positions that a program reads at a time
BLOCK = 1024  # values a program of GEGLU


def trusts(right: Callable[[torch.device], bool]) -> Callable[[torch.device], bool]:
    """Whether Triton is here and builds kernels (it needs a C compiler) that are ``right`` on a device; asked once."""

    @cache
    def works(device: torch.device) -> bool:
        if device.type != "cuda" or not importlib.util.find_spec("triton"):
            return False
        try:
            return right(device)
        except torch.cuda.OutOfMemoryError:  # which says nothing of Triton, and is dealt with elsewhere
            raise
        except Exception:  # whatever the compiler, the driver or Triton itself has to say
            return False

    return works


@torch.enable_grad()  # the first to ask may be a teacher
def right(device: torch.device) -> bool:
    """Whether the kernels say what torch says, and so do their gradients."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((2, 64, 4, 4), (64,), (64,)))
    x, weight, bias = x.to(device, memory_format=torch.channels_last), weight.to(device), bias.to(device)
    gates = x.requires_grad_().permute(0, 2, 3, 1)
    pairs = (
        (GroupNormSiLU.apply(x, weight, bias, 4, 1e-5, True), F.silu(F.group_norm(x, 4, weight, bias))),
        (Gated.apply(gates), gates[..., :32] * F.gelu(gates[..., 32:])),
    )
    said = [[(y, *torch.autograd.grad(y.square().sum(), x)) for y in pair] for pair in pairs]
    return all(
        torch.allclose(a, b, rtol=1e-2, atol=1e-2) for pair in said for a, b in zip(*pair, strict=True)
    )  # fmt: skip


works = trusts(right)


class GroupNormSiLU(torch.autograd.Function):
    """GroupNorm of a channels-last map (N, C, H, W), then SiLU if wanted; the map's type and layout are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        from dmm_core import kernels as k

        rows, channels, height, width = x.shape
        positions, size = height * width, channels // groups
        grid = (rows, -(-positions // k.SPAN), -(-channels // k.CHANNELS))
        each = {"SPAN": k.SPAN, "STEP": STEP, "CHANNELS": k.CHANNELS}
        sums = torch.empty(rows, grid[1], 2, channels, device=x.device)
        mean, rstd = torch.empty(2, rows, groups, device=x.device)
        y = torch.empty_like(x)
        k.sums_kernel[grid](x, sums, positions, channels, size, **each)
        k.statistics_kernel[rows, groups](
            x, sums, mean, rstd, grid[1], positions, channels, size, eps, GROUP=_power(size)
        )  # fmt: skip
        k.normalise_kernel[grid](x, y, mean, rstd, weight, bias, positions, channels, size, SILU=silu, **each)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.silu, ctx.grid = silu, grid
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from dmm_core import kernels as k

        x, weight, bias, mean, rstd = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        rows, channels, height, width = x.shape
        groups, positions = mean.shape[1], height * width
        size = channels // groups
        each = {"SILU": ctx.silu, "SPAN": k.SPAN, "STEP": STEP, "CHANNELS": k.CHANNELS}
        sums = torch.empty(rows, ctx.grid[1], 2, channels, device=x.device)
        first, second = torch.empty(2, rows, groups, device=x.device)
        told = (mean, rstd, weight, bias)
        k.gradient_sums_kernel[ctx.grid](x, dy, sums, *told, positions, channels, size, **each)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            k.gradient_means_kernel[rows, groups](
                sums, weight, first, second, ctx.grid[1], positions, channels, size, GROUP=_power(size)
            )  # fmt: skip
            k.gradient_kernel[ctx.grid](x, dy, dx, *told, first, second, positions, channels, size, **each)
        if not ctx.needs_input_grad[1]:
            return dx, None, None, None, None, None
        db, dw = sums.sum((0, 1))
        return dx, dw.to(weight.dtype), db.to(bias.dtype), None, None, None


class Gated(torch.autograd.Function):
    """a · gelu(g) (…, W) of a contiguous [a, g] (…, 2W)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        from dmm_core import kernels as k

        y = torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=x.dtype, device=x.device)
        k.geglu_kernel[(-(-y.numel() // BLOCK),)](x, y, y.numel(), y.shape[-1], BLOCK=BLOCK)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        from dmm_core import kernels as k

        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        grid = (-(-dy.numel() // BLOCK),)
        k.geglu_gradient_kernel[grid](x, dy.contiguous(), dx, dy.numel(), dy.shape[-1], BLOCK=BLOCK)
        return dx


class Norm(nn.GroupNorm):
    """A stock GroupNorm that does the SiLU after it, if ``silu``, and both in one pass where the map allows it."""

    silu = False

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4 and works(x.device) and x.is_contiguous(memory_format=torch.channels_last):
            return GroupNormSiLU.apply(x, self.weight, self.bias, self.num_groups, self.eps, self.silu)
        y = super().forward(x)
        return F.silu(y) if self.silu else y


class AfterNorm(nn.Module):
    """In place of a block's SiLU: the maps have been through it in ``Norm``, the time embedding (N, d) has not."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.ndim == 4 else F.silu(x)


def _geglu(self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """diffusers' GEGLU.forward, whose further arguments have no meaning."""
    x = self.proj(hidden)
    if works(x.device) and x.is_contiguous():
        return Gated.apply(x)
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def fuse(unet: nn.Module) -> None:
    """Let a diffusers UNet do so, in place. Its parameters keep their names, and may be overwritten afterwards."""
    for module in unet.modules():
        kind = type(module).__name__
        if kind == "ResnetBlock2D" and isinstance(module.nonlinearity, nn.SiLU):
            if module.time_embedding_norm == "default":
                _take_over(module.norm1, silu=True)
                _take_over(module.norm2, silu=True)
                module.nonlinearity = AfterNorm()
        elif kind == "Transformer2DModel" and isinstance(module.norm, nn.GroupNorm):
            _take_over(module.norm, silu=False)
        elif kind == "GEGLU":
            module.__class__ = type(kind, (type(module),), {"forward": _geglu})
    if isinstance(getattr(unet, "conv_act", None), nn.SiLU):
        _take_over(unet.conv_norm_out, silu=True)
        unet.conv_act = nn.Identity()


def _take_over(norm: nn.GroupNorm, silu: bool) -> None:
    norm.__class__, norm.silu = Norm, silu


def _power(count: int) -> int:
    """The next power of two, which Triton's ranges must be."""
    return 1 << max(0, count - 1).bit_length()
