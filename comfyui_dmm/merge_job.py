"""The job behind Merge Checkpoints: started with the GPU free, shown on the node, stopped by Cancel."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Any

import comfy.model_management as host
from comfy.utils import ProgressBar
from PIL import Image

from dmm_core import environment, jobs
from dmm_core.environment import NotInstalled, Training
from dmm_core.errors import BadInput
from dmm_core.progress import duration
from dmm_core.recipe import Recipe

from . import merging

SAVES_WITHIN = 600.0  # seconds that a cancelled merge has for its save
Say = Callable[[str], None]
log = logging.getLogger("dmm")


def merge(recipe: Recipe, replace: bool, say: Say) -> Image.Image | None:
    """Make the file, or leave it where it is this merge already; returns the last preview.

    Raises:
        BadInput: what is wrong, in one line; InterruptProcessingException: cancelled, all saved.
    """
    metadata = merging.require_ours(recipe.out)
    if metadata is not None:
        if merging.finished(recipe, metadata):
            say("This merge is finished already.")
            return None
        if not replace:
            raise BadInput("is a merge with other settings", recipe.out, "Choose another name, or turn replace on.")
    training = _training(say)
    host.unload_all_models()
    gc.collect()
    host.soft_empty_cache()
    job = jobs.start(recipe, replace, 60.0 if recipe.preset != "mini" else 5.0, training)
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
        saved = job.finish(SAVES_WITHIN)
        step = job.last.about["step"] if job.last is not None and job.last.kind == "stopped" else shown.step
        at = f"at step {step} of {shown.total}" if shown.total else "before the first step"
        kept = "Run it again to go on from there." if saved else "It goes on from its last save when it is run again."
        if isinstance(stop, host.InterruptProcessingException):
            say(f"Stopped {at}. {kept}")
            log.info("DMM: the merge was stopped %s. %s", at, kept)
        raise
    try:
        job.require_success()
        if job.last.kind == "stopped":
            raise jobs.JobFailed("the merge was stopped from outside", job.work, "Run it again to go on from there.")
    except BadInput:
        say("")  # the red node says what is wrong
        raise
    say("Done. Load DMM has it in its list.")
    return shown.picture


class Shown:
    """A job's events as the node shows them: bar, text, picture."""

    def __init__(self, say: Say) -> None:
        self.say, self.bar = say, ProgressBar(1)
        self.step = self.total = 0
        self.picture: Image.Image | None = None

    def __call__(self, event: jobs.Event) -> None:
        about = event.about
        if event.kind == "started" and about["resumed"]:
            log.info("DMM: goes on with the merge that was stopped")
        elif event.kind == "stage":
            part = f": {about['done']} of {about['total']}" if about["total"] else ""
            self.say(f"{about['what']}{part}")
            if about["total"]:
                self.bar.update_absolute(about["done"], about["total"])
        elif event.kind == "progress":
            self._progress(about)
        elif event.kind == "preview" and event.picture:
            self.picture = Image.open(BytesIO(event.picture)).convert("RGB")
            self.bar.update_absolute(about["step"], self.total or None, ("JPEG", self.picture, max(self.picture.size)))
        elif event.kind == "warning":
            log.warning("DMM: %s", about["line"])

    def _progress(self, about: Mapping[str, Any]) -> None:
        if about["step"] and not self.step:
            log.info("DMM: merging, step %d of %d", about["step"], about["total"])
        self.step, self.total = about["step"], about["total"]
        left = f", {duration(about['seconds_left'])} left" if about["seconds_left"] else ""
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in about["losses"].items())
        self.say(f"step {self.step} of {self.total}{left}" + (f"\nloss: {losses}" if losses else ""))
        self.bar.update_absolute(self.step, self.total)
