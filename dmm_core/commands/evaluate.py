"""Measure a DMM file against its teachers: Fréchet matrices, ratio to the reference, score gap closed."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dmm_core.errors import BadInput

HELP = "measure a DMM file against its teachers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="the DMM file")
    parser.add_argument(
        "--teacher", nargs="+", action="extend", required=True, metavar="FILE[=STRENGTH]",
        help="its teachers, in the file's order; LoRA files with the strength they had in its recipe, if none is said",
    )  # fmt: skip
    parser.add_argument("--base", help="what LoRA files among the teachers are put on")
    parser.add_argument(
        "--before", metavar="FILE",
        help="the earlier student that dmm extend began with: shown beside; where --teacher gives the new teachers "
        "alone, its own styles stand for their teachers",
    )  # fmt: skip
    parser.add_argument(
        "--mix", nargs=2, action="append", metavar=("STYLE", "STYLE"),
        help="measure the way from one style to the other in tenths, beside the weight average's; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--beside", nargs="+", default=[], metavar="FILE",
        help="checkpoints to set beside, as the weight average is: what dmm merge made of the same teachers, say",
    )  # fmt: skip
    parser.add_argument("--prompts", help="prompts that training did not use, one a line (built-in ones if left out)")
    parser.add_argument("--images", type=int, default=96, help="pictures a style (96)")
    parser.add_argument("--steps", type=int, default=12, help="sampler steps (12)")
    parser.add_argument("--few-steps", type=int, default=4, help="of a student that was made for few steps (4)")
    parser.add_argument("--cfg", type=float, default=None, help="guidance scale (7; 2 for the mini family)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default="dmm-evaluation", help="folder for report.html, report.json and pictures")


def run(args: argparse.Namespace, report: Any) -> dict:
    check(args)
    return measure_beside(args, opened_teachers(args, report), report)


def check(args: argparse.Namespace) -> None:
    """Raises BadInput for what is better told before anything is loaded and drawn."""
    from dmm_core.features import Extractor

    for option, least in (("images", 4), ("steps", 1), ("few_steps", 1)):
        if (given := getattr(args, option)) < least:
            raise BadInput(f"--{option.replace('_', '-')} {given}: expected at least {least}")
    if args.cfg is not None and not math.isfinite(args.cfg):
        raise BadInput(f"--cfg {args.cfg}: expected a number")
    Extractor.find()


def made(folder: Path) -> Path:
    """The folder, made if it is missing. Raises BadInput or OSError where nothing can be written into it."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise BadInput("cannot be written", folder, "Choose another place, or change its rights.")
    return folder


def opened_teachers(args: argparse.Namespace, report: Any = None) -> list:
    """The teachers that ``--teacher`` names, in the file's order: checkpoints, or LoRA files on ``--base``."""
    from dmm_core.checkpoint import open_checkpoint
    from dmm_core.commands.merge import file_and_strength
    from dmm_core.plan import open_teacher
    from dmm_core.recipe import TeacherSpec

    base = open_checkpoint(args.base) if args.base else None
    file = open_checkpoint(args.file)
    trained = strengths(file.metadata.get("dmm.recipe", ""))
    entries = file.style_info
    if args.before and len(args.teacher) < len(entries):  # the new ones alone, whose styles are the last
        entries = entries[-len(args.teacher) :]
    opened = []
    for given in in_order([file_and_strength(text) for text in args.teacher], entries, report):
        path = Path(given["path"])
        opened.append(
            open_teacher(TeacherSpec(path, strength=given.get("strength", trained.get(path.name, 1.0))), base)
        )
    return opened


def in_order(
    given: list[dict[str, Any]], entries: Sequence[dict[str, Any]], report: Any = None
) -> list[dict[str, Any]]:
    """Teachers' files in the order of the styles that ``entries`` of a DMM file tell of, as far as names can say.

    A wrong order would measure each style against another's teacher, and nothing in the figures would show it. Files
    that were renamed since are left where they are, with a note.
    """
    names = [Path(teacher["path"]).name for teacher in given]
    noted = [Path(str(entry.get("teacher") or "")).name for entry in entries]
    say = report.note if report else lambda text: None
    if len(names) != len(noted):  # which is refused later, by one who can tell what the file has
        return given
    if names != noted and Counter(names) == Counter(noted) and len({*names}) == len(names):
        say(f"note: teachers put in the file's order: {', '.join(noted)}")
        return [given[names.index(name)] for name in noted]
    for name, entry, known in zip(names, entries, noted, strict=True):
        if known and name != known:
            say(f"note: {name} is not the file that style {entry['name']} was learned from ({known})")
    return given


