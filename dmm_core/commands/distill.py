"""Merge checkpoints by distillation: several teachers into one student with a style for each."""

from __future__ import annotations

import argparse
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dmm_core.errors import BadInput
from dmm_core.shell import command

HELP = "merge checkpoints into one DMM file"
GUIDANCE = 5.0  # of students for few steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="the recipe, a YAML file")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run of the same recipe")
    parser.add_argument("--teacher", nargs="+", action="extend", help="checkpoints to merge, instead of a recipe")
    parser.add_argument(
        "--few-step", metavar="FILE", help="a DMM file to make sample in 4 to 8 steps, instead of teachers"
    )
    parser.add_argument("--guidance", type=float, help="of --few-step: CFG that becomes part of it (5)")
    parser.add_argument("--base", help="whose text encoder and VAE the result gets (the first teacher's if left out)")
    parser.add_argument("--out", help="the DMM file to write")
    parser.add_argument("--prompts", help="prompts to draw training data with, one a line")
    parser.add_argument("--steps", type=int, help="optimizer steps")
    parser.add_argument("--force", action="store_true", help="overwrite the output if it is there")
    parser.add_argument(
        "--preset", help="preview, good (of --teacher, if left out), best, mini: what is not said otherwise"
    )
    parser.add_argument(
        "--events",
        action="store_true",
        help="for programs: JSON lines on stdout; resumes by itself",
    )
    parser.add_argument("--preview", type=float, default=60.0, metavar="SECONDS", help="of --events; 0: none (60)")


def run(args: argparse.Namespace, report: Any) -> dict:
    """Alone, or as one of the processes that torchrun or accelerate launch has started: the first one speaks."""
    if args.events:
        from dmm_core import child

        return child.run(lambda: recipe_of(args), args.preview, args.force)
    return run_launched(lambda: recipe_of(args), args, report, command_again(args))


def run_launched(recipe_of: Callable[[], Any], args: argparse.Namespace, report: Any, again: str) -> dict:
    """Run a recipe alone, or in the group that a launcher has started."""
    from dmm_core.ranks import launched

    with launched() as ranks:
        if ranks.rank == 0:
            return merge_and_save(recipe_of(), args, report, again, ranks)
        try:
            merge_and_save(recipe_of(), args, report.silent(), again, ranks)
        except (BadInput, KeyboardInterrupt) as error:
            raise SystemExit(2 if isinstance(error, BadInput) else 130) from None
        raise SystemExit(0)


def merge_and_save(recipe: Any, args: argparse.Namespace, report: Any, again: str, ranks: Any) -> dict:
    if Path(recipe.out).exists() and not args.force:
        other = "another name with --out" if args.out else "change out in the recipe"
        raise BadInput("is there already", recipe.out, f"Give --force to overwrite it, or {other}.")
    merge = train(recipe, args.resume, report, again, ranks)
    merge.finish()
    report_share(merge, report)
    path = merge.save() if ranks.rank == 0 else Path(recipe.out)
    for warning in merge.warnings:
        report.note(f"note: {warning}")
    ranks.wait()
    done = merge.distillation
    report.out(f"{path}: {len(done.student.codebook)} styles, {done.samples_seen} samples in {merge.seconds:.0f} s")
    return {
        "out": path, "styles": list(done.student.codebook.names), "steps": done.steps_done,
        "samples_seen": done.samples_seen, "seconds": round(merge.seconds, 1), "start": recipe.train.start,
    }  # fmt: skip


def report_share(merge: Any, report: Any) -> None:
    """Tell by how much a merge's styles were moved apart, if they were."""
    if merge.share and merge.share < 1:
        told = f"the student made {merge.share:.1%} of its teachers' differences"
        report.note(f"{told}: its styles were moved apart by what is missing (train.unshrink)")


def recipe_of(args: argparse.Namespace) -> Any:
    """The recipe file, or one made of --teacher and --out."""
    from dmm_core.presets import DEFAULT
    from dmm_core.recipe import load_recipe, recipe_from_dict

    options = ("teacher", "few_step", "preset", "base", "out", "prompts", "steps", "guidance")
    chosen = [name for name in options if getattr(args, name) is not None]
    if args.recipe and chosen:
        raise BadInput(f"give a recipe or --{chosen[0].replace('_', '-')}, not both")
    if args.recipe:
        return load_recipe(args.recipe)
    if not (args.teacher or args.few_step) or not args.out:
        raise BadInput("a recipe is missing", hint="Give a YAML file, or --teacher FILE … --out FILE.")
    if args.teacher and args.few_step:
        raise BadInput("give --teacher or --few-step, not both", hint="The styles of the DMM file teach themselves.")
    if args.guidance is not None and not args.few_step:
        raise BadInput("--guidance is of --few-step", hint="Teachers draw with a recipe's data: {cfg_scale: …}.")
    guidance = GUIDANCE if args.guidance is None else args.guidance
    data: dict[str, Any] = {"teachers": list(args.teacher or ()), "out": args.out}
    data |= {"base": args.base} if args.base else {}
    preset = args.preset or (DEFAULT if args.teacher else None)
    data |= {"preset": preset} if preset else {}
    data |= {"data": {"prompts": args.prompts}} if args.prompts else {}
    data |= {"train": {"steps": args.steps}} if args.steps is not None else {}
    if args.few_step:
        data |= {"student": args.few_step, "train": {**data.get("train", {}), "few_step": guidance}}
        data["data"] = {"cfg_scale": guidance, **data.get("data", {})}
    return recipe_from_dict(data, source="command line")


def command_again(args: argparse.Namespace) -> str:
    if not args.recipe:
        return "the same command with --resume"
    return command("distill", Path(args.recipe).absolute(), "--resume")


class Every:
    """True at most once in so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.last = seconds, -math.inf

    def due(self) -> bool:
        now = time.monotonic()
        if now - self.last < self.seconds:
            return False
        self.last = now
        return True


@contextmanager
def stop_flag() -> Iterator[list[bool]]:
    """A list that gets an item at the first Ctrl-C; the second one interrupts at once."""
    asked: list[bool] = []

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def train(recipe: Any, resume: bool, report: Any, again: str, ranks: Any = None) -> Any:
    """Run a recipe with progress on stderr. A stop saves first and says how to go on; so does a file ``stop``."""
    from dmm_core.run import prepare

    bars: dict[str, Any] = {}

    def notify(what: str, done: int, total: int) -> None:
        if what not in bars:
            bars[what] = report.progress(total, what)
        bars[what].to(done)
        if done >= total:
            bars[what].close()

    merge = prepare(recipe, resume, notify, ranks)
    for warning in merge.sources.warnings:
        report.note(f"note: {warning}")
    stop_file, told = merge.work / "stop", Every(1.0)
    with stop_flag() as asked, report.progress(merge.total_steps, "distils") as bar:
        try:
            for result in merge.timed_steps(lambda: bool(asked) or stop_file.exists()):
                for warning in result.warnings:
                    report.note(f"note: {warning}")
                # reading a loss waits for the device, so most are left unread
                bar.to(result.step, **({"loss": result.loss} if told.due() or result.step == merge.total_steps else {}))
        except KeyboardInterrupt:
            stop_file.unlink(missing_ok=True)
            raise KeyboardInterrupt(f"Go on with: {again}") from None
    return merge
