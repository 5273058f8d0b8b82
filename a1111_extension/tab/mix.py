"""The sub-tab Mix & export: a slider for each style of a DMM file; a style file or a checkpoint of the mix."""

from __future__ import annotations

import json
from typing import Any

import gradio as gr

from dmm_core.errors import BadInput, StyleError
from dmm_core.studio.studio import Studio

from .. import sliders
from ..args import SLIDERS, parse_mix, read_names, write_mix
from ..styles import Book, open_book
from .events import attempt, on, said
from .lists import STUDENTS, Lists

STYLE, CHECKPOINT = "Style file for stock LoRA loaders", "Ordinary checkpoint"


class Mailbox:
    """What the panel of txt2img and img2img sends: file, names and weights, normalise; taken once."""

    def __init__(self) -> None:
        self.held: tuple[str, tuple[str, ...], tuple[float, ...], bool] | None = None


def build(studio: Studio, lists: Lists, mailbox: Mailbox) -> None:
    student = lists.one("DMM file", STUDENTS, "dmm_mix_student")
    status = gr.HTML("", elem_id="dmm_mix_status")
    rows, thumbnails, weights = sliders.rows("DMM mix", lambda name: f"dmm_mix_{name}")
    more = gr.Textbox(
        "", label="Further styles", placeholder="name=0.5, other=0.2", visible=False, elem_id="dmm_mix_more"
    )  # fmt: skip
    with gr.Row(elem_classes="dmm-buttons"):
        reset = gr.Button("Reset", size="sm", elem_id="dmm_mix_reset")
        shuffle = gr.Button("Random mix", size="sm", elem_id="dmm_mix_random")
        normalise = gr.Checkbox(True, label="Normalise", elem_id="dmm_mix_normalise", container=False)
    kind = gr.Radio([STYLE, CHECKPOINT], value=STYLE, label="Write", elem_id="dmm_mix_kind")
    told = gr.HTML("", elem_id="dmm_mix_told")
    with gr.Row(elem_classes="dmm-unfinished"):
        name = gr.Textbox("", label="Name", placeholder="my-mix", max_lines=1, elem_id="dmm_mix_name")
        write = gr.Button("Export", variant="primary", elem_id="dmm_mix_export", scale=0, min_width=120)
    names = gr.Textbox("", visible=False, elem_id="dmm_mix_names")
    receive = gr.Button("Receive", elem_id="dmm_receive", elem_classes="dmm-hidden")
    filled = [status, *rows, *thumbnails, *weights, more, names]

    def book(chosen: str | None) -> Book:
        return open_book(studio.folders.checkpoint(chosen))

    def fill(chosen: str | None, shown: str) -> list[Any]:
        return _fill(lambda: book(chosen), shown)

    def defaults(chosen: str | None, shown: str) -> list[Any]:
        try:
            file = book(chosen)
        except BadInput:
            return sliders.moved([])
        return sliders.moved([sliders.default(file, name) for name in read_names(shown)])

    def export(chosen: str | None, shown: str, text: str, norm: bool, what: str, to: str, *values: float) -> str:
        def work() -> str:
            names = read_names(shown)
            mix = book(chosen).sliders(tuple(float(value or 0) for value in values), names) if names else {}
            mix |= parse_mix(text) if text and text.strip() else {}
            if not mix:
                raise StyleError("no DMM file is chosen", hint="Choose one whose styles to mix.")
            return studio.export(chosen, mix, to or "", what == CHECKPOINT, bool(norm))

        return attempt(work)

    def take() -> list[Any]:
        """Updates of student, normalise and ``filled``: what the panel has sent."""
        held, mailbox.held = mailbox.held, None
        if held is None:
            return [gr.update() for _ in range(2 + len(filled))]
        file, sent, values, norm = held
        made = _fill(lambda: book(file), "")
        names, given = read_names(made[-1].get("value")), dict(zip(sent, values, strict=False))
        if names and sent:
            made[1 + 2 * SLIDERS : 1 + 3 * SLIDERS] = sliders.labelled(names, [given.get(n, 0.0) for n in names])
            rest = {name: weight for name, weight in given.items() if weight and name not in names}
            made[-2] = gr.update(visible=made[-2].get("visible", False), value=write_mix(rest) if rest else "")
        return [gr.update(value=file), gr.update(value=norm), *made]

    on(student.change, fill, [student, names], filled)
    on(reset.click, defaults, [student, names], weights)
    on(shuffle.click, lambda shown: sliders.moved(sliders.random_mix(len(read_names(shown)))), [names], weights)
    on(write.click, export, [student, names, more, normalise, kind, name, *weights], told)
    on(receive.click, take, None, [student, normalise, *filled])


def _fill(find: Any, shown: str) -> list[Any]:
    """Updates of status, rows, thumbnails, sliders, further styles, names. Shown styles keep their sliders."""
    try:
        book: Book | None = find()
        line = ""
    except BadInput as error:
        book, line = None, str(error)
    if book is None:
        nothing = [gr.update() for _ in range(2 * SLIDERS)]
        return [gr.update(value=said(line, True)), *sliders.shown(0), *nothing, gr.update(), gr.update(value="")]
    names = book.names[:SLIDERS]
    fresh = read_names(shown) != names
    values = [sliders.default(book, name) for name in names] if fresh else None
    rest = book.names[SLIDERS:]
    told = f"{len(book.names)} styles." + (f" Without a slider: {', '.join(rest)}." if rest else "")
    return [
        gr.update(value=said(told)), *sliders.shown(len(names)), *sliders.pictures(names, book),
        *sliders.labelled(names, values), gr.update(visible=bool(rest), **({"value": ""} if fresh else {})),
        gr.update(value=json.dumps(names, ensure_ascii=False)),
    ]  # fmt: skip
