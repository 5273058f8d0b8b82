"""Make a fixed mix of a DMM file's styles: a 5 KB style file for stock LoRA loaders, or an ordinary checkpoint."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from dmm_core.cli import Reporter
from dmm_core.commands import add_style_argument, parse_mix
from dmm_core.errors import BadInput

HELP = "write a style file, or an ordinary checkpoint, of a mix of styles"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the DMM file")
    add_style_argument(parser, required=True)
    parser.add_argument("--out", metavar="FILE", required=True, help="the .safetensors file to write")
    parser.add_argument("--name", help="what the mix is called in the file's metadata (default: the name of --out)")
    parser.add_argument(
        "--bake", action="store_true", help="write an ordinary checkpoint with this mix as its only style"
    )
    parser.add_argument(
        "--no-normalize", action="store_true", help="take the weights as they are, whatever they sum to"
    )
    parser.add_argument("--force", action="store_true", help="overwrite whatever file is there")


def run(args: argparse.Namespace, report: Reporter) -> dict[str, Any]:
    from dmm_core.checkpoint import open_checkpoint
    from dmm_core.export import export

    out, mix = _output(args), parse_mix(args.style) or {}
    name = args.name or out.stem
    used = export(open_checkpoint(args.file), mix, out, name, bake=args.bake, normalize=not args.no_normalize)
    kind = "checkpoint" if args.bake else "style"
    told = " + ".join(f"{weight:g} {style}" for style, weight in used.items())
    report.out(f"{out}: {kind} of {told}, {out.stat().st_size:,} bytes")
    return {
        "file": str(args.file),
        "out": str(out),
        "kind": kind,
        "name": name,
        "mix": used,
        "bytes": out.stat().st_size,
    }


def _output(args: argparse.Namespace) -> Path:
    """Where it is written. A style file may take another one's place; nobody's LoRA or checkpoint is lost."""
    path, source = Path(args.out), args.file
    if path.suffix.lower() != ".safetensors":
        raise BadInput("the output's name must end in .safetensors", path)
    if path.is_dir():
        raise BadInput("is a folder", path, "Give a file's name.")
    if path.exists() and os.path.exists(source) and os.path.samefile(path, source):
        raise BadInput("is the input too, and would be lost", path, "Choose another name.")
    if args.force or not path.exists():
        return path
    told = BadInput("is there already", path, "Give --force to overwrite it, or another name with --out.")
    if args.bake:
        raise told
    from dmm_core.outputs import require_style_file

    try:
        require_style_file(path)
    except BadInput:
        raise told from None
    return path
