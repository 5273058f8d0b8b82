"""Measure a DMM file against its teachers: Fréchet matrices, ratio to the reference, score gap closed."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from dmm_core.errors import BadInput

HELP = "measure a DMM file against its teachers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="the DMM file")
    parser.add_argument(
        "--teacher", nargs="+", action="extend", required=True, help="its teachers, in the file's order"
    )
    parser.add_argument("--prompts", help="prompts that training did not use, one a line (built-in ones if left out)")
    parser.add_argument("--images", type=int, default=96, help="pictures a style (96)")
    parser.add_argument("--steps", type=int, default=12, help="sampler steps (12)")
    parser.add_argument("--cfg", type=float, default=None, help="guidance scale (7; 2 for the mini family)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default="dmm-evaluation", help="folder for report.html, report.json and pictures")


def run(args: argparse.Namespace, report: Any) -> dict:
    import torch

    from dmm_core.checkpoint import open_checkpoint
    from dmm_core.data import built_in_prompts, read_prompts
    from dmm_core.measure import Bench, measure
    from dmm_core.models import build_unet, load_pipeline
    from dmm_core.plan import choose_device, must_fit
    from dmm_core.present import SUBJECTS, present
    from dmm_core.run import average_tensors, latent_size
    from dmm_core.teachers import Teachers

    began = time.monotonic()
    checkpoint = open_checkpoint(args.file)
    teachers = [open_checkpoint(path) for path in args.teacher]
    if checkpoint.dmm is None:
        raise BadInput("is no DMM file", args.file, "dmm distill makes one.")
    if len(teachers) != len(checkpoint.styles):
        raise BadInput(
            f"has {len(checkpoint.styles)} styles ({', '.join(checkpoint.styles)}), got {len(teachers)} teachers",
            args.file,
        )
    for teacher in teachers:
        must_fit(teachers[0], teacher)
    if args.images < 4:
        raise BadInput(f"--images {args.images}: expected at least 4")
    prompts = read_prompts(args.prompts) if args.prompts else built_in_prompts(args.images, seed=2**20)
    prompts = [prompts[i % len(prompts)] for i in range(args.images)]
    device = choose_device(args.device)
    small = checkpoint.unet_config["block_out_channels"][0] < 128
    average = build_unet(
        teachers[0].unet_config, average_tensors(teachers), torch.float32, teachers[0].path, styled=False
    )
    bench = Bench(
        load_pipeline(checkpoint, device), Teachers(teachers, device), average.to(device), prompts,
        latent_size(checkpoint, None),
        args.steps, args.cfg if args.cfg is not None else (2.0 if small else 7.0), notify=Notifier(report),
    )  # fmt: skip
    measured = measure(bench, began, title=checkpoint.path.stem)
    paths = present(
        Path(args.out), measured, replace(bench, prompts=list(dict.fromkeys(prompts))[:SUBJECTS]), checkpoint.path
    )
    for line in headline(measured.report):
        report.out(line)
    report.out(f"written: {', '.join(str(path) for path in paths)}")
    return measured.report


class Notifier:
    """Turns ``notify(what, done, total)`` calls into one progress bar after another."""

    def __init__(self, report: Any) -> None:
        self.report = report
        self.bars: dict[str, Any] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self.bars:
            self.bars[what] = self.report.progress(total, what)
        self.bars[what].to(min(done, total))
        if done == total:
            self.bars[what].close()


def headline(report: dict[str, Any]) -> list[str]:
    """The figures that matter, a sentence each."""
    error = f" ± {report['ratio_error']:.3f}" if report.get("ratio_error") else ""
    average = report["weight_average"]
    return [
        f"ratio to the teachers' own distance: {report['ratio']:.3f}{error} "
        f"(1 is a perfect student; weight average {average['ratio']:.2f})",
        f"score gap closed: {report['gap_closed']['mean']:.1%} (0 % is the weight average, 100 % the teachers)",
        f"measured with {report['extractor']}, {report['images_per_style']} pictures a style",
    ]
