"""The tab as a web page of its own, for people with neither host; ``dmm ui`` opens it."""

from __future__ import annotations

import inspect
import signal
import sysconfig
import time
from pathlib import Path
from typing import Any

import gradio as gr

from dmm_core import __version__, environment
from dmm_core.environment import Training
from dmm_core.studio.desk import Host
from dmm_core.studio.folders import Folders
from dmm_core.studio.studio import Studio

from .mix import Mailbox
from .page import build

ROOT = Path(__file__).resolve().parents[2]
TITLE = "DMM: many styles in one checkpoint"


class Alone(Host):
    """This program has the GPU to itself, and may train in its own environment."""

    def training(self) -> Training:
        return environment.own_python()


def folders(models: Path) -> Folders:
    """``checkpoints`` and ``loras`` in the folder, and ``dmm`` for reports and unfinished merges; made if missing."""
    made = Folders((models / "checkpoints",), (models / "loras",), models / "dmm")
    for folder in (*made.checkpoints, *made.loras, made.own):
        folder.mkdir(parents=True, exist_ok=True)
    return made


def shipped(name: str) -> str:
    """A file that lies where the webuis look for it: in the clone's root, or of an installed package beside it."""
    path = ROOT / name
    if not path.is_file():
        path = Path(sysconfig.get_path("data"), "share", "dmm-studio", Path(name).name)
    return path.read_text(encoding="utf-8")


def page(studio: Studio) -> tuple[Any, dict[str, Any]]:
    """The page, and options for its ``launch``: from gradio 6 on, looks are launch's business."""
    looks = {
        "css": shipped("style.css"),
        "head": f"<script>{shipped('javascript/dmm_tab.js')}</script>",
        # fonts of the system: others would be fetched from elsewhere
        "theme": gr.themes.Default(
            primary_hue="indigo", neutral_hue="slate", font=["system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ),
    }  # fmt: skip
    launched = set(inspect.signature(gr.Blocks.launch).parameters)
    late = {key: value for key, value in looks.items() if key in launched}
    early = {key: value for key, value in looks.items() if key not in launched}
    with gr.Blocks(title=TITLE, analytics_enabled=False, **early) as blocks:
        gr.HTML(
            f'<header class="dmm-title"><h1>DMM</h1><p>Many fine-tuned checkpoints in one file, with a slider for each '
            f"style.</p><small>{__version__}</small></header>"
        )
        build(studio, Mailbox())
    return blocks, {**late, **({"footer_links": []} if "footer_links" in launched else {})}


def serve(models: Path, host: str, port: int | None, browser: bool, ready: Any) -> None:
    """Until Ctrl-C, or a service's polite end; a merge that is running is saved first. ``ready`` gets the address."""

    def end(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    studio = Studio(folders(models), Alone())
    blocks, options = page(studio)
    try:
        _, address, _ = blocks.launch(
            server_name=host, server_port=port, inbrowser=browser, prevent_thread_lock=True, quiet=True, share=False,
            **options,
        )  # fmt: skip
        ready(address)
        while blocks.is_running:
            time.sleep(0.2)
    finally:
        studio.desk.close()
        blocks.close(verbose=False)
