"""What a UNet does between its matrix products, in one pass over a feature map each, and their gradients.

GroupNorm with SiLU, GEGLU, the sum at the end of a block, LayerNorm's gradient: torch does them in several passes, and
its GroupNorm on CUDA knows maps with the channels first alone: each one turns its map over, and the convolution after
it turns it back (docs/results.md has the times). ``layers.py`` puts them into a UNet, where ``works`` says that they
can be.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

STEP = 32  # positions that a program reads at a time
BLOCK = 1024  # values a program, where they do not depend on each other
TILE = 4096  # values that a program of LayerNorm's gradient reads at a time
PROGRAMS = 1024  # of LayerNorm's gradient, which each leave sums behind


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
    shapes = ((2, 64, 4, 4), (2, 64, 4, 4), (64,), (64,), (2, 64))
    x, h, weight, bias, shift = (torch.randn(*shape, generator=generator).to(device) for shape in shapes)
    x, h = (part.to(memory_format=torch.channels_last) for part in (x, h))
    inputs = [part.requires_grad_() for part in (x, weight, bias, shift)]
    gates, shifted = x.permute(0, 2, 3, 1), x + shift[:, :, None, None]
    pairs = (
        (GroupNormSiLU.apply(x, weight, bias, 4, 1e-5, True, shift), F.silu(F.group_norm(shifted, 4, weight, bias))),
        (Gated.apply(gates), gates[..., :32] * F.gelu(gates[..., 32:])),
        (Plus.apply(x, h, bias), x + h + bias[None, :, None, None]),
        (RowNorm.apply(gates, weight, bias, 1e-5), F.layer_norm(gates, (64,), weight, bias)),
    )
    for pair in pairs:
        said = [(y, *torch.autograd.grad(y.square().sum(), inputs, allow_unused=True)) for y in pair]
        for mine, theirs in zip(*said, strict=True):
            if theirs is not None and not torch.allclose(mine, theirs, rtol=1e-2, atol=1e-2):
                return False
    return True


works = trusts(right)


class GroupNormSiLU(torch.autograd.Function):
    """GroupNorm of a channels-last map (N, C, H, W), then SiLU if wanted; the map's type and layout are kept.

    ``shift`` (N, C) is added to the map before.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool,
        shift: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        from dmm_core import kernels as k

        rows, channels, height, width = x.shape
        positions, size = height * width, channels // groups
        grid = (rows, -(-positions // k.SPAN), -(-channels // k.CHANNELS))
        shifted = {"SHIFT": shift is not None}
        shift = x if shift is None else shift.contiguous()  # the kernels do not look at it where it is none
        each = {**shifted, "SPAN": k.SPAN, "STEP": STEP, "CHANNELS": k.CHANNELS}
        sums = torch.empty(rows, grid[1], 2, channels, device=x.device)
        mean, rstd = torch.empty(2, rows, groups, device=x.device)
        y = torch.empty_like(x)
        k.sums_kernel[grid](x, shift, sums, positions, channels, size, **each)
        k.statistics_kernel[rows, groups](
            x, shift, sums, mean, rstd, grid[1], positions, channels, size, eps, GROUP=_power(size), **shifted
        )  # fmt: skip
        k.normalise_kernel[grid](x, shift, y, mean, rstd, weight, bias, positions, channels, size, SILU=silu, **each)
        ctx.save_for_backward(x, weight, bias, mean, rstd, shift)
        ctx.silu, ctx.grid, ctx.shifted = silu, grid, shifted
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from dmm_core import kernels as k

        x, weight, bias, mean, rstd, shift = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        rows, channels, height, width = x.shape
        groups, positions = mean.shape[1], height * width
        size = channels // groups
        each = {**ctx.shifted, "SILU": ctx.silu, "SPAN": k.SPAN, "STEP": STEP, "CHANNELS": k.CHANNELS}
        sums = torch.empty(rows, ctx.grid[1], 3, channels, device=x.device)
        first, second = torch.empty(2, rows, groups, device=x.device)
        told = (mean, rstd, weight, bias)
        k.gradient_sums_kernel[ctx.grid](x, shift, dy, sums, *told, positions, channels, size, **each)
        dx, dshift = None, torch.empty(0)
        if ctx.needs_input_grad[0] or ctx.shifted["SHIFT"]:
            dx, dshift = torch.empty_like(x), torch.empty(rows, channels, device=x.device)
            k.gradient_means_kernel[rows, groups](
                sums, weight, rstd, first, second, dshift, ctx.grid[1], positions, channels, size, GROUP=_power(size),
                **ctx.shifted,
            )  # fmt: skip
            k.gradient_kernel[ctx.grid](x, shift, dy, dx, *told, first, second, positions, channels, size, **each)
        of_shift = dshift.to(shift.dtype) if ctx.shifted["SHIFT"] else None
        if not ctx.needs_input_grad[1]:
            return dx, None, None, None, None, None, of_shift
        db, dw = sums[:, :, :2].sum((0, 1))
        return dx, dw.to(weight.dtype), db.to(bias.dtype), None, None, None, of_shift


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


class Plus(torch.autograd.Function):
    """x + h + bias (C,) of channels-last maps (N, C, H, W) of one type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, bias: Tensor) -> Tensor:
        from dmm_core import kernels as maps
        from dmm_core import kernels_rows as k

        y, channels = torch.empty_like(x), x.shape[1]
        rows = x.numel() // channels
        grid = (-(-rows // STEP), -(-channels // maps.CHANNELS))
        k.plus_kernel[grid](x, h, bias, y, rows, channels, STEP=STEP, CHANNELS=maps.CHANNELS)
        ctx.dtype = bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy, dy, _over_positions(dy).to(ctx.dtype) if ctx.needs_input_grad[2] else None


class RowNorm(torch.autograd.Function):
    """LayerNorm over the last axis of contiguous rows (…, C), of the weight's type; torch's own, but for the gradient.

    Torch takes the weight's and the bias' gradient in further passes over everything.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, (x.shape[-1],), weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from dmm_core import kernels_rows as k

        x, weight, mean, rstd = ctx.saved_tensors
        dy, dx, channels = dy.contiguous(), torch.empty_like(x), x.shape[-1]
        rows, wide = x.numel() // channels, _power(channels)
        together = max(1, TILE // wide)
        steps = max(1, rows // (together * PROGRAMS))
        programs = -(-rows // (together * steps))
        sums = torch.empty(programs, 2, channels, device=x.device)
        k.row_norm_gradient_kernel[(programs,)](
            x, dy, dx, mean, rstd, weight, sums, rows, channels, steps, ROWS=together, CHANNELS=wide, num_warps=8
        )  # fmt: skip
        if not ctx.needs_input_grad[1]:
            return dx, None, None, None
        dw, db = sums.sum(0)
        return dx, dw.to(weight.dtype), db.to(weight.dtype), None


def _over_positions(x: Tensor) -> Tensor:
    """The sum of a map (N, C, H, W) over all but the channels: (C,), float32."""
    from dmm_core import kernels as maps
    from dmm_core import kernels_rows as k

    x = x.contiguous(memory_format=torch.channels_last)
    channels = x.shape[1]
    rows = x.numel() // channels
    grid = (-(-rows // maps.SPAN), -(-channels // maps.CHANNELS))
    sums = torch.empty(grid[0], channels, device=x.device)
    k.column_sums_kernel[grid](x, sums, rows, channels, SPAN=maps.SPAN, STEP=STEP, CHANNELS=maps.CHANNELS)
    return sums.sum(0)


def _power(count: int) -> int:
    """The next power of two, which Triton's ranges must be."""
    return 1 << max(0, count - 1).bit_length()
