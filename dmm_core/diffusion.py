"""Stable Diffusion's noise schedule: scaled-linear betas from 0.00085 to 0.012 over 1000 timesteps, in one place."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012
SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": BETA_START, "beta_end": BETA_END}


@lru_cache(maxsize=4)
def alphas_cumprod(device: torch.device | str = "cpu") -> Tensor:
    """ᾱ_t, float32 (1000,)."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TIMESTEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float().to(device)


def add_noise(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = √ᾱ_t x0 + √(1−ᾱ_t) ε for latents (B, C, H, W) and timesteps (B,)."""
    a = alphas_cumprod(x0.device)[t].view(-1, 1, 1, 1)
    return a.sqrt() * x0 + (1 - a).sqrt() * noise


def to_epsilon(prediction: Tensor, x_t: Tensor, t: Tensor, prediction_type: str) -> Tensor:
    """ε of what a model says of x_t (B, C, H, W) at t (B,): ε itself, or √ᾱ_t v + √(1−ᾱ_t) x_t (arXiv:2202.00512)."""
    if prediction_type == "epsilon":
        return prediction
    a = alphas_cumprod(x_t.device)[t].view(-1, 1, 1, 1)
    return a.sqrt() * prediction + (1 - a).sqrt() * x_t


def predict_x0(x_t: Tensor, prediction: Tensor, t: Tensor, prediction_type: str = "epsilon") -> Tensor:
    """x̂0 = (x_t − √(1−ᾱ_t) ε) / √ᾱ_t    DMM (arXiv:2504.12364) Eq. 12; of v: √ᾱ_t x_t − √(1−ᾱ_t) v."""
    a = alphas_cumprod(x_t.device)[t].view(-1, 1, 1, 1)
    if prediction_type == "v_prediction":
        return a.sqrt() * x_t - (1 - a).sqrt() * prediction
    return (x_t - (1 - a).sqrt() * prediction) / a.sqrt()


def ddim_step(x_t: Tensor, eps: Tensor, t: Tensor, to: Tensor) -> Tensor:
    """x at the timesteps ``to`` (B,) on the straight way from x_t (B, C, H, W): DDIM (arXiv:2010.02502) Eq. 12, σ = 0.

    Timesteps below 0 are those of clean latents, where ᾱ is 1.
    """
    table = alphas_cumprod(x_t.device)
    a, b = (torch.where(at < 0, 1.0, table[at.clamp(min=0)]).view(-1, 1, 1, 1) for at in (t, to))
    return b.sqrt() * (x_t - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps


@lru_cache(maxsize=1)
def zero_snr_alphas_cumprod() -> Tensor:
    """ᾱ'_t of the schedule that ends in pure noise, float64 (1000,): √ᾱ moved and stretched (arXiv:2305.08891)."""
    roots = alphas_cumprod().double().sqrt()
    return ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))).square()


@lru_cache(maxsize=4)
def zero_snr_times(device: torch.device | str = "cpu") -> Tensor:
    """For every t the time t' at which the zero-terminal-SNR schedule has as much noise, ᾱ'_t' = ᾱ_t: (1000,) float32.

    Between two timesteps log SNR is interpolated. x_t is then the same for both, and a model of that schedule can be
    asked about it; its noisiest times have no counterpart.
    """
    wanted, given = alphas_cumprod().double().logit(), zero_snr_alphas_cumprod()[:-1].logit()  # both fall with t
    right = torch.searchsorted(-given, -wanted).clamp(1, len(given) - 1)
    left = right - 1
    return (left + (given[left] - wanted) / (given[left] - given[right])).clamp(min=0).float().to(device)