def strengths(recipe: str) -> dict[str, float]:
    """Teachers' file names and strengths in a file's ``dmm.recipe``; none where it is left out or not to be read."""
    try:
        return {Path(entry["path"]).name: float(entry["strength"]) for entry in json.loads(recipe)["teachers"]}
    except (ValueError, KeyError, TypeError):
        return {}


def measure_beside(args: argparse.Namespace, teachers: list, report: Any) -> dict:
    """Measure the file beside these opened teachers, and show it."""
    from dmm_core.checkpoint import open_checkpoint
    from dmm_core.features import appeal
    from dmm_core.measure import draw_compared, measure
    from dmm_core.mixing import expected, mixing_table
    from dmm_core.present import SUBJECTS, present

    began = time.monotonic()
    bench = bench_of(args, teachers, Notifier(report))
    pairs = pairs_of(args.mix or [], bench.names)
    before = earlier_bench(bench, args.before) if args.before else None
    networks, out = appeal.find(bench.student.device), made(Path(args.out))
    bench.expected += expected(bench, pairs) + len(bench.prompts) * bool(networks)
    compared = draw_compared(bench)
    mixing = [mixing_table(bench, compared, pair) for pair in pairs]
    told = [{k: v for k, v in entry.items() if k != "thumbnail"} for entry in open_checkpoint(args.file).style_info]
    about = {"title": bench.student.path.stem, "mixing": mixing, "merged": told}
    measured = measure(bench, began, compared=compared, before=before, networks=networks, **about)
    for line in headline(measured.report):  # before the gallery is drawn: whatever becomes of it, they are known
        report.out(line)
    few = list(dict.fromkeys(bench.prompts))[:SUBJECTS]
    gallery = replace(bench, prompts=few, what="draws pictures to show", expected=0, others={})
    small = replace(before, prompts=few, others={}) if before else None
    paths = present(out, measured, gallery, bench.student.path, small)
    report.out(f"written: {', '.join(str(path) for path in paths)}")
    return measured.report


def bench_of(args: argparse.Namespace, teachers: list, notify: Any) -> Any:
    """The file beside its teachers; with ``--before``, an earlier student may stand for the teachers it had."""
    from dmm_core.checkpoint import open_checkpoint
    from dmm_core.data import built_in_prompts, read_prompts
    from dmm_core.extension import style_teachers
    from dmm_core.fitting import must_fit
    from dmm_core.latents import latent_size
    from dmm_core.measure import Bench
    from dmm_core.models import build_unet, load_pipeline
    from dmm_core.plan import choose_device
    from dmm_core.run import average_tensors
    from dmm_core.teachers import Teachers

    checkpoint = open_checkpoint(args.file)
    if checkpoint.dmm is None:
        raise BadInput("is no DMM file", args.file, "dmm distill makes one.")
    for teacher in teachers:
        must_fit(checkpoint, teacher)
    if args.before:
        earlier = open_checkpoint(args.before)
        if earlier.dmm is None or checkpoint.styles[: len(earlier.styles)] != earlier.styles:
            raise BadInput(f"has not the first styles of {checkpoint.path.name}", args.before)
        if len(teachers) == len(checkpoint.styles) - len(earlier.styles):
            teachers = [*style_teachers(earlier), *teachers]
    if len(teachers) != len(checkpoint.styles):
        raise BadInput(
            f"has {len(checkpoint.styles)} styles ({', '.join(checkpoint.styles)}), got {len(teachers)} teachers",
            args.file,
        )
    prompts = read_prompts(args.prompts) if args.prompts else built_in_prompts(args.images, seed=2**20)
    prompts = [prompts[i % len(prompts)] for i in range(args.images)]
    device = choose_device(args.device)
    dtype, resident = sparing(device)
    small = checkpoint.unet_config["block_out_channels"][0] < 128
    average = build_unet(
        checkpoint.unet_config,
        average_tensors(teachers, None, checkpoint),
        dtype,
        checkpoint.path,
        styled=False,
    )
    others = others_of(args.beside, checkpoint, device, dtype)
    beside = Teachers(teachers, device, dtype, resident, prediction_type=checkpoint.prediction_type)
    cfg = args.cfg if args.cfg is not None else (2.0 if small else 7.0)
    student, size = load_pipeline(checkpoint, device, unet_dtype=dtype), latent_size(checkpoint, None)
    return Bench(
        student, beside, average.to(device), prompts, size, args.steps, cfg, notify, few=args.few_steps, others=others
    )


def sparing(device: str) -> tuple[Any, int | None]:
    """UNets' type and how many teachers stay on the device: its own precision and one, but on a CPU float32 and all."""
    from dmm_core.plan import DTYPES, choose_precision

    if device.startswith("cpu"):
        return DTYPES["fp32"], None
    return DTYPES[choose_precision("auto", device)], 1


