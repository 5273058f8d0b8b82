"""AdamW of many tensors in one launch against torch's, and its rounding."""

from __future__ import annotations

import os

import pytest
import torch

from dmm_core import at_once, fused
from tests.unit.test_fused import DEVICE, needs_triton

pytestmark = needs_triton
GROUP = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
assert DEVICE == "cuda" or os.environ["TRITON_INTERPRET"]


def weights_of(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """More than a program updates, less, and one with its channels last."""
    made = [torch.randn(5000), torch.randn(64), torch.randn(3, 8, 3, 3).to(memory_format=torch.channels_last)]
    return [torch.nn.Parameter(tensor.to(DEVICE, dtype)) for tensor in made]


def states_of(weights) -> list[dict]:
    zeros = lambda p: torch.zeros_like(p, dtype=torch.float32)  # noqa: E731
    return [{"exp_avg": zeros(p), "exp_avg_sq": zeros(p), "step": torch.zeros((), device=DEVICE)} for p in weights]


def step(weights, states, number, most=1.0, seed=3):
    clip = at_once.clip_factor([p.grad for p in weights], most)
    at_once.adamw_at_once(weights, states, GROUP, clip, number, seed)


@pytest.mark.parametrize("most", [None, 1.0])
def test_float32_is_torchs(most):
    weights = weights_of(torch.float32)
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in weights]
    optimizer, states = torch.optim.AdamW(theirs, **GROUP), states_of(weights)
    for number in range(3):
        for mine, other in zip(weights, theirs, strict=True):
            mine.grad = 3 * torch.randn_like(mine)
            other.grad = mine.grad.clone()
        step(weights, states, number, most)
        if most:
            torch.nn.utils.clip_grad_norm_(theirs, most)
        optimizer.step()
    for mine, other, state in zip(weights, theirs, states, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(state["exp_avg_sq"], optimizer.state[other]["exp_avg_sq"], rtol=1e-5, atol=1e-9)
        assert state["step"] == 3


def test_bfloat16_is_rounded_to_a_neighbour_and_right_on_average():
    weights = weights_of(torch.bfloat16)
    exact = [torch.nn.Parameter(p.detach().float()) for p in weights]
    gradients = [torch.randn_like(p) for p in weights]
    for mine, other, gradient in zip(weights, exact, gradients, strict=True):
        mine.grad, other.grad = gradient, gradient.float()
    begun = [p.detach().clone() for p in weights]
    torch.optim.AdamW(exact, **GROUP).step()
    told = []
    for seed in range(24):
        for p, before in zip(weights, begun, strict=True):
            p.data.copy_(before)
        step(weights, states_of(weights), 0, None, seed)
        told.append([p.detach().float() for p in weights])
    for i, wanted in enumerate(exact):
        seen = torch.stack([one[i] for one in told])
        ulp = 2.0 ** (wanted.detach().abs().log2().floor() - 7)
        assert ((seen - wanted).abs() <= 1.001 * ulp).all() and (seen != seen[0]).any()
        assert ((seen.mean(0) - wanted) / ulp).mean().abs() < 0.05


def test_the_same_step_is_rounded_alike_and_another_one_is_not():
    told = []
    for seed, number in ((3, 0), (3, 0), (3, 1), (4, 0)):
        torch.manual_seed(0)
        weights = weights_of(torch.bfloat16)
        for p in weights:
            p.grad = torch.ones_like(p)
        states = states_of(weights)
        step(weights, states, number, None, seed)
        told.append(torch.cat([p.detach().flatten() for p in weights]))
    assert torch.equal(told[0], told[1]) and not torch.equal(told[0], told[2]) and not torch.equal(told[0], told[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_no_number_is_seen_in_the_weights(dtype):
    weights = weights_of(dtype)
    for p in weights:
        p.grad = torch.full_like(p, torch.nan)
    step(weights, states_of(weights), 0)
    assert all(p.isnan().all() for p in weights)


def test_a_gradient_laid_out_otherwise():
    """Its values meet the weights they belong to."""
    (*_, p), (*_, other) = weights_of(torch.float32), weights_of(torch.float32)
    other.data.copy_(p)
    gradient = torch.randn(p.shape, device=DEVICE)
    p.grad, other.grad = gradient.clone(memory_format=torch.channels_last), gradient.contiguous()
    for weight in (p, other):
        step([weight], states_of([weight]), 0, None)
    assert torch.equal(p, other)


def test_which_weights_lie_as_the_kernel_needs_them():
    whole = torch.zeros(64, 8, device=DEVICE)
    assert at_once.fits([whole, whole.t(), whole[1:]])
    assert not at_once.fits([whole[:, :4]]) and not at_once.fits([whole.flatten()[1:]])
    assert not at_once.fits([whole.half()])


def test_what_is_asked_of_a_device_before_it_is_trusted(monkeypatch):
    device = torch.device(DEVICE)
    with torch.no_grad():
        assert fused.right(device) and at_once.right(device)
    monkeypatch.setattr(at_once, "adamw_at_once", lambda *args: None)
    monkeypatch.setattr(fused.Gated, "apply", lambda x: x[..., :32])
    assert not fused.right(device) and not at_once.right(device)
