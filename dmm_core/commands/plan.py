"""Say whether the files of a recipe can be merged, and what it will take on this machine."""

from __future__ import annotations

import argparse
import time
from typing import Any

HELP = "check a recipe and estimate its cost, without work"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="the recipe, a YAML file")
    parser.add_argument("--quick", action="store_true", help="do not measure the time of three steps")


def run(args: argparse.Namespace, report: Any) -> dict:
    from dmm_core.plan import plan
    from dmm_core.progress import duration
    from dmm_core.recipe import load_recipe

    recipe = load_recipe(args.recipe)
    told = plan(recipe, None)
    if not args.quick:
        report.note("timing three steps")
        told = plan(recipe, seconds_per_step(recipe))
    gib = 2**30
    report.out(f"mergeable: {len(told.styles)} teachers ({', '.join(told.styles)}), {told.family}")
    report.out(f"UNet: {told.unet_parameters / 1e6:.1f} M parameters, {told.precision} on {told.device}")
    report.out(
        f"memory: about {told.memory_bytes / gib:.2f} GiB beside activations; disk: {told.disk_bytes / gib:.2f} GiB"
    )
    took = f", about {duration(told.seconds)} ({told.seconds_per_step:.2f} s a step)" if told.seconds else ""
    report.out(f"work: {told.steps} steps, {told.samples} samples{took}")
    for warning in told.warnings:
        report.out(f"note: {warning}")
    return told.to_dict()


def seconds_per_step(recipe: Any) -> float:
    """The median of three steps on random latents, after one that does not count. Nothing is written."""
    import torch

    from dmm_core.data import LatentData, Pool
    from dmm_core.run import latent_size, open_sources, ready

    sources = open_sources(recipe, check_values=False)
    size = latent_size(sources.base, recipe.data.size)
    pool = Pool(torch.randn(8, 4, *size), torch.zeros(8, dtype=torch.long))
    distillation = ready(recipe, sources, LatentData(["a picture"], [pool], recipe.data.prompt_drop))
    times = []
    for _ in range(4):
        began = time.monotonic()
        distillation.step()
        times.append(time.monotonic() - began)
    return sorted(times[1:])[1]
