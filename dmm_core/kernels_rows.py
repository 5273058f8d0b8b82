"""Triton kernels on rows of C channels (M, C): tokens, and the positions of a map with the channels last.

``fused.py`` calls them. Sums are taken in float32, whatever the type.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def plus_kernel(x_ptr, h_ptr, bias_ptr, y_ptr, rows, channels, STEP: tl.constexpr, CHANNELS: tl.constexpr):
    """y = x + h + bias."""
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    r = tl.program_id(0).to(tl.int64) * STEP + tl.arange(0, STEP)
    inside = (r < rows)[:, None] & (c < channels)[None, :]
    at = r[:, None] * channels + c[None, :]
    bias = tl.load(bias_ptr + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    x = tl.load(x_ptr + at, mask=inside).to(tl.float32)
    h = tl.load(h_ptr + at, mask=inside).to(tl.float32)
    tl.store(y_ptr + at, (x + h + bias).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def column_sums_kernel(
    x_ptr, sums_ptr, rows, channels, SPAN: tl.constexpr, STEP: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Σx of each channel over a span of rows: sums (spans, C)."""
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([STEP, CHANNELS], tl.float32)
    for start in range(0, SPAN, STEP):
        r = tl.program_id(0).to(tl.int64) * SPAN + start + tl.arange(0, STEP)
        inside = (r < rows)[:, None] & (c < channels)[None, :]
        total += tl.load(x_ptr + r[:, None] * channels + c[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(sums_ptr + tl.program_id(0) * channels + c, tl.sum(total, 0), mask=c < channels)


@triton.jit
def row_norm_gradient_kernel(
    x_ptr, dy_ptr, dx_ptr, mean_ptr, rstd_ptr, weight_ptr, sums_ptr, rows, channels, steps,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx = (dy·w − mean(dy·w) − x̂ mean(dy·w·x̂)) / σ of rows; and Σdy·x̂ and Σdy of each program: sums (P, 2, C)."""
    program = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CHANNELS)
    there = c < channels
    weight = tl.load(weight_ptr + c, mask=there, other=0.0).to(tl.float32)[None, :]
    slope, offset = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
    for step in range(0, steps):
        r = (program * steps + step) * ROWS + tl.arange(0, ROWS)
        inside = (r < rows)[:, None] & there[None, :]
        at = r[:, None] * channels + c[None, :]
        mean = tl.load(mean_ptr + r, mask=r < rows, other=0.0).to(tl.float32)[:, None]
        rstd = tl.load(rstd_ptr + r, mask=r < rows, other=0.0).to(tl.float32)[:, None]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        unit = tl.where(inside, (x - mean) * rstd, 0.0)
        dz = dy * weight
        first, second = tl.sum(dz, 1)[:, None] / channels, tl.sum(dz * unit, 1)[:, None] / channels
        dx = (dz - first - unit * second) * rstd
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        slope += tl.sum(dy * unit, 0)
        offset += tl.sum(dy, 0)
    to = sums_ptr + program * 2 * channels + c
    tl.store(to, slope, mask=there)
    tl.store(to + channels, offset, mask=there)
