"""Merge checkpoints by their weights: an average, a difference added, block weights, LoRAs baked in."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from dmm_core.errors import BadInput

HELP = "merge checkpoints by averaging or adding their weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="the recipe, a YAML file")
    parser.add_argument("--model", nargs="+", action="extend", help="checkpoints to merge, instead of a recipe")
    parser.add_argument("--weight", nargs="+", action="extend", type=float, help="a weight for each of them (1 each)")
    parser.add_argument("--base", help="add alpha times what the other models differ from this one to the first")
    parser.add_argument("--alpha", type=float, help="share of the models after the first; with --base, the factor")
    parser.add_argument("--lora", nargs="+", action="extend", metavar="FILE[=STRENGTH]", help="LoRA files to bake in")
    parser.add_argument("--dtype", choices=("keep", "fp32", "fp16", "bf16"), help="type of the result (the first's)")
    parser.add_argument("--out", help="the .safetensors file to write")
    parser.add_argument("--force", action="store_true", help="overwrite the output if it is there")


def run(args: argparse.Namespace, report: Any) -> dict:
    recipe = recipe_of(args)
    if recipe.out.exists() and not args.force:
        other = "another name with --out" if args.out else "change out in the recipe"
        raise BadInput("is there already", recipe.out, f"Give --force to overwrite it, or {other}.")
    from dmm_core.merge_files import Merger

    began = time.monotonic()
    merger = Merger(recipe)
    with report.progress(100, "merges, %") as bar:
        path = merger.write(lambda done, total: bar.to(100 * done // total))
    seconds, size = time.monotonic() - began, path.stat().st_size
    names = [model.path.name for model in recipe.models]
    report.out(f"{path}: {recipe.method} of {', '.join(names)}, {size:,} bytes in {seconds:.1f} s")
    return {
        "out": path, "method": recipe.method, "models": names, "loras": [lora.path.name for lora in recipe.loras],
        "family": merger.first.family, "parameters": merger.count, "bytes": size, "seconds": round(seconds, 2),
    }  # fmt: skip


def recipe_of(args: argparse.Namespace) -> Any:
    """The recipe file, or one made of --model and --out."""
    from dmm_core.merge_recipe import load_merge_recipe, merge_recipe_from_dict

    options = ("model", "weight", "base", "alpha", "lora", "dtype", "out")
    if args.recipe:
        if given := [f"--{name}" for name in options if getattr(args, name) is not None]:
            raise BadInput(f"give a recipe or {given[0]}, not both")
        return load_merge_recipe(args.recipe)
    if not args.model or not args.out:
        raise BadInput("a recipe is missing", hint="Give a YAML file, or --model FILE … --out FILE.")
    weights = args.weight or [1.0] * len(args.model)
    if len(weights) != len(args.model):
        raise BadInput(f"expected one --weight a model, got {len(weights)} for {len(args.model)}")
    models = [{"path": path, "weight": weight} for path, weight in zip(args.model, weights, strict=True)]
    data: dict[str, Any] = {"models": models, "out": args.out}
    data |= {"base": args.base, "method": "add_difference"} if args.base else {}
    data |= {"loras": [file_and_strength(text) for text in args.lora]} if args.lora else {}
    data |= {name: getattr(args, name) for name in ("alpha", "dtype") if getattr(args, name) is not None}
    return merge_recipe_from_dict(data, source="command line")


def file_and_strength(text: str) -> dict[str, Any]:
    """``FILE`` or ``FILE=STRENGTH``."""
    path, equals, strength = text.rpartition("=")
    if not equals or Path(text).exists():
        return {"path": text}
    try:
        return {"path": path, "strength": float(strength)}
    except ValueError:
        return {"path": text}
