"""Say whether the files of a recipe can be merged, what it takes on this machine, and what makes it fit."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "check a recipe, try a few steps of it, and say what it takes"
GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="the recipe, a YAML file")
    parser.add_argument("--quick", action="store_true", help="check the files alone, without a trial of a few steps")
    parser.add_argument("--memory", type=float, metavar="GIB", help="plan for a device with this much free memory")
    parser.add_argument("--write", metavar="FILE", help="write the recipe with the changes that make it fit")


def run(args: argparse.Namespace, report: Any) -> dict:
    from dmm_core.plan import choose_device, plan
    from dmm_core.recipe import dump_recipe, load_recipe
    from dmm_core.trial import fit

    recipe = load_recipe(args.recipe)
    told = plan(recipe)
    found = None
    if not args.quick:
        budget = int(args.memory * GIB) if args.memory else None
        device, body = choose_device(recipe.train.device), told.discriminator_parameters
        found = fit(recipe, device, told.unet_parameters, budget, report.note, body)
        told = plan(recipe, found, tried=True)
    if args.write and found:
        dump_recipe(found.recipe, args.write)
    for line in lines(told):
        report.out(line)
    return told.to_dict()


def lines(told: Any) -> list[str]:
    """A plan in words."""
    from dmm_core.progress import duration

    found = [
        f"mergeable: {len(told.styles)} teachers ({', '.join(told.styles)}), {told.family}",
        f"UNet: {told.unet_parameters / 1e6:.1f} M parameters, {told.precision} on {told.device}",
    ]
    if told.discriminator_parameters:
        found.append(f"discriminator: {told.discriminator_parameters / 1e6:.1f} M parameters beside it")
    if told.peak_bytes is None:
        found.append(f"memory: about {told.memory_bytes / GIB:.2f} GiB beside activations")
    else:
        found.append(f"memory: {told.peak_bytes / GIB:.2f} GiB at most, RAM {told.ram_bytes / GIB:.2f} GiB")
    found.append(f"disk: {told.disk_bytes / GIB:.2f} GiB")
    took = f", about {duration(told.seconds)} ({told.seconds_per_step:.2f} s a step)" if told.seconds else ""
    found.append(f"work: {told.steps} steps, {told.samples} samples{took}")
    if told.changes:
        found.append("to fit, set in train: " + ", ".join(f"{key}: {value}" for key, value in told.changes.items()))
    if told.fits is False:
        found.append("note: it does not fit this device, whatever is changed; make data.size or train.batch smaller.")
    return found + [f"note: {warning}" for warning in told.warnings]
