"""What travels along the wires: DMM_CODEBOOK is a ``Book``, DMM_STYLE a ``Style``. torch and dmm_core alone.

A style is kept as weights of the codebook's rows until it is used, so that everything mixes before the MLP.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dmm_core.checkpoint import Checkpoint
from dmm_core.checkpoint.errors import MissingFile
from dmm_core.checkpoint.reader import sha256
from dmm_core.errors import StyleError
from dmm_core.schedule import check, weights_at
from dmm_core.style import Codebook, Mix, one_hot

SLIDERS = 8  # of one StyleMix node
_REMEMBERED = 512  # vectors of a schedule's steps


@dataclass(frozen=True, eq=False)
class Book:
    """A file's codebook. ``key`` tells codebooks apart by their content, whichever node loaded them."""

    codebook: Codebook
    path: Path
    key: str
    weights_files: tuple[Path, ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint, codebook: Codebook) -> Book:
        digest = hashlib.sha256(repr(codebook.names).encode())
        for tensor in codebook.state_dict().values():
            digest.update(tensor.contiguous().numpy().tobytes())
        return cls(codebook, checkpoint.path, digest.hexdigest(), checkpoint.weights_files)

    @property
    def names(self) -> tuple[str, ...]:
        return self.codebook.names

    def file_hash(self) -> str:
        """sha256 of the DMM file; of a folder, its UNet's. Raises MissingFile where it is gone."""
        if not all(file.is_file() for file in self.weights_files):
            raise MissingFile(self.path)
        return sha256(*self.weights_files)

    def require_same(self, other: Book, what: str) -> None:
        """Raises StyleError unless the other codebook is this one."""
        if self.key != other.key:
            raise StyleError(
                f"the style is of {other.path.name}, but {what} is of {self.path.name}",
                hint="Connect both to the same Load DMM node.",
            )


@dataclass(frozen=True, eq=False)
class Style:
    """Weights (S, K, N): S stages of a schedule (1: fixed), K batch rows (1: all rows alike), N styles.

    ``raw`` are the weights before normalising, (K, N): what a chained StyleMix adds up.
    """

    book: Book
    weights: Tensor
    raw: Tensor
    mode: str = "blend"
    start: float = 0.0
    end: float = 1.0
    _vectors: dict[float, Tensor] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict) -> Style:
        return self  # never changed; a MODEL's options are copied deeply with every clone

    @property
    def scheduled(self) -> bool:
        return len(self.weights) > 1

    @property
    def rows(self) -> int:
        return self.weights.shape[1]

    def at(self, share: float) -> Tensor:
        """Weights (K, N) when ``share`` of the steps is done: 0 at the first, 1 at the last."""
        return weights_at(self.weights, share, self.mode, self.start, self.end)

    @torch.no_grad()
    def vectors(self, share: float = 0.0) -> Tensor:
        """Style vectors (K, d), float32 on the CPU; the default style's is zero in a DMM file of ours."""
        share = share if self.scheduled else 0.0
        if share not in self._vectors:
            if len(self._vectors) >= _REMEMBERED:
                self._vectors.clear()
            self._vectors[share] = self.book.codebook(self.at(share)).float()
        return self._vectors[share]

    def single(self, use: str) -> dict[str, float]:
        """The mix, where there is one style alone. Raises StyleError for a schedule or a batch."""
        for wrong, many in (("schedule", self.scheduled), ("batch of styles", self.rows > 1)):
            if many:
                raise StyleError(f"a {wrong} cannot be {use}", hint="Connect a single style or a mix.")
        return dict(zip(self.book.names, self.weights[0, 0].tolist(), strict=True))


def fixed(book: Book, mixes: Sequence[Mix], normalise: bool) -> Style:
    """A style of one row for each mix. Raises StyleError where the weights cannot be used."""
    raw = torch.stack([book.codebook.weights(mix, normalize=False) for mix in mixes])
    weights = torch.stack([book.codebook.weights(mix, normalise) for mix in mixes])
    return Style(book, weights[None], raw)


def named(book: Book, name: str, strength: float) -> Style:
    """(1 − strength) · default + strength · style, in codebook space."""
    default, style = book.codebook.weights(book.codebook.default), book.codebook.weights(one_hot_of(book, name))
    weights = (1 - strength) * default + strength * style
    return Style(book, weights[None, None], weights[None])


def one_hot_of(book: Book, name: str) -> Mix:
    if name not in book.names:
        wrong = f"there is no style {name!r} in {book.path.name}" if name else "no style is chosen"
        raise StyleError(wrong, hint=f"The styles are: {', '.join(book.names)}.")
    return one_hot(book.names, name)


def mixed(book: Book, sliders: Sequence[float], normalise: bool, first: int = 0, add: Style | None = None) -> Style:
    """Sliders for the styles from number ``first`` on. Sliders beyond the last style have no style to act on."""
    if not 0 <= first < len(book.names):
        raise StyleError(
            f"first is {first}, but {book.path.name} has {len(book.names)} styles, numbered from 0",
            hint="Set first to the number of the style that the first slider is for.",
        )
    base = torch.zeros(1, len(book.names))
    if add is not None:
        book.require_same(add.book, "the codebook")
        if add.scheduled:
            raise StyleError("a schedule cannot be added to a mix", hint="Schedule the mixes instead.")
        base = add.raw
    mine = torch.zeros(len(book.names))
    values = sliders[: len(book.names) - first]
    mine[first : first + len(values)] = torch.tensor(values, dtype=torch.float32)
    rows = [dict(zip(book.names, row, strict=True)) for row in (base + mine).tolist()]
    return fixed(book, rows, normalise)


def every(book: Book) -> Style:
    """One row a style, in the codebook's order."""
    return fixed(book, [one_hot(book.names, name) for name in book.names], normalise=True)


def scheduled(styles: Sequence[Style], mode: str, start: float, end: float) -> Style:
    """From the first style to the last between two shares of the sampling steps, mixed in codebook space."""
    book, rows = styles[0].book, max(style.rows for style in styles)
    check(mode, start, end)
    for style in styles:
        book.require_same(style.book, "another style of the schedule")
        if style.scheduled:
            raise StyleError(
                "a schedule cannot be part of a schedule", hint="Give all its styles to one Style Schedule node."
            )
        if style.rows not in (1, rows):
            raise StyleError(f"batches of {style.rows} and of {rows} styles do not go together in one schedule")
    stages = torch.stack([style.weights[0].expand(rows, -1) for style in styles])
    return Style(book, stages, stages[0], mode, start, end)
