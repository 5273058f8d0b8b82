"""Which Python trains: hosts have torch but not the rest, and nothing may be added to them."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmm_core.errors import BadInput

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = "DMM_TRAIN_PYTHON"


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
    found = _script(script).train_environment()
    if found is None:
        raise NotInstalled("what training needs is not installed", hint=f"Run: {sys.executable} {script} --train")
    python, paths = found
    return Training(python, tuple(paths))


def install(say: Callable[[str], None], stop: Callable[[], bool] = lambda: False) -> Training:
    """Run ``install.py --train`` with this Python; ``say`` gets its lines. Nothing of this Python is changed.

    Args:
        stop: asked now and then; true ends the installation, which starts anew the next time.

    Raises:
        BadInput: what the script said last, or that it was stopped.
    """
    command = [sys.executable, str(ROOT / "install.py"), "--train"]
    apart: dict[str, Any] = {"start_new_session": True}  # a group of its own, to be ended together with its pip
    if sys.platform == "win32":
        apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
        errors="replace", env={**os.environ, "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}, **apart,
    )  # fmt: skip
    lines: list[str] = []
    threading.Thread(target=_tell, args=(process.stdout, lines, say), daemon=True).start()
    while process.poll() is None:
        if stop():
            _end_group(process)
            break
        time.sleep(0.2)
    if process.wait() != 0:
        raise BadInput(f"what training needs could not be installed: {lines[-1] if lines else 'no reason was given'}")
    return training_python()


def _tell(stream: Any, lines: list[str], say: Callable[[str], None]) -> None:
    for line in stream:
        if line.strip():
            lines.append(re.sub(r"^install\.py: ", "", line.strip()))
            say(lines[-1])


def _end_group(process: subprocess.Popen[str]) -> None:
    if sys.platform == "win32":
        process.send_signal(signal.CTRL_BREAK_EVENT)
    else:
        os.killpg(process.pid, signal.SIGTERM)


def _script(path: Path) -> Any:
    """install.py as a module; it needs the standard library alone and does nothing when it is imported."""
    spec = importlib.util.spec_from_file_location("dmm_install", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["dmm_install"] = module
    spec.loader.exec_module(module)
    return module
