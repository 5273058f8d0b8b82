"""Which Python trains: hosts have torch but not the rest, and nothing may be added to them."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dmm_core.errors import BadInput

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = "DMM_TRAIN_PYTHON"
# What those libraries load where it is there, and nothing here asks for. scipy takes a second or more. Beside a peft
# below 0.17 diffusers does not start: Forge has 0.13, ComfyUI what its node packs have brought.
UNUSED = ("peft", "scipy")


@dataclass(frozen=True)
class Training:
    """A Python with everything that training needs, once ``paths`` are put before its own."""

    python: Path
    paths: tuple[Path, ...] = ()


class NotInstalled(BadInput):
    """The environment for training is yet to be made."""


def training_python() -> Training:
    """DMM_TRAIN_PYTHON; else what ``install.py --train`` made for this Python; without an install.py, this Python.

    Raises:
        NotInstalled: it is not there, or was made for another Python or torch.
        BadInput: DMM_TRAIN_PYTHON is no file.
    """
    if given := os.environ.get(VARIABLE):
        if not Path(given).is_file():
            raise BadInput(f"{VARIABLE} names a file that is not there", given)
        return Training(Path(given))
    script = ROOT / "install.py"
    if not script.is_file():  # installed as a package, with the train extra beside it
        return Training(Path(sys.executable))
    # asked in a process of its own: this one's sys.path may be longer than what install.py saw when it ran
    command = [sys.executable, "-X", "utf8", str(script), "--train", "--where"]
    told = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8")
    if told.returncode != 0:
        raise NotInstalled("what training needs is not installed", hint=f"Run: {sys.executable} {script} --train")
    found = json.loads(told.stdout)
    return Training(Path(found["python"]), tuple(map(Path, found["paths"])))


_IMPORTS = threading.RLock()


@cache
def _came_before() -> bool:
    """Whether diffusers was there when the first of ours wanted it."""
    return "diffusers" in sys.modules


@contextmanager
def importing() -> Iterator[None]:
    """Around imports of diffusers and transformers: they do not find ``UNUSED``, and no garbage is collected.

    Seen with torch 2.13 and diffusers 0.39: 5.7 in place of 7.8 seconds of CPU, which every child process pays. Where
    others have imported diffusers before, it has seen them there and counts on it: then nothing is hidden. What else is
    loaded on the way (scikit-learn by transformers, where it is there) imports them as ever.
    """
    hidden = () if _came_before() else UNUSED
    with _IMPORTS:  # two threads would each restore what the other has put there
        find, collects = importlib.util.find_spec, gc.isenabled()

        def find_used(name: str, package: str | None = None) -> Any:
            return None if name in hidden else find(name, package)

        importlib.util.find_spec = find_used
        gc.disable()
        try:
            yield
        finally:
            importlib.util.find_spec = find
            if collects:
                gc.enable()


def own_python() -> Training:
    """This Python where it can train itself, as in what ``install.py --demo`` made; else as ``training_python``."""
    if not os.environ.get(VARIABLE) and all(map(importlib.util.find_spec, ("torch", "diffusers", "transformers"))):
        return Training(Path(sys.executable))
    return training_python()


def install(say: Callable[[str], None], stop: Callable[[], bool] = lambda: False) -> Training:
    """Run ``install.py --train`` with this Python; ``say`` gets its lines. Nothing of this Python is changed.

    Args:
        stop: asked now and then; true ends the installation, which starts anew the next time.

    Raises:
        BadInput: what the script said last, or that it was stopped.
    """
    command = [sys.executable, str(ROOT / "install.py"), "--train"]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
        errors="replace", env={**os.environ, "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}, **apart(),
    )  # fmt: skip
    lines: list[str] = []
    reader = threading.Thread(target=_tell, args=(process.stdout, lines, say), daemon=True)
    reader.start()
    while process.poll() is None:
        if stop():
            end_group(process)
            break
        time.sleep(0.2)
    process.wait()
    reader.join(10)
    if process.returncode != 0:
        raise BadInput(f"what training needs could not be installed: {lines[-1] if lines else 'no reason was given'}")
    return training_python()


def _tell(stream: Any, lines: list[str], say: Callable[[str], None]) -> None:
    for line in stream:
        if line.strip():
            lines.append(re.sub(r"^install\.py: ", "", line.strip()))
            say(lines[-1])


def apart() -> dict[str, Any]:
    """Popen's options for a group of its own, to be ended together with what it starts."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}


def end_group(process: subprocess.Popen[Any]) -> None:
    if sys.platform == "win32":
        process.send_signal(signal.CTRL_BREAK_EVENT)
    else:
        os.killpg(process.pid, signal.SIGTERM)
