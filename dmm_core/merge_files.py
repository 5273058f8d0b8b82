"""A merge of whole files, streamed: values are read, merged and written piece by piece, so memory stays small.

The result is an LDM single file, whatever layout the inputs have; what is not merged comes from the first model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmm_core.checkpoint import metadata as meta
from dmm_core.checkpoint.checkpoint import Checkpoint
from dmm_core.checkpoint.errors import NonFinite
from dmm_core.checkpoint.layout import Stored, implied, ldm_layout, others
from dmm_core.checkpoint.opening import open_checkpoint
from dmm_core.checkpoint.stream import Job, Span, read_ahead
from dmm_core.checkpoint.writer import Lazy, non_finite, write_pieces, writing_order
from dmm_core.errors import BadInput
from dmm_core.merge import add_difference, shares, weighted_sum
from dmm_core.merge_blocks import block_alphas, block_of, unet_blocks
from dmm_core.merge_check import check_inputs
from dmm_core.merge_recipe import MergeRecipe

READ = 1 << 21  # values of each file at one time
WORK = 1 << 18  # of these, values merged at one time: few enough that a core's cache holds them
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Notify = Callable[[int, int], None]


@dataclass(frozen=True)
class Step:
    """What a block needs: the numbers of the models to read, and the function that merges their values."""

    models: tuple[int, ...]
    merge: Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Unit:
    """One tensor of a part, with where it lies in each of the step's models."""

    name: str  # in the output
    part: str
    key: str
    transposed: bool
    step: Step
    flips: tuple[tuple[int, int] | None, ...]  # shape of a matrix that must be transposed first
    weighed: bool  # whether what a LoRA adds depends on the merged tensor

    @property
    def whole(self) -> bool:
        """Whether it is merged in one piece."""
        return self.weighed or any(self.flips)


Piece = tuple[Unit | str, int]  # a unit, or the name of a tensor that is copied; and the first value's number


