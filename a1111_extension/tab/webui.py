"""The tab in A1111, Forge and reForge: their lists, their memory, their place among the tabs."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from modules import call_queue, paths_internal, script_callbacks, sd_models, shared

from dmm_core.errors import BadInput
from dmm_core.studio.desk import Host
from dmm_core.studio.folders import Folders
from dmm_core.studio.studio import Studio

from .. import checkpoint
from ..args import read_names
from .mix import Mailbox
from .page import build

TITLE = "DMM"
MEMORY = ("backend.memory_management", "ldm_patched.modules.model_management")  # Forge's and reForge's


class Webui(Host):
    """The webui's model leaves the GPU before a merge, and comes back after it."""

    def __init__(self) -> None:
        self.lent: Any = None  # A1111's model while it is in the host's memory

    def device(self) -> str:
        """``shared.device``, where a recipe can name it."""
        device = str(getattr(shared, "device", None) or "")
        return device if device in ("cpu", "mps") or device.startswith(("cuda", "xpu")) else ""

    def free(self) -> None:
        """Forks: ``unload_all_models``; A1111: ``sd_models.unload_model_weights``, which keeps it in RAM."""
        if getattr(shared.state, "job", ""):
            raise BadInput("the webui is drawing", hint="Wait until it is done, or interrupt it.")
        with call_queue.queue_lock:
            memory = fork_memory()
            if memory is not None:
                memory.unload_all_models()
            elif (model := sd_models.model_data.sd_model) is not None:
                sd_models.unload_model_weights(model)
                self.lent = model
            gc.collect()
            if memory is not None:
                memory.soft_empty_cache()

    def give_back(self) -> None:
        """A1111's model goes back to its device; the forks load theirs at the next picture."""
        with call_queue.queue_lock:
            self.bring_back()

    def bring_back(self) -> None:
        """Also before a picture that is drawn in mid-merge: A1111 would not move the model by itself."""
        lent, self.lent = self.lent, None
        if lent is not None and lent is sd_models.model_data.sd_model:
            sd_models.send_model_to_device(lent)

    def wrote(self) -> None:
        sd_models.list_models()


def fork_memory() -> Any:
    """Memory management of Forge or reForge; None in A1111."""
    for name in MEMORY:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


def folders() -> Folders:
    """The webui's model folders, and ``dmm`` in its folder of outputs."""
    options = shared.cmd_opts
    checkpoints = [Path(sd_models.model_path)]
    if given := getattr(options, "ckpt_dir", None):
        checkpoints.append(Path(given))
    lora = getattr(options, "lora_dir", None) or Path(sd_models.model_path).with_name("Lora")
    own = Path(paths_internal.default_output_dir) / "dmm"
    return Folders(tuple(checkpoints), (Path(lora),), own, _listed)


def _listed() -> Iterator[str]:
    yield from (info.filename for info in list(sd_models.checkpoints_list.values()))


HOST, MAILBOX = Webui(), Mailbox()
STUDIO = Studio(folders(), HOST)  # outlives "Reload UI", and so does a merge


def send(names: str, normalise: bool, *values: float) -> None:
    """The panel's "Send to tab": kept until the tab takes it."""
    path = checkpoint.current_path()
    if path is None:
        return
    root = next((root for root in STUDIO.folders.checkpoints if path.is_relative_to(root)), None)
    if root is None:
        return
    sent = read_names(names)
    weights = tuple(float(value or 0) for value in values[: len(sent)])
    MAILBOX.held = (path.relative_to(root).as_posix(), sent, weights, bool(normalise))


def tab() -> list[tuple[Any, str, str]]:
    """For ``on_ui_tabs``."""
    with gr.Blocks(analytics_enabled=False) as interface:
        build(STUDIO, MAILBOX)
    return [(interface, TITLE, "dmm_tab")]


def register() -> None:
    script_callbacks.on_ui_tabs(tab)
