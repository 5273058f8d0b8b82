"""What makes work faster and changes nothing but rounding: memory layout, compilation, no waiting for copies, cores."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dmm_core.layers import fuse

Item = TypeVar("Item")
Made = TypeVar("Made")
REPEATED = ("BasicTransformerBlock", "ResnetBlock2D")  # diffusers' blocks that make up nearly all of a UNet
ALIGNED = 256  # bytes; where torch's allocator would put a tensor
VARIANTS = 64  # shapes, types and gradient modes that one block's code may be compiled for


def to_device(tensors: Iterable[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of the CPU on the device; for CUDA through pinned memory, without waiting for the copy.

    All in one copy: each would wait in turn for a piece of the teacher that is on its way.
    """
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    return packed(list(tensors), lambda host: host.pin_memory().to(device, non_blocking=True))


def packed(tensors: Sequence[Tensor], carry: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Tensors side by side in one of bytes, which is carried, and taken apart again."""
    rooms = [-(-tensor.numel() * tensor.element_size() // ALIGNED) * ALIGNED for tensor in tensors]
    host = torch.empty(sum(rooms), dtype=torch.uint8)
    for tensor, part in zip(tensors, host.split(rooms), strict=True):
        _values(part, tensor).copy_(tensor)
    return [_values(part, tensor) for tensor, part in zip(tensors, carry(host).split(rooms), strict=True)]


def _values(part: Tensor, like: Tensor) -> Tensor:
    """Bytes as the tensor that they are, or are to be."""
    return part[: like.numel() * like.element_size()].view(like.dtype).view(like.shape)


def wants_channels_last(wanted: bool | None, device: torch.device) -> bool:
    """The recipe's wish; without one, channels last on CUDA, for its tensor cores, and as they come elsewhere."""
    return device.type == "cuda" if wanted is None else wanted


def has_bf16(device: str) -> bool:
    """Whether a CUDA device computes in bfloat16 itself: NVIDIA's from sm_80 on.

    ``torch.cuda.is_bf16_supported`` counts emulation too, which is slow, and for which cuDNN has no convolutions.
    """
    if torch.version.hip:
        return torch.cuda.is_bf16_supported()
    return torch.cuda.get_device_capability(torch.device(device)) >= (8, 0)


def quicken(unet: Any, channels_last: bool, compiled: bool, backend: str = "inductor") -> Any:
    """Lay out and compile a UNet, in place. Its parameters keep their names, and may be overwritten afterwards.

    Blocks are compiled one by one (regional): equal ones share the work, so that it takes a minute and not ten.
    """
    if channels_last:
        unet.to(memory_format=torch.channels_last)
    if compiled:
        import torch._dynamo.config as dynamo

        keep_compiled_code()
        limit = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"  # its name before 2.6
        setattr(dynamo, limit, max(VARIANTS, getattr(dynamo, limit)))
        for module in unet.modules():
            if type(module).__name__ in REPEATED:
                module.compile(backend=backend, dynamic=False)
    elif channels_last:
        fuse(unet)
    return unet


def keep_compiled_code() -> None:
    """Let compiled code outlive this process, so that a resume does not compile again."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dmm" / "inductor"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir()) / "dmm-inductor"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def side_by_side(work: Callable[[Item], Made], items: Sequence[Item], device: torch.device) -> Iterator[Made]:
    """``work`` of every item, in their order; on a CPU its cores take items of their own, without gradients.

    Small layers leave the threads of one operation waiting for each other: two samplings of one thread each end sooner
    than one after the other of two threads. Where there are fewer items than cores, each gets several.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(items)) if device.type == "cpu" else 1
    if workers < 2:
        yield from map(torch.no_grad()(work), items)
        return
    each = threads // workers
    with ThreadPoolExecutor(workers, "dmm", torch.set_num_threads, (each,)) as pool:
        try:
            yield from pool.map(torch.no_grad()(work), items)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)


def has_room_twice(device: torch.device) -> bool:
    """Whether what this process holds of a CUDA device's memory after a step is less than half of what it can have."""
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device)
    return held < (free + held) / 2


class Recorded:
    """A function of tensors that records its kernels for each shape of them, and replays them (CUDA graphs).

    A UNet of few rows launches hundreds of short kernels: from Python that takes longer than running them. The function
    gives a list of tensors, reads no number off them, and finds its weights where they were (their values may change).

    Args:
        pool: memory that may be shared with other recordings (``torch.cuda.graph_pool_handle``): what a call gives is
            copied out of it at once, so that the next recording's replay may overwrite it.
        warm: calls before a recording, in which libraries choose their kernels and compiled blocks are compiled. None:
            the function may not be called for nothing (it adds to gradients); a shape's first call is not recorded.
    """

    WARM = 2

    def __init__(self, function: Callable[..., list[Tensor]], pool: Any, warm: int | None = WARM) -> None:
        self.function, self.pool, self.warm = function, pool, warm
        self.recordings: dict[Any, tuple[Any, list[Tensor], list[Tensor]]] = {}
        self._called: set[Any] = set()

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        key = tuple((x.shape, x.dtype) for x in inputs)
        if self.warm is None and key not in self._called:
            self._called.add(key)
            return self.function(*inputs)
        if key not in self.recordings:
            self.recordings[key] = self._record([x.clone() for x in inputs])
        graph, places, outputs = self.recordings[key]
        for place, x in zip(places, inputs, strict=True):
            place.copy_(x)
        graph.replay()
        return [output.clone() for output in outputs]

    def _record(self, places: list[Tensor]) -> tuple[Any, list[Tensor], list[Tensor]]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.warm or 0):
                self.function(*places)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            outputs = self.function(*places)
        return graph, places, outputs
