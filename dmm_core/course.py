"""The course of a stage: what its first steps alone do. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dmm_core.recipe import TrainSpec

# Shares of a stage's steps, from the first on (docs/results.md, *Tried with all losses*).
FIRST_PART = {
    "blockwise": 0.3,  # layers know by then what their teachers' say, and learn how to work together
    "mixed": 0.6,  # the way from style to style is learned by then, the rest is for styles
}


def has(key: str, spec: TrainSpec, step: int) -> bool:
    """Whether a step of a stage, counted from 0, does what ``FIRST_PART`` has for its first ones."""
    return bool(getattr(spec, key)) and step < FIRST_PART[key] * spec.steps


def phases(spec: TrainSpec) -> list[tuple[int, float]]:
    """Parts of a stage whose steps do the same: the first step of each, and its share of all steps."""
    kinds = [tuple(has(key, spec, step) for key in FIRST_PART) for step in range(spec.steps)]
    begins = [step for step in range(spec.steps) if not step or kinds[step] != kinds[step - 1]]
    return [(begin, (end - begin) / spec.steps) for begin, end in zip(begins, [*begins[1:], spec.steps], strict=True)]