def others_of(paths: list[str], checkpoint: Any, device: str, dtype: Any) -> dict[str, Any]:
    """The UNets of ``--beside`` by their files' names."""
    from dmm_core.checkpoint import open_checkpoint
    from dmm_core.fitting import must_fit, same_prediction
    from dmm_core.models import build_unet

    others: dict[str, Any] = {}
    for path in paths:
        other = open_checkpoint(path)
        must_fit(checkpoint, other)
        if not same_prediction(checkpoint, other):
            raise BadInput(
                f"does not predict what {checkpoint.path.name} does, and cannot be set beside it", other.path
            )
        name = other.path.stem if other.path.stem not in others else str(other.path)
        others[name] = build_unet(other.unet_config, other.unet(), dtype, other.path, styled=False).to(device)
    return others


def pairs_of(given: list[list[str]], names: tuple[str, ...]) -> list[tuple[str, str]]:
    """What ``--mix`` says, checked."""
    for name in (name for pair in given for name in pair):
        if name not in names:
            raise BadInput(f"--mix: there is no style {name!r}", hint=f"The styles are: {', '.join(names)}.")
    return [(first, second) for first, second in given]


def earlier_bench(bench: Any, path: str) -> Any:
    """The same bench with the student that a file holds."""
    from dmm_core.models import load_pipeline

    student = load_pipeline(path, bench.student.device, unet_dtype=bench.student.unet.dtype)
    return replace(bench, student=student, what="draws what was before", expected=0, others={})


class Notifier:
    """Turns ``notify(what, done, total)`` calls into one progress bar after another."""

    def __init__(self, report: Any) -> None:
        self.report = report
        self.bars: dict[str, Any] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self.bars:
            self.bars[what] = self.report.progress(total, what)
        self.bars[what].to(done)
        if done == total:
            self.bars[what].close()


def headline(report: dict[str, Any]) -> list[str]:
    """The figures that matter, a sentence each."""
    error = f" ± {report['ratio_error']:.3f}" if report.get("ratio_error") else ""
    average = report["weight_average"]
    gap = report["gap_closed"]["mean"]
    return [
        f"ratio to the teachers' own distance: {report['ratio']:.3f}{error} "
        f"(1: {report['images_per_style']} pictures a style show no difference; weight average {average['ratio']:.2f})",
        *(f"{other['name']} beside: ratio {other['ratio']:.3f}{_closed(other)}" for other in report["baselines"]),
        *([] if gap is None else [f"score gap closed: {gap:.1%} (0 % is the weight average, 100 % the teachers)"]),
        *same_seed(report),
        *separated(report),
        *(
            f"{row['score']}: " + ", ".join(f"{what} {mean:.2f}" for what, mean in row["means"].items())
            for row in report.get("appeal", ())
        ),
        f"measured with {report['extractor']}, {report['images_per_style']} pictures a style",
    ]


def _closed(other: dict[str, Any]) -> str:
    return "" if other["gap_closed"] is None else f", gap closed {other['gap_closed']:.1%}"


def same_seed(report: dict[str, Any]) -> list[str]:
    if not (alike := report.get("same_seed")):
        return []
    mine, average = alike["student"], alike.get("average")
    beside = f"; weight average {average['mean']:.2f}" if average else ""
    told = f"picture by picture, same prompt and seed: {mine['mean']:.3f} ± {mine['error']:.3f} of what another seed "
    lost = {name: numbers for name, numbers in zip(report["styles"], mine["astray"], strict=True) if numbers}
    where = "; ".join(f"{name} {', '.join(map(str, numbers))}" for name, numbers in lost.items())
    drawn = report["images_per_style"] * len(report["styles"])
    count = f"{sum(map(len, lost.values()))} of {drawn}{f' ({where})' if where else ''}"
    return [
        f"{told}changes (0 is the teacher's picture itself{beside})",
        f"pictures nearer to another teacher's of the same seed: {count}",
    ]


def separated(report: dict[str, Any]) -> list[str]:
    apart = report.get("separation")
    told = (
        [
            f"style recognised in {apart['student']:.0%} of the pictures (teachers' own {apart['teachers']:.0%}, "
            f"chance {apart['chance']:.0%})"
        ]
        if apart
        else []
    )
    for mixing in report.get("mixing", ()):
        ways = {"mix": mixing["student"], "weight average": mixing["average"]}
        steady = "; ".join(
            f"{name} {'steady' if way['monotone'] else format(way['against'], '.1%') + ' of the way against'}, "
            f"at most {way['largest']:.0%} of it in a tenth"
            for name, way in ways.items()
            if way
        )
        told.append(f"from {mixing['first']} to {mixing['second']}: {steady}")
    return told
