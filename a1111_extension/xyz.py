"""Axes for the webuis' own script "X/Y/Z plot": style, mix, and each slider by its number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from modules import scripts

from dmm_core.errors import BadInput

from . import checkpoint
from .args import SLIDERS
from .styles import Book

MARK = "[DMM]"


def _names() -> list[str]:
    book = checkpoint.current()
    return list(book.names) if isinstance(book, Book) else []


def _set(key: str | int) -> Callable[[Any, Any, Any], None]:
    def apply(p: Any, x: Any, xs: Any) -> None:
        p.dmm_axes = {**getattr(p, "dmm_axes", {}), key: x}  # a new dict: p is a shallow copy of the grid's

    return apply


def _confirm(p: Any, values: list[str]) -> None:
    """Called before the grid starts (``process_axis``); what it raises stops the grid with that sentence."""
    book = checkpoint.current()
    if not isinstance(book, Book):
        raise RuntimeError(book)
    try:
        for value in values:
            book.mix(value)
    except BadInput as error:
        raise RuntimeError(str(error)) from None


def _slider_label(p: Any, option: Any, value: float) -> str:
    number = int(option.label.rpartition(" ")[2]) - 1
    names = _names()
    return f"{names[number] if number < len(names) else option.label}: {value:g}"


def register() -> None:
    """In ``on_before_ui``: the grid's script is loaded by then, and its dropdowns are not made yet."""
    for data in scripts.scripts_data:
        if data.path.replace("\\", "/").endswith("/xyz_grid.py"):
            _extend(data.module)


def _extend(grid: Any) -> None:
    if any(option.label.startswith(MARK) for option in grid.axis_options):
        return
    option = grid.AxisOption
    grid.axis_options += [
        option(f"{MARK} style", str, _set("style"), confirm=_confirm, choices=_names),
        option(f"{MARK} mix", str, _set("style"), confirm=_confirm),
        *(option(f"{MARK} slider {i + 1}", float, _set(i), format_value=_slider_label) for i in range(SLIDERS)),
    ]
