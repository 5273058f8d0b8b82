"""Sizes of training pictures: one square, or several of about the same area (buckets), as kohya's sd-scripts have them.

A pair here is (height, width), as tensors have it, in pixels unless it says latents; recipes write WIDTHxHEIGHT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dmm_core.errors import BadInput

if TYPE_CHECKING:
    from dmm_core.checkpoint import Checkpoint
    from dmm_core.recipe import DataSpec

Size = tuple[int, int]
STEP, SMALL_STEP = 64, 16  # pixels that sides are multiples of; for models of less than four steps a side
PIXELS = 8  # of a latent's side


def parse(text: str) -> Size:
    """``512x768`` (width x height) → (768, 512)."""
    width, _, height = text.partition("x")
    return int(height), int(width)


def buckets(side: int, aspect: float) -> list[Size]:
    """Sizes of at most ``side``² pixels whose longer side is at most ``aspect`` times the shorter one, narrow to wide.

    As ``make_bucket_resolutions`` of sd-scripts: each width with the largest height that the area has room for, and the
    same the other way round. At 1024 and 1.75 these are SDXL's own sizes from 768x1344 to 1344x768.
    """
    step = STEP if side >= 4 * STEP else SMALL_STEP
    found = {(side, side)}
    for longer in range(side // step * step + step, int(side * math.sqrt(aspect)) + 2 * step, step):
        shorter = side * side // longer // step * step
        if shorter and longer <= aspect * shorter:
            found |= {(shorter, longer), (longer, shorter)}
    return sorted(found, key=lambda size: (size[1] / size[0], size))


def latent_sizes(spec: DataSpec, base: Checkpoint) -> list[Size]:
    """Height and width of the latents that a recipe trains on, without repeats.

    Raises:
        BadInput: the teachers are to make fewer latents than there are sizes.
    """
    side = spec.size or PIXELS * int(base.unet_config["sample_size"])
    pixels = [parse(text) for text in spec.sizes] or buckets(side, spec.aspect)
    sizes = [(height // PIXELS, width // PIXELS) for height, width in dict.fromkeys(pixels)]
    if spec.kind == "teachers" and spec.latents_per_teacher < len(sizes):
        told = f"data.latents_per_teacher: expected at least one for each of the {len(sizes)} sizes"
        raise BadInput(f"{told}, got {spec.latents_per_teacher}")
    return sizes


def largest(sizes: Sequence[Size]) -> Size:
    """The one that takes the most memory."""
    return max(sizes, key=lambda size: size[0] * size[1])


def squarest(sizes: Sequence[Size]) -> Size:
    """The one to show pictures at."""
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1])))


def nearest(size: Size, sizes: Sequence[Size]) -> int:
    """Number of the size whose shape is most like this one's: where a picture loses least when it is cut to it."""
    wanted = math.log(size[0] / size[1])
    return min(range(len(sizes)), key=lambda i: abs(math.log(sizes[i][0] / sizes[i][1]) - wanted))
