"""The panel "DMM styles" of txt2img and img2img, for gradio 3.41 and 4.40 alike.

Labels are the keys of people's saved defaults (``ui-config.json``): they are the same for every checkpoint, and a
checkpoint's names are put beside the sliders afterwards. New controls go to the end.
"""

from __future__ import annotations

import html
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr
from modules.ui_components import InputAccordion

from dmm_core.schedule import MODES

from . import checkpoint, infotext
from .args import CONTROLS, DEFAULT, PASSES, SLIDERS, read_names
from .styles import Book

TITLE = "DMM styles"
HINT = "a name, or a mix such as ink=0.7, clay=0.3"


@dataclass
class Panel:
    """The components that callbacks fill: ``rows[i]`` holds thumbnail i and slider i."""

    status: Any
    rows: list[Any]
    thumbnails: list[Any]
    sliders: list[Any]
    negative: Any
    to: Any
    names: Any

    @property
    def filled(self) -> list[Any]:
        return [self.status, *self.rows, *self.thumbnails, *self.sliders, self.negative, self.to, self.names]


def build(elem_id: Callable[[str], str]) -> tuple[list[Any], list[tuple[Any, Any]], Panel]:
    """The controls in the order of ``args.CONTROLS``, sliders, names; what a pasted infotext fills; and the panel."""
    with InputAccordion(False, label=TITLE, elem_id=elem_id("enabled")) as enabled:
        status = gr.HTML(value="", elem_id=elem_id("status"), elem_classes="dmm-status")
        rows, thumbnails, sliders = _sliders(elem_id)
        with gr.Row(elem_classes="dmm-buttons"):
            refresh = gr.Button("Refresh", elem_id=elem_id("refresh"), size="sm")
            reset = gr.Button("Reset", elem_id=elem_id("reset"), size="sm")
            mix = gr.Button("Random mix", elem_id=elem_id("random"), size="sm")
        with gr.Row():
            normalise = gr.Checkbox(True, label="DMM normalise", elem_id=elem_id("normalise"))
            apply_to = gr.Radio(list(PASSES), value="both", label="DMM pass", elem_id=elem_id("apply_to"))
        with gr.Accordion("Negative half, schedule, batch", open=False):
            negative = _choice("DMM negative half", "negative", elem_id)
            to = _choice("DMM schedule: to", "to", elem_id)
            with gr.Row():
                start = gr.Slider(0.0, 1.0, value=0.0, step=0.01, label="DMM schedule: from", elem_id=elem_id("start"))
                end = gr.Slider(0.0, 1.0, value=1.0, step=0.01, label="DMM schedule: until", elem_id=elem_id("end"))
                mode = gr.Radio(list(MODES), value="blend", label="DMM schedule: mode", elem_id=elem_id("mode"))
            batch = gr.Textbox(
                "",
                label="DMM style of each image",
                placeholder="ink; clay; ink=0.5, clay=0.5",
                elem_id=elem_id("batch"),
            )
        names = gr.Textbox("", label="DMM slider names", visible=False, elem_id=elem_id("names"))
    panel = Panel(status, rows, thumbnails, sliders, negative, to, names)
    _connect(panel, enabled, refresh, reset, mix)
    fixed = [enabled, normalise, apply_to, negative, to, start, end, mode, batch]
    return [*fixed, *sliders, names], _paste_fields(fixed, panel), panel


def _sliders(elem_id: Callable[[str], str]) -> tuple[list[Any], list[Any], list[Any]]:
    rows, thumbnails, sliders = [], [], []
    for i in range(SLIDERS):
        with gr.Row(visible=False, elem_classes="dmm-style") as row:
            thumbnails.append(gr.HTML("", elem_classes="dmm-thumbnail"))
            sliders.append(
                gr.Slider(-1.0, 2.0, value=0.0, step=0.01, label=f"DMM style {i + 1}", elem_id=elem_id(f"w{i}"))
            )
        rows.append(row)
    return rows, thumbnails, sliders


def _choice(label: str, name: str, elem_id: Callable[[str], str]) -> Any:
    info = {"negative": f"empty: the same style; or {HINT}", "to": f"empty: no schedule; or {HINT}"}[name]
    return gr.Dropdown(
        ["", DEFAULT], value="", label=label, info=info, allow_custom_value=True, elem_id=elem_id(name)
    )  # fmt: skip


def _connect(panel: Panel, enabled: Any, refresh: Any, reset: Any, mix: Any) -> None:
    keep = {"inputs": [panel.names], "outputs": panel.filled, "show_progress": False}
    enabled.change(fn=fill, **keep)  # opened: perhaps another checkpoint is loaded by now
    refresh.click(fn=fill, **keep)
    root = gr.context.Context.root_block
    if root is not None:
        root.load(fn=fill, **keep)
    panel.names.change(fn=relabel, inputs=[panel.names], outputs=panel.filled[1 : 1 + 3 * SLIDERS], show_progress=False)
    reset.click(fn=defaults, inputs=[panel.names], outputs=panel.sliders, show_progress=False)
    mix.click(fn=random_mix, inputs=[panel.names], outputs=panel.sliders, show_progress=False)


