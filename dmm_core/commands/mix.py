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
TIME_BIAS = "time_embedding.linear_2.bias"  # diffusers' name of time_embed.2.bias


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


def run(args: argparse.Namespace, report: Reporter) -> dict[str, Any]:
    from dmm_core.checkpoint import open_checkpoint, write_style

    out, mix = _output(args.out, args.file), parse_mix(args.style) or {}
    checkpoint = open_checkpoint(args.file)
    codebook = checkpoint.codebook()
    if codebook is None:
        raise BadInput("is an ordinary checkpoint and holds no styles to mix", args.file, "Give a DMM file.")
    try:
        weights = codebook.weights(mix, normalize=not args.no_normalize)
    except BadInput as error:
        raise type(error)(error.what, args.file, error.hint) from None
    # What the file's own UNet must gain: the default style is folded into its bias, and out of this vector.
    vector = codebook(weights).detach()
    name = args.name or out.stem
    used = {style: round(float(weight), 8) for style, weight in zip(codebook.names, weights, strict=True) if weight}
    if args.bake:
        _bake(out, checkpoint, vector, name)
    else:
        write_style(out, vector=vector, name=name, mix=used, dmm_hash=checkpoint.sha256())
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


def _bake(out: Path, checkpoint: Any, vector: Any, name: str) -> None:
    """The checkpoint without codebook, ``time_embed.2.bias`` + s in its place."""
    from dmm_core.checkpoint import write_checkpoint

    unet = dict(checkpoint.unet())
    bias = unet[TIME_BIAS]
    unet[TIME_BIAS] = (bias.float() + vector.float()).to(bias.dtype)
    metadata = {key: value for key, value in checkpoint.metadata.items() if not key.startswith("dmm.")}
    metadata.pop("modelspec.hash_sha256", None)  # of the tensors that it was
    write_checkpoint(
        out, family=checkpoint.family, unet=unet, vae=checkpoint.vae() if checkpoint.vae_config else None,
        text_encoders=[checkpoint.text_encoder(i) for i in range(len(checkpoint.text_configs))],
        metadata={**metadata, "modelspec.title": name},
        prediction_type=checkpoint.prediction_type, vae_config=checkpoint.vae_config,
    )  # fmt: skip


def _output(out: str, source: str) -> Path:
    path = Path(out)
    if path.suffix.lower() != ".safetensors":
        raise BadInput("the output's name must end in .safetensors", path)
    if path.is_dir():
        raise BadInput("is a folder", path, "Give a file's name.")
    if path.exists() and os.path.exists(source) and os.path.samefile(path, source):
        raise BadInput("is the input too, and would be lost", path, "Choose another name.")
    return path
