"""Sampling in 4 to 8 steps: latent consistency distillation, all styles at once. LCM (arXiv:2310.04378) §4.

A teacher's guided path leads from x_t one solver step towards its end, to x_{t-20}. From both points the student is to
say the same clean latents, so that it learns to say the path's end at once. The guidance becomes its own: it is sampled
without.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dmm_core.data import Batch
from dmm_core.diffusion import add_noise, predict_x0, to_epsilon
from dmm_core.teachers import Teachers

SKIP = 20  # timesteps of a solver step: LCM's k
SOFT = 1e-3  # where the distance goes over from squares to absolute values


def guided(teachers: Teachers, batch: Batch, x_t: Tensor, t: Tensor, nothing: int, scale: float) -> Tensor:
    """What a batch's teacher predicts by classifier-free guidance: (B, 4, h, w).

    ``nothing``: number of the empty prompt.
    """
    if scale == 1:
        return teachers.predict(batch.teacher, x_t, t, batch.prompt)[0]
    prompts = torch.cat([batch.prompt, torch.full_like(batch.prompt, nothing)])
    both, _ = teachers.predict(batch.teacher, x_t.repeat(2, 1, 1, 1), t.repeat(2), prompts)
    cond, uncond = both.chunk(2)
    return uncond + scale * (cond - uncond)


def consistency_loss(
    ask: Callable[[Tensor, Tensor], Tensor], x_t: Tensor, t: Tensor, mine: Tensor, theirs: Tensor, prediction_type: str
) -> Tensor:
    """Distance between the clean latents that the student says at x_t and one step further on the teacher's path: (B,).

    Args:
        ask: the student, of latents (B, 4, h, w) and timesteps (B,).
        mine, theirs: what student and teacher predict at x_t.
    """
    clean, noise = predict_x0(x_t, theirs, t, prediction_type), to_epsilon(theirs, x_t, t, prediction_type)
    at_end, before = (t < SKIP).view(-1, 1, 1, 1), (t - SKIP).clamp(min=0)
    x_before = add_noise(clean, noise, before)
    with torch.no_grad():
        said = predict_x0(x_before, ask(x_before, before).float(), before, prediction_type)
    wanted = torch.where(at_end, clean, said)
    apart = predict_x0(x_t, mine.float(), t, prediction_type) - wanted
    return ((apart.square() + SOFT**2).sqrt() - SOFT).flatten(1).mean(1)
