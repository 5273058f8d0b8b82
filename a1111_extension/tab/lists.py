"""The dropdowns whose choices are files, and their refreshing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from dmm_core.studio.studio import Studio

from .events import MAJOR

CHECKPOINTS, LORAS, STUDENTS, MODELS, UNFINISHED = "checkpoints", "LoRAs", "DMM files", "models", "unfinished"


class Lists:
    """Makes dropdowns and remembers them. Typed names are allowed: the studio checks every name itself."""

    def __init__(self, studio: Studio) -> None:
        folders = studio.folders
        self.of: dict[str, Callable[[], list[str]]] = {
            CHECKPOINTS: folders.list_checkpoints,
            LORAS: folders.list_loras,
            STUDENTS: folders.list_students,
            MODELS: lambda: [*folders.list_checkpoints(), *folders.list_loras()],
            UNFINISHED: studio.unfinished,
        }
        self.made: list[tuple[Any, str]] = []
        self.order: dict[str, list[str]] = {}  # of a kind's files in the lists of several

    def one(self, label: str, kind: str, elem_id: str, info: str | None = None) -> Any:
        return self._add(kind, label=label, info=info, elem_id=elem_id, value=None)

    def many(self, label: str, kind: str, elem_id: str, info: str | None = None) -> Any:
        return self._add(kind, label=label, info=info, elem_id=elem_id, value=[], multiselect=True)

    def _add(self, kind: str, **options: Any) -> Any:
        choices = self.of[kind]()
        if options.get("multiselect"):
            self.order.setdefault(kind, choices)
        elif kind in (CHECKPOINTS, UNFINISHED):
            choices = ["", *choices]  # none of them
        custom = MAJOR >= 4 or not options.get("multiselect")  # 3.41 knows no more, and checks no choice either
        made = gr.Dropdown(choices, allow_custom_value=custom, **options)
        self.made.append((made, kind))
        return made

    @property
    def components(self) -> list[Any]:
        return [component for component, _ in self.made]

    def now(self) -> dict[str, list[str]]:
        return {kind: find() for kind, find in self.of.items()}

    def updates(self, now: dict[str, list[str]] | None) -> list[Any]:
        """Updates of ``components``; none if ``now`` is None."""
        made = []
        for component, kind in self.made:
            if now is None:
                made.append(gr.update())
            elif component.multiselect:
                made.append(gr.update(choices=self._in_order(kind, now[kind])))
            else:
                empty = [""] if kind in (CHECKPOINTS, UNFINISHED) else []
                made.append(gr.update(choices=[*empty, *now[kind]]))
        return made

    def _in_order(self, kind: str, found: list[str]) -> list[str]:
        """New files behind the known ones: from 4 on, gradio's page remembers places in the list, not names."""
        self.order[kind] = list(dict.fromkeys([*self.order[kind], *found]))
        here = set(found)
        return [name for name in self.order[kind] if name in here]
