"""The always-visible script, and what is registered with the webui. ``modules/scripts.py``, ``script_callbacks.py``."""

from __future__ import annotations

from typing import Any

from modules import script_callbacks, scripts

from . import checkpoint, infotext, tag, ui, xyz
from .hook import LIVE
from .session import SESSION, step
from .tab import webui


class DMMScript(scripts.Script):
    def title(self) -> str:
        return ui.TITLE

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        controls, self.infotext_fields, _ = ui.build(self.elem_id)
        self.paste_field_names = list(infotext.KEYS)
        return controls

    def before_process(self, p: Any, *values: Any) -> None:
        webui.HOST.bring_back()  # a merge may have the GPU; who draws meanwhile shares it
        checkpoint.renew()

    def process(self, p: Any, *values: Any) -> None:
        """After the checkpoint is settled, before prompts are parsed."""
        SESSION.begin(p, values)

    def before_process_batch(self, p: Any, *values: Any, **kwargs: Any) -> None:
        SESSION.batch(int(kwargs.get("batch_number", 0)), int(p.batch_size))

    def process_before_every_sampling(self, p: Any, *values: Any, **kwargs: Any) -> None:
        """Base and hires pass; Forge calls it twice for the latter."""
        SESSION.refresh(p)

    def postprocess(self, p: Any, processed: Any, *values: Any) -> None:
        SESSION.end()


def _before_ui() -> None:
    tag.register()
    xyz.register()


def _model_loaded(sd_model: Any) -> None:
    LIVE.hide()  # the next sampling hooks what it finds
    checkpoint.remember(sd_model)


def register() -> None:
    """At every (re)load of scripts: the webui has forgotten all callbacks by then (``load_scripts``)."""
    script_callbacks.on_before_ui(_before_ui)
    webui.register()
    script_callbacks.on_cfg_denoiser(step)
    script_callbacks.on_model_loaded(_model_loaded)
    script_callbacks.on_script_unloaded(LIVE.end)
