"""The node Merge Checkpoints: sockets, widgets and texts. What it does is in ``merging``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io, ui

from dmm_core.errors import BadInput
from dmm_core.presets import DEFAULT, PRESETS

from . import merge_job, merging
from .nodes import schema

CHECKPOINTS = 8  # of one node
TeachersType = io.Custom("DMM_TEACHERS")


def checkpoint_input(name: str, tooltip: str, loras: bool = True) -> io.Input:
    return io.Combo.Input(name, options=merging.choices(loras), default=merging.NONE, optional=True, tooltip=tooltip)


def inputs() -> list[io.Input]:
    """All but ``name`` optional, so that prompts of older versions stay valid; new widgets go to the end."""
    told = " ".join(f"{name}: {preset.title}. {preset.does}" for name, preset in PRESETS.items())
    return [
        io.String.Input("name", default="my-styles", tooltip="Of the file to write into models/checkpoints. Empty: "
                        "only hand the checkpoints on to the next Merge Checkpoints."),
        *(checkpoint_input(f"checkpoint_{i}", "A checkpoint to learn from, or a LoRA, which is put on the base; its "
                           "style gets the file's name.")
          for i in range(1, CHECKPOINTS + 1)),
        checkpoint_input("base", "Whose text encoder and VAE the result gets, and what LoRAs are put on. none: those "
                         "of the first checkpoint, and no LoRAs.", loras=False),
        io.Combo.Input("preset", options=list(PRESETS), default=DEFAULT, optional=True, tooltip=told),
        io.String.Input("prompts", default="", multiline=True, optional=True, tooltip="What the checkpoints draw to "
                        "learn from, one prompt a line. Empty: everyday subjects."),
        io.String.Input("recipe", default="", optional=True, tooltip="A recipe file for what the widgets do not say, "
                        "with its whole path or in ComfyUI's input folder. Usually empty."),
        io.Boolean.Input("replace", default=False, optional=True, tooltip="Overwrite a merge of this name that has "
                         "other settings, finished or stopped."),
        TeachersType.Input("teachers", optional=True, tooltip="More checkpoints, from another Merge Checkpoints."),
    ]  # fmt: skip


class MergeCheckpoints(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "MergeCheckpoints", "Merge Checkpoints", "Distils several checkpoints into one file with a style for each. "
            "It takes minutes to a night; Cancel saves, and running it again goes on from there.",
            inputs(),
            # COMBO too, so that the wire fits the checkpoint of Load DMM
            [io.Custom("STRING,COMBO").Output("NAME", display_name="name", tooltip="The file's name, for Load DMM."),
             TeachersType.Output("TEACHERS", display_name="teachers", tooltip="All checkpoints of this node, for "
                                 "another Merge Checkpoints.")],
            is_output_node=True, hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, name: str | None = None, recipe: str | None = None, **chosen: Any) -> Any:
        """Other files under the same names, or an output that is gone, run again; a finished merge does not."""
        stats = []
        read: dict[str, Callable[[], Path]] = {}
        if recipe and recipe.strip():  # "" would be the input folder, which changes with every picture put there
            read["recipe"] = partial(merging.recipe_file, recipe)
        for key, value in chosen.items():
            if key.startswith("checkpoint_") or key == "base":
                read[key] = partial(merging.find, str(value))
        for key, path in read.items():
            try:
                about = path().stat()
            except (BadInput, OSError):
                continue
            stats.append(f"{key} {about.st_mtime_ns} {about.st_size}")
        try:
            made = merging.MADE.fingerprint(merging.output(name or ""))
        except BadInput:
            made = 0
        return f"{stats} {made}"

    @classmethod
    def execute(
        cls, name: str, base: str = merging.NONE, preset: str = DEFAULT, prompts: str = "", recipe: str = "",
        replace: bool = False, teachers: tuple[Path, ...] = (), **checkpoints: str,
    ) -> io.NodeOutput:  # fmt: skip
        own = [checkpoints.get(f"checkpoint_{i}", merging.NONE) for i in range(1, CHECKPOINTS + 1)]
        chosen = [*teachers, *(merging.find(one) for one in own if one != merging.NONE)]
        if not name.strip():
            return io.NodeOutput("", tuple(chosen))
        wanted = merging.recipe_of(name, chosen, base, preset, prompts, recipe)
        from server import PromptServer  # there while nodes run, not wherever this package is imported

        node = cls.hidden.unique_id

        def say(text: str) -> None:  # for web/progress.js, which says why not ComfyUI's own progress text
            PromptServer.instance.send_sync("dmm.progress", {"node": node, "text": text})

        picture = merge_job.merge(wanted, replace, say)
        merging.MADE.note(wanted.out)
        shown = None
        if picture is not None:
            shown = ui.PreviewImage(torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None], cls=cls)
        return io.NodeOutput(merging.listed(wanted.out), tuple(chosen), ui=shown)


NODES: tuple[type[io.ComfyNode], ...] = (MergeCheckpoints,)
