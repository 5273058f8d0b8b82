"""Optimizers by themselves: rounding at random, AdamW for bfloat16 weights, 8-bit moments."""

from __future__ import annotations

import pytest
import torch

from dmm_core.adamw import TOGETHER, StochasticAdamW, round_at_random_
from dmm_core.optim import StudentOptimizer
from dmm_core.recipe import TrainSpec


def test_stochastic_rounding_is_unbiased_and_exact_where_it_can_be():
    generator = torch.Generator().manual_seed(0)

    def rounded_of(x):
        round_at_random_(x := x.clone(), generator)
        assert torch.equal(x, x.bfloat16().float()), "a bfloat16's value"
        return x

    exact = torch.tensor([0.0, 1.0, -3.5, 2.0**-120, -(2.0**100)])
    assert torch.equal(rounded_of(exact), exact)
    x = torch.tensor([0.1, -0.7, 123.456, 1 + 2.0**-12, -1e-30])
    rounded = rounded_of(x.expand(200_000, -1).contiguous())
    apart = 2.0 ** (x.abs().log2().floor() - 7)  # distance of two neighbours, with 8 significant bits
    assert (rounded - x).abs().le(apart).all() and all(len(column.unique()) == 2 for column in rounded.T)
    error = (rounded.double().mean(0) - x).abs() / apart
    assert (error < 5 * 0.5 / 200_000**0.5).all()  # five standard errors; rounding to nearest would be off by up to 0.5


def test_what_is_no_number_stays_none():
    """CUDA's NaN is 0x7FFFFFFF: with any noise added, and cut off, it would be -0."""
    x = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800000], dtype=torch.int32).view(torch.float32).repeat(64)
    round_at_random_(x, torch.Generator().manual_seed(0))
    assert x[0::3].isnan().all() and x[1::3].isnan().all() and x[2::3].isposinf().all()


@pytest.mark.parametrize(("rounds", "progress"), [("at random", True), ("to nearest", False)])
def test_small_steps_add_up_only_when_rounded_at_random(rounds, progress):
    """Steps of 1e-4 on weights near 1, whose neighbours are 0.004 away: w → 1.05 within 1000 steps, or never."""
    w = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    group = [{"params": [w]}]
    settings = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0}
    if rounds == "at random":
        optimizer = StochasticAdamW(group, {w: 0}, 0, **settings)
        optimizer.state[w] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros(64), "exp_avg_sq": torch.zeros(64)}
    else:
        optimizer = torch.optim.AdamW(group, **settings)
    for _ in range(600):
        optimizer.zero_grad()
        (w.float() - 1.05).square().sum().backward()
        optimizer.step()
    assert (w.float().mean().item() > 1.04) is progress and (w.float().eq(1).all().item()) is not progress


def test_stochastic_adamw_is_adamw_for_float32():
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 50)) for _ in range(2))
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    a = StochasticAdamW([{"params": [ours]}], {ours: 0}, 0, **settings)
    a.state[ours] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros(50), "exp_avg_sq": torch.zeros(50)}
    b = torch.optim.AdamW([theirs], **settings)
    for _ in range(5):
        for w, optimizer in ((ours, a), (theirs, b)):
            w.grad = torch.sin(3 * w.detach())
            optimizer.step()
    assert torch.allclose(ours, theirs, atol=1e-6) and not torch.allclose(ours, torch.linspace(-1, 1, 50), atol=1e-3)


def test_weights_are_stepped_together_in_any_layout():
    """Channels-last, transposed and large weights beside others: each as if it were alone, but for the rounding."""
    generator = torch.Generator().manual_seed(0)
    shapes = [torch.randn(4, 3, 2, 2, generator=generator).to(memory_format=torch.channels_last),
              torch.randn(5, 7, generator=generator).T, torch.randn(TOGETHER // 1000, 1001, generator=generator),
              torch.ones(())]  # fmt: skip
    wide = [torch.nn.Parameter(x.bfloat16().float()) for x in shapes]
    narrow = [torch.nn.Parameter(x.bfloat16()) for x in shapes]
    spec = TrainSpec(weights="bf16", lr=1e-2)
    ours = StudentOptimizer([(narrow, 1e-2)], spec, torch.device("cpu"))
    theirs = torch.optim.AdamW(wide, lr=1e-2, weight_decay=spec.weight_decay)
    for a, b in zip(narrow, wide, strict=True):
        a.grad = torch.randn(a.shape, generator=generator).bfloat16()
        b.grad = a.grad.float()
    ours.begin(1.0, 0)
    ours.optimizers[0].step()
    theirs.step()
    for a, b in zip(narrow, wide, strict=True):
        apart = 2.0 ** (b.abs().clamp(min=1e-30).log2().floor() - 7)  # distance of two neighbours
        assert (((a.float() - b).abs() <= apart * 1.01).all() and not torch.equal(a, b.bfloat16())) or a.numel() == 1


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_eight_bit_moments_train_and_resume(dtype, fused, device):
    """bitsandbytes' kernels; a transposed weight too. Run by name where that library is installed."""
    pytest.importorskip("bitsandbytes")
    spec = TrainSpec(optimizer="adamw8bit", fused_backward=fused, lr=1e-3, weight_decay=0.0)
    goal = torch.linspace(-1, 1, 8192, device=device).view(64, 128)

    def optimizer():
        zeros = [torch.zeros(64, 128, dtype=dtype), torch.zeros(8), torch.zeros(128, 64, dtype=dtype).T]
        weights = [torch.nn.Parameter(x.to(device)) for x in zeros]
        groups = [([weights[0]], 1e-3), ([weights[1]], 1e-2), ([weights[2]], 1e-3)]
        return weights, StudentOptimizer(groups, spec, torch.device(device))

    def step(weights, mine, number):
        mine.begin(1.0, number)
        apart = [weights[0].float() - goal, weights[1] - 1, weights[2].float() - goal]
        sum(x.square().sum() for x in apart).backward()
        mine.step(torch.amp.GradScaler(device, enabled=False))
        mine.zero_grad()

    weights, straight = optimizer()
    for number in range(5):
        step(weights, straight, number)
    assert straight.state()["0.codes1"].dtype == torch.uint8 and straight.state()["1.exp_avg"].dtype == torch.float32
    for large in (weights[0], weights[2]):
        assert large[:32].mean().item() == pytest.approx(-5e-3, rel=0.1)
    assert weights[1].mean().item() == pytest.approx(5e-2, rel=0.1)
    again, resumed = optimizer()
    resumed.load_state({key: value.clone() for key, value in straight.state().items()})
    for mine, theirs in zip(again, weights, strict=True):
        mine.data.copy_(theirs)
    step(weights, straight, 5)
    step(again, resumed, 5)
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
