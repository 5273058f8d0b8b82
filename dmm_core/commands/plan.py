"""Say whether the files of a recipe can be merged, what it takes on this machine, and what makes it fit."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from dmm_core.errors import BadInput

HELP = "check a recipe, try a few steps of it, and say what it takes"
GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="the recipe, a YAML file")
    parser.add_argument("--quick", action="store_true", help="check the files alone, without a trial of a few steps")
    parser.add_argument("--memory", type=float, metavar="GIB", help="plan for a device with this much free memory")
    parser.add_argument("--write", metavar="FILE", help="write the recipe with the changes that make it fit")
    parser.add_argument("--force", action="store_true", help="overwrite the file of --write if it is there")


def run(args: argparse.Namespace, report: Any) -> dict:
    from dmm_core.plan import choose_device, plan
    from dmm_core.recipe import dump_recipe, load_recipe
    from dmm_core.trial import fit

    check(args)
    recipe = load_recipe(args.recipe)
    told = plan(recipe)
    found = None
    if not args.quick:
        if args.write:  # a place that cannot be used is told before the trial, which takes minutes
            Path(args.write).parent.mkdir(parents=True, exist_ok=True)
        budget = None if args.memory is None else int(args.memory * GIB)
        device, body = choose_device(recipe.train.device), told.discriminator_parameters
        found = fit(recipe, device, told.unet_parameters, budget, report.note, body)
        told = plan(recipe, found, tried=True)
    if args.write and found:
        dump_recipe(found.recipe, args.write)
    for line in lines(told):
        report.out(line)
    return told.to_dict()


def check(args: argparse.Namespace) -> None:
    """Raises BadInput for what the trial would come too late to tell."""
    if args.memory is not None and not 0 < args.memory * GIB < math.inf:
        raise BadInput(f"--memory {args.memory:g}: expected a number of GiB above 0")
    if args.write is None:
        return
    path = Path(args.write)
    if args.quick:
        raise BadInput("give --write or --quick, not both", hint="What makes it fit is found by the trial.")
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise BadInput("the recipe's name must end in .yaml or .yml", path)
    if path.is_dir():
        raise BadInput("is a folder", path, "Give a file's name.")
    if path.exists() and not args.force:
        raise BadInput("is there already", path, "Give --force to overwrite it, or another name with --write.")


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
