"""One activity at a time, in a thread of its own, with the GPU lent by the host and given back after it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dmm_core import environment, jobs
from dmm_core.environment import Training
from dmm_core.errors import BadInput, one_line
from dmm_core.follow import SAVES_WITHIN, View, require_done
from dmm_core.studio.tool import Stopped

log = logging.getLogger("dmm")


class Host:
    """What the program around the page does for an activity; this one is a program with a GPU to itself."""

    def device(self) -> str:
        """Where to train; "" for what is best."""
        return ""

    def free(self) -> None:
        """Free the GPU's memory. Raises BadInput where that cannot be now."""

    def give_back(self) -> None:
        """The activity is over."""

    def wrote(self) -> None:
        """There are new files in the model folders."""

    def training(self) -> Training:
        """Raises NotInstalled: what training needs is yet to be installed."""
        return environment.training_python()


@dataclass
class Activity:
    """What is being done, or was done last. ``state``: running, done, stopped or failed."""

    title: str
    state: str = "running"
    line: str = ""  # the last word
    view: View | None = None  # of a merge
    lines: list[str] = field(default_factory=list)  # what an installation or an evaluation said
    plan: dict[str, Any] | None = None
    pictures: list[tuple[str, bytes]] = field(default_factory=list)  # caption and file
    cancelled: threading.Event = field(default_factory=threading.Event)
    version: int = 0  # counts up with every change

    def say(self, line: str) -> None:
        self.line = line
        self.lines = [*self.lines[-199:], line]
        self.version += 1

    @property
    def running(self) -> bool:
        return self.state == "running"


class Busy(BadInput):
    """Something else is going on."""


class Desk:
    """Holds the activity. All methods may be called from any thread."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.activity: Activity | None = None
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def begin(self, title: str, work: Callable[[Activity], str], needs_gpu: bool = True) -> Activity:
        """Start ``work``, whose return value is the last word.

        Raises:
            Busy: another activity is running. BadInput: the GPU cannot be freed now.
        """
        with self._lock:
            if self.activity is not None and self.activity.running:
                raise Busy(f"this is still going on: {self.activity.title}", hint="Wait for it, or cancel it.")
            if needs_gpu:
                self.host.free()
            activity = self.activity = Activity(title)
            self._thread = threading.Thread(
                target=self._run, args=(activity, work, needs_gpu), daemon=True, name="dmm activity"
            )
            self._thread.start()
        return activity

    def cancel(self) -> bool:
        """Ask the activity to stop; a merge saves first. False where nothing is running."""
        activity = self.activity
        if activity is None or not activity.running:
            return False
        activity.cancelled.set()
        activity.version += 1
        return True

    def wait(self, seconds: float | None = None) -> None:
        if self._thread is not None:
            self._thread.join(seconds)

    def close(self) -> None:
        """The program ends: save what is running."""
        if self.cancel():
            self.wait(SAVES_WITHIN)

    def _run(self, activity: Activity, work: Callable[[Activity], str], needs_gpu: bool) -> None:
        state, line = "failed", ""
        try:
            line = work(activity)
            state = "stopped" if activity.cancelled.is_set() and activity.view is not None else "done"
        except Stopped:
            state, line = "stopped", "Cancelled."
        except BadInput as error:
            line = str(error)
        except OSError as error:
            line = f"{error.filename or 'the disk'}: {error.strerror or error}."
        except Exception as error:  # ours: the page goes on, and the program's log has the rest
            log.exception("DMM: %s broke off", activity.title)
            line = f"This went wrong: {one_line(error)}"
        try:
            if needs_gpu:
                self.host.give_back()
            self.host.wrote()
        except Exception:
            log.exception("DMM: the host could not go on as before")
        activity.say(line)
        activity.state = state
        activity.version += 1


def follow(job: jobs.Job, activity: Activity, again: str) -> str:
    """Take a merge to its end, or to its save if it is cancelled; returns the last word.

    Raises:
        JobFailed: how it ended otherwise.
    """
    view = activity.view = activity.view or View()
    while job.last is None:
        event = job.poll(0.2)
        if event is not None:
            view.take(event)
            activity.version += 1
        if activity.cancelled.is_set():
            view.doing, view.training = "saves what was learnt, then stops", False
            told = view.cancel(job, again)
            if job.last is None or job.last.kind == "stopped":
                return told
    require_done(job, again)
    return f"Done: {os.path.basename(str(job.last.about['out']))}."
