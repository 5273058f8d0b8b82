"""The tab: forms on the left, what is going on on the right. For gradio 3.41 to 6."""

from __future__ import annotations

import zlib
from typing import Any

import gradio as gr

from dmm_core.studio.studio import Studio

from . import forms, mix, tools, words
from .events import SHOW_CARD, attempt, on
from .lists import Lists


def build(studio: Studio, mailbox: mix.Mailbox) -> None:
    """All of it, inside a Blocks. ``javascript/dmm_tab.js`` presses ``dmm_poll`` while the tab is on the screen."""
    lists = Lists(studio)
    with gr.Column(elem_id="dmm_page"):
        with gr.Group(visible=not studio.ready(), elem_id="dmm_setup") as setup:
            gr.HTML(
                '<div class="dmm-said">What training needs is not installed yet. It goes into a folder of its own; '
                "this program's own packages stay as they are.</div>"
            )
            install = gr.Button("Install what training needs", variant="primary", elem_id="dmm_install")
            said = gr.HTML("", elem_id="dmm_install_told")
        with gr.Row(elem_classes="dmm-columns"):
            with gr.Column(scale=3, min_width=320, elem_classes="dmm-forms"), gr.Tabs(elem_id="dmm_tabs"):
                with gr.TabItem("Merge"):
                    forms.build(studio, lists, extend=False)
                with gr.TabItem("Inspect"):
                    tools.inspect(studio, lists)
                with gr.TabItem("Mix & export"):
                    mix.build(studio, lists, mailbox)
                with gr.TabItem("Extend"):
                    forms.build(studio, lists, extend=True)
                with gr.TabItem("Evaluate"):
                    gallery = tools.evaluate(studio, lists)
            with gr.Column(scale=2, min_width=320, elem_classes="dmm-side", elem_id="dmm_side"):
                card = gr.HTML(words.IDLE, elem_id="dmm_card")
                cancel = gr.Button("Cancel", visible=False, variant="stop", elem_id="dmm_cancel")
                preview = gr.HTML("", elem_id="dmm_preview")
        poll = gr.Button("Poll", elem_id="dmm_poll", elem_classes="dmm-hidden")
        seen = gr.State("")
    watcher = Watcher(studio, lists)
    shown = [seen, card, cancel, preview, gallery, setup, *lists.components]
    on(poll.click, watcher.look, [seen], shown, queue=False)
    on(cancel.click, lambda: gr.update(interactive=not studio.desk.cancel()), None, [cancel], queue=False)
    on(on(install.click, lambda: attempt(lambda: forms.begun(studio.install())), None, [said]).then, None, js=SHOW_CARD)


class Watcher:
    """Tells a page what has changed since it looked last; any number of pages may look."""

    def __init__(self, studio: Studio, lists: Lists) -> None:
        self.studio, self.lists = studio, lists

    def look(self, seen: str) -> list[Any]:
        """Updates of: what was seen, card, cancel, preview, gallery, setup, lists.

        ``seen`` has a mark for the card, for its pictures, and for the files; only what changed is sent.
        """
        activity = self.studio.desk.activity
        before = (seen or "").split("|") if (seen or "").count("|") == 2 else ["", "", ""]
        picture = None
        if activity is not None:
            picture = activity.view.picture if activity.view is not None else None
        finished = list(activity.pictures) if activity is not None else []
        running = activity is not None and activity.running
        marks = [f"{id(activity)} {activity.version if activity else 0} {running}", _mark(picture, finished), before[2]]
        lists = None
        if not running or not before[2]:  # a merge changes no list before its end
            now = self.lists.now()
            marks[2] = f"{zlib.crc32(repr(now).encode())}"
            lists = now if marks[2] != before[2] else None
        same = gr.update()
        fresh = [new != old for new, old in zip(marks, before, strict=True)]
        told: list[Any] = ["|".join(marks)]
        told.append(gr.update(value=words.card(activity)) if fresh[0] else same)
        cancelling = activity is not None and activity.cancelled.is_set()
        told.append(gr.update(visible=running, interactive=not cancelling) if fresh[0] else same)
        preview, gallery = same, same
        if fresh[1]:
            evaluated = activity is not None and activity.view is None and bool(finished)
            caption = activity.view.caption if activity is not None and activity.view is not None else ""
            preview = gr.update(value=words.pictures([(caption, picture)] if picture else []))
            gallery = gr.update(value=words.pictures(finished)) if evaluated else same
        told += [preview, gallery]
        told.append(gr.update(visible=not self.studio.ready()) if fresh[0] and not running else same)
        return told + self.lists.updates(lists)


def _mark(picture: bytes | None, finished: list[tuple[str, bytes]]) -> str:
    return " ".join(str(zlib.crc32(data)) for data in ([picture] if picture else []) + [data for _, data in finished])