class Merger:
    """The opened inputs of a recipe, checked, and the way from them to the output.

    Raises:
        BadInput: the first file that cannot be read or does not fit the others, with its name.
    """

    def __init__(self, recipe: MergeRecipe) -> None:
        self.recipe = recipe
        paths = [model.path for model in recipe.models] + ([recipe.base] if recipe.base else [])
        self.models = [open_checkpoint(path) for path in paths]
        self.first = self.models[0]
        self.layout = ldm_layout(self.first)
        self.blocks = unet_blocks(self.layout)
        alphas = block_alphas(recipe.blocks, recipe.base_alpha, self.blocks)
        self.steps = {block: step_for(recipe, alpha) for block, alpha in alphas.items()}
        self.needs = {
            (number, part) for part in self.first.parts for block in self._blocks_of(part)
            for number in self.steps[block].models
        }  # fmt: skip
        check_inputs(self.models, self.needs)
        self.loras = [(spec, self._fit(spec.path)) for spec in recipe.loras]
        copied = others(self.first)
        self.copied = {
            key: Lazy(info.dtype, info.shape, partial(self.first.tensors.__getitem__, key))
            for key, info in self.first.tensors.info.items() if key in copied and key not in self.layout
        }  # fmt: skip
        added = {key: tensor for key, tensor in implied(self.first).items() if key not in self.copied}
        self.copied |= {key: Lazy(t.dtype, tuple(t.shape), partial(lambda t: t, t)) for key, t in added.items()}
        self.kinds = {name: Lazy(self._dtype(stored), stored.shape, _never) for name, stored in self.layout.items()}
        self.kinds |= self.copied

    def _fit(self, path: Path) -> Any:
        from dmm_core.lora import open_lora

        return open_lora(path).fit(self.first)

    def _blocks_of(self, part: str) -> list[str]:
        return [*self.blocks] if part == "unet" else [block_of("", part, self.blocks)]

    def _dtype(self, stored: Stored) -> torch.dtype:
        part, key = stored.holds[0]
        return DTYPES.get(self.recipe.dtype) or self.first.tensors.info[self.first.parts[part][key].key].dtype

    @property
    def count(self) -> int:
        """Values that are merged."""
        return sum(torch.Size(stored.shape).numel() for stored in self.layout.values())

    def write(self, notify: Notify = lambda done, total: None) -> Path:
        """Write the output, atomically; ``notify`` is told how many values of how many are done.

        Raises:
            NonFinite: an input has NaN or infinity, named; or a value is too large for the output's type.
        """
        recipe, out = self.recipe, self.recipe.out
        given = {k: v for k, v in self.first.metadata.items() if k == "modelspec.resolution"}
        names = [model.path.name for model in self.models] + [spec.path.name for spec, _ in self.loras]
        given["modelspec.merged_from"] = ", ".join(dict.fromkeys(names))
        if recipe.include_recipe:
            given["dmm.merge"] = meta.to_json(recipe.to_dict(names_only=True))
        strings = meta.modelspec(self.first.family, self.first.prediction_type, given, recipe.title or out.stem)
        try:
            write_pieces(out, self.kinds, strings, self._pieces(notify))
        except NonFinite as error:
            raise self._blame(error) from None
        return out

    def _pieces(self, notify: Notify) -> Iterator[tuple[str, Tensor]]:
        done, total = 0, self.count
        current, delta = None, None
        for (unit, begin), values in read_ahead(self._jobs()):
            if isinstance(unit, str):
                yield unit, self.copied[unit].make()
                continue
            if unit is not current:
                current, delta = unit, None if unit.weighed else self._delta(unit)
            values = [
                value if shape is None else value.reshape(shape).T.reshape(-1)
                for value, shape in zip(values, unit.flips, strict=True)
            ]
            if unit.weighed:
                delta = self._delta(unit, merge_values(unit.step.merge, values, None, torch.float32))
            count = values[0].numel()
            added = None if delta is None else delta[begin : begin + count]
            yield unit.name, merge_values(unit.step.merge, values, added, self.kinds[unit.name].dtype)
            done += count
            notify(done, total)

    def _jobs(self) -> Iterator[Job[Piece]]:
        """What to read, in the order in which it is written."""
        for name in writing_order(self.kinds):
            if name in self.copied:
                yield Job((name, 0), ())
                continue
            stored = self.layout[name]
            for part, key in stored.holds:
                unit, spans = self._unit(name, stored, part, key)
                pieces = [span.pieces(span.count if unit.whole else READ) for span in spans]
                for number, row in enumerate(zip(*pieces, strict=True)):
                    yield Job((unit, number * READ), row)

    def _unit(self, name: str, stored: Stored, part: str, key: str) -> tuple[Unit, list[Span]]:
        step = self.steps[block_of(name, part, self.blocks)]
        spans, flips = [], []
        for number in step.models:
            model = self.models[number]
            source = model.parts[part][key]
            info = model.tensors.info[source.key]
            spans.append(Span.of(info, source))
            flips.append((info.shape[0], info.shape[1]) if source.transposed != stored.transposed else None)
        weighed = any(lora.needs_weight(part, key) for _, lora in self.loras)
        return Unit(name, part, key, stored.transposed, step, tuple(flips), weighed), spans

    def _delta(self, unit: Unit, merged: Tensor | None = None) -> Tensor | None:
        """What the LoRAs add to a tensor, flat and in the output's order; None for nothing.

        ``merged``: the tensor, flat in float32, where the unit is ``weighed``; LoRAs come one after the other.
        """
        total: Tensor | None = None
        if merged is not None:
            shape = self.first.shapes(unit.part)[unit.key]
            merged = merged.reshape(shape[::-1]).T if unit.transposed else merged.reshape(shape)
        for spec, lora in self.loras:
            text = unit.part != "unet" and spec.text_strength is not None
            weight = merged if merged is None or total is None else merged + total.reshape(merged.shape)
            delta = lora.delta(unit.part, unit.key, spec.text_strength if text else spec.strength, weight)
            if delta is not None:
                total = delta if total is None else total.add_(delta)
        if total is None:
            return None
        return (total.T if unit.transposed else total).reshape(-1)

    def _blame(self, error: NonFinite) -> BadInput:
        """The input that a value which is no number came from; found by reading its tensor again."""
        stored = self.layout.get(error.key)
        for part, key in stored.holds if stored else ():
            for number in self.steps[block_of(error.key, part, self.blocks)].models:
                model: Checkpoint = self.models[number]
                if bad := non_finite(model.tensor(part, key)):
                    return NonFinite(model.path, model.parts[part][key].key, bad)
            for spec, lora in self.loras:
                delta = lora.delta(part, key, 1.0, self.first.tensor(part, key))
                if delta is not None and (bad := non_finite(delta)):
                    return NonFinite(spec.path, error.key, bad)
        if not stored:
            return NonFinite(self.first.path, error.key, non_finite(self.copied[error.key].make()))
        dtype = str(self.kinds[error.key].dtype).removeprefix("torch.")
        return BadInput(f"{error.key} has values too large for {dtype}", self.recipe.out, "Use dtype bf16 or fp32.")


def _never() -> Tensor:
    raise AssertionError("comes in pieces")


def merge_values(
    merge: Callable[[Sequence[Tensor]], Tensor], values: Sequence[Tensor], delta: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """A method over flat tensors of one length, a cache's worth at a time; ``delta`` is added before the last cast."""
    merged = torch.empty(values[0].numel(), dtype=dtype)
    for begin in range(0, merged.numel(), WORK):
        part = merge([value[begin : begin + WORK] for value in values])
        if delta is not None:
            part.add_(delta[begin : begin + WORK])
        merged[begin : begin + WORK].copy_(part)
    return merged


def step_for(recipe: MergeRecipe, alpha: float) -> Step:
    """The recipe's method at one alpha. Models that it gives no weight are not read."""
    weights = [model.weight for model in recipe.models]
    if recipe.method == "add_difference":
        used = [i for i in range(1, len(weights)) if weights[i] * alpha]
        alphas = [weights[i] * alpha for i in used]
        if not used:
            return Step((0,), partial(weighted_sum, weights=[1.0]))
        return Step((0, *used, len(weights)), lambda v: add_difference(v[0], v[1:-1], v[-1], alphas))
    alone = recipe.alpha is None and not recipe.blocks
    factors = shares(weights, None if alone else alpha)
    used = [i for i, factor in enumerate(factors) if factor]
    return Step(tuple(used), partial(weighted_sum, weights=[factors[i] for i in used]))


def merge_files(recipe: MergeRecipe, notify: Notify = lambda done, total: None) -> Path:
    """Merge the recipe's files into its output. Raises BadInput: nothing is written then."""
    return Merger(recipe).write(notify)
