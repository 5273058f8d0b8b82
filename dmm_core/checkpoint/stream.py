"""Values of several files read side by side, piece by piece, the next piece while the present one is worked on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

import torch
from torch import Tensor

from dmm_core.checkpoint.errors import TruncatedFile
from dmm_core.checkpoint.parts import Source
from dmm_core.checkpoint.reader import TensorInfo

AHEAD = 2  # pieces that are read while one is worked on
Label = TypeVar("Label")


@dataclass(frozen=True)
class Span:
    """``count`` values that lie together in a file, from byte ``offset`` on."""

    path: Path
    dtype: torch.dtype
    offset: int
    count: int

    @classmethod
    def of(cls, info: TensorInfo, source: Source) -> Span:
        """Where a model's tensor lies: all of a stored one, or a third of three that are stacked."""
        count = info.count if source.row is None else info.count // 3
        return cls(info.path, info.dtype, info.offset + (source.row or 0) * count * info.dtype.itemsize, count)

    def pieces(self, most: int) -> list[Span]:
        """Spans of at most so many values, one after the other."""
        return [
            Span(self.path, self.dtype, self.offset + i * self.dtype.itemsize, min(most, self.count - i))
            for i in range(0, self.count, most)
        ]


@dataclass(frozen=True)
class Job(Generic[Label]):
    """Spans to read at one time, and what the one who asked wants to know them by."""

    label: Label
    spans: Sequence[Span]


def read_ahead(jobs: Iterable[Job[Label]]) -> Iterator[tuple[Label, list[Tensor]]]:
    """Each job's spans as flat tensors, in order, read by a thread of its own.

    The tensors lie in buffers that are used again: they are good until the next item is asked for.

    Raises:
        TruncatedFile: a file that has become shorter.
    """
    waiting: deque[tuple[Label, Future[list[Tensor]]]] = deque()
    buffers: list[list[bytearray]] = [[] for _ in range(AHEAD + 1)]
    with ExitStack() as files, ThreadPoolExecutor(1, "read") as pool:
        opened: dict[Path, BinaryIO] = {}

        def read(spans: Sequence[Span], slot: list[bytearray]) -> list[Tensor]:
            for path in {span.path for span in spans} - opened.keys():
                opened[path] = files.enter_context(path.open("rb", buffering=0))
            slot.extend(bytearray() for _ in range(len(spans) - len(slot)))
            return [_read(opened[span.path], span, slot, i) for i, span in enumerate(spans)]

        for number, job in enumerate(jobs):
            waiting.append((job.label, pool.submit(read, job.spans, buffers[number % len(buffers)])))
            if len(waiting) > AHEAD:
                label, ready = waiting.popleft()
                yield label, ready.result()
        for label, ready in waiting:
            yield label, ready.result()


def _read(file: BinaryIO, span: Span, slot: list[bytearray], index: int) -> Tensor:
    size = span.count * span.dtype.itemsize
    if not size:
        return torch.empty(0, dtype=span.dtype)
    if len(slot[index]) < size:
        slot[index] = bytearray(size)
    view = memoryview(slot[index])[:size]
    file.seek(span.offset)
    done = 0
    while done < size:  # Linux reads at most 2 GiB at once
        got = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not got:
            raise TruncatedFile(span.path, span.offset + size, span.offset + done)
        done += got
    return torch.frombuffer(slot[index], dtype=span.dtype, count=span.count)
