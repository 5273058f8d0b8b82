"""Sampling in 4 to 8 steps, all styles at once: progressive distillation (arXiv:2202.00512) in one go.

A teacher's guided path leads from x_t on in short steps. One long step of the student is to end where several of those
do. The guidance becomes its own: it is sampled without, by DDIM, which hosts call Euler. The path is the same that an
ordinary sampler follows, and so a picture stays what it was with its seed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dmm_core.data import Batch
from dmm_core.diffusion import TIMESTEPS, ddim_step, to_epsilon
from dmm_core.teachers import Teachers

STRIDE = TIMESTEPS // 4  # timesteps of the student's step: with four of them it is at the end
INSIDE = 4  # steps of the teacher within it


def guided(teachers: Teachers, batch: Batch, x_t: Tensor, t: Tensor, nothing: int, scale: float) -> Tensor:
    """What a batch's teacher predicts by classifier-free guidance: (B, 4, h, w).

    ``nothing``: number of the empty prompt.
    """
    if scale == 1:
        return teachers.predict(batch.teacher, x_t, t, batch.prompt)[0]
    prompts = torch.cat([batch.prompt, torch.full_like(batch.prompt, nothing)])
    both, *_ = teachers.predict(batch.teacher, x_t.repeat(2, 1, 1, 1), t.repeat(2), prompts)
    cond, uncond = both.chunk(2)
    return uncond + scale * (cond - uncond)


def stops(t: Tensor) -> Iterator[Tensor]:
    """The timesteps (B,) at which a teacher's steps from t (B,) end. Below 0 are the clean latents."""
    span = (t + 1).clamp(max=STRIDE)
    return (t - span * done // INSIDE for done in range(1, INSIDE + 1))


def path_end(teachers: Teachers, batch: Batch, x_t: Tensor, t: Tensor, nothing: int, scale: float) -> Tensor:
    """Where a batch's teacher arrives from x_t within the student's step: (B, 4, h, w). Asks it ``INSIDE`` times."""
    for stop in stops(t):
        said = guided(teachers, batch, x_t, t.clamp(min=0), nothing, scale)
        x_t = ddim_step(x_t, to_epsilon(said, x_t, t.clamp(min=0), teachers.prediction_type), t, stop)
        t = stop
    return x_t


def path_loss(prediction: Tensor, wanted: Tensor, x_t: Tensor, t: Tensor, prediction_type: str) -> Tensor:
    """Mean squared distance between where the student's step from x_t leads and ``path_end``: (B,).

    ``prediction``: what the student says of x_t (B, 4, h, w) at t (B,).
    """
    *_, end = stops(t)
    reached = ddim_step(x_t, to_epsilon(prediction.float(), x_t, t, prediction_type), t, end)
    return (reached - wanted).square().flatten(1).mean(1)
