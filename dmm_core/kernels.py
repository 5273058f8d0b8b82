"""Triton kernels for what a UNet does between its convolutions, on feature maps with the channels last; and AdamW.

``fused.py`` and ``at_once.py`` call them. A map is (N, H·W, C) in memory; sums are taken in float32, whatever its type.
Before it is normalised, a map may be shifted by s (N, C): what a time embedding and a convolution's bias add to it.
"""

from __future__ import annotations

import triton
import triton.language as tl

SPAN = 128  # positions (of H·W) that one program sums up
CHANNELS = 64  # that one program reads side by side: 128 bytes of bfloat16


@triton.jit
def normed(x, mean, rstd, weight, bias):
    return (x - mean) * rstd * weight + bias


@triton.jit
def of_channels(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, row, c, channels, size):
    """Mean and 1/σ of these channels' groups, and their weights and biases: (1, channels) each."""
    there = c < channels
    group = row * (channels // size) + c // size
    mean, rstd = tl.load(mean_ptr + group, mask=there), tl.load(rstd_ptr + group, mask=there)
    weight, bias = tl.load(weight_ptr + c, mask=there), tl.load(bias_ptr + c, mask=there)
    return mean[None, :], rstd[None, :], weight.to(tl.float32)[None, :], bias.to(tl.float32)[None, :]


@triton.jit
def shift_of(shift_ptr, row, c, channels, SHIFT: tl.constexpr):
    """What is added to these channels of a row."""
    shift = (c * 0).to(tl.float32)
    if SHIFT:
        shift = tl.load(shift_ptr + row * channels + c, mask=c < channels, other=0.0).to(tl.float32)
    return shift


@triton.jit
def silu_gradient(z):
    s = tl.sigmoid(z)
    return s * (1 + z * (1 - s))


@triton.jit
def sums_kernel(
    x_ptr, shift_ptr, sums_ptr, positions, channels, size,
    SHIFT: tl.constexpr, SPAN: tl.constexpr, STEP: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Σ(x − k) and Σ(x − k)² of each channel over a span of positions: sums (N, spans, 2, C).

    k is the first value of the channel's group: where all are far from 0, their squares would hide the variance.
    """
    row, span, spans = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    leader = (c // size) * size
    near = tl.load(x_ptr + row * positions * channels + leader, mask=c < channels, other=0.0).to(tl.float32)
    near += shift_of(shift_ptr, row, leader, channels, SHIFT)
    shift = shift_of(shift_ptr, row, c, channels, SHIFT)
    first, square = tl.zeros([STEP, CHANNELS], tl.float32), tl.zeros([STEP, CHANNELS], tl.float32)
    for start in tl.static_range(0, SPAN, STEP):
        p = span * SPAN + start + tl.arange(0, STEP)
        inside = (p < positions)[:, None] & (c < channels)[None, :]
        at = x_ptr + row * positions * channels + p[:, None] * channels + c[None, :]
        x = tl.load(at, mask=inside, other=0.0).to(tl.float32) + shift[None, :]
        x = tl.where(inside, x - near[None, :], 0.0)
        first += x
        square += x * x
    to = sums_ptr + (row * spans + span) * 2 * channels + c
    tl.store(to, tl.sum(first, 0), mask=c < channels)
    tl.store(to + channels, tl.sum(square, 0), mask=c < channels)


@triton.jit
def over_spans(
    sums_ptr, which: tl.constexpr, kinds: tl.constexpr, row, c, inside, spans, channels, GROUP: tl.constexpr
):  # fmt: skip
    """Sums of one of several kinds of these channels, over all spans."""
    total = tl.zeros([GROUP], tl.float32)
    for span in range(0, spans):
        total += tl.load(sums_ptr + ((row * spans + span) * kinds + which) * channels + c, mask=inside, other=0.0)
    return total


@triton.jit
def statistics_kernel(
    x_ptr, shift_ptr, sums_ptr, mean_ptr, rstd_ptr, spans, positions, channels, size, eps,
    SHIFT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Mean and 1/σ of each group of ``size`` channels: (N, G)."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    inside = tl.arange(0, GROUP) < size
    c = group * size + tl.arange(0, GROUP)
    first = over_spans(sums_ptr, 0, 2, row, c, inside, spans, channels, GROUP)
    square = over_spans(sums_ptr, 1, 2, row, c, inside, spans, channels, GROUP)
    count = positions * size * 1.0
    mean = tl.sum(first, 0) / count
    variance = tl.maximum(tl.sum(square, 0) / count - mean * mean, 0.0)
    near = tl.load(x_ptr + row * positions * channels + group * size).to(tl.float32)
    if SHIFT:
        near += tl.load(shift_ptr + row * channels + group * size).to(tl.float32)
    to = row * tl.num_programs(1) + group
    tl.store(mean_ptr + to, mean + near)
    tl.store(rstd_ptr + to, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def normalise_kernel(
    x_ptr, shift_ptr, y_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, positions, channels, size,
    SHIFT: tl.constexpr, SILU: tl.constexpr, SPAN: tl.constexpr, STEP: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row, span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    there = c < channels
    mean, rstd, weight, bias = of_channels(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, row, c, channels, size)
    mean -= shift_of(shift_ptr, row, c, channels, SHIFT)[None, :]
    for start in tl.static_range(0, SPAN, STEP):
        p = span * SPAN + start + tl.arange(0, STEP)
        inside = (p < positions)[:, None] & there[None, :]
        at = row * positions * channels + p[:, None] * channels + c[None, :]
        x = tl.load(x_ptr + at, mask=inside).to(tl.float32)
        z = normed(x, mean, rstd, weight, bias)
        if SILU:
            z = z * tl.sigmoid(z)
        tl.store(y_ptr + at, z.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gradient_sums_kernel(
    x_ptr, shift_ptr, dy_ptr, sums_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, positions, channels, size,
    SHIFT: tl.constexpr, SILU: tl.constexpr, SPAN: tl.constexpr, STEP: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Σdz, Σdz·x̂ and Σx̂ of each channel over a span of positions: sums (N, spans, 3, C)."""
    row, span, spans = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    there = c < channels
    mean, rstd, weight, bias = of_channels(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, row, c, channels, size)
    mean -= shift_of(shift_ptr, row, c, channels, SHIFT)[None, :]
    first, second = tl.zeros([STEP, CHANNELS], tl.float32), tl.zeros([STEP, CHANNELS], tl.float32)
    units = tl.zeros([STEP, CHANNELS], tl.float32)
    for start in range(0, SPAN, STEP):
        p = span * SPAN + start + tl.arange(0, STEP)
        inside = (p < positions)[:, None] & there[None, :]
        at = row * positions * channels + p[:, None] * channels + c[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dz = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if SILU:
            dz *= silu_gradient(normed(x, mean, rstd, weight, bias))
        unit = tl.where(inside, (x - mean) * rstd, 0.0)
        first += dz
        second += dz * unit
        if SHIFT:
            units += unit
    to = sums_ptr + (row * spans + span) * 3 * channels + c
    tl.store(to, tl.sum(first, 0), mask=there)
    tl.store(to + channels, tl.sum(second, 0), mask=there)
    tl.store(to + 2 * channels, tl.sum(units, 0), mask=there)


@triton.jit
def gradient_means_kernel(
    sums_ptr, weight_ptr, rstd_ptr, first_ptr, second_ptr, dshift_ptr, spans, positions, channels, size,
    SHIFT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The means of dz·w and dz·w·x̂ over each group: (N, G); and the shift's gradient, the sum of dx: (N, C)."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    inside = tl.arange(0, GROUP) < size
    c = group * size + tl.arange(0, GROUP)
    weight = tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
    first = over_spans(sums_ptr, 0, 3, row, c, inside, spans, channels, GROUP)
    second = over_spans(sums_ptr, 1, 3, row, c, inside, spans, channels, GROUP)
    count = positions * size * 1.0
    to = row * tl.num_programs(1) + group
    first_mean, second_mean = tl.sum(first * weight, 0) / count, tl.sum(second * weight, 0) / count
    tl.store(first_ptr + to, first_mean)
    tl.store(second_ptr + to, second_mean)
    if SHIFT:
        units = over_spans(sums_ptr, 2, 3, row, c, inside, spans, channels, GROUP)
        total = (first * weight - positions * first_mean - units * second_mean) * tl.load(rstd_ptr + to)
        tl.store(dshift_ptr + row * channels + c, total, mask=inside)


@triton.jit
def gradient_kernel(
    x_ptr, shift_ptr, dy_ptr, dx_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, first_ptr, second_ptr,
    positions, channels, size,
    SHIFT: tl.constexpr, SILU: tl.constexpr, SPAN: tl.constexpr, STEP: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx = (dz·w − mean(dz·w) − x̂ mean(dz·w·x̂)) / σ."""
    row, span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    there = c < channels
    mean, rstd, weight, bias = of_channels(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, row, c, channels, size)
    mean -= shift_of(shift_ptr, row, c, channels, SHIFT)[None, :]
    group = row * (channels // size) + c // size
    first = tl.load(first_ptr + group, mask=there)[None, :]
    second = tl.load(second_ptr + group, mask=there)[None, :]
    for start in range(0, SPAN, STEP):
        p = span * SPAN + start + tl.arange(0, STEP)
        inside = (p < positions)[:, None] & there[None, :]
        at = row * positions * channels + p[:, None] * channels + c[None, :]
        x = tl.load(x_ptr + at, mask=inside).to(tl.float32)
        dz = tl.load(dy_ptr + at, mask=inside).to(tl.float32)
        if SILU:
            dz *= silu_gradient(normed(x, mean, rstd, weight, bias))
        unit = (x - mean) * rstd
        dx = (dz * weight - first - unit * second) * rstd
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gelu_parts(gate):
    """Φ(g), and the derivative of g·Φ(g)."""
    share = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
    return share, share + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327


@triton.jit
def geglu_kernel(x_ptr, y_ptr, count, width, BLOCK: tl.constexpr):
    """y (R, W) = a · gelu(g) of x (R, 2W) = [a, g]."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < count
    at = x_ptr + i + (i // width) * width
    value = tl.load(at, mask=there).to(tl.float32)
    gate = tl.load(at + width, mask=there).to(tl.float32)
    share, _slope = gelu_parts(gate)
    tl.store(y_ptr + i, (value * gate * share).to(y_ptr.dtype.element_ty), mask=there)


@triton.jit
def geglu_gradient_kernel(x_ptr, dy_ptr, dx_ptr, count, width, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < count
    at = i + (i // width) * width
    value = tl.load(x_ptr + at, mask=there).to(tl.float32)
    gate = tl.load(x_ptr + at + width, mask=there).to(tl.float32)
    dy = tl.load(dy_ptr + i, mask=there).to(tl.float32)
    share, slope = gelu_parts(gate)
    tl.store(dx_ptr + at, (dy * gate * share).to(dx_ptr.dtype.element_ty), mask=there)
    tl.store(dx_ptr + at + width, (dy * value * slope).to(dx_ptr.dtype.element_ty), mask=there)


@triton.jit
def adamw_values(
    weight, gradient, first, second, there, noise, clip, lr, beta1, beta2, eps, decay, step_size, root,
    NARROW: tl.constexpr,
):  # fmt: skip
    """Update the values at these addresses; ``there``: None, or which of them are values."""
    p = tl.load(weight, mask=there).to(tl.float32)
    g = tl.load(gradient, mask=there).to(tl.float32) * clip
    m = beta1 * tl.load(first, mask=there) + (1 - beta1) * g
    v = beta2 * tl.load(second, mask=there) + (1 - beta2) * g * g
    p = p * (1 - lr * decay) - step_size * m / (tl.sqrt(v) / root + eps)
    tl.store(first, m, mask=there)
    tl.store(second, v, mask=there)
    if NARROW:  # to one of the two neighbours, so that the expected value is p (adamw.round_at_random_)
        bits = (p.to(tl.uint32, bitcast=True) + (noise & 0xFFFF)) & 0xFFFF0000
        p = tl.where(p == p, bits.to(tl.float32, bitcast=True), p)  # the sum could make a NaN a 0
    tl.store(weight, p.to(weight.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["seed"])
def adamw_kernel(
    places_ptr, sizes_ptr, owner_ptr, start_ptr, clip_ptr, count, seed, lr, beta1, beta2, eps, decay, step_size, root,
    NARROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """AdamW of many tensors at once; a program updates ``BLOCK`` values of one of them.

    ``places`` (4, count): addresses, multiples of 16, of weights, gradients (of one type, bfloat16 if ``NARROW``), and
    moments (float32).
    """
    owner = tl.load(owner_ptr + tl.program_id(0))
    start = tl.multiple_of(tl.load(start_ptr + tl.program_id(0)), BLOCK)
    size = tl.load(sizes_ptr + owner)
    i = start + tl.arange(0, BLOCK)
    kind = tl.bfloat16 if NARROW else tl.float32
    at = places_ptr + owner
    weight = tl.multiple_of(tl.load(at).to(tl.pointer_type(kind)), 16) + i
    gradient = tl.multiple_of(tl.load(at + count).to(tl.pointer_type(kind)), 16) + i
    first = tl.multiple_of(tl.load(at + 2 * count).to(tl.pointer_type(tl.float32)), 16) + i
    second = tl.multiple_of(tl.load(at + 3 * count).to(tl.pointer_type(tl.float32)), 16) + i
    noise = tl.randint((seed.to(tl.int64) << 32) + owner, i.to(tl.int32), n_rounds=7).to(tl.uint32, bitcast=True)
    clip = tl.load(clip_ptr)
    if start + BLOCK <= size:  # without a mask, which would keep the addresses from being read several at a time
        adamw_values(weight, gradient, first, second, None, noise, clip,
                     lr, beta1, beta2, eps, decay, step_size, root, NARROW)  # fmt: skip
    else:
        adamw_values(weight, gradient, first, second, i < size, noise, clip,
                     lr, beta1, beta2, eps, decay, step_size, root, NARROW)  # fmt: skip
