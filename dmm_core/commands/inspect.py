"""What a model file holds: kind, architecture, parameters, styles, metadata, and tensors with NaN or infinity."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from dmm_core.cli import Reporter, jsonable

HELP = "say what a model file holds"
WIDTH = 160  # longer values, thumbnails above all, are cut for people; --json has them whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a .safetensors file or a diffusers folder")
    parser.add_argument(
        "--check", action="store_true", help="read every value too, and list tensors with NaN or infinity"
    )


def run(args: argparse.Namespace, report: Reporter) -> dict[str, Any]:
    from dmm_core.checkpoint import inspect_file

    found: Any = inspect_file(args.file, check_values=args.check)
    found = jsonable(vars(found) if dataclasses.is_dataclass(found) else found)
    for line in lines(found):
        report.out(line)
    return found


def lines(found: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """``key: value`` lines, deeper mappings further in; what is None or empty is left out."""
    for key, value in found.items():
        if value is None or value in ({}, [], ""):
            continue
        if isinstance(value, Mapping):
            yield f"{indent}{key}:"
            yield from lines(value, indent + "  ")
        elif isinstance(value, list):
            yield f"{indent}{key}:"
            yield from (f"{indent}  {_cut(item)}" for item in value)
        else:
            yield f"{indent}{key}: {_cut(value)}"


def _cut(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_cut(v)}" for k, v in value.items() if v not in (None, ""))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = " ".join(str(value).split())
    return text if len(text) <= WIDTH else text[:WIDTH] + " …"
