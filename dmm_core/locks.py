"""Locks between processes that outlive no crash: the system drops them with the process, however it ends.

A lock is a file whose bytes the system has lent to one process (``flock``, on Windows ``LockFile``), so none is ever
left behind by a dead owner and no process number can be mistaken for another. What the file says is for messages alone.
"""

from __future__ import annotations

import getpass
import os
import tempfile
from pathlib import Path
from types import TracebackType

FAR = 1 << 30  # the byte that Windows locks: beyond the text, which others must be able to read


def lock_folder() -> Path:
    """One for each user of the machine; DMM_LOCKS names another."""
    if given := os.environ.get("DMM_LOCKS"):
        return Path(given)
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container whose user has no name
        user = str(os.getuid()) if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"dmm-locks-{user}"


class Busy(Exception):
    """Another process has the lock; ``str`` is what it says of itself."""


class Lock:
    """Held from ``with`` to its end, or to the end of the process.

    Args:
        name: of what is held, e.g. "cuda-0".
        note: what others are told who want it too.
    """

    def __init__(self, name: str, note: str = "") -> None:
        self.path = lock_folder() / f"{name}.lock"
        self.note = note
        self._file: int | None = None

    def __enter__(self) -> Lock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            _take(file)
        except OSError:
            os.close(file)
            raise Busy(self.path.read_text(encoding="utf-8", errors="replace").strip()) from None
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()}, {self.note}\n".encode())
        self._file = file
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            os.close(self._file)  # drops the lock; the file stays, since removing it would race with the next owner
            self._file = None


if os.name == "nt":
    import msvcrt

    def _take(file: int) -> None:
        os.lseek(file, FAR, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        os.lseek(file, 0, os.SEEK_SET)

else:
    import fcntl

    def _take(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
