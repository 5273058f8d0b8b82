"""The safetensors format, written as a stream: same tensors and metadata in, same bytes out.

The safetensors library orders metadata at random; here keys are sorted, so that saving twice gives equal files.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dmm_core.checkpoint.errors import NonFinite
from dmm_core.checkpoint.reader import CODES
from dmm_core.files import atomic_file, write_atomically

HASH_KEY = "modelspec.hash_sha256"
NO_HASH = "0x" + "0" * 64
BEHIND = 2  # pieces that wait to be checked, hashed and written while the next ones are made


class Kind(Protocol):
    """What a header says of a tensor."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Lazy:
    """A tensor that is made when its turn to be written comes; its type and shape are known before."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def non_finite(tensor: Tensor) -> int:
    """How many values are NaN or infinite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return 0
    if tensor.element_size() == 1:  # float8 has no isfinite
        tensor = tensor.to(torch.float32)
    try:  # NaN spreads to both ends of the range; one pass, 20 to 80 times as fast as a mask
        ends = tensor.aminmax()
    except RuntimeError:  # torch before 2.2 has none of float16 on a CPU, and A1111 has torch 2.1
        ends = tensor.float().aminmax()
    if all(torch.isfinite(end) for end in ends):
        return 0
    return int(tensor.numel() - torch.isfinite(tensor).sum().item())


def write_json(path: Path, value: object) -> None:
    write_atomically(path, (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


def write_safetensors(path: Path, tensors: Mapping[str, Tensor | Lazy], metadata: Mapping[str, str]) -> str:
    """Write one file, tensor by tensor; returns the hex sha256 of its tensor data.

    Metadata ``modelspec.hash_sha256``, where given, is set to that hash. Refuses to leave anything behind on failure.

    Raises:
        NonFinite: a tensor has NaN or infinity.
    """
    return write_pieces(path, tensors, metadata, ((key, _made(tensors[key])) for key in writing_order(tensors)))


def writing_order(tensors: Mapping[str, Kind]) -> list[str]:
    """The keys in the order in which they lie in the file: wide types first, so that all lie aligned."""
    return sorted(tensors, key=lambda key: (-_itemsize(tensors[key].dtype), key))


def write_pieces(
    path: Path, kinds: Mapping[str, Kind], metadata: Mapping[str, str], pieces: Iterable[tuple[str, Tensor]]
) -> str:
    """``write_safetensors`` for tensors that are never whole in memory.

    Args:
        kinds: type and shape of every tensor; the header is made of these.
        pieces: (key, values) in ``writing_order``, a tensor's values at once or in several pieces, of any shape.

    Raises:
        NonFinite: a piece has NaN or infinity.
    """
    order = writing_order(kinds)
    strings = {key: metadata[key] for key in sorted(metadata)}
    if HASH_KEY in strings:
        strings[HASH_KEY] = NO_HASH
    digest = hashlib.sha256()
    with atomic_file(path) as file:

        def put(key: str, flat: Tensor) -> None:
            if bad := non_finite(flat):
                raise NonFinite(path, key, bad)
            data = _c_bytes(flat) if flat.numel() else b""
            digest.update(data)
            file.write(data)

        file.write(_header(kinds, order, strings))
        waiting: deque[Future[None]] = deque()
        with ThreadPoolExecutor(1, "write") as pool:  # hashing and writing leave the interpreter to the next piece
            for key, flat in _checked(kinds, order, pieces):
                waiting.append(pool.submit(put, key, flat))
                if len(waiting) > BEHIND:
                    waiting.popleft().result()
            for last in waiting:
                last.result()
        if HASH_KEY in strings:
            strings[HASH_KEY] = "0x" + digest.hexdigest()
            file.seek(0)
            file.write(_header(kinds, order, strings))  # of the same length
    return digest.hexdigest()


def _itemsize(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype).element_size()


def _header(tensors: Mapping[str, Kind], order: list[str], strings: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(strings)} if strings else {}
    offset = 0
    for key in order:
        tensor = tensors[key]
        count = torch.Size(tensor.shape).numel()
        end = offset + count * _itemsize(tensor.dtype)
        header[key] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _made(source: Tensor | Lazy) -> Tensor:
    return source.make() if isinstance(source, Lazy) else source


def _checked(
    kinds: Mapping[str, Kind], order: list[str], pieces: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The pieces flat and on the CPU. Raises ValueError unless they are what was promised, whole and in order."""
    keys, key, left = iter(order), "", 0
    for name, tensor in pieces:
        while not left and key != name:
            key = next(keys, name)
            left = torch.Size(kinds[key].shape).numel()
        left -= tensor.numel()
        if key != name or left < 0 or tensor.dtype != kinds[key].dtype:
            raise ValueError(f"{key}: promised {kinds[key]}, got {tensor.dtype} {tuple(tensor.shape)} of {name}")
        yield key, tensor.detach().cpu().contiguous().reshape(-1)
    if left or any(torch.Size(kinds[key].shape).numel() for key in keys):
        raise ValueError(f"{key}: the values end before the file does")


def _c_bytes(flat: Tensor) -> memoryview:
    """The bytes of a contiguous tensor without a copy and without numpy, which torch may lack."""
    import ctypes

    size = flat.numel() * flat.element_size()
    array = (ctypes.c_char * size).from_address(flat.data_ptr())
    array._tensor = flat  # keeps the memory alive as long as the view
    return memoryview(array).cast("B")
