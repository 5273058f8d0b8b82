"""Rows between two styles: the way of a slider is taught, not left to what a style vector happens to mean half-way.

Such a row has a mix of two styles, and learns a mix of what both teachers say of it. The paper trains pure
styles alone (arXiv:2504.12364, §3.4); of its mixes, most of the change then falls into one or two tenths of the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dmm_core import course
from dmm_core.data import Batch, Between
from dmm_core.recipe import TrainSpec

EVEN = 0.5  # power of the weights: mixed by the weights themselves, predictions change pictures around 0.5 alone


def put_between(batches: Sequence[Batch], spec: TrainSpec, step: int, rng: torch.Generator) -> list[Batch]:
    """A step's batches, ``spec.mixed`` of their rows (``rows_between``) on the way to the style of the batch before.

    The first batch is left as it is: so each teacher answers its own rows and those of the next batch at once, and
    none has to come to the device twice. Who is first changes from step to step (``extension.teachers_of_step``).
    """
    made = list(batches)
    for place in range(1, len(made)):
        batch, before = made[place], made[place - 1].teacher
        count = rows_between(spec, len(made), step)
        if count and batch.teacher != before:
            made[place] = replace(batch, between=Between(before, torch.rand(count, generator=rng)))
    return made


def rows_between(spec: TrainSpec, batches: int, step: int) -> int:
    """Of each batch but the first: as many in every step, so that recorded kernels fit; or one, but not in every.

    None after the first part of the stage (``course.FIRST_PART``).
    """
    if not course.has("mixed", spec, step):
        return 0
    wanted = spec.mixed * spec.batch * batches / max(1, batches - 1)
    return min(spec.batch, round(wanted) if wanted >= 1 else int((step + 1) * wanted) - int(step * wanted))


def weights_of(styles: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    """Style weights (B, N) of a batch: ``styles`` with the first rows on the way to ``other`` (N,) by ``weight``."""
    count = len(weight)
    return torch.cat([torch.lerp(styles[:count], other.expand(count, -1), weight[:, None]), styles[count:]])


def blended(mine: Tensor, theirs: Tensor, weight: Tensor) -> Tensor:
    """What the rows of ``mine`` (B, …) shall learn: in the first, the share that ``theirs`` (m, …) have of it is
    w^½ / (w^½ + (1 - w)^½), for the change of pictures to spread over the way (docs/results.md).
    """
    other, own = weight**EVEN, (1 - weight) ** EVEN
    share = (other / (other + own)).to(mine.dtype).view(-1, *[1] * (mine.ndim - 1))
    return torch.cat([torch.lerp(mine[: len(weight)], theirs, share.expand_as(theirs)), mine[len(weight) :]])
