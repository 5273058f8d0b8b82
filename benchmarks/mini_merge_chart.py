"""What ``mini_merge.py`` measured, as a table in Markdown and as two curves over the samples seen."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from dmm_core.report.draw import INK, LINE, MUTED, PAPER, write

COLOURS = (
    "#0b7285", "#d9480f", "#5f3dc4", "#e8a100", "#2b8a3e", "#c2255c", "#495057", "#74b816", "#7a5230", "#1864ab",
    "#f06595", "#15aabf", "#000000", "#b197fc", "#adb5bd",
)  # fmt: skip
PANEL, MARGIN = (560, 380), 76
WIDE, ROUND = 20, [k * 10**n for n in range(3, 8) for k in (1, 2, 5)]
Curve = list[tuple[int, list[float]]]  # samples seen, one value a seed


def curves(rows: Sequence[dict[str, Any]], value: Any) -> dict[str, Curve]:
    """Variant and length, or what a row is called → values of all its seeds at each number of samples."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        bare = [change.removeprefix("train.").removeprefix("data.") for change in row["changes"].split()]
        changes = "".join(f", {change.replace('=', ' ')}" for change in bare)
        name = row.get("label") or f"{row['start']} start, {row['losses']}, {row['steps']} steps{changes}"
        for point in row["points"]:
            found.setdefault(name, {}).setdefault(point["samples_seen"], []).append(value(point))
    return {name: sorted(points.items()) for name, points in sorted(found.items())}


def spread(values: Sequence[float], form: str) -> str:
    """Mean ± deviation; the mean alone where there is one value."""
    deviation = f" ± {format(statistics.stdev(values), form)}" if len(values) > 1 else ""
    return format(statistics.mean(values), form) + deviation


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The last point of every variant: mean ± deviation over its seeds."""
    ratio, gap = curves(rows, lambda p: p["ratio"]), curves(rows, lambda p: p["gap_closed"]["mean"])
    lines = ["| variant | seeds | samples | ratio | gap closed |", "|---|---|---|---|---|"]
    for name, points in ratio.items():
        samples, values = points[-1]
        gaps = gap[name][-1][1]
        lines.append(f"| {name} | {len(values)} | {samples:,} | {spread(values, '.3f')} | {spread(gaps, '.1%')} |")
    return "\n".join(lines)


def panel(draw: ImageDraw.ImageDraw, left: int, title: str, lines: dict[str, Curve], percent: bool) -> None:
    """One set of curves; the vertical axis is linear for shares and logarithmic for ratios."""
    values = [v for curve in lines.values() for _, many in curve for v in many]
    scale = (lambda v: v) if percent else math.log
    low = math.floor(20 * min(values)) / 20 if percent else min(values) * 0.98
    high = 1.0 if percent else max(values) * 1.05
    seen = [samples for curve in lines.values() for samples, _ in curve]
    wide = max(seen) > WIDE * min(seen)  # then the horizontal axis is logarithmic too
    along, first = (math.log, 0.8 * min(seen)) if wide else (float, 0)
    width, height = PANEL

    def at(samples: float, value: float) -> tuple[float, float]:
        share = (scale(value) - scale(low)) / (scale(high) - scale(low))
        right = (along(samples) - along(first)) / (along(max(seen)) - along(first))
        return left + width * right, MARGIN + height * (1 - share)

    write(draw, (left, 34), title, 22)
    ticks = [k / 20 for k in range(21)] if percent else [1.0, 1.035, 1.1, 1.25, 1.5, 2, 3, 5, 10]
    for tick in (t for t in ticks if low <= t <= high):
        y = at(first, tick)[1]
        draw.line((left, y, left + width, y), fill=LINE)
        write(draw, (left - 8, y), f"{tick:.0%}" if percent else f"{tick:g}", 16, MUTED, "rm")
    for samples in [n for n in ROUND if n >= first] if wide else [max(seen) * k / 4 for k in range(5)]:
        if samples > max(seen):
            break
        write(draw, (at(samples, low)[0], MARGIN + height + 20), f"{samples / 1000:.0f}k", 16, MUTED, "mm")
    write(draw, (left + width / 2, MARGIN + height + 44), "samples seen", 16, MUTED, "mm")
    for colour, curve in zip(COLOURS * len(lines), lines.values(), strict=False):
        means = [at(samples, statistics.mean(many)) for samples, many in curve]
        draw.line(means, fill=colour, width=3, joint="curve")
        for (samples, many), (x, y) in zip(curve, means, strict=True):
            draw.line((x, at(samples, min(many))[1], x, at(samples, max(many))[1]), fill=colour, width=2)
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)


def show(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Print the table and draw the curves."""
    print(table(rows))
    ratio = curves(rows, lambda p: p["ratio"])
    size = (2 * (PANEL[0] + MARGIN) + 60, PANEL[1] + 2 * MARGIN + 20 + 30 * len(ratio))
    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    panel(draw, MARGIN, "Ratio to the teachers' own distance (1 is perfect)", ratio, percent=False)
    gap = curves(rows, lambda p: p["gap_closed"]["mean"])
    panel(draw, MARGIN * 2 + PANEL[0] + 30, "Score gap closed", gap, percent=True)
    for k, (colour, name) in enumerate(zip(COLOURS * len(ratio), ratio, strict=False)):
        y = PANEL[1] + 2 * MARGIN + 20 + 30 * k
        draw.line((MARGIN, y, MARGIN + 30, y), fill=colour, width=4)
        write(draw, (MARGIN + 40, y), name, 17, INK)
    canvas.save(out)
