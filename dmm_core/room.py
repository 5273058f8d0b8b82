"""Room that a recipe takes on the disk and in the host's memory, of shapes and counts alone. In bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dmm_core.checkpoint import Checkpoint
from dmm_core.checkpoint.shapes import codebook_shapes
from dmm_core.checkpoint.writer import BEHIND
from dmm_core.recipe import Recipe, TrainSpec
from dmm_core.sizes import latent_sizes

if TYPE_CHECKING:
    from dmm_core.plan import Sources


def drawing(stages: Sequence[Recipe]) -> list[Recipe]:
    """Stages whose teachers draw latents: of those that share them, one."""
    return list({stage.work: stage for stage in stages if stage.data.kind == "teachers"}.values())


def keeping(stages: Sequence[Recipe]) -> list[Recipe]:
    """Stages whose latents are made for them, of teachers or pictures, and kept: of those that share them, one."""
    return list({stage.work: stage for stage in stages if stage.data.kind != "cache"}.values())


def asked(recipe: Recipe, sources: Sources) -> int:
    """How many teachers draw latents: all, or the new ones, if there are any, where old styles are not trained."""
    left_out = sources.old if recipe.train.regularize == 0 and recipe.teachers else 0
    return len(sources.teachers) - left_out


def file_bytes(path: Path) -> int:
    """Of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")))


def most_bytes(stages: Sequence[Recipe], sources: Sources, count: int, body: int) -> int:
    """Room that states, students between stages and the result take on the disk at the worst moment.

    A save needs room for two states: the old one goes when the new one is whole. The result is written next to the
    last one.

    Args:
        count, body: parameters of the UNet and of the discriminator's body.
    """
    states = [state_bytes(stage.train, sources, count, body) for stage in stages]
    student = learned_bytes(stages[0].train, sources, count)  # which every stage but the last leaves
    saving = max(before * student + 2 * size for before, size in enumerate(states))
    return max(saving, (len(states) - 1) * student + states[-1] + file_bytes(sources.base.path))


def state_bytes(spec: TrainSpec, sources: Sources, count: int, body: int) -> int:
    """Room that the saved state of a stage takes: what is learned, its moments and average, the discriminator's."""
    moments, average = 2 if spec.optimizer == "adamw8bit" else 8, 4 if spec.ema else 0
    unet = 0 if spec.student == "lora" else count * (moments + average)
    critic = 12 * body if spec.adversarial and spec.discriminator == "full" else 0
    return learned_bytes(spec, sources, count) + unet + small(spec, sources) * (8 + average) + critic


def learned_bytes(spec: TrainSpec, sources: Sources, count: int) -> int:
    """Room that a student takes between two stages: codebook, and UNet or adapters."""
    weight = 2 if spec.weights == "bf16" else 4
    return 4 * small(spec, sources) + (0 if spec.student == "lora" else count * weight)


def small(spec: TrainSpec, sources: Sources) -> int:
    """How many parameters learn in float32 whatever type the UNet has: the codebook's, and those of adapters."""
    codebook = codebook_shapes(len(sources.names), sources.base.style_width)
    count = sum(math.prod(shape) for shape in codebook.values())
    for outputs, *inputs in sources.base.shapes("unet").values() if spec.student == "lora" else ():
        if inputs:
            count += min(spec.rank, outputs, math.prod(inputs)) * (outputs + math.prod(inputs))
    return count


def saving_bytes(base: Checkpoint) -> int:
    """What a save has on the host at once: copies of the largest tensor, on their way to the file."""
    return (BEHIND + 2) * 4 * max(math.prod(shape) for shape in base.shapes("unet").values())


def latent_bytes(recipe: Recipe, sources: Sources) -> int:
    """Room that a stage's latents take, of its teachers or of pictures, in float16."""
    from dmm_core.data import captioned_images

    sizes = latent_sizes(recipe.data, sources.base)
    mean = math.fsum(h * w for h, w in sizes) / len(sizes)
    if recipe.data.kind == "images":
        latents = sum(1 for _ in captioned_images(recipe.data.path or ""))
    else:
        latents = recipe.data.latents_per_teacher * asked(recipe, sources)
    return int(latents * 4 * mean * 2)


def prompt_count(recipe: Recipe) -> int:
    """How many prompts are encoded: those given or built in, the different captions of pictures, or a cache's."""
    from dmm_core.data import captioned_images, load_cache, read_prompts

    data = recipe.data
    if data.kind == "images":
        return len({caption for _, caption in captioned_images(data.path or "")})
    if data.kind == "cache":
        return len(load_cache(data.path or "")[0])
    return min(len(read_prompts(data.prompts)), data.latents_per_teacher) if data.prompts else data.latents_per_teacher
