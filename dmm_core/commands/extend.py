"""Add teachers to a DMM file: its styles stay, each taught by the file as it was, and the new ones come after them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dmm_core.errors import BadInput

HELP = "add further checkpoints to a DMM file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("student", help="the DMM file to extend; or a recipe (YAML) with student and teachers")
    parser.add_argument("--teacher", nargs="+", action="extend", help="checkpoints to add")
    parser.add_argument("--out", help="the DMM file to write")
    parser.add_argument("--base", help="what LoRA files among the teachers are put on")
    parser.add_argument("--prompts", help="prompts to draw training data with, one a line")
    parser.add_argument("--steps", type=int, help="optimizer steps")
    parser.add_argument("--preset", help="preview, good (if left out), best or mini: what is not said otherwise")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run of the same recipe")
    parser.add_argument("--force", action="store_true", help="overwrite the output if it is there")
    parser.add_argument("--report", metavar="DIR", help="draw and measure old and new styles, before and after")
    parser.add_argument(
        "--old-teacher", nargs="+", metavar="FILE",
        help="of --report: the old styles' own teachers, in order (if left out, the student as it was)",
    )  # fmt: skip
    parser.add_argument("--images", type=int, default=48, help="of --report: pictures a style (48)")
    parser.add_argument("--sampler-steps", type=int, default=12, help="of --report (12)")
    parser.add_argument("--test-prompts", metavar="FILE", help="of --report: prompts that training did not use")


def run(args: argparse.Namespace, report: Any) -> dict:
    from dmm_core.commands.distill import run_launched

    made = run_launched(lambda: checked(args), args, report, "the same command with --resume")
    return made | {"report": show(args, recipe_of(args), report)} if args.report else made


def checked(args: argparse.Namespace) -> Any:
    """The recipe, once what ``--report`` needs is there too: training takes hours, and its report comes after."""
    recipe = recipe_of(args)
    if not args.report:
        return recipe
    from dmm_core.checkpoint import open_checkpoint
    from dmm_core.commands import evaluate
    from dmm_core.data import read_prompts
    from dmm_core.fitting import must_fit

    if args.sampler_steps < 1:
        raise BadInput(f"--sampler-steps {args.sampler_steps}: expected at least 1")
    measuring = measurement(args, recipe)
    evaluate.check(measuring)
    earlier = open_checkpoint(recipe.student)
    for path in args.old_teacher or ():
        must_fit(earlier, open_checkpoint(path))
    if args.old_teacher and earlier.dmm and len(args.old_teacher) != len(earlier.styles):
        styles = f"{len(earlier.styles)} styles ({', '.join(earlier.styles)})"
        raise BadInput(f"has {styles}, got {len(args.old_teacher)} old teachers", earlier.path)
    if measuring.prompts:
        read_prompts(measuring.prompts)
    evaluate.made(Path(args.report))
    return recipe


def recipe_of(args: argparse.Namespace) -> Any:
    """The recipe file, or one made of the arguments."""
    from dmm_core.presets import DEFAULT
    from dmm_core.recipe import load_recipe, recipe_from_dict

    if Path(args.student).suffix.lower() in (".yaml", ".yml", ".json"):
        for key in ("teacher", "out", "preset", "base", "prompts", "steps"):
            if getattr(args, key) is not None:
                raise BadInput(f"give a recipe or --{key}, not both", args.student)
        recipe = load_recipe(args.student)
        if recipe.student is None:
            raise BadInput("has no student to extend", args.student, "dmm distill makes one of teachers alone.")
        return recipe
    if not args.teacher or not args.out:
        raise BadInput("what to add is missing", args.student, "Give --teacher FILE … --out FILE.")
    data: dict[str, Any] = {"student": args.student, "teachers": list(args.teacher), "out": args.out}
    data |= {"base": args.base} if args.base else {}
    data["preset"] = args.preset or DEFAULT
    data |= {"data": {"prompts": args.prompts}} if args.prompts else {}
    data |= {"train": {"steps": args.steps}} if args.steps is not None else {}
    return recipe_from_dict(data, source="command line")


def show(args: argparse.Namespace, recipe: Any, report: Any) -> dict:
    """The report of ``dmm evaluate`` on old and new styles, the earlier student beside."""
    from dmm_core.checkpoint import open_checkpoint
    from dmm_core.commands import evaluate
    from dmm_core.plan import open_sources

    sources = open_sources(recipe, check_values=False)
    own = [{"path": path} for path in args.old_teacher or ()]
    if own and sources.earlier:
        own = evaluate.in_order(own, sources.earlier.style_info, report)
    old = [open_checkpoint(teacher["path"]) for teacher in own] or list(sources.teachers[: sources.old])
    teachers = [*old, *sources.teachers[sources.old :]]
    measured = evaluate.measure_beside(measurement(args, recipe), teachers, report)
    for row in measured["per_style"]:
        report.out(
            f"{row['style']}: distance {row['before']:.3g} before, {row['student']:.3g} now, "
            f"{row['reference']:.3g} is its teacher's own"
        )
    return measured


def measurement(args: argparse.Namespace, recipe: Any) -> argparse.Namespace:
    """What ``dmm evaluate`` is told for ``--report``."""
    from dmm_core.commands import evaluate

    prompts = args.test_prompts or recipe.evaluate.prompts
    line = [str(recipe.out), "--before", str(recipe.student), "--images", str(args.images)]
    line += ["--steps", str(args.sampler_steps), "--out", args.report]
    line += ["--device", recipe.train.device, *(["--prompts", str(prompts)] if prompts else []), "--teacher", ""]
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    return parser.parse_args(line)
