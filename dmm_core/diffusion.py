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


def predict_x0(x_t: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x̂0 = (x_t − √(1−ᾱ_t) ε) / √ᾱ_t    DMM (arXiv:2504.12364) Eq. 12."""
    a = alphas_cumprod(x_t.device)[t].view(-1, 1, 1, 1)
    return (x_t - (1 - a).sqrt() * eps) / a.sqrt()
