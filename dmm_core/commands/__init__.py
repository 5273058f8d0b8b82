"""The commands of ``dmm``, a module each (see ``dmm_core/cli.py``), and what several of them share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dmm_core.errors import StyleError


def add_style_argument(parser: argparse.ArgumentParser, required: bool = False) -> None:
    parser.add_argument(
        "--style", metavar="NAME=WEIGHT", nargs="+", action="extend", default=None, required=required,
        help="a style and its weight (1 where it is left out); give several for a mix",
    )  # fmt: skip


def parse_mix(values: Sequence[str] | None) -> dict[str, float] | None:
    """``["ink=0.7", "neon=0.3"]`` → ``{"ink": 0.7, "neon": 0.3}``; None for None (the default style).

    Raises:
        StyleError: a weight that is no number, or a style given twice.
    """
    if values is None:
        return None
    mix: dict[str, float] = {}
    for value in values:
        name, equals, weight = value.rpartition("=")
        name, weight = (name, weight) if equals else (value, "1")
        if name in mix:
            raise StyleError(f"--style {name} is given twice")
        try:
            mix[name] = float(weight)
        except ValueError:
            raise StyleError(f"--style {value}: {weight!r} is not a number", hint="Write NAME=WEIGHT.") from None
    return mix
