"""Where teachers' weights are while they do not work: in the host's memory, equal tensors once; and how they come over.

A module on the device is built once. Its weights are overwritten in place when another teacher's turn comes, on CUDA by
copies on a side stream that the computation does not wait for.
"""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmm_core.blockwise import LayerCalls
from dmm_core.checkpoint import Checkpoint
from dmm_core.checkpoint.reader import TensorInfo
from dmm_core.conditioning import Context, predict
from dmm_core.losses import BlockFeatures
from dmm_core.memory import available_ram
from dmm_core.speed import Recorded

PINNED_BLOCK = 1 << 28  # bytes; pinned memory is handed out in powers of two
SAMPLE = 64  # values by which most unequal tensors are told apart


class MappedFile:
    """A safetensors file in the address space: its pages are read when used, and the system may drop them again."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def tensor(self, info: TensorInfo) -> Tensor:
        """One tensor, not to be written to."""
        if not info.count:
            return torch.empty(info.shape, dtype=info.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(self.bytes, dtype=info.dtype, count=info.count, offset=info.offset).view(info.shape)


class HostStore:
    """Teachers' UNet tensors on the host: mapped from their files, or (``pinned``) in page-locked memory as ``dtype``.

    Tensors with the same values, of one teacher or several, are the same object.

    Args:
        channels_last: lay 4-D pinned tensors out as the device's modules have them, so that a copy is one piece.
    """

    def __init__(self, dtype: torch.dtype, pinned: bool = False, channels_last: bool = False) -> None:
        self.dtype, self.pinned, self.channels_last = dtype, pinned, channels_last
        self.bytes = self.shared_bytes = 0  # held; spared because they were there already
        self._files: dict[Path, MappedFile] = {}
        self._teachers: dict[Checkpoint, dict[str, Tensor]] = {}
        self._seen: dict[tuple, list[tuple[Tensor, Tensor]]] = {}  # (as in the file, as held)
        self._block, self._used = torch.empty(0, dtype=torch.uint8), 0

    def tensors(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """A teacher's UNet in diffusers' keys; read at the first call."""
        if checkpoint not in self._teachers:
            self._teachers[checkpoint] = {key: self._held(*told) for key, *told in self._mapped(checkpoint)}
        return self._teachers[checkpoint]

    def _mapped(self, checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor, bool]]:
        """Key, tensor, and whether the tensor lies in the file, where it takes no memory."""
        for key, source in checkpoint.parts["unet"].items():
            info = checkpoint.tensors.info[source.key]
            if info.path not in self._files:
                self._files[info.path] = MappedFile(info.path)
            tensor = source.take(self._files[info.path].tensor(info))
            changed = checkpoint.changed("unet", key, tensor)
            yield key, changed, changed is tensor

    def _held(self, tensor: Tensor, mapped: bool) -> Tensor:
        """The tensor as it is held; the one that is there already if an equal one is."""
        flat = tensor.flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE].contiguous().view(torch.uint8)
        like = self._seen.setdefault((tensor.shape, tensor.dtype, bytes(sample.tolist())), [])
        for other, held in like:
            if torch.equal(tensor, other):
                self.shared_bytes += held.numel() * held.element_size()
                return held
        held = self._pin(tensor) if self.pinned else tensor
        self.bytes += held.numel() * held.element_size()
        if mapped or held is tensor:  # what a LoRA made would stay in memory a second time, to compare others with
            like.append((tensor, held))
        return held

    def _pin(self, tensor: Tensor) -> Tensor:
        """A copy in page-locked memory, as ``dtype``."""
        last = self.channels_last and tensor.ndim == 4
        strides = torch.empty_like(tensor, device="meta", memory_format=torch.channels_last if last else None).stride()
        size = tensor.numel() * self.dtype.itemsize
        if self._used + size > len(self._block):
            self._block, self._used = _pinned(max(PINNED_BLOCK, size)), 0
        place = self._block[self._used : self._used + size].view(self.dtype)
        self._used += -(-size // 256) * 256
        return place.as_strided(tensor.shape, strides).copy_(tensor)


def _pinned(size: int) -> Tensor:
    """Page-locked bytes where there is a GPU; ordinary ones elsewhere, or where the system gives no more."""
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    except RuntimeError:
        return torch.empty(size, dtype=torch.uint8)


def host_store(
    checkpoints: list[Checkpoint], device: torch.device, dtype: torch.dtype, channels_last: bool
) -> HostStore:
    """Pinned for CUDA if the host's memory has room for all teachers and a quarter more; else mapped from the files."""
    count = sum(torch.Size(shape).numel() for shape in checkpoints[0].shapes("unet").values())
    room = available_ram()
    needed = count * dtype.itemsize * len(set(checkpoints))
    pinned = device.type == "cuda" and (room is None or room > 1.25 * needed)
    return HostStore(dtype, pinned, channels_last)


class Slot:
    """A UNet on the device whose weights may be overwritten by another teacher's.

    On CUDA a copy starts when the old weights' last use is over, and ``take`` makes the computation wait for its end;
    the host waits for neither. On other devices both are done when the call returns.
    """

    def __init__(self, unet: Any, held: dict[str, Tensor], stream: Any = None) -> None:
        self.unet, self.held, self.stream = unet, held, stream
        self.targets = {key: tensor.detach() for key, tensor in unet.state_dict().items()}
        self.used: Any = None  # end of the last known use
        self.filled: Any = None  # end of the last copy
        self.recordings: dict[bool, Recorded] = {}  # with the blocks' outputs, and without

    @torch.no_grad()
    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Begin to put another teacher's weights in place; what both have in common stays."""
        if self.stream is not None:
            self.stream.wait_event(self.used or torch.cuda.current_stream().record_event())
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            for key, target in self.targets.items():
                if self.held.get(key) is not tensors[key]:
                    target.copy_(tensors[key], non_blocking=True)
        if self.stream is not None:
            self.filled = self.stream.record_event()
        self.held = tensors

    def take(self) -> Any:
        """The UNet, ready to compute."""
        if self.filled is not None:
            torch.cuda.current_stream().wait_event(self.filled)
        self.used = None
        return self.unet

    def release(self) -> None:
        """What was launched so far is the last use, until ``take`` is called again."""
        if self.stream is not None:
            self.used = torch.cuda.current_stream().record_event()

    def answer(
        self, x_t: Tensor, t: Tensor, context: Context, features: bool, layers: bool = False, pool: Any = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What the UNet says of x_t (B, 4, h, w), with its blocks' outputs if wanted; its layers' maps if wanted.

        ``pool``: of the recording of its kernels that is made, or replayed; None calls the UNet itself. So do layers'
        maps (``LayerCalls``), whose memory a recording would keep.
        """
        inputs = (x_t, t, *context.parts)
        if layers:
            with LayerCalls(self.unet) as calls:
                return self._answer(features, *inputs), calls.take()
        if pool is None:
            return self._answer(features, *inputs), []
        if features not in self.recordings:
            self.recordings[features] = Recorded(partial(self._answer, features), pool)
        return self.recordings[features](*inputs), []

    def _answer(self, features: bool, x_t: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor | None = None) -> list:
        with BlockFeatures(self.unet, enabled=features) as blocks:
            said = predict(self.unet, x_t, t, Context(tokens, pooled))
        return [said, *blocks.take()]
