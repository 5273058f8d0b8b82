"""What is written into a picture's parameters, and how the panel is filled from them again. torch and dmm_core alone.

The webuis quote values with commas themselves (``quote`` in modules/infotext_utils.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .args import SLIDERS, Args, parse_mix, write_mix
from .styles import Book

WEIGHTS, NORMALISE, PASS, NEGATIVE, TO, SCHEDULE, BATCH = KEYS = (
    "DMM weights", "DMM normalise", "DMM pass", "DMM negative", "DMM to", "DMM schedule", "DMM batch",
)  # fmt: skip


def write(args: Args, book: Book) -> dict[str, str]:
    """Keys and values for ``p.extra_generation_params``; what is as usual is left out."""
    if isinstance(args.weights, tuple):
        try:
            weights = write_mix(book.sliders(args.weights, args.names))
        except ValueError:  # the session says it
            return {}
    else:
        weights = write_mix(args.weights)
    told = {WEIGHTS: weights}
    if not args.normalise:
        told[NORMALISE] = "False"
    if args.apply_to != "both":
        told[PASS] = args.apply_to
    if args.negative:
        told[NEGATIVE] = write_mix(args.negative)
    if args.to:
        told |= {TO: write_mix(args.to), SCHEDULE: f"{args.mode} {args.start:g} {args.end:g}"}
    if args.batch:
        told[BATCH] = "; ".join(map(write_mix, args.batch))
    return told


def read(params: Mapping[str, Any]) -> dict[str, Any] | None:
    """The panel's values by control's name, ``weights`` a text, of an infotext; None where it has no DMM style."""
    if WEIGHTS not in params:
        return None
    try:
        mode, start, end = str(params.get(SCHEDULE, "blend 0 1")).split()
        shares = float(start), float(end)
    except ValueError:  # edited by hand
        mode, shares = "blend", (0.0, 1.0)
    return {
        "enabled": True,
        "weights": str(params[WEIGHTS]),
        "normalise": str(params.get(NORMALISE, "True")) != "False",
        "apply_to": str(params.get(PASS, "both")),
        "negative": str(params.get(NEGATIVE, "")),
        "to": str(params.get(TO, "")),
        "start": shares[0],
        "end": shares[1],
        "mode": mode,
        "batch": str(params.get(BATCH, "")),
    }


def sliders(text: str, book: Book | str) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Names and values of the panel's sliders for a text of weights.

    The loaded checkpoint's names where they fit; else the text's own, since pictures are often pasted before their
    checkpoint is loaded.
    """
    if isinstance(book, Book):
        try:
            mix = book.mix(text)
            names = book.names
            if any(name not in names[:SLIDERS] for name, weight in mix.items() if weight):  # beyond the last slider
                names = tuple(name for name, weight in mix.items() if weight)
            return names[:SLIDERS], tuple(mix.get(name, 0.0) for name in names[:SLIDERS])
        except ValueError:
            pass
    try:
        mix = parse_mix(text)
    except ValueError:
        return (), ()
    return tuple(mix)[:SLIDERS], tuple(mix.values())[:SLIDERS]
