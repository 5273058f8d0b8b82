"""Draw pictures with a checkpoint or a DMM file, without a host."""

from __future__ import annotations

import argparse
import io
import math
from pathlib import Path
from typing import Any

from dmm_core.commands import add_style_argument, parse_mix
from dmm_core.errors import BadInput

HELP = "draw pictures with a checkpoint or DMM file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a DMM file, or any SD1.5 checkpoint")
    parser.add_argument("--prompt", nargs="+", required=True, help="one picture for each")
    parser.add_argument("--negative", default="", help="negative prompt")
    add_style_argument(parser)
    parser.add_argument("--no-normalize", action="store_true", help="take the weights as they are (extrapolation)")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the next ones count up")
    parser.add_argument("--steps", type=int, default=None, help="(20; 4 with a student for few steps)")
    parser.add_argument(
        "--cfg", type=float, default=None,
        help="guidance scale, 1 is off (7; 2 for the mini family; 1 with a student for few steps)",
    )  # fmt: skip
    parser.add_argument("--size", default=None, metavar="WxH", help="in pixels, multiples of 8")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default="picture.png", help="PNG; further pictures get -1, -2 … before the suffix")


def run(args: argparse.Namespace, report: Any) -> dict:
    import torch
    from PIL import Image

    from dmm_core.checkpoint import open_checkpoint
    from dmm_core.latents import latent_size
    from dmm_core.models import load_pipeline
    from dmm_core.plan import DTYPES, choose_device, choose_precision
    from dmm_core.sample import decode, sample

    check(args)
    mix = parse_mix(args.style)
    checkpoint = open_checkpoint(args.file)
    height, width = parse_size(args.size) if args.size else tuple(8 * n for n in latent_size(checkpoint, None))
    device = choose_device(args.device)
    out, paths = Path(args.out), []
    out.parent.mkdir(parents=True, exist_ok=True)  # a place that cannot be used is told before anything is drawn
    pipe = load_pipeline(checkpoint, device, unet_dtype=DTYPES[choose_precision("auto", device)])
    style = None
    if mix is not None:
        if pipe.codebook is None:
            raise BadInput("is no DMM file, so it has no styles", args.file, "Leave --style out.")
        style = pipe.codebook.style(mix, not args.no_normalize)
    small, few = checkpoint.unet_config["block_out_channels"][0] < 128, pipe.few_step > 0
    cfg = args.cfg if args.cfg is not None else 1.0 if few else 2.0 if small else 7.0
    steps = args.steps if args.steps is not None else 4 if few else 20
    seeds = [args.seed + i for i in range(len(args.prompt))]
    with torch.no_grad():
        latents = sample(
            pipe, args.prompt, seeds=seeds, steps=steps, cfg_scale=cfg, negative=args.negative, style=style,
            size=(height, width),
        )  # fmt: skip
    for i, picture in enumerate(decode(pipe.vae, latents)):
        paths.append(out if i == 0 else out.with_stem(f"{out.stem}-{i}"))
        Image.fromarray(picture).save(paths[-1])
        report.out(str(paths[-1]))
    return {"out": paths, "seeds": seeds, "style": mix, "steps": steps, "cfg": cfg, "size": [width, height]}


def check(args: argparse.Namespace) -> None:
    """Raises BadInput for what would be found after drawing, or by a traceback."""
    if args.steps is not None and not 1 <= args.steps <= 1000:
        raise BadInput(f"--steps {args.steps}: expected 1 to 1000")
    if args.cfg is not None and not math.isfinite(args.cfg):
        raise BadInput(f"--cfg {args.cfg}: expected a number")
    last = 2**63 - 1 - len(args.prompt)
    if not 0 <= args.seed <= last:
        raise BadInput(f"--seed {args.seed}: expected 0 to {last}")
    out = Path(args.out)
    if out.is_dir():
        raise BadInput("is a folder", out, "Give a file's name.")
    if not can_be_saved(out.suffix.lower()):
        raise BadInput(f"--out {out}: expected a picture's name, e.g. {out.with_suffix('.png')}")


def can_be_saved(suffix: str) -> bool:
    """Whether pictures in colour can be written with this suffix: of some formats, PIL does so with a plug-in alone."""
    from PIL import Image

    kind = Image.registered_extensions().get(suffix)
    if kind not in Image.SAVE:
        return False
    try:
        Image.new("RGB", (8, 8)).save(io.BytesIO(), kind)
    except (OSError, ValueError, KeyError):
        return False
    return True


def parse_size(text: str) -> tuple[int, int]:
    """ "512x768" (width x height) → (768, 512)."""
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) > 0 and int(width) % 8 == int(height) % 8 == 0):
        raise BadInput(f"--size {text}: expected WIDTHxHEIGHT in multiples of 8, e.g. 512x768")
    return int(height), int(width)
