"""The safetensors format, read without memory maps: headers at once, tensors one at a time.

A memory map would have to be closed before Windows lets anyone replace the file, and every tensor made from it keeps it
open; so bytes are read into the tensor's own memory. Format: 8 bytes little-endian header length, JSON header, data.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from dmm_core.checkpoint.errors import MissingFile, NotACheckpoint, NotSafetensors, PickleRefused, TruncatedFile

MAX_HEADER = 100_000_000  # the limit of the safetensors library
PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle"}
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is. ``offset`` counts from the start of the file, in bytes."""

    path: Path
    code: str
    shape: tuple[int, ...]
    offset: int
    size: int

    @property
    def dtype(self) -> torch.dtype:
        if self.code not in DTYPES:
            raise NotACheckpoint(f"has tensors of type {self.code}, which cannot be read here", self.path)
        return DTYPES[self.code]

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def refuse_pickle(path: Path, start: bytes = b"") -> None:
    """Raises PickleRefused by the file's name, or by a zip's or a pickle protocol's first bytes."""
    if (
        path.suffix.lower() in PICKLES
        or start[:4] == b"PK\x03\x04"
        or (start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5")
    ):
        raise PickleRefused(path)


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of one file; reads nothing but the header.

    Raises:
        MissingFile, PickleRefused, NotSafetensors, TruncatedFile
    """
    if not path.is_file():
        raise MissingFile(path)
    refuse_pickle(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8:
            raise TruncatedFile(path, 8, size)
        if not 2 <= length <= MAX_HEADER:
            refuse_pickle(path, start)
            raise NotSafetensors(path, "it has no valid header")
        if 8 + length > size:
            raise TruncatedFile(path, 8 + length, size)
        raw = file.read(length)
    try:
        header = json.loads(raw)
        metadata = {str(k): str(v) for k, v in (header.pop("__metadata__", None) or {}).items()}
        tensors = {key: _info(path, entry, 8 + length) for key, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise NotSafetensors(path, "its header cannot be read") from error
    end = max((t.offset + t.size for t in tensors.values()), default=8 + length)
    if end > size:
        raise TruncatedFile(path, end, size)
    return tensors, metadata


def _info(path: Path, entry: dict, data: int) -> TensorInfo:
    begin, end = entry["data_offsets"]
    info = TensorInfo(path, entry["dtype"], tuple(entry["shape"]), data + begin, end - begin)
    if not 0 <= begin <= end or not all(isinstance(n, int) and n >= 0 for n in info.shape):
        raise ValueError("offsets or shape out of range")
    if info.code in DTYPES and info.count * torch.empty((), dtype=DTYPES[info.code]).element_size() != info.size:
        raise ValueError("size and shape do not match")
    return info


def read_tensor(file: BinaryIO, info: TensorInfo) -> Tensor:
    """One tensor, in memory of its own."""
    if not info.size:
        return torch.empty(info.shape, dtype=info.dtype)
    buffer = bytearray(info.size)
    file.seek(info.offset)
    if (got := file.readinto(buffer)) != info.size:  # type: ignore[attr-defined]
        raise TruncatedFile(info.path, info.offset + info.size, info.offset + (got or 0))
    return torch.frombuffer(buffer, dtype=info.dtype).reshape(info.shape)


class Tensors(Mapping[str, Tensor]):
    """The tensors of one or several safetensors files, read when asked for.

    Iterating gives the keys, ``info[key]`` what is known without reading, ``t[key]`` the tensor; ``read`` gives many,
    in the order in which they lie on the disk.
    """

    def __init__(self, info: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None = None) -> None:
        self.info = dict(info)
        self.metadata = dict(metadata or {})

    @classmethod
    def open(cls, *paths: Path) -> Tensors:
        """All tensors of a file, or of the shards of one; the first file's metadata wins."""
        info: dict[str, TensorInfo] = {}
        metadata: dict[str, str] = {}
        for path in paths:
            tensors, strings = read_header(path)
            info.update(tensors)
            metadata = {**strings, **metadata}
        return cls(info, metadata)

    def __getitem__(self, key: str) -> Tensor:
        info = self.info[key]
        with info.path.open("rb", buffering=0) as file:
            return read_tensor(file, info)

    def __iter__(self) -> Iterator[str]:
        return iter(self.info)

    def __len__(self) -> int:
        return len(self.info)

    def __contains__(self, key: object) -> bool:
        return key in self.info

    def shape(self, key: str) -> tuple[int, ...]:
        return self.info[key].shape

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors one at a time, in the order in which they lie on the disk."""
        wanted = sorted(keys, key=lambda k: (str(self.info[k].path), self.info[k].offset))
        path, file = None, None
        try:
            for key in wanted:
                info = self.info[key]
                if info.path != path:
                    if file is not None:
                        file.close()
                    path, file = info.path, info.path.open("rb", buffering=0)
                assert file is not None
                yield key, read_tensor(file, info)
        finally:
            if file is not None:
                file.close()


def sha256(*paths: Path) -> str:
    """Hex digest of the bytes of a file, or of several one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one diffusers component: one, or the shards its index names, full precision first.

    Raises:
        PickleRefused: the folder has pickles only. Returns [] where there are no weights at all.
    """
    for stem in ("diffusion_pytorch_model", "model"):
        for variant in ("", ".fp16", ".bf16", ".non_ema"):
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if (whole := folder / f"{stem}{variant}.safetensors").is_file():
                return [whole]
            if index.is_file():
                try:
                    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
                    return [folder / os.path.basename(name) for name in sorted(names)]
                except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                    raise NotSafetensors(index, "its list of files cannot be read") from error
    if not folder.is_dir():
        return []
    found = sorted(folder.glob("*.safetensors"))
    if not found and (pickles := sorted(p for p in folder.iterdir() if p.suffix.lower() in PICKLES)):
        raise PickleRefused(pickles[0])
    return found[:1]
