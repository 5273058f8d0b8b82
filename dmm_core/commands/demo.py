"""Merge the four shipped teachers on this machine, measure the result, and show it in pictures. No GPU, no download."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from dmm_core.errors import BadInput, RecipeError
from dmm_core.shell import command

HELP = "merge the shipped mini teachers here and now, and look at the result"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="dmm-demo", help="folder for everything that is made (dmm-demo)")
    parser.add_argument("--steps", type=int, help="optimizer steps of the merge (600 to 2000, as this machine is fast)")
    parser.add_argument(
        "--resume", action="store_true", help="go on with an interrupted demo, for as many steps as it had"
    )


def run(args: argparse.Namespace, report: Any) -> dict:
    from dmm_core.commands.distill import report_share, train
    from dmm_core.commands.evaluate import Notifier, headline
    from dmm_core.measure import measure
    from dmm_core.present import present
    from dmm_core.run import bench_of
    from mini_family import demo

    began = time.monotonic()
    out = Path(args.out).absolute()
    recipe = recipe_of(out, args, report)
    report.note(f"teachers: {', '.join(teacher.name for teacher in recipe.teachers)} (in {out / 'teachers'})")
    merge = train(recipe, args.resume, report, again=command("demo", "--out", out, "--resume"))
    merge.finish()
    report_share(merge, report)
    bench = bench_of(merge, demo.held_out_prompts(), demo.SAMPLER_STEPS, demo.CFG_SCALE, Notifier(report))
    measured = measure(
        bench, began, merge.distillation.samples_seen, title="Four mini teachers in one model",
        start=recipe.train.start, merged=merge.style_info(), recipe=recipe.to_dict(names_only=True),
    )  # fmt: skip
    file = merge.save(
        {key: measured.report[key] for key in ("ratio", "gap_closed", "extractor", "samples_seen", "commit")}
    )
    for warning in merge.warnings:
        report.note(f"note: {warning}")
    gallery = replace(bench, prompts=demo.shown_prompts(), what="draws pictures to show", expected=0)
    paths = present(out, measured, gallery, file)
    for line in headline(measured.report):
        report.out(line)
    report.out(f"look at {out / 'report.html'} (and styles.png, mix.png, fid.png beside it); the DMM file is {file}")
    report.out(f"took {time.monotonic() - began:.0f} s")
    return measured.report | {"out": out, "file": file, "written": paths}


def recipe_of(out: Path, args: argparse.Namespace, report: Any) -> Any:
    """What the demo merges, and how; where it was interrupted, what it began with."""
    from dmm_core.recipe import dump_recipe, load_recipe, recipe_from_dict
    from dmm_core.stages import unfinished
    from dmm_core.trial import run_trial
    from mini_family import demo, family

    kept = out / "mini-dmm.recipe.yaml"  # where a merge leaves it
    must_be_the_demos(kept, out)
    if args.resume and kept.exists():
        return load_recipe(kept)
    base, *teachers = family.unpack(out / "teachers")
    prompts = out / "mini-dmm.prompts.txt"  # a name that no file of the user's has
    prompts.write_text("\n".join(demo.training_prompts()) + "\n", encoding="utf-8")

    def recipe_with(steps: int) -> Any:
        return recipe_from_dict(demo.recipe_of(out, teachers, base, prompts, steps), source="the demo's recipe")

    recipe = recipe_with(demo.FEWEST if args.steps is None else args.steps)
    if unfinished(recipe):  # which prepare refuses to lose, and --resume needs as it was
        return recipe
    if args.steps is None:
        recipe = recipe_with(demo.steps_that_fit(run_trial(recipe, steps=6).seconds_per_step))
        report.note(f"takes {recipe.train.steps} steps, as many as fit into some minutes here (--steps says otherwise)")
    dump_recipe(recipe, kept)
    return recipe


def must_be_the_demos(kept: Path, out: Path) -> None:
    """Raises BadInput for a recipe that somebody else wrote: the demo would write its own in that place."""
    from dmm_core.recipe import load_recipe
    from mini_family import demo

    if not kept.exists():
        return
    try:
        recipe = load_recipe(kept, check_files=False)
        own = recipe.title == demo.TITLE and Path(recipe.out).resolve() == (out / "mini-dmm.safetensors").resolve()
    except RecipeError:
        own = False
    if not own:
        raise BadInput(
            "is not a recipe of this folder's demo", kept, "Move it away, or give another folder: --out DIR."
        )
