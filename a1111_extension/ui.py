"""The panel "DMM styles" of txt2img and img2img, for gradio 3.41 and 4.40 alike.

Labels are the keys of people's saved defaults (``ui-config.json``): they are the same for every checkpoint, and a
checkpoint's names are put beside the sliders afterwards. New controls go to the end.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr
from modules.ui_components import InputAccordion

from dmm_core.schedule import MODES

from . import checkpoint, infotext, sliders
from .args import CONTROLS, DEFAULT, PASSES, SLIDERS, read_names
from .styles import Book
from .tab import webui
from .tab.events import OPEN_MIX, on

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
        rows, thumbnails, weights = sliders.rows("DMM style", elem_id)
        with gr.Row(elem_classes="dmm-buttons"):
            refresh = gr.Button("Refresh", elem_id=elem_id("refresh"), size="sm")
            reset = gr.Button("Reset", elem_id=elem_id("reset"), size="sm")
            mix = gr.Button("Random mix", elem_id=elem_id("random"), size="sm")
            send = gr.Button("Send to tab", elem_id=elem_id("send"), size="sm")
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
    panel = Panel(status, rows, thumbnails, weights, negative, to, names)
    _connect(panel, enabled, refresh, reset, mix)
    # the weights wait at the server until the tab, now in front, takes them
    on(on(send.click, webui.send, [names, normalise, *weights]).then, None, js=OPEN_MIX)
    fixed = [enabled, normalise, apply_to, negative, to, start, end, mode, batch]
    return [*fixed, *weights, names], _paste_fields(fixed, panel), panel


def _choice(label: str, name: str, elem_id: Callable[[str], str]) -> Any:
    info = {"negative": f"empty: the same style; or {HINT}", "to": f"empty: no schedule; or {HINT}"}[name]
    return gr.Dropdown(
        ["", DEFAULT], value="", label=label, info=info, allow_custom_value=True, elem_id=elem_id(name)
    )  # fmt: skip


def _connect(panel: Panel, enabled: Any, refresh: Any, reset: Any, mix: Any) -> None:
    keep = {"inputs": [panel.names, *panel.sliders], "outputs": panel.filled, "show_progress": False}
    enabled.change(fn=fill, **keep)  # opened: perhaps another checkpoint is loaded by now
    refresh.click(fn=fill, **keep)
    root = gr.context.Context.root_block
    if root is not None:
        root.load(fn=fill, **keep)
    panel.names.change(fn=relabel, inputs=[panel.names], outputs=panel.filled[1 : 1 + 3 * SLIDERS], show_progress=False)
    reset.click(fn=defaults, inputs=[panel.names], outputs=panel.sliders, show_progress=False)
    mix.click(fn=random_mix, inputs=[panel.names], outputs=panel.sliders, show_progress=False)


def fill(shown: str, *values: float) -> list[Any]:
    """Updates of ``Panel.filled``: the styles of the checkpoint that is drawn with, or why there are none.

    ``values``: the sliders', beside the names ``shown``. They go along by name, and stay where the names stay.
    Without a DMM file the names stay too: with none, values would be taken by position later on.
    """
    book = checkpoint.current()
    if not isinstance(book, Book):
        nothing = [gr.update() for _ in range(SLIDERS)]
        hidden = [gr.update(visible=False) for _ in range(SLIDERS)]
        choices = [gr.update(choices=["", DEFAULT])] * 2
        return [gr.update(value=_line(book)), *hidden, *nothing, *nothing, *choices, gr.update()]
    before = read_names(shown)
    names, moved, missing = sliders.follow(book, dict(zip(before, values, strict=False)))
    told = f"{book.path.name}: {len(book.names)} styles. {book.usage}".rstrip()
    if len(book.names) > SLIDERS:
        told += f" {len(book.names) - SLIDERS} of them have no slider; give them by name."
    if missing:
        told += f" Left out, since it has no such style: {', '.join(missing)}."
    choices = gr.update(choices=["", DEFAULT, *book.names])
    return [
        gr.update(value=_line(told)), *sliders.shown(len(names)), *sliders.pictures(names, book),
        *sliders.labelled(names, None if names == before else moved),
        choices, choices, gr.update(value=json.dumps(names, ensure_ascii=False)),
    ]  # fmt: skip


def relabel(shown: str) -> list[Any]:
    """Updates of rows, thumbnails and sliders: a pasted infotext has brought names with it."""
    names = read_names(shown)
    return [
        *sliders.shown(len(names)), *sliders.pictures(names, checkpoint.current()), *sliders.labelled(names, None),
    ]  # fmt: skip


def defaults(shown: str) -> list[Any]:
    """The default style's weights."""
    book = checkpoint.current()
    return sliders.moved([sliders.default(book, n) if isinstance(book, Book) else 0.0 for n in read_names(shown)])


def random_mix(shown: str) -> list[Any]:
    return sliders.moved(sliders.random_mix(len(read_names(shown))))


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
