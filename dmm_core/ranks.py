"""Several processes that share each optimizer step: every one asks its part of the teachers, gradients are added up.

Either this process starts the others (``companions``, for the cores of a CPU), or torchrun or accelerate launch has
started all of them (``launched``, for several GPUs): any number, for any number of teachers. All draw all samples from
one random state, so the sum is what a single process would have, to rounding.
On a CPU two processes of one thread each are faster than one of two threads: small layers leave threads waiting.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dmm_core.recipe import Recipe

Item = TypeVar("Item")
PATIENCE = timedelta(minutes=10)  # for another process's step
LONG = timedelta(hours=12)  # while the first process makes the data
BUCKET = 1 << 24  # numbers that are added up at once


class Alone:
    """One process that does everything."""

    rank, world = 0, 1

    def mine(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of a step's work."""
        return items[self.rank :: self.world]

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Put the sum over all processes into every gradient."""

    def add(self, tally: Tensor) -> Tensor:
        """The sum over all processes."""
        return tally

    def any(self, here: bool, device: torch.device) -> bool:
        """Whether it is so in any of the processes."""
        return here

    def stops(self, asked: bool, device: torch.device) -> bool:
        """Whether this step is the last one."""
        return asked

    def wait(self) -> None:
        """Go on when all processes are here."""


class Together(Alone):
    """A member of an initialised ``torch.distributed`` group."""

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        for bucket in _buckets(list(parameters)):
            # a process for which no teacher was left has no gradients
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).float().flatten() for p in bucket])
            dist.all_reduce(flat)
            for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                if p.grad is None:
                    p.grad = torch.empty_like(p)
                p.grad.copy_(part.view_as(p))  # in its place, to which recorded kernels write

    def add(self, tally: Tensor) -> Tensor:
        dist.all_reduce(tally)
        return tally

    def any(self, here: bool, device: torch.device) -> bool:
        flag = torch.tensor(int(here), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)


class Launched(Together):
    """A member of a group of equals, which stop at the same step."""

    def stops(self, asked: bool, device: torch.device) -> bool:
        return self.any(asked, device)

    def wait(self) -> None:
        dist.barrier()


def _buckets(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters in groups of about ``BUCKET`` numbers, so that the sums need little memory of their own."""
    bucket, size = [], 0
    for p in parameters:
        bucket.append(p)
        size += p.numel()
        if size >= BUCKET:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


@contextmanager
def launched() -> Iterator[Alone]:
    """Join the group that torchrun or accelerate launch announces in the environment; alone where there is none.

    Every process takes the GPU of its number on this machine.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        yield Alone()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, timeout=LONG)
    try:
        yield Launched()
    finally:
        dist.destroy_process_group()


@contextmanager
def companions(recipe: Recipe, count: int) -> Iterator[Alone]:
    """``count`` processes in all, this one among them; the others take the recipe's state up where it is saved.

    They end with the block. One thread a process while it is entered.
    """
    if count < 2:
        yield Alone()
        return
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="dmm-", ignore_cleanup_errors=True) as folder:
        meeting = str(Path(folder) / "meeting")
        context = multiprocessing.get_context("spawn")
        others = [
            context.Process(target=_companion, args=(recipe, meeting, rank, count), daemon=True)
            for rank in range(1, count)
        ]
        for process in others:
            process.start()
        try:
            torch.set_num_threads(1)
            _meet(meeting, 0, count)
            yield Together()
        finally:
            for process in others:
                process.terminate()
            for process in others:
                process.join()
            if dist.is_initialized():
                dist.destroy_process_group()
            torch.set_num_threads(threads)


def _meet(meeting: str, rank: int, count: int) -> None:
    store = dist.FileStore(meeting, count)  # torch reads a file's URL as it stands, with %20 for a space
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=PATIENCE)


def _companion(recipe: Recipe, meeting: str, rank: int, count: int) -> None:
    """What another process does: the same steps, of which it saves and tells nothing."""
    from dmm_core.run import prepare
    from dmm_core.stages import unfinished

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process saves, then ends the others
    torch.set_num_threads(1)
    distillation = prepare(recipe, resume=unfinished(recipe)).distillation
    _meet(meeting, rank, count)
    for _ in distillation.run(Together()):
        pass
