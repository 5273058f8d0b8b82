"""A slider for each style, with its picture: the rows that the panel and the tab share, and what fills them."""

from __future__ import annotations

import html
import random
from collections.abc import Callable
from typing import Any

import gradio as gr

from .args import SLIDERS
from .styles import Book


def rows(label: str, elem_id: Callable[[str], str]) -> tuple[list[Any], list[Any], list[Any]]:
    """Rows, thumbnails and sliders; row i holds thumbnail i and slider i. All are hidden at first."""
    made, thumbnails, sliders = [], [], []
    for i in range(SLIDERS):
        with gr.Row(visible=False, elem_classes="dmm-style") as row:
            thumbnails.append(gr.HTML("", elem_classes="dmm-thumbnail"))
            sliders.append(
                gr.Slider(-1.0, 2.0, value=0.0, step=0.01, label=f"{label} {i + 1}", elem_id=elem_id(f"w{i}"))
            )
        made.append(row)
    return made, thumbnails, sliders


def shown(count: int) -> list[Any]:
    """Updates of the rows."""
    return [gr.update(visible=i < count) for i in range(SLIDERS)]


def labelled(names: tuple[str, ...], values: Any) -> list[Any]:
    """Updates of the sliders; those without a style go to 0, and None leaves all values as they are."""
    made = []
    for i in range(SLIDERS):
        label = {"label": names[i]} if i < len(names) else {}
        value = {} if values is None else {"value": values[i] if i < len(values) else 0.0}
        made.append(gr.update(**label, **value))
    return made


def moved(values: list[float]) -> list[Any]:
    """Updates of the sliders' values alone."""
    return [gr.update(value=value) for value in values] + [gr.update(value=0.0)] * (SLIDERS - len(values))


def pictures(names: tuple[str, ...], book: Book | str) -> list[Any]:
    """Updates of the thumbnails, for what the file has of these styles."""
    known = dict(zip(book.names, book.thumbnails, strict=True)) if isinstance(book, Book) else {}
    return [gr.update(value=picture(known.get(name, ""))) for name in (*names, *[""] * SLIDERS)[:SLIDERS]]


def picture(uri: str) -> str:
    """A style's picture; only data that is in the file, never an address that the page would fetch."""
    return f'<img src="{html.escape(uri, quote=True)}" alt="">' if uri.startswith("data:image/") else ""


def follow(book: Book, before: dict[str, float]) -> tuple[tuple[str, ...], list[float], list[str]]:
    """Names and values of the sliders for this file, after those of ``before``; and what had a weight but has no style.

    Styles beyond the last slider take the place of others while they have a weight. Where no style with a weight is the
    file's, the default style.
    """
    first = book.names[:SLIDERS]
    given = {name: float(value or 0) for name, value in before.items()}
    weighted = {name for name, value in given.items() if value}
    kept = weighted & set(book.names)
    if not kept and set(before) != set(first):
        return first, [default(book, name) for name in first], []
    chosen = kept | set([name for name in first if name not in kept][: SLIDERS - len(kept)])
    names = tuple(name for name in book.names if name in chosen)
    return names, [given.get(name, 0.0) for name in names], [name for name in given if name in weighted - kept]


def default(book: Book, name: str) -> float:
    """A weight of the default style, short enough to show; normalised it is exact."""
    return round(book.codebook.default.get(name, 0.0), 4)


def random_mix(count: int) -> list[float]:
    """Weights that sum to 1, spread evenly over all mixes."""
    parts = [random.expovariate(1.0) for _ in range(count)]
    return [round(part / sum(parts), 2) for part in parts]
