"""styles.png, mix.png and fid.png, drawn from arrays and the report's numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from dmm_core.report.draw import (
    ACCENT,
    INK,
    LINE,
    MUTED,
    PAPER,
    cell_side,
    place,
    ramp_color,
    shorten,
    text_color,
    text_width,
    wrap,
    write,
    write_slanted,
)

LABEL, SMALL, TITLE = 20, 17, 26  # font sizes, pixels
GAP, GROUP, MARGIN = 6, 20, 24  # between pictures, between groups, around everything
TENTHS = tuple(k / 10 for k in range(11))


@dataclass(frozen=True, eq=False)
class StyleGrid:
    """The same subjects in every style. Picture arrays are (subjects, H, W, 3) uint8, one seed for teacher and student.

    Attributes:
        average: the plain weight average on the same subjects.
        before: an earlier student, style → pictures.
    """

    subjects: Sequence[str]
    teachers: Mapping[str, np.ndarray]
    students: Mapping[str, np.ndarray]
    average: np.ndarray | None = None
    before: Mapping[str, np.ndarray] = field(default_factory=dict)

    def rows(self) -> list[tuple[str, str, np.ndarray]]:
        """(style, who, pictures) from top to bottom."""
        rows = []
        for style in self.students:
            if style in self.teachers:
                rows.append((style, "teacher", self.teachers[style]))
            if style in self.before:
                rows.append((style, "before", self.before[style]))
            rows.append((style, "student", self.students[style]))
        return rows + ([] if self.average is None else [("weight average", "", self.average)])


@dataclass(frozen=True, eq=False)
class MixStrip:
    """One subject from the first style to the second: (len(weights), H, W, 3) uint8, one seed throughout."""

    subject: str
    first: str
    second: str
    pictures: np.ndarray
    average: np.ndarray | None = None  # (H, W, 3): what averaging the teachers' weights gives instead


@dataclass(frozen=True, eq=False)
class Grids:
    """The pictures of a report, and what the commands beside them name; each part may be missing."""

    styles: StyleGrid | None = None
    mixes: Sequence[MixStrip] = ()
    weights: Sequence[float] = field(default=TENTHS)  # of the second style
    prompt: str | None = None  # in full, of the first subject
    file: Path | None = None  # the DMM file, where it lies


def draw_styles(grid: StyleGrid) -> Image.Image:
    """Columns = subjects; for each style a row of the teacher's pictures and one of the student's."""
    rows = grid.rows()
    side = cell_side(rows[0][2][0])
    heads = [wrap(subject, SMALL, side) for subject in grid.subjects]
    labels = [f"{style} · {who}" if who else style for style, who, _ in rows]
    left = MARGIN + min(360, max(text_width(label, LABEL) for label in labels)) + 16
    top = MARGIN + max(len(head) for head in heads) * (SMALL + 5) + 8
    groups = [i > 0 and row[0] != rows[i - 1][0] for i, row in enumerate(rows)]
    height = top + len(rows) * (side + GAP) + sum(groups) * (GROUP - GAP) + MARGIN
    canvas = Image.new("RGB", (left + len(heads) * (side + GAP) - GAP + MARGIN, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    for k, head in enumerate(heads):
        for i, line in enumerate(reversed(head)):
            write(draw, (left + k * (side + GAP) + side / 2, top - 14 - i * (SMALL + 5)), line, SMALL, MUTED, "mm")
    y = top
    for new_group, (style, who, pictures) in zip(groups, rows, strict=True):
        y += GROUP - GAP if new_group else 0
        _two_tone(draw, left - 16, y + side // 2, shorten(style, LABEL, 250), f" · {who}" if who else "")
        for k, picture in enumerate(pictures[: len(heads)]):
            place(canvas, picture, (left + k * (side + GAP), y), side)
        y += side + GAP
    return canvas


def _two_tone(draw: ImageDraw.ImageDraw, right: int, y: int, name: str, rest: str) -> None:
    """A name in ink and what follows in grey, ending at ``right``."""
    start = right - text_width(name, LABEL) - text_width(rest, LABEL)
    write(draw, (start, y), name, LABEL, INK)
    write(draw, (start + text_width(name, LABEL), y), rest, LABEL, MUTED)


def draw_mix(strips: Sequence[MixStrip], weights: Sequence[float] = TENTHS) -> Image.Image:
    """Rows = subjects and pairs of styles, columns = weight of the second style, then the weight average beside."""
    side = cell_side(strips[0].pictures[0])
    names = [(strip.subject, f"{strip.first} to {strip.second}") for strip in strips]
    left = MARGIN + min(320, max(text_width(text, LABEL) for pair in names for text in pair)) + 20
    beside = any(strip.average is not None for strip in strips)
    top = MARGIN + 2 * LABEL + 26
    pitch = side + GAP
    width = left + len(weights) * pitch - GAP + (GROUP + side if beside else 0) + MARGIN
    canvas = Image.new("RGB", (width, top + len(strips) * pitch - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(canvas)
    write(draw, (left, MARGIN + 8), "weight of the second style (the first has the rest)", SMALL, MUTED)
    for k, weight in enumerate(weights):
        write(draw, (left + k * pitch + side / 2, top - 20), f"{weight:g}", LABEL, INK, "mm")
    edge = left + len(weights) * pitch - GAP + GROUP
    if beside:
        for i, line in enumerate(("weight", "average")):
            write(draw, (edge + side / 2, top - 20 - (1 - i) * (SMALL + 5)), line, SMALL, MUTED, "mm")
    for row, strip in enumerate(strips):
        y = top + row * pitch
        write(draw, (left - 20, y + side / 2 - 13), shorten(names[row][0], LABEL, 300), LABEL, INK, "rm")
        write(draw, (left - 20, y + side / 2 + 13), shorten(names[row][1], SMALL, 300), SMALL, MUTED, "rm")
        for k, picture in enumerate(strip.pictures):
            place(canvas, picture, (left + k * pitch, y), side)
        if strip.average is not None:
            place(canvas, strip.average, (edge, y), side)
    return canvas


def draw_matrices(report: Mapping[str, Any]) -> Image.Image:
    """Both Fréchet matrices as heat maps of one colour scale, the nearest teacher of each row outlined."""
    styles, own, other = list(report["styles"]), np.array(report["matrix"]), np.array(report["reference"])
    n, largest = len(styles), float(max(np.max(own), np.max(other)))
    cell = 104 if n <= 5 else 84
    names = [shorten(name, LABEL, 190) for name in styles]
    label = max(text_width(name, LABEL) for name in names) + 16
    slanted = max(text_width(name, LABEL) for name in names) > cell - 8
    rise = round(0.65 * (label - 16)) + 24 if slanted else LABEL + 14
    overhang = round(0.77 * label) if slanted else 0
    panel = max(label + n * cell + overhang, 420)
    top = MARGIN + 2 * (TITLE + 12) + LABEL + 34 + rise
    canvas = Image.new("RGB", (2 * MARGIN + 2 * panel + 48, top + n * cell + 108), PAPER)
    draw = ImageDraw.Draw(canvas)
    error = report.get("ratio_error")
    spread = f" ± {error:.3f}" if error is not None else ""
    write(draw, (MARGIN, MARGIN + TITLE / 2), _ascii_accents(report.get("metric") or report["extractor"]), TITLE)
    line = f"student / reference = {report['ratio']:.3f}{spread}   ·   {report['images_per_style']} pictures a style"
    write(draw, (MARGIN, MARGIN + TITLE + 24), line, LABEL, MUTED)
    for k, (values, rows, total) in enumerate(
        ((own, "student", "fid_t"), (other, "teacher, other seeds", "fid_t_reference"))
    ):
        x, y = MARGIN + k * (panel + 48), top
        write(draw, (x, top - rise - 22), f"rows: {rows}   ·   columns: teacher", LABEL, INK)
        for j, name in enumerate(names):
            center = x + label + j * cell + cell // 2
            if slanted:
                write_slanted(canvas, (center - 10, top - 4), name, LABEL)
            else:
                write(draw, (center, top - 16), name, LABEL, INK, "mm")
            write(draw, (x + label - 12, top + j * cell + cell / 2), name, LABEL, INK, "rm")
        _heat_map(draw, values, (x + label, y), cell, largest)
        write(draw, (x + label, top + n * cell + 26), f"sum of the diagonal {report[total]:.3f}", LABEL, INK)
    _legend(draw, MARGIN, top + n * cell + 66, largest)
    return canvas


def _heat_map(draw: ImageDraw.ImageDraw, values: np.ndarray, at: tuple[int, int], cell: int, largest: float) -> None:
    nearest = values.argmin(1)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            x, y = at[0] + j * cell, at[1] + i * cell
            color = ramp_color(value, largest)
            draw.rectangle((x, y, x + cell - 3, y + cell - 3), fill=color)
            if j == nearest[i]:
                draw.rectangle((x, y, x + cell - 3, y + cell - 3), outline=ACCENT, width=4)
            write(draw, (x + cell / 2 - 1, y + cell / 2), short_number(value), LABEL, text_color(color), "mm")


def _legend(draw: ImageDraw.ImageDraw, x: int, y: int, largest: float) -> None:
    write(draw, (x, y + 11), "near 0", SMALL, MUTED)
    x += text_width("near 0", SMALL) + 10
    for k in range(180):
        draw.line((x + k, y, x + k, y + 21), fill=ramp_color((k / 179) ** 2 * largest, largest))
    draw.rectangle((x - 1, y - 1, x + 180, y + 22), outline=LINE)
    far = f"{short_number(largest)} far"
    write(draw, (x + 192, y + 11), far, SMALL, MUTED)
    x += 192 + text_width(far, SMALL) + 32
    draw.rectangle((x, y, x + 21, y + 21), outline=ACCENT, width=4)
    write(draw, (x + 32, y + 11), "nearest teacher of the row", SMALL, MUTED)


def short_number(value: float) -> str:
    """About three figures, e.g. 0.276, 5.06, 10.3, 191."""
    size = abs(value)
    return (
        f"{value:.3f}"
        if size < 1
        else f"{value:.2f}"
        if size < 10
        else f"{value:.1f}"
        if size < 100
        else f"{value:.0f}"
    )


def _ascii_accents(text: str) -> str:
    """Pillow's own font has no é: Fréchet is drawn as Frechet rather than in another font than the rest."""
    return text.replace("é", "e")
