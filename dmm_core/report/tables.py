"""Tables of the HTML report: pictures as data URIs, matrices as heat maps, numbers. All text is escaped here."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import features

from dmm_core.report.draw import ramp_color, text_color, thumbnail
from dmm_core.report.pictures import MixStrip, StyleGrid, short_number

SHOWN = 192  # pixels of the longer side of an embedded picture


def e(value: object) -> str:
    """Escaped text, for contents and attributes alike."""
    return escape(str(value), quote=True)


def number(value: Any) -> str:
    """A number as it is shown; a dash for what was not measured."""
    return "–" if value is None else short_number(float(value))


def data_uri(picture: np.ndarray) -> str:
    """A picture (H, W, 3) uint8 as a data URI: lossless while small, at most 192 px."""
    image = thumbnail(picture, min(SHOWN, max(picture.shape[:2])))
    buffer, small = io.BytesIO(), max(image.size) <= 96
    kind = "webp" if features.check("webp") else "png"
    if kind == "webp":
        image.save(buffer, "WEBP", lossless=small, quality=90)
    else:
        image.save(buffer, "PNG")
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _picture(picture: np.ndarray, alt: str, css: str = "") -> str:
    attribute = f' class="{css}"' if css else ""
    return f'<td{attribute}><img src="{data_uri(picture)}" alt="{e(alt)}"></td>'


def styles_table(grid: StyleGrid) -> str:
    """Columns = subjects, two rows a style."""
    head = "".join(f'<th scope="col">{e(subject)}</th>' for subject in grid.subjects)
    body, before = [], None
    for style, who, pictures in grid.rows():
        cells = "".join(
            _picture(picture, f"{subject}, {style} {who}".strip())
            for subject, picture in zip(grid.subjects, pictures, strict=False)
        )
        css = ' class="group"' if before not in (None, style) else ""
        who_line = f"<span>{e(who)}</span>" if who else ""
        body.append(f'<tr{css}><th scope="row">{e(style)}{who_line}</th>{cells}</tr>')
        before = style
    return _scroll(
        f'<table class="pictures"><thead><tr><td></td>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'
    )


def mix_table(strips: Sequence[MixStrip], weights: Sequence[float]) -> str:
    """Columns = weight of the second style, then the weight average."""
    beside = any(strip.average is not None for strip in strips)
    head = "".join(f'<th scope="col">{weight:g}</th>' for weight in weights)
    head += '<th scope="col" class="apart">weight average</th>' if beside else ""
    body = []
    for strip in strips:
        cells = "".join(
            _picture(picture, f"{strip.subject}, {1 - weight:g} {strip.first} + {weight:g} {strip.second}")
            for weight, picture in zip(weights, strip.pictures, strict=True)
        )
        if strip.average is not None:
            cells += _picture(strip.average, f"{strip.subject}, weight average", "apart")
        label = f"{e(strip.subject)}<span>{e(strip.first)} to {e(strip.second)}</span>"
        body.append(f'<tr><th scope="row">{label}</th>{cells}</tr>')
    return _scroll(
        f'<table class="pictures"><thead><tr><td></td>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'
    )


def heat_table(caption: str, styles: Sequence[str], matrix: Sequence[Sequence[float]], largest: float) -> str:
    """A matrix as a table of coloured cells, the smallest of each row marked."""
    head = "".join(f'<th scope="col">{e(name)}</th>' for name in styles)
    body = []
    for name, row in zip(styles, matrix, strict=True):
        cells = ""
        for value in row:
            color = ramp_color(value, largest)
            css = ' class="nearest"' if value == min(row) else ""
            style = f"background:rgb{color};color:{text_color(color)}".replace(" ", "")
            cells += f'<td{css} style="{style}">{number(value)}</td>'
        body.append(f'<tr><th scope="row">{e(name)}</th>{cells}</tr>')
    table = f"<caption>{e(caption)}</caption><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f'<table class="heat">{table}</table>'


def numbers_table(head: Sequence[str], rows: Sequence[Sequence[str]], css: str = "numbers plain") -> str:
    """A table of plain text; the first column names the row."""
    top = "".join(f'<th scope="col">{e(text)}</th>' for text in head)
    body = "".join(
        f'<tr><th scope="row">{e(row[0])}</th>{"".join(f"<td>{e(cell)}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    return _scroll(f'<table class="{css}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>')


def style_numbers(report: Mapping[str, Any]) -> str:
    """One row a style: distances, ratio, floor, gap closed, and whether the own teacher is the nearest."""
    closed = report["gap_closed"].get("per_style", {})
    earlier = any(row.get("before") is not None for row in report.get("per_style", ()))
    rows = []
    for row in report.get("per_style", ()):
        spread = f" ± {row['ratio_error']:.2f}" if row.get("ratio_error") is not None else ""
        gap = closed.get(row["style"])
        rows.append(
            [
                row["style"], *([number(row.get("before"))] if earlier else []), number(row["student"]),
                number(row["reference"]), f"{row['ratio']:.2f}{spread}",
                number(row["weight_average"]), number(row["floor"]), "–" if gap is None else f"{100 * gap:.0f} %",
                "yes" if row["nearest_own_teacher"] else "NO",
            ]
        )  # fmt: skip
    names = [
        "style",
        *(["student before"] if earlier else []),
        "student",
        "teacher again",
        "ratio",
        "weight average",
        "floor",
        "gap closed",
        "own teacher nearest",
    ]
    return numbers_table(names, rows) if rows else ""


def mixing_numbers(mixing: Mapping[str, Any]) -> str:
    """One row a weight of the second style: distances of the student's mix and of the weight average."""
    pair = (mixing["first"], mixing["second"])
    kinds = {"student": mixing["student"], "weight average": mixing.get("average")}
    kinds = {name: values for name, values in kinds.items() if values}
    head = [f"weight of {pair[1]}", *(f"{name} to {goal}" for name in kinds for goal in pair)]
    columns = [values[key] for values in kinds.values() for key in ("to_first", "to_second")]
    rows = [[f"{amount:g}", *(number(column[i]) for column in columns)] for i, amount in enumerate(mixing["amounts"])]
    steady, largest = ["steady"], ["largest step"]
    for values in kinds.values():
        steady += ["yes" if values["monotone"] else f"{100 * values['against']:.1f} % of the way against", ""]
        largest += [f"{100 * values['largest']:.0f} % of the way" if "largest" in values else "–", ""]
    return numbers_table(head, [*rows, steady, largest])


def baseline_numbers(report: Mapping[str, Any]) -> str:
    """The student, the weight average and further models without styles: ratio and gap closed."""
    student = {"name": "this merge", "ratio_error": report.get("ratio_error"), "ratio": report["ratio"],
               "gap_closed": report["gap_closed"].get("mean")}  # fmt: skip
    average = {**report["weight_average"], "name": "weight average"}
    rows = []
    for row in (student, average, *report["baselines"]):
        spread = f" ± {row['ratio_error']:.2f}" if row.get("ratio_error") is not None else ""
        gap = row.get("gap_closed")
        rows.append([row["name"], f"{row['ratio']:.2f}{spread}", "–" if gap is None else f"{100 * gap:.0f} %"])
    return numbers_table(["", "ratio", "gap closed"], rows)


def appeal_numbers(appeal: Sequence[Mapping[str, Any]]) -> str:
    """One row a score, a column for each set of pictures."""
    sets = list(appeal[0]["means"])
    rows = [[row["score"], *(f"{row['means'][what]:.2f}" for what in sets), row["network"]] for row in appeal]
    return numbers_table(["", *sets, "network"], rows)


def _scroll(table: str) -> str:
    return f'<div class="scroll" tabindex="0">{table}</div>'
