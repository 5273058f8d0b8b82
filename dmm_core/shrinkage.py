"""Shrinkage: a student whose training ends early makes its styles' differences too small. Measured, and undone.

Of what teacher k says with guidance beyond the mean m of all teachers, a student with style k says the share

    b = Σ ω_t ⟨ε_S − m, ε_k − m⟩ / Σ ω_t ‖ε_k − m‖²        over samples of the teachers' own pictures.

Without guidance b is 1 long before the training is over. But guidance multiplies what a prompt changes, and that part
is learned last: where the student cannot tell it yet, its squared error is least a little way back towards what all
styles have in common. No loss tells of it, pictures do. So the style vectors are moved apart,

    s ← c + (s − c) / b,    c = their mean,

which costs some passes (docs/results.md, *Shrinkage*).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dmm_core.data import Batch, LatentData
from dmm_core.speed import to_device

if TYPE_CHECKING:
    from dmm_core.distill import Distillation

ROWS = 96  # of all teachers together; two draws of so many differ by 0.005 in b
LEAST = 0.5  # a share below it counts as this: such a student has hardly begun


def unshrink(run: Distillation, cfg_scale: float) -> float:
    """Move a trained student's styles apart, in place, by what they lack of their teachers' differences.

    Returns the share b before that; 1 or more leaves the student as it is.
    """
    share = share_of_differences(run, cfg_scale)
    if share < 1:
        run.student.codebook.stretch(1 / max(share, LEAST))
    return share


@torch.no_grad()
def share_of_differences(run: Distillation, cfg_scale: float) -> float:
    """b (above) of a student beside its teachers at a guidance, on samples that the recipe's seed decides."""
    batches, count = draw(run), len(run.teachers)
    mean, own = [[torch.zeros_like(batch.x_t) for batch in batches] for _ in range(2)]
    run.teachers.expect([teacher for teacher in range(count) for _ in batches for _ in range(2)])
    for teacher in range(count):  # each of them once on the device
        for i, batch in enumerate(batches):
            said = guided(run, batch, cfg_scale, partial(of_teacher, run, teacher))
            mean[i] += said / count
            own[i] += said * (teacher == batch.teacher)
    whole = made = 0.0
    for batch, m, target in zip(batches, mean, own, strict=True):
        said = guided(run, batch, cfg_scale, partial(of_student, run, batch.teacher))
        weight, difference = run.weights.cpu()[batch.t].reshape(-1, 1, 1, 1), target - m
        whole += float((weight * difference.square()).sum())
        made += float((weight * difference * (said - m)).sum())
    return made / whole if whole > 0 else 1.0


def guided(
    run: Distillation, batch: Batch, cfg_scale: float, ask: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """What is said of a batch (B, 4, h, w) with its prompts, guided away from the empty one; on the CPU."""
    x_t, t = to_device((batch.x_t, batch.t), run.device)
    nothing = torch.full_like(batch.prompt, len(run.data.prompts) - 1)
    with_prompt, without = (ask(x_t, t, prompt).float().cpu() for prompt in (batch.prompt, nothing))
    return without + cfg_scale * (with_prompt - without)


def of_teacher(run: Distillation, teacher: int, x_t: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
    """ε (B, 4, h, w) of a teacher, for numbers of prompts (B,)."""
    return run.teachers.predict(teacher, x_t, t, prompt)[0]


def of_student(run: Distillation, style: int, x_t: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
    """The same of the student with one style."""
    context = run.context[prompt].map(lambda part: to_device((part,), run.device)[0])
    with run.passes.autocast():
        return run.student(x_t, t, context, run.one_hot[style].expand(len(t), -1))


def draw(run: Distillation) -> list[Batch]:
    """As many batches of each teacher's own pictures as make up ``ROWS``, all with their prompts."""
    data, count = run.data, len(run.teachers)
    rng = torch.Generator().manual_seed(run.spec.seed)
    own = LatentData(data.prompts[:-1], data.pools, prompt_drop=0.0)
    rounds = -(-ROWS // (count * run.spec.batch))
    return [own.draw(k, run.spec.batch, rng, size=own.choose(rng)) for _ in range(rounds) for k in range(count)]
