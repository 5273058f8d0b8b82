"""The safetensors format, written as a stream: same tensors and metadata in, same bytes out.

The safetensors library orders metadata at random; here keys are sorted, so that saving twice gives equal files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dmm_core.checkpoint.errors import NonFinite
from dmm_core.checkpoint.reader import CODES
from dmm_core.files import atomic_file, write_atomically

HASH_KEY = "modelspec.hash_sha256"
NO_HASH = "0x" + "0" * 64


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
    # NaN spreads to both ends of the range; one pass, 20 to 80 times as fast as a mask
    if all(torch.isfinite(end) for end in tensor.aminmax()):
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
    order = sorted(tensors, key=lambda key: (-_itemsize(tensors[key].dtype), key))  # wide types first: all lie aligned
    strings = {key: metadata[key] for key in sorted(metadata)}
    if HASH_KEY in strings:
        strings[HASH_KEY] = NO_HASH
    digest = hashlib.sha256()
    with atomic_file(path) as file:
        file.write(_header(tensors, order, strings))
        for key in order:
            data = _data(path, key, tensors[key])
            digest.update(data)
            file.write(data)
        if HASH_KEY in strings:
            strings[HASH_KEY] = "0x" + digest.hexdigest()
            file.seek(0)
            file.write(_header(tensors, order, strings))  # of the same length
    return digest.hexdigest()


def _itemsize(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype).element_size()


def _header(tensors: Mapping[str, Tensor | Lazy], order: list[str], strings: Mapping[str, str]) -> bytes:
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


def _data(path: Path, key: str, source: Tensor | Lazy) -> memoryview | bytes:
    tensor = source.make() if isinstance(source, Lazy) else source
    if tensor.dtype != source.dtype or tuple(tensor.shape) != tuple(source.shape):
        raise ValueError(f"{key}: promised {source.dtype} {source.shape}, got {tensor.dtype} {tuple(tensor.shape)}")
    if bad := non_finite(tensor):
        raise NonFinite(path, key, bad)
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if not flat.numel():
        return b""
    return memoryview(_c_bytes(flat))


def _c_bytes(flat: Tensor) -> memoryview:
    """The bytes of a contiguous tensor without a copy and without numpy, which torch may lack."""
    import ctypes

    size = flat.numel() * flat.element_size()
    array = (ctypes.c_char * size).from_address(flat.data_ptr())
    array._tensor = flat  # keeps the memory alive as long as the view
    return memoryview(array).cast("B")
