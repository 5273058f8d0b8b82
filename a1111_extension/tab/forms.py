"""The sub-tabs Merge and Extend: one form, since adding to a DMM file asks for the same things and a file."""

from __future__ import annotations

from typing import Any

import gradio as gr

from dmm_core.presets import PRESETS
from dmm_core.studio.desk import Activity
from dmm_core.studio.studio import Studio, Wanted

from .events import SHOW_CARD, attempt, on
from .lists import CHECKPOINTS, LORAS, STUDENTS, UNFINISHED, Lists

TIMES = " · ".join(f"{name}: {preset.title.partition(', ')[2] or preset.title}" for name, preset in PRESETS.items())
FIELDS = ("name", "checkpoints", "loras", "base", "student", "preset", "prompts", "steps", "pictures", "replace")


def build(studio: Studio, lists: Lists, extend: bool) -> None:
    """The form, in the place where it is called."""
    where = "extend" if extend else "merge"
    fields: dict[str, Any] = {}
    if extend:
        fields["student"] = lists.one("DMM file to extend", STUDENTS, f"dmm_{where}_student")
    else:
        fields["student"] = gr.State("")
    title = "Checkpoints to add" if extend else "Checkpoints"
    note = "their styles get the files' names" if extend else "two or more; each becomes a style with the file's name"
    fields["checkpoints"] = lists.many(title, CHECKPOINTS, f"dmm_{where}_checkpoints", note)
    fields["loras"] = lists.many("LoRAs", LORAS, f"dmm_{where}_loras", "each a style too, on top of the base")
    base = "what LoRAs are put on; empty: no LoRAs" if extend else "gives text encoder and VAE; empty: the first one"
    fields["base"] = lists.one("Base", CHECKPOINTS, f"dmm_{where}_base", base)
    fields["name"] = gr.Textbox(
        "", label="Name of the new file", placeholder="my-styles", max_lines=1, elem_id=f"dmm_{where}_name"
    )
    fields["preset"] = gr.Radio(list(PRESETS), value="good", label="Preset", info=TIMES, elem_id=f"dmm_{where}_preset")
    with gr.Accordion("More", open=False):
        fields["prompts"] = gr.Textbox(
            "", label="Prompts", lines=3, placeholder="one a line; empty: everyday subjects",
            elem_id=f"dmm_{where}_prompts",
        )  # fmt: skip
        with gr.Row():
            fields["steps"] = gr.Number(0, label="Steps", info="0: the preset's", elem_id=f"dmm_{where}_steps")
            fields["pictures"] = gr.Number(
                0, label="Pictures a checkpoint", info="0: the preset's", elem_id=f"dmm_{where}_pictures"
            )
        fields["replace"] = gr.Checkbox(
            False, label="Replace a merge of this name that has other settings", elem_id=f"dmm_{where}_replace"
        )
    told = gr.HTML("", elem_id=f"dmm_{where}_told")
    with gr.Row(elem_classes="dmm-buttons"):
        plan = gr.Button("Plan", elem_id=f"dmm_{where}_plan")
        start = gr.Button("Extend" if extend else "Merge", variant="primary", elem_id=f"dmm_{where}_start")
    inputs = [fields[name] for name in FIELDS]

    def begin(how: Any) -> Any:
        def act(*values: Any) -> str:
            wanted = Wanted(**{key: value for key, value in zip(FIELDS, values, strict=True) if value is not None})
            return attempt(lambda: begun(how(wanted)))

        return act

    def extending(how: Any) -> Any:
        def act(wanted: Wanted) -> Activity:
            if extend:
                studio.folders.checkpoint(wanted.student)
            return how(wanted)

        return act

    on(on(plan.click, begin(extending(studio.plan)), inputs, told).then, None, js=SHOW_CARD)
    on(on(start.click, begin(extending(studio.merge)), inputs, told).then, None, js=SHOW_CARD)
    if not extend:
        _unfinished(studio, lists)


def _unfinished(studio: Studio, lists: Lists) -> None:
    with gr.Row(elem_classes="dmm-unfinished"):
        chosen = lists.one("Unfinished merges", UNFINISHED, "dmm_unfinished", "go on exactly where they were stopped")
        resume = gr.Button("Resume", elem_id="dmm_resume", scale=0, min_width=120)
    told = gr.HTML("", elem_id="dmm_resume_told")
    act = lambda name: attempt(lambda: begun(studio.resume(name)))  # noqa: E731
    on(on(resume.click, act, [chosen], told).then, None, js=SHOW_CARD)


def begun(activity: Activity) -> str:
    """Nothing: the card says all from here on."""
    return ""
