"""The child's side of a job (``dmm distill RECIPE --events``): the merge, told as a JSON line for whatever happens.

Every line is an object with ``kind``: started, stage, progress, preview, warning, saved, and at last one of done,
stopped and failed. The process that reads them is free to go away: the child then saves and leaves as if asked to stop.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from dmm_core.errors import BadInput, one_line
from dmm_core.history import Losses
from dmm_core.locks import Busy, Lock
from dmm_core.recipe import Recipe, work_folder

EVERY = 0.5  # seconds between two lines of progress
SHARE = 10  # a preview may take one part in so many of the time


class Events:
    """Writes lines to ``stream``; ``gone`` once nobody reads them."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.gone = stream, False

    @classmethod
    def on_stdout(cls) -> Events:
        """Takes stdout for the events alone; what libraries print there goes to stderr from now on."""
        sys.stdout.flush()
        own = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
        os.dup2(2, 1)
        return cls(own)

    def __call__(self, kind: str, **about: Any) -> None:
        from dmm_core.cli import jsonable

        if self.gone:
            return
        try:
            self.stream.write(json.dumps(jsonable({"kind": kind, **about})) + "\n")
            self.stream.flush()
        except OSError:  # a pipe without a reader: EPIPE, on Windows EINVAL
            self.gone = True


def run(recipe_of: Callable[[], Recipe], preview_seconds: float, force: bool = False) -> dict[str, Any]:
    """The merge of a recipe, taken up where it was left. What ends it is told as an event, then raised."""
    events = Events.on_stdout()
    try:
        recipe = recipe_of()
        if recipe.out.exists() and not force:
            raise BadInput("is there already", recipe.out, "Choose another name, or delete it.")
        with held(recipe):
            return _merge(recipe, preview_seconds, events)
    except KeyboardInterrupt:
        raise
    except BadInput as error:
        events("failed", line=str(error))
        raise
    except BaseException as error:
        events("failed", line=one_line(error))
        raise


@contextmanager
def held(recipe: Recipe) -> Iterator[None]:
    """Device and output belong to this process while entered. Raises BadInput where another one has them."""
    from dmm_core.plan import choose_device

    device = choose_device(recipe.train.device)
    note = f"merging {recipe.out}"
    try:
        with Lock(device_name(device), note), Lock(output_name(recipe), note):
            yield
    except Busy as busy:
        raise BadInput(f"{device} is busy ({busy})", hint="One merge at a time: wait for it, or stop it.") from None


def device_name(device: str) -> str:
    """The same for every process that would use this device."""
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return f"device-{kind}-{index or 0}"
    import torch

    found = torch.cuda.get_device_properties(int(index or torch.cuda.current_device()))
    return f"device-{getattr(found, 'uuid', None) or 'cuda-' + (index or '0')}"


def output_name(recipe: Recipe) -> str:
    place = os.path.normcase(os.path.abspath(recipe.out))
    return f"out-{hashlib.sha256(place.encode()).hexdigest()[:16]}"


def _merge(recipe: Recipe, preview_seconds: float, events: Events) -> dict[str, Any]:
    from dmm_core.run import prepare
    from dmm_core.stages import unfinished

    stop_file = work_folder(recipe) / "stop"
    asked = lambda: events.gone or stop_file.exists()  # noqa: E731
    resumed = unfinished(recipe)
    events("started", process=os.getpid(), resumed=resumed, work=work_folder(recipe), out=recipe.out)

    def notify(what: str, done: int, total: int) -> None:
        events("stage", what=what, done=done, total=total)
        if asked():
            raise KeyboardInterrupt

    merge: Any = None
    try:
        events("stage", what="opens and checks the files", done=0, total=0)
        merge = prepare(recipe, resumed, notify)
        for warning in merge.sources.warnings:
            events("warning", line=warning)
        _train(merge, asked, Previews(merge, preview_seconds, events), events)
        events("stage", what="writes the file", done=0, total=0)
        path = merge.save()
        for warning in merge.warnings:
            events("warning", line=warning)
    except KeyboardInterrupt:
        stop_file.unlink(missing_ok=True)
        events("stopped", step=merge.steps_done if merge else 0, resumable=unfinished(recipe))
        raise KeyboardInterrupt("The same job again goes on from there.") from None
    run = merge.distillation
    told = {"out": path, "styles": list(merge.sources.names), "steps": run.steps_done,
            "samples_seen": run.samples_seen, "seconds": round(merge.seconds, 1)}  # fmt: skip
    events("done", **told)
    return told


def _train(merge: Any, asked: Callable[[], bool], previews: Previews, events: Events) -> None:
    """All steps that are left; leaves the averaged weights in the student."""
    total = merge.total_steps
    saved, told = _changed(merge.state_file), 0.0
    began, first = time.monotonic(), merge.distillation.steps_done
    losses = previews.losses = Losses(merge.work / "losses.json", first)
    events("progress", step=first, total=total, seconds_left=None, losses=losses.now, loss=None)
    for result in merge.timed_steps(asked):
        for warning in result.warnings:
            events("warning", line=warning)
        now = time.monotonic()
        if now - told >= EVERY or result.step == total:  # reading a loss waits for the device: most are left unread
            losses.add(result.step, result.score)
            left = (total - result.step) * (now - began) / (result.step - first)
            events("progress", step=result.step, total=total, seconds_left=left, losses=losses.now, loss=result.loss)
            told = now
        if saved != (saved := _changed(merge.state_file)):
            with suppress(OSError):  # a picture's line, not worth a merge
                losses.save()
            events("saved", path=merge.state_file)
        previews.now_and_then()
    if saved != _changed(merge.state_file):
        events("saved", path=merge.state_file)
    merge.finish()
    previews.draw()


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


class Previews:
    """Draws at the first step, then every so often, and at the end; a failure ends the pictures, not the training."""

    def __init__(self, merge: Any, seconds: float, events: Events) -> None:
        self.merge, self.seconds, self.events = merge, seconds, events
        self.preview: Any = None
        self.losses: Losses | None = None
        self.next = 0.0

    def now_and_then(self) -> None:
        if self.seconds and time.monotonic() >= self.next:
            self.draw()

    def draw(self) -> None:
        if not self.seconds:
            return
        from dmm_core.preview import Preview

        began = time.monotonic()
        try:
            if self.preview is None or self.preview.stage != self.merge.stage:  # other prompts
                self.preview = Preview(self.merge)
            path, caption = self.preview.draw(self.losses.points if self.losses else [])
        except (RuntimeError, MemoryError, OSError, BadInput) as error:  # memory, a full disk, no VAE in the file
            self.seconds = 0.0
            self.events("warning", line=f"there are no previews: {one_line(error)}")
            return
        self.events("preview", path=path, caption=caption, step=self.merge.distillation.steps_done)
        now = time.monotonic()
        self.next = now + max(self.seconds, SHARE * (now - began))
