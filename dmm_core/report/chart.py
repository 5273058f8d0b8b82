"""The way from one style to another as curves, drawn as SVG inside the page: sharp at any size, light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dmm_core.report.tables import e

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 380, 250, 34, 12, 10, 42  # of the drawing, and of its margins


def mixing_chart(mixing: Mapping[str, Any]) -> str:
    """Distances to both teachers over the weight of the second style: the student's, and the weight average's dashed.

    Args:
        mixing: what ``mixing.mixing_table`` gives.
    """
    kinds = {"student": mixing["student"], "average": mixing.get("average")}
    curves = {(kind, goal): way[f"to_{goal}"] for kind, way in kinds.items() if way for goal in ("first", "second")}
    ticks = axis(max(max(values) for values in curves.values()))
    top = ticks[-1]
    lines = "".join(
        f'<polyline class="{kind} {goal}" points="{points(mixing["amounts"], values, top)}"/>'
        for (kind, goal), values in curves.items()
    )
    told = f"Distances to {mixing['first']} and {mixing['second']} over the weight of {mixing['second']}"
    return (
        f'<figure class="curves"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{e(told)}">'
        f"{_axes(ticks)}{lines}"
        f'<text class="name" x="{(LEFT + WIDTH - RIGHT) // 2}" y="{HEIGHT - 4}">weight of {e(mixing["second"])}</text>'
        f"</svg><figcaption>{_legend(mixing, curves)}</figcaption></figure>"
    )


def points(amounts: Sequence[float], values: Sequence[float], top: float) -> str:
    """Corners of a line, ``x,y x,y …``, in the drawing's units."""
    return " ".join(f"{_x(a):.1f},{_y(v, top):.1f}" for a, v in zip(amounts, values, strict=True))


def axis(largest: float) -> list[float]:
    """Round numbers from 0 to ``largest`` or just above: three to six of them."""
    largest = largest if largest > 0 else 1.0
    decade = 10.0 ** math.floor(math.log10(largest))
    step = next(step for step in (0.2, 0.25, 0.5, 1.0, 2.0) if largest <= 5 * step * decade) * decade
    return [i * step for i in range(math.ceil(largest / step - 1e-9) + 1)]


def _x(amount: float) -> float:
    return LEFT + amount * (WIDTH - LEFT - RIGHT)


def _y(value: float, top: float) -> float:
    return HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM)


def _axes(ticks: Sequence[float]) -> str:
    """Horizontal lines with their distances, and the weights below."""
    made = ""
    for tick in ticks:
        y = _y(tick, ticks[-1])
        made += f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        made += f'<text class="side" x="{LEFT - 6}" y="{y + 4:.1f}">{tick:g}</text>'
    for i in range(0, 11, 2):
        made += f'<text class="below" x="{_x(i / 10):.1f}" y="{HEIGHT - BOTTOM + 16}">{i / 10:g}</text>'
    return made


def _legend(mixing: Mapping[str, Any], curves: Mapping[tuple[str, str], Any]) -> str:
    names = {"student": "student", "average": "weight average"}
    return "".join(
        f'<span><svg viewBox="0 0 28 8"><polyline class="{kind} {goal}" points="0,4 28,4"/></svg>'
        f"{names[kind]} to {e(mixing[goal])}</span>"
        for kind, goal in curves
    )
