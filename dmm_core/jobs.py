"""A distillation as a child process, for hosts: start, follow, stop, resume. Needs the standard library alone.

    job = jobs.start(recipe)              # or resumes what a stop, a crash or a power cut left
    for event in job.events():            # started, stage, progress, preview, warning, saved, done | stopped
        ...                               # job.stop() from anywhere: it saves, and the loop ends with "stopped"

The child has its own environment (``training_python``). Whatever becomes of it, the host sees an event or a JobFailed.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmm_core import inputs
from dmm_core.environment import Training, training_python
from dmm_core.errors import BadInput
from dmm_core.files import write_atomically
from dmm_core.recipe import FREE, DataSpec, Recipe, TrainSpec, work_folder
from dmm_core.schema import plain
from dmm_core.stages import clear_work, something_made

LAST = ("done", "stopped", "failed")
DATA, TRAIN = plain(DataSpec()), plain(TrainSpec())  # the defaults
LAUNCH = "import sys; sys.path[:0] = {paths}; sys.argv[0] = 'dmm'; from dmm_core.cli import main; sys.exit(main())"


class JobFailed(BadInput):
    """The one line that a host shows."""


@dataclass(frozen=True)
class Event:
    """What the child tells; ``about`` has the fields of ``dmm_core/child.py``, ``picture`` a preview's JPEG."""

    kind: str
    about: Mapping[str, Any] = field(default_factory=dict)
    picture: bytes | None = None


class Job:
    """A running merge. ``stop`` and ``poll`` may be called from any thread."""

    def __init__(self, work: Path, process: subprocess.Popen[bytes]) -> None:
        self.work, self.process = work, process
        self.last: Event | None = None  # the one that ended it
        self._events: queue.Queue[Event] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True, name="dmm job")
        self._reader.start()

    def poll(self, seconds: float) -> Event | None:
        """The next event, or None where there was none in this time."""
        try:
            event = self._events.get(timeout=seconds)
        except queue.Empty:
            return None
        if event.kind in LAST:
            self.last = event
        return event

    def events(self) -> Iterator[Event]:
        """Everything up to "done" or "stopped".

        Raises:
            JobFailed: what ended it otherwise.
        """
        while self.last is None:
            event = self.poll(1.0)
            if event is not None:
                self.require_success()
                yield event

    def require_success(self) -> None:
        """Raises JobFailed if the job has failed."""
        if self.last is not None and self.last.kind == "failed":
            raise JobFailed(self.last.about["line"])

    def stop(self) -> None:
        """Ask it to save and leave; "stopped" follows, or "done" if it was as good as ready."""
        self.work.mkdir(parents=True, exist_ok=True)
        (self.work / "stop").touch()

    def finish(self, seconds: float) -> bool:
        """Stop, and wait up to ``seconds`` for the end; then end it by force. Whether it ended by itself."""
        self.stop()
        until = time.monotonic() + seconds
        while self.last is None and time.monotonic() < until:
            self.poll(min(0.5, seconds))
        by_itself = self.last is not None
        if not by_itself:
            self.process.kill()
        self.process.wait()
        self._reader.join(10)
        return by_itself

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.last is None:
            self.finish(60)

    # ------------------------------------------------------------ the reader's thread

    def _read(self) -> None:
        ended = False
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = _event(line)
            if event is not None and not ended:
                ended = event.kind in LAST
                if ended:
                    self._leave(event)
                self._events.put(event)
        code = self.process.wait()
        if not ended:
            self._events.put(Event("failed", {"line": _crash(code, self.work)}))

    def _leave(self, event: Event) -> None:
        """Its last word said, the child ends; only then are device and files free for the next one."""
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:  # a driver that hangs
            self.process.kill()
            self.process.wait()
        if event.kind == "done":  # on Windows the child could not remove its own log
            clear_work(self.work)


