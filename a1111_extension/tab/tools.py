"""The sub-tabs Inspect and Evaluate."""

from __future__ import annotations

from typing import Any

import gradio as gr

from dmm_core.errors import BadInput
from dmm_core.studio.studio import Studio

from . import words
from .events import SHOW_CARD, attempt, on
from .forms import begun
from .lists import CHECKPOINTS, MODELS, STUDENTS, Lists


def inspect(studio: Studio, lists: Lists) -> None:
    chosen = lists.one("Checkpoint, LoRA or style file", MODELS, "dmm_inspect_file")
    with gr.Row(elem_classes="dmm-buttons"):
        check = gr.Checkbox(False, label="Look for NaN and infinity too", elem_id="dmm_inspect_check", container=False)
        look = gr.Button("Inspect", variant="primary", elem_id="dmm_inspect_start")
    told = gr.HTML("", elem_id="dmm_inspect_told")
    found = gr.HTML("", elem_id="dmm_inspect_found")

    def act(name: str | None, values: bool) -> tuple[str, str]:
        shown: list[str] = []

        def work() -> str:
            shown.append(words.inspected(studio.inspect(name, bool(values))))
            return ""

        return attempt(work), "".join(shown)

    on(look.click, act, [chosen, check], [told, found])


def evaluate(studio: Studio, lists: Lists) -> Any:
    """Returns where the pictures go."""
    student = lists.one("DMM file", STUDENTS, "dmm_evaluate_student")
    teachers = lists.many("Its teachers", MODELS, "dmm_evaluate_teachers", "in the order of the file's styles")
    with gr.Row():
        base = lists.one("Base", CHECKPOINTS, "dmm_evaluate_base", "of LoRA files among the teachers")
        images = gr.Number(96, label="Pictures a style", elem_id="dmm_evaluate_images")
        steps = gr.Number(12, label="Sampler steps", elem_id="dmm_evaluate_steps")
    start = gr.Button("Evaluate", variant="primary", elem_id="dmm_evaluate_start")
    told = gr.HTML("", elem_id="dmm_evaluate_told")
    gallery = gr.HTML("", elem_id="dmm_gallery")

    def guess(name: str | None) -> Any:
        try:
            found, under = studio.teachers_of(name)
            return gr.update(value=found), gr.update(value=under)
        except (BadInput, OSError):
            return gr.update(), gr.update()

    def act(
        name: str | None, beside: list[str] | None, under: str | None, count: float | None, each: float | None
    ) -> str:
        return attempt(lambda: begun(studio.evaluate(name, beside or [], count or 0, each or 0, under)))

    on(student.change, guess, [student], [teachers, base])
    on(on(start.click, act, [student, teachers, base, images, steps], told).then, None, js=SHOW_CARD)
    return gallery
