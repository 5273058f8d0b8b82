"""From validated args to style vectors: what each row of a step's batch gets. torch and dmm_core alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dmm_core import schedule
from dmm_core.checkpoint import open_checkpoint
from dmm_core.errors import BadInput, StyleError
from dmm_core.style import Codebook, one_hot

from .args import DEFAULT, Args, Given, parse_mix

COND, UNCOND = 0, 1  # as in the forks' ``cond_or_uncond``
SAME = 1e-4  # weights nearer to the default's are the default's: sliders show four digits, and move by 0.01
_REMEMBERED = 256  # vectors of a schedule's steps


@dataclass(frozen=True, eq=False)
class Book:
    """The styles of one DMM file. ``folded``: its stored weights already show the default style."""

    path: Path
    codebook: Codebook
    thumbnails: tuple[str, ...]
    folded: bool
    usage: str = ""  # what a user must know to draw with it

    @property
    def names(self) -> tuple[str, ...]:
        return self.codebook.names

    def mix(self, given: Given) -> dict[str, float]:
        """Weights by name. Raises StyleError, naming the file, for an unknown name or what is no mix."""
        if isinstance(given, Mapping):
            mix = dict(given)
        elif given in self.names:  # first: a name may look like a mix
            mix = one_hot(self.names, given)
        elif given.strip() == DEFAULT:
            mix = dict(self.codebook.default)
        else:
            mix = parse_mix(given)
        self.codebook.weights(mix, normalize=False)
        return mix

    def sliders(self, values: tuple[float, ...], names: tuple[str, ...]) -> dict[str, float]:
        """The mix of slider values; those beyond the last style have no style to act on.

        Where styles of the default have no slider, sliders that stand as the default has them are the default whole.

        Raises:
            StyleError: the panel shows the styles of another checkpoint.
        """
        if names and not set(names) <= set(self.names):
            raise StyleError(
                f"the sliders are those of another checkpoint ({', '.join(names)})", hint="Press the panel's refresh."
            )
        mix, default = dict(zip(names or self.names, values, strict=False)), self.codebook.default
        untouched = all(abs(value - default.get(name, 0.0)) < SAME for name, value in mix.items())
        return dict(default) if untouched else mix


def open_book(path: Path) -> Book:
    """Raises BadInput: no checkpoint, none with styles, or one that cannot be read."""
    checkpoint = open_checkpoint(path)
    codebook = checkpoint.codebook()
    if codebook is None:
        raise BadInput("is an ordinary checkpoint without styles", path, "Choose a DMM file.")
    thumbnails = tuple(str(style.get("thumbnail", "")) for style in checkpoint.style_info)
    return Book(path, codebook, thumbnails, checkpoint.dmm == "ours", checkpoint.usage)


@dataclass(eq=False)
class Plan:
    """Weights (S, H, K, N): stages of the schedule, halves of the guidance (1: alike), images (1: alike), styles."""

    book: Book
    weights: Tensor
    mode: str = "blend"
    start: float = 0.0
    end: float = 1.0
    _vectors: dict[float, Tensor | None] = field(default_factory=dict)

    @property
    def moving(self) -> bool:
        return len(self.weights) > 1

    @property
    def uniform(self) -> bool:
        """Whether every row of a step gets the same vector."""
        return self.weights.shape[1:3] == (1, 1)

    @property
    def idle(self) -> bool:
        """Whether nothing is to be added at any step."""
        return not self.moving and self.vectors() is None

    @torch.no_grad()
    def vectors(self, share: float = 0.0) -> Tensor | None:
        """Style vectors (H, K, d), float32 on the CPU; None where the file as it is shows just that.

        The default style of a file of ours is exactly zero here, not the rounding of its sum.
        """
        share = share if self.moving else 0.0
        if share not in self._vectors:
            if len(self._vectors) >= _REMEMBERED:
                self._vectors.clear()
            book = self.book.codebook
            weights = schedule.weights_at(self.weights, share, self.mode, self.start, self.end)
            vectors = book(weights).float()
            if self.book.folded:
                plain = (weights - book.weights(book.default)).abs().amax(-1) < SAME
                vectors[plain] = 0.0
            self._vectors[share] = vectors if vectors.any() else None
        return self._vectors[share]


def plan(book: Book, args: Args, tags: Mapping[str, float] | None = None) -> Plan:
    """What the args ask for; the prompt's tags take the place of the sliders.

    Raises:
        StyleError: an unknown style, or weights that sum to 0 and are to be normalised.
    """

    def row(given: Given) -> Tensor:
        return book.codebook.weights(book.mix(given), args.normalise)

    if tags:
        base = row(tags)
    elif isinstance(args.weights, tuple):
        base = row(book.sliders(args.weights, args.names))
    else:
        base = row(args.weights)
    images = torch.stack([row(given) for given in args.batch] or [base])  # (K, N)
    stages = [images]
    if args.to:
        stages.append(row(args.to).expand_as(images))
    halves = torch.stack(stages)[:, None]  # (S, 1, K, N)
    if args.negative:
        negative = row(args.negative).expand_as(halves)
        halves = torch.cat([halves, negative], dim=1)
    return Plan(book, halves, args.mode, args.start, args.end)
