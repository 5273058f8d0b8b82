"""What a merge leaves to look at: styles.png, mix.png, fid.png, report.html and report.json."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dmm_core.files import write_atomically
from dmm_core.report.page import page
from dmm_core.report.pictures import Grids, MixStrip, StyleGrid, draw_matrices, draw_mix, draw_styles

__all__ = [
    "Grids",
    "MixStrip",
    "StyleGrid",
    "draw_matrices",
    "draw_mix",
    "draw_styles",
    "page",
    "write_json",
    "write_report",
]


def write_report(
    out_dir: str | Path, report: Mapping[str, Any], grids: Grids | None = None, title: str = "Merged checkpoint"
) -> list[Path]:
    """Write all that there is to show, each file atomically; returns what was written.

    Args:
        report: what ``evaluate.to_report`` gave. The page also shows, where they are there: ``merged`` (a list of
            name, teacher, sha256), ``file`` (the DMM file), ``recipe`` (dict or text) and ``sampler`` (a dict).
        grids: the pictures; a missing part is left out.
    """
    out, grids = Path(out_dir), grids or Grids()
    drawn = {"fid.png": draw_matrices(report)}
    if grids.styles is not None:
        drawn["styles.png"] = draw_styles(grids.styles)
    if grids.mixes:
        drawn["mix.png"] = draw_mix(grids.mixes, grids.weights)
    for name, image in drawn.items():
        write_atomically(out / name, _png(image))
    write_atomically(out / "report.html", page(report, grids, title).encode())
    return [*(out / name for name in drawn), out / "report.html", write_json(out / "report.json", report)]


def write_json(path: str | Path, report: Mapping[str, Any]) -> Path:
    """The report as UTF-8 JSON. Arrays become lists, paths text, and what is not finite null."""
    text = json.dumps(_plain(report), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(Path(path), (text + "\n").encode())
    return Path(path)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