def start(
    recipe: Recipe, replace: bool = False, preview_seconds: float = 60.0, training: Training | None = None
) -> Job:
    """Begin a merge, or take up an unfinished one of the same recipe.

    Args:
        replace: throw away an unfinished merge with other settings, and overwrite the output.
        training: the child's environment; ``training_python()`` if it is left out.

    Raises:
        BadInput: an unfinished merge of other settings lies there, somebody is at it, or there is no environment to
            train in.
    """
    training = training or training_python()
    work = work_folder(recipe)
    _require_free(recipe)
    if replace and (inputs.changed(recipe) or not same_merge(recipe, work)):
        clear_work(work)
    elif not same_merge(recipe, work):
        raise BadInput(
            "an unfinished merge with other settings lies here",
            work,
            "With its own settings it is taken up. Or take another name, or replace it, and what it learnt is lost.",
        )
    inputs.require_same(recipe)
    work.mkdir(parents=True, exist_ok=True)
    write_atomically(work / "job.json", json.dumps(recipe.to_dict(), indent=1).encode())
    (work / "stop").unlink(missing_ok=True)
    told = ["distill", str(work / "job.json"), "--events", "--preview", f"{preview_seconds:g}"]
    return Job(work, _spawn(command(training, *told, *(["--force"] if replace else [])), work / "log.txt"))


def command(training: Training, *arguments: str) -> list[str]:
    """``dmm ARGUMENTS`` in the environment for training, with this very code."""
    root = Path(__file__).resolve().parents[1]
    code = LAUNCH.format(paths=ascii([*map(str, training.paths), str(root)]))
    return [str(training.python), "-X", "utf8", "-c", code, *arguments]


def clean_environment() -> dict[str, str]:
    """The host's, without what would lead the child to the host's packages."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return kept | {"PYTHONUNBUFFERED": "1", "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000")}


def _spawn(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """The child, out of reach of a Ctrl-C in the host's console: the host stops it in order."""
    apart: dict[str, Any] = {"start_new_session": True}
    if sys.platform == "win32":
        apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
    try:
        with log.open("wb") as file:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=file, env=clean_environment(), **apart
            )
    except OSError as error:
        raise JobFailed(f"cannot be started ({error.strerror})", command[0]) from error


# ---------------------------------------------------------------- an unfinished merge


def same_merge(recipe: Recipe, work: Path) -> bool:
    """Whether what lies in the work folder, if anything, was begun with this recipe."""
    if not something_made(work):
        return True
    before = begun(work)
    return before is not None and essence(before) == essence(json.loads(json.dumps(recipe.to_dict())))


def begun(work: Path) -> dict[str, Any] | None:
    """The recipe that the work in a folder was begun with, as a plain mapping; None where none can be read."""
    try:
        found = json.loads((work / "job.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def essence(recipe: Mapping[str, Any], free: Collection[str] = FREE) -> dict[str, Any]:
    """What decides the result of a merge, of a recipe as a plain mapping: all but the ``free`` keys of train.

    A recipe of an earlier version has the defaults of settings that there were none of then.
    """
    kept = {key: recipe.get(key) for key in ("teachers", "base", "student", "default_style")}

    def of(part: Mapping[str, Any]) -> dict[str, Any]:
        train = TRAIN | (part.get("train") or {})
        bare = {key: value for key, value in train.items() if key not in free}
        return {**part, "data": DATA | (part.get("data") or {}), "train": bare}

    parts = {key: recipe.get(key) for key in ("data", "train")}
    return {**kept, **of(parts), "stages": [of(stage) for stage in recipe.get("stages") or ()]}


def _require_free(recipe: Recipe) -> None:
    """Raises JobFailed while another process works on this output."""
    from dmm_core.child import output_name
    from dmm_core.locks import Busy, Lock

    try:
        with Lock(output_name(recipe), "looks"):
            pass
    except Busy as busy:
        raise JobFailed(f"is being made ({busy})", recipe.out, "Stop that merge first.") from None


# ---------------------------------------------------------------- what the child said


def _event(line: bytes) -> Event | None:
    """An event, with a preview's bytes: its file may soon be gone. None for anything else."""
    try:
        about = json.loads(line)
        kind = about.pop("kind")
        picture = Path(about["path"]).read_bytes() if kind == "preview" else None
    except (ValueError, KeyError, AttributeError, OSError):
        return None
    return Event(kind, about, picture)


def _crash(code: int, work: Path) -> str:
    """One line about a child that ended without a word."""
    how = f"exit code {code}"
    if code < 0:
        try:
            how = signal.Signals(-code).name
        except ValueError:
            how = f"signal {-code}"
    try:
        lines = (work / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    said = next((line.strip() for line in reversed(lines) if line.strip()), "")
    again = " Starting it again goes on from its last save." if any(work.glob("st*.safetensors")) else ""
    return f"the merge's process broke off ({how})" + (f", last words: {said[:300]}." if said else ".") + again
