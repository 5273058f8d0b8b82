"""Train the mini family's autoencoder: the TAESD shape (diffusers ``AutoencoderTiny``), 64×64 pictures ↔ 4×8×8 latents.

Noise on the latents in training makes neighbours decode alike, and a penalty keeps every channel near N(0, 1), so that
the UNet sees latents on the scale it expects (``scaling_factor`` 1).

    python -m mini_family.autoencoder --data build/mini --minutes 25
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny

from mini_family.draw import STYLES
from mini_family.names import subjects

BATCH = 16
LATENT_NOISE = 0.08


def training_pictures(data: Path) -> torch.Tensor:
    """All pictures of names that are not held out, and the extra ones: uint8 (n, 3, 64, 64)."""
    held = set(subjects(held=True))
    stacks = []
    for style in STYLES:
        file = np.load(data / f"{style}.npz")
        seen = [i for i, name in enumerate(file["names"]) if name not in held]
        stacks += [file["pictures"][seen].reshape(-1, 64, 64, 3), file["extra"]]
    return torch.from_numpy(np.concatenate(stacks)).permute(0, 3, 1, 2).contiguous()


def picture_loss(made: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """L1 of values and of their differences to the next pixel (edges): pictures (B, 3, H, W) in [0, 1]."""
    loss = F.l1_loss(made, real) + 0.5 * F.mse_loss(made, real).sqrt()
    for dim in (2, 3):
        loss = loss + F.l1_loss(made.diff(dim=dim), real.diff(dim=dim))
    return loss


def latent_penalty(z: torch.Tensor) -> torch.Tensor:
    """Distance of each latent channel's mean and deviation from 0 and 1, and of values from the clamp at ±3."""
    channel = z.transpose(0, 1).flatten(1)
    return (
        channel.mean(1).square().mean() + (channel.std(1) - 1).square().mean() + F.relu(z.abs() - 2.5).square().mean()
    )


def step_loss(vae: AutoencoderTiny, real: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        z = vae.encoder(real * 2 - 1)  # diffusers: pictures in [-1, 1]
    z = z.float()
    with torch.autocast("cpu", torch.bfloat16):
        made = vae.decoder(z + LATENT_NOISE * torch.randn_like(z))
    return picture_loss((made.float() + 1) / 2, real) + 0.05 * latent_penalty(z)


def train(data: Path, minutes: float, start: AutoencoderTiny | None = None, lr: float = 1e-3) -> AutoencoderTiny:
    """Train for a time, the learning rate falling as a cosine over it."""
    pictures = training_pictures(data)
    vae = (start or AutoencoderTiny()).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    began, step = time.time(), 0
    while (done := (time.time() - began) / (60 * minutes)) < 1:
        optimizer.param_groups[0]["lr"] = (
            lr * min(1, (step + 1) / 100) * (0.02 + 0.98 * (0.5 + 0.5 * np.cos(np.pi * done)))
        )
        real = (
            pictures[torch.randint(len(pictures), (BATCH,))]
            .float()
            .div(255)
            .contiguous(memory_format=torch.channels_last)
        )
        loss = step_loss(vae, real)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(f"step {step} {done:.0%} loss {loss.item():.4f}", flush=True)
    return vae.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--more", action="store_true", help="go on from what is there")
    args = parser.parse_args()
    torch.manual_seed(0)
    out = args.data / "vae"
    vae = train(args.data, args.minutes, AutoencoderTiny.from_pretrained(out) if args.more else None, args.lr)
    vae.to(memory_format=torch.contiguous_format).save_pretrained(out)


if __name__ == "__main__":
    main()
