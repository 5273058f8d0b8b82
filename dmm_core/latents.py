"""A recipe's training data: made once by the teachers or of pictures, kept in the work folder, found again there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dmm_core.checkpoint import Checkpoint
from dmm_core.data import Pool, Pools, built_in_prompts, encode_images, load_cache, read_prompts, save_cache
from dmm_core.economy import Rows
from dmm_core.models import build_vae
from dmm_core.plan import Sources
from dmm_core.recipe import Recipe, work_folder
from dmm_core.room import asked as drawn_by
from dmm_core.sample import initial_noise, sample_latents
from dmm_core.schema import plain
from dmm_core.sizes import latent_sizes
from dmm_core.teachers import Teachers

Notify = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is
Warn = Callable[[str], None]


def silent(*told: object) -> None:
    """The callback of those who want to hear nothing."""


def make_data(
    recipe: Recipe, sources: Sources, teachers: Teachers, notify: Notify, warn: Warn = silent
) -> tuple[list[str], list[Pools]]:
    """Prompts and every teacher's latents (or one entry for all), from the cache if this recipe has made one."""
    spec = recipe.data
    if spec.kind == "cache":
        return load_cache(spec.path or "")
    cache, origin = work_folder(recipe) / "latents.safetensors", origin_of(recipe)
    if cache.exists():
        return load_cache(cache, origin)
    if spec.kind == "images":
        vae = build_vae(sources.base, torch.float32).to(teachers.device)
        prompts, pictures = encode_images(vae, spec.path or "", latent_sizes(spec, sources.base))
        pools = [pictures]
    else:
        prompts = (
            read_prompts(spec.prompts)
            if spec.prompts
            else built_in_prompts(spec.latents_per_teacher, recipe.train.seed)
        )
        pools = teacher_latents(recipe, sources, teachers, prompts, notify, keep=work_folder(recipe), warn=warn)
        prompts, pools = only_used(prompts, pools)
    save_cache(cache, prompts, pools, origin)
    for part in cache.parent.glob("latents-*.safetensors"):
        part.unlink()
    return load_cache(cache)  # as stored, so that a resumed run sees the same bits


def origin_of(recipe: Recipe) -> str:
    """All of a recipe that its latents depend on, as text. Of the prompts' file what it says, not where it lies."""
    others = ("prompt_drop", "foreign", "prompts")
    data = {key: value for key, value in plain(recipe.data, str).items() if key not in others}
    teachers = [(teacher.path.name, teacher.strength) for teacher in recipe.teachers]
    below = [path.name if path else None for path in (recipe.base, recipe.student)]
    text = recipe.data.prompts
    words = hashlib.sha256(text.read_bytes()).hexdigest() if text and text.is_file() else None  # numbers point into it
    return json.dumps([data, words, teachers, below, recipe.train.seed, recipe.train.regularize == 0])


def teacher_latents(
    recipe: Recipe,
    sources: Sources,
    teachers: Teachers,
    prompts: Sequence[str],
    notify: Notify = silent,
    chunk: int = 16,
    keep: Path | None = None,
    warn: Warn = silent,
) -> list[Pools]:
    """``latents_per_teacher`` latents sampled from every teacher that will be asked, prompts and sizes in turn.

    Args:
        chunk: rows that are drawn together, as long as memory suffices.
        keep: a folder where each teacher's are put, and found again after an interruption.

    Raises:
        MemoryTooSmall: one row is too much for the device.
    """
    spec = recipe.data
    sizes = latent_sizes(spec, sources.base)
    asked = range(len(teachers) - drawn_by(recipe, sources), len(teachers))
    count, done, total = spec.latents_per_teacher, 0, spec.latents_per_teacher * len(asked)
    number = prompts_of(count, len(prompts))
    used, place = number.unique(return_inverse=True)  # of a long list the others are not even embedded
    teachers.embed([*(prompts[i] for i in used), ""])
    together = Rows(teachers.device, "draw even one picture to learn from", "Use a smaller data.size.")
    pools: list[Pools] = [()] * asked.start
    for index in asked:
        kept = keep / f"latents-{index}.safetensors" if keep else None
        if kept and kept.exists():
            pools += load_cache(kept, origin_of(recipe))[1]
            done += count
            continue
        of_size = [range(first, count, len(sizes)) for first in range(len(sizes))]
        chunks = [rows[start : start + chunk] for rows in of_size for start in range(0, len(rows), chunk)]
        parts: list[list[Tensor]] = [[] for _ in sizes]
        draw = drawing(recipe, teachers, index, place, sizes)
        for rows, part in zip(chunks, together.of(draw, chunks), strict=True):
            parts[rows[0] % len(sizes)].append(part)
            done += len(part)
            notify("teachers draw their training data", done, total)
        del draw  # it holds the teacher, whose place is the next one's
        pools.append(tuple(Pool(torch.cat(part), number[list(rows)])
                           for part, rows in zip(parts, of_size, strict=True)))  # fmt: skip
        if kept:
            save_cache(kept, prompts, pools[-1:], origin_of(recipe))
    if together.most:
        warn(f"memory ran out while teachers drew: they drew the same pictures, {together.most} at a time")
    return pools


def prompts_of(count: int, prompts: int) -> Tensor:
    """Which of so many prompts each of ``count`` pictures has (count,): all in turn, or some from all of the list."""
    if count >= prompts:
        return torch.arange(count) % prompts
    return torch.arange(count) * (7919 if prompts % 7919 else 7907) % prompts  # primes


def only_used(prompts: Sequence[str], pools: Sequence[Pools]) -> tuple[list[str], list[Pools]]:
    """The prompts that latents were drawn of, and the pools with their numbers among these."""
    used = torch.cat([pool.prompt for entry in pools for pool in entry]).unique()
    kept = [tuple(Pool(pool.latents, torch.searchsorted(used, pool.prompt)) for pool in entry) for entry in pools]
    return [prompts[i] for i in used], kept


def drawing(
    recipe: Recipe, teachers: Teachers, index: int, number: Tensor, sizes: Sequence[tuple[int, int]]
) -> Callable[[range], Tensor]:
    """What draws rows of teacher ``index``'s latents (B, 4, h, w) on the CPU, of one of the ``sizes``.

    Each row has noise of its own, so that it is the same with whichever others it is drawn. ``number``: of each row's
    prompt among the embedded ones; the empty one comes after the last.
    """
    spec, unet = recipe.data, teachers.unet_alone(index)
    nothing = teachers.context(index, torch.tensor([-1]))

    def draw(rows: range) -> Tensor:
        seeds = [(recipe.train.seed * 1_000_003 + index * 100_003 + row) % 2**63 for row in rows]
        return sample_latents(
            unet, teachers.context(index, number[list(rows)]), initial_noise(seeds, sizes[rows[0] % len(sizes)]),
            steps=spec.steps, cfg_scale=spec.cfg_scale, negative=nothing, **teachers.sampling(index),
        ).cpu()  # fmt: skip

    return draw


def latent_size(base: Checkpoint, pixels: int | None) -> tuple[int, int]:
    """Height and width of latents: of ``pixels`` square, or of the size that the file says it is made for."""
    side = pixels // 8 if pixels else int(base.unet_config["sample_size"])
    return side, side
