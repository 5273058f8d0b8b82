"""A recipe's training data: made once by the teachers or of pictures, kept in the work folder, found again there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dmm_core.checkpoint import Checkpoint
from dmm_core.data import Pool, built_in_prompts, encode_images, load_cache, read_prompts, save_cache
from dmm_core.models import build_vae
from dmm_core.plan import Sources
from dmm_core.recipe import Recipe, work_folder
from dmm_core.sample import initial_noise, sample_latents
from dmm_core.speed import side_by_side
from dmm_core.teachers import Teachers

Notify = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is


def silent(what: str, done: int, total: int) -> None:
    """The progress callback of those who want none."""


def make_data(recipe: Recipe, sources: Sources, teachers: Teachers, notify: Notify) -> tuple[list[str], list[Pool]]:
    """Prompts and one pool of latents a teacher (or one for all), from the cache if this recipe has made one."""
    spec = recipe.data
    if spec.kind == "cache":
        return load_cache(spec.path or "")
    cache = work_folder(recipe) / "latents.safetensors"
    if cache.exists():
        return load_cache(cache)
    if spec.kind == "images":
        prompts, pool = encode_images(
            build_vae(sources.base, torch.float32).to(teachers.device), spec.path or "", spec.size or 512
        )
        pools = [pool]
    else:
        prompts = (
            read_prompts(spec.prompts)
            if spec.prompts
            else built_in_prompts(spec.latents_per_teacher, recipe.train.seed)
        )
        pools = teacher_latents(recipe, sources, teachers, prompts, notify, keep=work_folder(recipe))
    save_cache(cache, prompts, pools)
    for part in cache.parent.glob("latents-*.safetensors"):
        part.unlink()
    return load_cache(cache)  # as stored, so that a resumed run sees the same bits


def teacher_latents(
    recipe: Recipe,
    sources: Sources,
    teachers: Teachers,
    prompts: Sequence[str],
    notify: Notify = silent,
    chunk: int = 16,
    keep: Path | None = None,
) -> list[Pool]:
    """``latents_per_teacher`` latents sampled from every teacher, the prompts in turn: no data set is needed.

    ``keep``: a folder where each teacher's are put, and found again after an interruption.
    """
    spec = recipe.data
    count, total = spec.latents_per_teacher, spec.latents_per_teacher * len(teachers)
    size = latent_size(sources.base, spec.size)
    teachers.embed([*prompts, ""])
    pools = []
    for index in range(len(teachers)):
        kept = keep / f"latents-{index}.safetensors" if keep else None
        if kept and kept.exists():
            pools += load_cache(kept)[1]
            continue
        number = (
            torch.arange(count) * 7919 % len(prompts) if count < len(prompts) else torch.arange(count) % len(prompts)
        )
        unet, nothing = teachers.unet(index), teachers.context(index, torch.tensor([len(prompts)]))

        def draw(start: int, unet=unet, nothing=nothing, index=index, number=number) -> Tensor:
            rows = number[start : start + chunk]
            seeds = [recipe.train.seed * 1_000_003 + index * 100_003 + start + i for i in range(len(rows))]
            return sample_latents(
                unet, teachers.context(index, rows), initial_noise(seeds, size), steps=spec.steps,
                cfg_scale=spec.cfg_scale, negative=nothing, **teachers.sampling(index),
            ).cpu()  # fmt: skip

        parts = []
        for part in side_by_side(draw, range(0, count, chunk), teachers.device):
            parts.append(part)
            notify("teachers draw their training data", index * count + sum(map(len, parts)), total)
        pools.append(Pool(torch.cat(parts), number))
        if kept:
            save_cache(kept, prompts, pools[-1:])
    return pools


def latent_size(base: Checkpoint, pixels: int | None) -> tuple[int, int]:
    """Height and width of latents: of ``pixels`` square, or of the size that the file says it is made for."""
    side = pixels // 8 if pixels else int(base.unet_config["sample_size"])
    return side, side
