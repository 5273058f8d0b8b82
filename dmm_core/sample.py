"""Pictures without a host: DPM-Solver++ (2M) with classifier-free guidance, one style vector a row.

Students made for few steps (``fewstep.py``) are sampled by DDIM, which hosts call Euler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmm_core.conditioning import Context, encode_prompts, predict
from dmm_core.diffusion import SCHEDULER
from dmm_core.economy import Rows
from dmm_core.environment import importing
from dmm_core.models import Pipeline


def initial_noise(seeds: Sequence[int], size: tuple[int, int] = (8, 8)) -> Tensor:
    """One latent (4, h, w) a seed, drawn on the CPU so that every device starts alike: (B, 4, h, w)."""
    return torch.stack([torch.randn(4, *size, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds])


@torch.no_grad()
def sample_latents(
    unet: Any,
    context: Context,
    noise: Tensor,
    *,
    steps: int = 12,
    cfg_scale: float = 1.0,
    negative: Context | None = None,
    style: Tensor | None = None,
    prediction_type: str = "epsilon",
    zero_snr: bool = False,
    few_step: bool = False,
) -> Tensor:
    """Latents (B, 4, h, w) from noise of that shape.

    Args:
        context: embeddings of B prompts.
        negative: embedding of the one negative prompt; needed where ``cfg_scale`` is not 1.
        style: style vectors (B, d) or (d,) for a UNet that takes them; both halves of CFG get the same.
        few_step: for a student of such steps.
    """
    scheduler = scheduler_of(steps, prediction_type, zero_snr, few_step)
    guided = cfg_scale != 1.0
    if guided:
        if negative is None:
            raise ValueError("cfg_scale other than 1 needs the negative prompt's embedding")
        context = Context.cat([context, negative.expand(len(context))])
    if style is not None:
        style = style.expand(len(noise), -1)
        style = torch.cat([style, style]) if guided else style
    x = noise.to(device=unet.device, dtype=torch.float32)
    for t in scheduler.timesteps:
        both = torch.cat([x, x]) if guided else x
        eps = predict(unet, both, t, context, style).float()
        if guided:
            cond, uncond = eps.chunk(2)
            eps = uncond + cfg_scale * (cond - uncond)
        x = scheduler.step(eps, t, x, return_dict=False)[0]
    return x


def scheduler_of(steps: int, prediction_type: str, zero_snr: bool, few_step: bool) -> Any:
    """diffusers' scheduler, set to this many steps."""
    with importing():
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    if few_step:
        scheduler = DDIMScheduler(
            **SCHEDULER, prediction_type=prediction_type, timestep_spacing="trailing", clip_sample=False
        )
    else:
        scheduler = DPMSolverMultistepScheduler(
            **SCHEDULER, prediction_type=prediction_type, timestep_spacing="trailing", rescale_betas_zero_snr=zero_snr
        )
    scheduler.set_timesteps(steps)
    return scheduler


def sample(
    pipe: Pipeline,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int = 12,
    cfg_scale: float = 1.0,
    negative: str = "",
    style: Tensor | None = None,
    size: tuple[int, int] = (64, 64),
    chunk: int = 48,
) -> Tensor:
    """Latents (B, 4, h/8, w/8) of prompts, one seed each; ``size`` in pixels, ``style`` (B, d) or (d,).

    A DMM file without ``style`` gives its default style. Fewer are drawn at a time where memory runs out.

    Raises:
        MemoryTooSmall: one picture is too much for the device.
    """
    if pipe.styled and style is None:
        assert pipe.codebook is not None
        style = pipe.codebook.default_style()
    context = encode_prompts(pipe.text_encoders, prompts)
    empty = encode_prompts(pipe.text_encoders, [negative]) if cfg_scale != 1.0 else None
    noise = initial_noise(seeds, (size[0] // 8, size[1] // 8))

    def draw(these: range) -> Tensor:
        rows = slice(these.start, these.stop)
        return sample_latents(
            pipe.unet, context[rows], noise[rows], steps=steps, cfg_scale=cfg_scale, negative=empty,
            style=style[rows] if style is not None and style.ndim == 2 else style,
            prediction_type=pipe.prediction_type, zero_snr=pipe.zero_snr, few_step=pipe.few_step > 0,
        )  # fmt: skip

    together = Rows(pipe.device, "draw even one picture", "Or use a smaller size, or --device cpu.")
    every = range(len(prompts))
    return torch.cat(list(together.of(draw, [every[start : start + chunk] for start in every[::chunk]])))


def decode(vae: Any, latents: Tensor, chunk: int = 24) -> np.ndarray:
    """Pictures uint8 (B, H, W, 3) of latents (B, 4, h, w) as the UNet sees them; fewer at a time where memory runs out.

    Raises:
        MemoryTooSmall: one picture is too much for the device.
    """
    scale = getattr(vae.config, "scaling_factor", None) or 1.0

    def pictures(part: Tensor) -> Tensor:
        made = vae.decode((part / scale).to(vae.dtype)).sample.float()
        return ((made.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()

    together = Rows(vae.device, "decode even one picture")
    return torch.cat(list(together.of(pictures, latents.split(chunk)))).permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def encode(vae: Any, pictures: np.ndarray, chunk: int = 48) -> Tensor:
    """Latents (B, 4, H/8, W/8) of pictures uint8 (B, H, W, 3): the mean, where the VAE gives a distribution."""
    scale = getattr(vae.config, "scaling_factor", None) or 1.0
    pixels = torch.from_numpy(pictures.copy()).permute(0, 3, 1, 2).to(vae.device, vae.dtype) / 127.5 - 1
    made = [vae.encode(part) for part in pixels.split(chunk)]
    return torch.cat([(m.latents if hasattr(m, "latents") else m.latent_dist.mean).float() for m in made]) * scale
