"""A ``dmm`` command as a child in the environment for training: its answer as data, its notes line by line."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

from dmm_core.environment import Training, apart, end_group
from dmm_core.errors import BadInput
from dmm_core.jobs import clean_environment, command

Say = Callable[[str], None]


class Stopped(Exception):
    """It was cancelled."""


def run(training: Training, arguments: list[str], say: Say, stop: Callable[[], bool]) -> dict[str, Any]:
    """What the command prints with ``--json``; ``say`` gets its progress.

    Args:
        stop: asked now and then; true ends the command and what it has started.

    Raises:
        BadInput: the command's own line, or how it broke off.
        Stopped: ``stop`` said so.
    """
    try:
        process = subprocess.Popen(
            command(training, *arguments, "--json"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, encoding="utf-8", errors="replace", env=clean_environment(), **apart(),
        )  # fmt: skip
    except OSError as error:
        raise BadInput(f"cannot be started ({error.strerror})", training.python) from error
    answer: list[str] = []
    lines: list[str] = []

    def note(line: str) -> None:
        lines.append(line)
        say(line)

    takes = ((process.stdout, answer.append), (process.stderr, note))
    readers = [threading.Thread(target=_read, args=both, daemon=True) for both in takes]
    for reader in readers:
        reader.start()
    while process.poll() is None:
        if stop():
            end_group(process)
            process.wait()
            raise Stopped
        time.sleep(0.1)
    for reader in readers:
        reader.join(10)
    return _answer(process.returncode, "\n".join(answer), lines)


def _read(stream: Any, take: Say) -> None:
    for line in stream:
        if line.strip():
            take(line.strip())


def _answer(code: int, answer: str, lines: list[str]) -> dict[str, Any]:
    if code == 0:
        try:
            return dict(json.loads(answer))
        except ValueError:
            raise BadInput("the command gave no answer that can be read") from None
    said = next((line for line in reversed(lines) if line), f"exit code {code}")
    if code == 2:
        raise BadInput(re.sub(r"^dmm( \w+)?: ", "", said))
    raise BadInput(f"the command broke off: {said[:300]}")
