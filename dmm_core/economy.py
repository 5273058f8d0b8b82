"""Out of memory in mid-run: what is given up, in which order. The samples of the step stay the same."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dmm_core.errors import BadInput
from dmm_core.speed import side_by_side

STREAMS = ("cuda",)  # kinds of device with memory of their own, over which a teacher's blocks may pass
ENOUGH_ROWS = 4  # below this a GPU has too little to do: recomputing activations costs less than smaller passes
SIGNS = ("out of memory", "can't allocate memory", "_alloc_failed", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was what an operation lacked: CUDA and ROCm, MPS, the CPU's allocator, cuDNN and cuBLAS."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


class MemoryTooSmall(BadInput):
    """Memory does not suffice even for the least that can be done at a time."""


def let_go(device: torch.device) -> None:
    """Give memory of what nobody holds any more back to the device; optimizers and their weights hold each other."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


class Rows:
    """Work on many rows, in chunks that are halved whenever memory runs out. Each row gets what it would have got.

    Args:
        doing, hint: what is done with one row, and what helps where memory does not suffice even for that.
        most: rows together, once memory has run out; None until then.
    """

    def __init__(self, device: torch.device, doing: str, hint: str = "", most: int | None = None) -> None:
        self.device, self.doing, self.hint, self.most = device, doing, hint, most

    def of(self, work: Callable[[Any], Tensor], chunks: Sequence[Any]) -> Iterator[Tensor]:
        """``work`` of every chunk, ``side_by_side``. A chunk (range, tensor) has a length and is cut by slices.

        Raises:
            MemoryTooSmall: memory runs out at one row.
        """
        return side_by_side(partial(self._in_pieces, work), chunks, self.device)

    def _in_pieces(self, work: Callable[[Any], Tensor], chunk: Any) -> Tensor:
        made: list[Tensor] = []
        first = 0
        while first < len(chunk):
            piece = chunk[first : first + (self.most or len(chunk))]
            try:
                made.append(work(piece))
                first += len(piece)
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            if len(piece) == 1:
                hint = f"Close other programs that use it. {self.hint}".strip()
                raise MemoryTooSmall(f"the device's memory is too small to {self.doing}", hint=hint)
            self.most = min(len(piece) // 2, self.most or len(piece))
            let_go(self.device)  # here, where the error no longer holds what was computed
        return made[0] if len(made) == 1 else torch.cat(made)


@dataclass
class Economy:
    """How sparingly the steps are made.

    Args:
        rows: how many rows pass the student together.
        checkpointing: activations are computed again in the backward pass.
        resident: teachers on the device.
        splits: whether ``rows`` may be made fewer (not where the backward pass takes the optimizer's step).
        least: teachers on the device at least; 0 where their blocks may pass over it.
        steps_down: how often something was given up.
    """

    rows: int
    checkpointing: bool
    resident: int
    splits: bool = True
    least: int = 1
    steps_down: int = 0

    def give_up_something(self) -> str:
        """Become more sparing; returns what changed.

        Raises:
            MemoryTooSmall: there is nothing left to give up.
        """
        before = self.rows, self.checkpointing, self.resident
        if self.splits and self.rows > ENOUGH_ROWS:
            self.rows = max(ENOUGH_ROWS, self.rows // 2)
        elif not self.checkpointing:
            self.checkpointing = True
        elif self.resident > 1:
            self.resident = self.resident // 2
        elif self.splits and self.rows > 1:
            self.rows = self.rows // 2
        elif self.resident > self.least:
            self.resident = self.least
        else:
            raise MemoryTooSmall(
                "the device's memory is too small for this training, even one row at a time",
                hint="Use train.student: lora, train.weights: bf16, or a smaller data.size.",
            )
        self.steps_down += 1
        now = self.rows, self.checkpointing, self.resident
        kept = f"{now[2]} teachers on the device" if now[2] else "one block of a teacher on the device after the other"
        told = (f"{now[0]} rows at a time", "gradient checkpointing", kept)
        changed = next(text for text, a, b in zip(told, before, now, strict=True) if a != b)
        return f"memory ran out: going on with {changed}, on the same samples"
