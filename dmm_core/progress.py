"""How far a command is: tqdm's bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import Any, TextIO


class Quiet:
    """A stream that may lose its reader, as ``| tee log`` does at Ctrl-C: silent from then on, and the work goes on.

    None, which is what Python has for a closed stream, is silent from the start.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def _try(self, what: str, *arguments: Any) -> None:
        if self._stream is None:
            return
        try:
            getattr(self._stream, what)(*arguments)
        except OSError:
            hush(self._stream)
            self._stream = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def hush(stream: Any) -> None:
    """Send a broken stream's rest nowhere: else Python fails to flush it at the end, and the exit code is lost."""
    with suppress(OSError, ValueError, AttributeError):
        number, nowhere = stream.fileno(), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


class Progress:
    """Counts up to ``total`` on ``stream`` (stderr), with rate and time left.

    Args:
        total: how many there are; 0 or None if that is not known.
        label: what is being done, in a few words.
        every: seconds between two lines where the stream is no terminal (the last one always comes).
    """

    def __init__(self, total: int | None, label: str, stream: TextIO | None = None, every: float = 10.0) -> None:
        self.total, self.label, self.every = total or None, label, every
        self.stream: Any = Quiet(stream if stream is not None else sys.stderr)
        self.done = 0
        self.figures: dict[str, Any] = {}
        self.began = self.told = time.monotonic()
        self.first: int | None = None  # what was done before this sitting does not count for the rate
        self.bar = self._bar()

    def _bar(self) -> Any:
        if not self.stream.isatty():
            return None
        try:
            from tqdm import tqdm
        except ImportError:  # not there in every host; lines do
            return None
        return tqdm(total=self.total, desc=self.label, file=self.stream, dynamic_ncols=True, leave=True)

    def update(self, n: int = 1, **figures: Any) -> None:
        """``n`` more are done; ``figures`` are shown beside, e.g. ``loss=0.02``."""
        self.to(self.done + n, **figures)

    def to(self, done: int, **figures: Any) -> None:
        """``done`` are done in all."""
        if self.first is None:
            self.first = max(0, done - 1) if done > 1 else 0
        step, self.done = done - self.done, done
        self.figures.update(figures)
        if self.bar is not None:
            if self.figures:
                self.bar.set_postfix({k: _short(v) for k, v in self.figures.items()}, refresh=False)
            self.bar.update(step)
        elif time.monotonic() - self.told >= self.every:
            self._line()

    def _line(self) -> None:
        now = time.monotonic()
        self.told = now
        rate = (self.done - (self.first or 0)) / max(now - self.began, 1e-9)
        parts = [f"{self.label}: {self.done}" + (f"/{self.total}" if self.total else "")]
        parts += [f"{rate:.3g}/s"] if rate else []
        if self.total and rate and self.done < self.total:
            parts.append(f"{duration((self.total - self.done) / rate)} left")
        elif self.done:
            parts.append(f"took {duration(now - self.began)}")
        parts += [f"{key} {_short(value)}" for key, value in self.figures.items()]
        print(", ".join(parts), file=self.stream, flush=True)

    def close(self) -> None:
        """The last word; called by ``with`` also when something broke."""
        if self.bar is not None:
            self.bar.close()
        elif self.done:
            self._line()
        self.done = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def duration(seconds: float) -> str:
    """``42 s``, ``7 min``, ``3 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