def fill(shown: str) -> list[Any]:
    """Updates of ``Panel.filled``: the loaded checkpoint's styles, or why there are none.

    Where the panel shows them already, the sliders stay as they are.
    """
    book = checkpoint.current()
    if not isinstance(book, Book):
        nothing = [gr.update() for _ in range(SLIDERS)]
        hidden = [gr.update(visible=False) for _ in range(SLIDERS)]
        choices = [gr.update(choices=["", DEFAULT])] * 2
        return [gr.update(value=_line(book)), *hidden, *nothing, *nothing, *choices, gr.update(value="")]
    names = book.names[:SLIDERS]
    fresh = read_names(shown) != names
    told = f"{book.path.name}: {len(book.names)} styles."
    if len(book.names) > SLIDERS:
        told += f" The last {len(book.names) - SLIDERS} have no slider; give them by name."
    values = [_default(book, name) for name in names] if fresh else None
    choices = gr.update(choices=["", DEFAULT, *book.names])
    return [
        gr.update(value=_line(told)), *_shown(len(names)), *_pictures(names), *_labelled(names, values),
        choices, choices, gr.update(value=json.dumps(names, ensure_ascii=False)),
    ]  # fmt: skip


def relabel(shown: str) -> list[Any]:
    """Updates of rows, thumbnails and sliders: a pasted infotext has brought names with it."""
    names = read_names(shown)
    return [*_shown(len(names)), *_pictures(names), *_labelled(names, None)]


def _pictures(names: tuple[str, ...]) -> list[Any]:
    """Updates of the thumbnails, for what the loaded checkpoint has of these styles."""
    book = checkpoint.current()
    known = dict(zip(book.names, book.thumbnails, strict=True)) if isinstance(book, Book) else {}
    return [gr.update(value=_picture(known.get(name, ""))) for name in (*names, *[""] * SLIDERS)[:SLIDERS]]


def _default(book: Book, name: str) -> float:
    """A weight of the default style, short enough to show; normalised it is exact."""
    return round(book.codebook.default.get(name, 0.0), 4)


def _shown(count: int) -> list[Any]:
    return [gr.update(visible=i < count) for i in range(SLIDERS)]


def _labelled(names: tuple[str, ...], values: Any) -> list[Any]:
    """Updates of the sliders; those without a style go to 0, which the session takes no notice of."""
    made = []
    for i in range(SLIDERS):
        label = {"label": names[i]} if i < len(names) else {}
        value = {} if values is None else {"value": values[i] if i < len(values) else 0.0}
        made.append(gr.update(**label, **value))
    return made


def defaults(shown: str) -> list[Any]:
    """The default style's weights."""
    book = checkpoint.current()
    names = read_names(shown)
    values = [_default(book, name) if isinstance(book, Book) else 0.0 for name in names]
    return [gr.update(value=value) for value in values] + [gr.update(value=0.0)] * (SLIDERS - len(values))


def random_mix(shown: str) -> list[Any]:
    """Weights that sum to 1, spread evenly over all mixes of these styles."""
    parts = [random.expovariate(1.0) for _ in read_names(shown)]
    values = [round(part / sum(parts), 2) for part in parts]
    return [gr.update(value=value) for value in values] + [gr.update(value=0.0)] * (SLIDERS - len(values))


def _paste_fields(fixed: list[Any], panel: Panel) -> list[tuple[Any, Any]]:
    """Pairs for ``Script.infotext_fields``: component and a function of the infotext's parameters.

    Plain values, no updates: Forge's API takes an update for a value (``apply_infotext`` in modules/api/api.py). The
    labels follow the names by an event.
    """

    def of(name: str) -> Callable[[dict[str, Any]], Any]:
        def value(params: dict[str, Any]) -> Any:
            told = infotext.read(params)
            if told is None:
                return False if name == "enabled" else None  # None: leave the control alone
            return told[name]

        return value

    def of_slider(i: int) -> Callable[[dict[str, Any]], Any]:
        def value(params: dict[str, Any]) -> Any:
            told = infotext.read(params)
            if told is None:
                return None
            values = infotext.sliders(told["weights"], checkpoint.current())[1]
            return float(values[i]) if i < len(values) else 0.0

        return value

    def names(params: dict[str, Any]) -> Any:
        told = infotext.read(params)
        if told is None:
            return None
        return json.dumps(infotext.sliders(told["weights"], checkpoint.current())[0], ensure_ascii=False)

    pairs = [(component, of(name)) for component, name in zip(fixed, CONTROLS, strict=True)]
    pairs += [(slider, of_slider(i)) for i, slider in enumerate(panel.sliders)]
    return [*pairs, (panel.names, names)]


def _line(text: str) -> str:
    return f"<span>{html.escape(text)}</span>"


def _picture(uri: str) -> str:
    """A style's picture; only data that is in the file, never an address that the page would fetch."""
    return f'<img src="{html.escape(uri, quote=True)}" alt="">' if uri.startswith("data:image/") else ""
