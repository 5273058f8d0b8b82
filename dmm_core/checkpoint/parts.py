"""Where each tensor of a model lies in the file, and what must be done to it to be diffusers' or transformers'."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dmm_core.checkpoint import keymap
from dmm_core.checkpoint.errors import MissingKeys, WrongShape
from dmm_core.checkpoint.reader import Tensors
from dmm_core.checkpoint.shapes import Shapes


@dataclass(frozen=True)
class Source:
    """A tensor of the file: ``row`` of three stacked ones, ``transposed``, or a 1×1 convolution as a ``matrix``."""

    key: str
    row: int | None = None
    transposed: bool = False
    matrix: bool = False

    def fits(self, stored: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, ...] | None:
        """None if a tensor of the stored shape gives the wanted one, else the shape it should have."""
        expected = self.stored_shape(wanted)
        if self.matrix and stored[2:] in ((), (1,), (1, 1)):
            stored = stored[:2]
        return None if stored == expected else expected

    def stored_shape(self, wanted: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in the file of what gives the wanted one; of a ``matrix`` without the 1×1 that may follow."""
        shape = wanted[::-1] if self.transposed else wanted
        return shape if self.row is None else (3 * shape[0], *shape[1:])

    def take(self, tensor: Tensor) -> Tensor:
        if self.row is not None:
            tensor = tensor.chunk(3)[self.row]
        if self.matrix:
            tensor = tensor.reshape(tensor.shape[:2])
        return (tensor.T if self.transposed else tensor).contiguous()


Part = dict[str, Source]  # diffusers or transformers key → where it lies
Candidates = Callable[[str], list[Source]]


def locate(tensors: Tensors, path: Path, name: str, shapes: Shapes, candidates: Candidates) -> Part:
    """Find every key of ``shapes`` in the file, under the first candidate name that is there.

    Raises:
        MissingKeys, WrongShape
    """
    part: Part = {}
    missing: list[str] = []
    for key, shape in shapes.items():
        options = candidates(key)
        source = next((option for option in options if option.key in tensors), None)
        if source is None:
            missing.append(options[0].key)
        elif (expected := source.fits(tensors.shape(source.key), shape)) is not None:
            raise WrongShape(path, source.key, expected, tensors.shape(source.key))
        else:
            part[key] = source
    if missing:
        raise MissingKeys(path, name, list(dict.fromkeys(missing)))
    return part


def unet_candidates(layout: str, prefix: str, shapes: Shapes, config: Mapping[str, Any]) -> Candidates:
    names = keymap.unet_map(shapes, config) if layout == "ldm" else {key: key for key in shapes}
    return lambda key: [Source(prefix + names[key])]


# What diffusers called the VAE's attention until 2023; the SD1.5 folders of that time are still around.
_LEGACY_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def vae_candidates(layout: str, shapes: Shapes, config: Mapping[str, Any]) -> Candidates:
    names = keymap.vae_map(shapes, config) if layout == "ldm" else {key: key for key in shapes}
    prefix = keymap.VAE if layout == "ldm" else "vae/"

    def candidates(key: str) -> list[Source]:
        source = Source(prefix + names[key], matrix=keymap.vae_is_matrix(key))
        if layout == "ldm" or ".attentions.0.to_" not in key:
            return [source]
        start, _, rest = source.key.rpartition(".attentions.0.")
        name, _, leaf = rest.rpartition(".")
        return [source, replace(source, key=f"{start}.attentions.0.{_LEGACY_ATTENTION[name]}.{leaf}")]

    return candidates


def text_candidates(open_clip: bool, prefix: str, shapes: Shapes) -> Candidates:
    if not open_clip:  # files of 2022 lack the "text_model."
        return lambda key: [Source(prefix + key), Source(prefix + key.removeprefix("text_model."))]
    names = keymap.open_clip_map(shapes)
    return lambda key: [
        Source(prefix + names[key], keymap.stacked_row(key), transposed=key == "text_projection.weight")
    ]


def read_part(tensors: Tensors, part: Part) -> dict[str, Tensor]:
    """The tensors of a part in its own names and order; each stored tensor is read once."""
    wanted: dict[str, list[str]] = {}
    for key, source in part.items():
        wanted.setdefault(source.key, []).append(key)
    found: dict[str, Tensor] = {}
    for stored, tensor in tensors.read(wanted):
        for key in wanted[stored]:
            found[key] = part[key].take(tensor)
    return {key: found[key] for key in part}
