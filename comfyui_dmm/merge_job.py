"""The job behind Merge Checkpoints: started with the GPU free, shown on the node, stopped by Cancel."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from io import BytesIO

import comfy.model_management as host
from comfy.utils import ProgressBar
from PIL import Image

from dmm_core import environment, jobs
from dmm_core.asked import preview_seconds
from dmm_core.environment import NotInstalled, Training
from dmm_core.errors import BadInput
from dmm_core.follow import View, require_done
from dmm_core.outputs import settled
from dmm_core.recipe import Recipe

AGAIN = "Run it again"
DONE = "Done. Load DMM has it in its list."
Say = Callable[[str], None]
log = logging.getLogger("dmm")


def merge(recipe: Recipe, replace: bool, say: Say) -> Image.Image | None:
    """Make the file, or leave it where it is this merge already; returns the last preview.

    Raises:
        BadInput: what is wrong, in one line; InterruptProcessingException: cancelled, all saved.
    """
    if settled(recipe, replace):
        say("This merge is finished already.")
        return None
    training = _training(say)
    host.unload_all_models()
    gc.collect()
    host.soft_empty_cache()
    job = jobs.start(recipe, replace, preview_seconds(recipe), training)
    return _follow(job, say)


def _training(say: Say) -> Training:
    """The environment for training; made at first use, since that changes nothing of ComfyUI."""
    try:
        return environment.training_python()
    except NotInstalled:
        log.info(
            "DMM: installing what training needs, once, beside the node pack. ComfyUI's own packages stay as they are."
        )
        say("Installing what training needs, once. ComfyUI's own packages stay as they are.")
        try:
            return environment.install(lambda line: say(f"Installing what training needs, once: {line}"),
                                       host.processing_interrupted)  # fmt: skip
        except BadInput:
            host.throw_exception_if_processing_interrupted()
            raise


def _follow(job: jobs.Job, say: Say) -> Image.Image | None:
    """Show a job on the node until it ends. A cancel lets it save first."""
    shown = Shown(say)
    try:
        while job.last is None:
            host.throw_exception_if_processing_interrupted()
            event = job.poll(0.2)
            if event is not None:
                shown(event)
    except BaseException as stop:  # a cancel, or the end of ComfyUI
        say("Stopping: what was learnt is saved first.")
        told = shown.view.cancel(job, AGAIN)
        if job.last is not None and job.last.kind == "failed":
            told = f"Broken off: {job.last.about['line']}"
        elif job.last is not None and job.last.kind == "done":
            told = DONE
        if isinstance(stop, host.InterruptProcessingException):
            say(told)
            log.info("DMM: the merge was %s", told[0].lower() + told[1:])
        raise
    try:
        require_done(job, AGAIN)
    except BadInput:
        say("")  # the red node says what is wrong
        raise
    say(DONE)
    return shown.picture


class Shown:
    """A job's events as the node shows them: bar, text, picture."""

    def __init__(self, say: Say) -> None:
        self.say, self.bar, self.view = say, ProgressBar(1), View()
        self.picture: Image.Image | None = None

    def __call__(self, event: jobs.Event) -> None:
        view, before = self.view, self.view.step
        view.take(event)
        if event.kind == "started" and view.resumed:
            log.info("DMM: goes on with the merge that was stopped")
        elif event.kind == "stage":
            self.say(view.line())
            if view.of:
                self.bar.update_absolute(view.done, view.of)
        elif event.kind == "progress":
            if view.step and not before:
                log.info("DMM: merging, step %d of %d", view.step, view.total)
            losses = ", ".join(f"{name} {loss:.4f}" for name, loss in view.losses.items())
            self.say(view.line() + (f"\nloss: {losses}" if losses else ""))
            self.bar.update_absolute(view.step, view.total)
        elif event.kind == "preview" and view.picture:
            self.picture = Image.open(BytesIO(view.picture)).convert("RGB")
            at = event.about["step"]
            self.bar.update_absolute(at, view.total or None, ("JPEG", self.picture, max(self.picture.size)))
        elif event.kind == "warning":
            log.warning("DMM: %s", view.warnings[-1])
