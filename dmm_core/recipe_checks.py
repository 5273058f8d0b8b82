"""What a recipe's types cannot say: values that must fit each other. Each fault is told by its key."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dmm_core.errors import RecipeError
from dmm_core.sizes import parse

if TYPE_CHECKING:
    from dmm_core.recipe import DataSpec, Recipe, TrainSpec

Demand = Callable[..., None]  # whether it is fine; the line that says what is not; what to do


def check_values(recipe: Recipe, source: str | Path) -> None:
    """One stage's values.

    Raises:
        RecipeError: the key, what was expected and what is there; ``source`` is where.
    """
    demand = partial(_demand, source)
    _check_styles(recipe, demand)
    _check_data(recipe.data, demand)
    _check_course(recipe, demand)
    _check_economies(recipe.train, demand)
    told = f"evaluate.images_per_style: expected 0, got {recipe.evaluate.images_per_style}"
    demand(not recipe.evaluate.images_per_style, told, "A merge is measured afterwards, by dmm evaluate.")
    out = recipe.out
    demand(out.suffix.lower() == ".safetensors", f"out: expected a name that ends in .safetensors, got {out.name!r}")


def _demand(source: str | Path, fine: bool, line: str, hint: str = "") -> None:
    if not fine:
        raise RecipeError(line, source, hint)


def _check_styles(recipe: Recipe, demand: Demand) -> None:
    names = [teacher.name for teacher in recipe.teachers]
    alone = recipe.student is not None and recipe.train.few_step > 0  # the student teaches itself
    demand(len(names) > 0 or alone, "teachers: expected at least one, got none")
    for i, name in enumerate(names):
        told = f"teachers[{i}].name: the style {name!r} is there twice"
        demand(name not in names[:i], told, "Give each teacher a name of its own.")
    style = recipe.default_style
    if style is not None:
        for name in style if recipe.student is None else ():  # old styles are known once the file is open
            demand(name in names, f"default_style: no teacher is called {name!r}", f"They are: {', '.join(names)}.")
        demand(abs(sum(style.values())) > 1e-6, f"default_style: the weights sum to 0, got {style}")


def _check_data(data: DataSpec, demand: Demand) -> None:
    fine = data.kind == "teachers" or data.path is not None
    demand(fine, f"data.path is missing, and data.kind {data.kind} needs it")
    demand(data.size is None or data.size % 8 == 0, f"data.size: expected a multiple of 8, got {data.size}")
    fine = all(n % 8 == 0 for text in data.sizes for n in parse(text))
    demand(fine, f"data.sizes: expected multiples of 8, got {', '.join(data.sizes)}")
    fine = data.kind != "cache" or not (data.sizes or data.aspect > 1)
    demand(fine, "data.sizes and aspect: expected nothing with kind cache, which has its")
    fine = not data.sizes or (data.size, data.aspect) == (None, 1)
    demand(fine, "data.sizes: expected neither size nor aspect beside")


def _check_course(recipe: Recipe, demand: Demand) -> None:
    """Where training starts, who teaches in a step, and what few steps leave out."""
    train, total = recipe.train, len(recipe.teachers)
    demand(train.start != "base" or recipe.base is not None, "base is missing, and train.start base needs it")
    told = "train.start: expected nothing with student, from which the training starts, got base"
    demand(train.start != "base" or recipe.student is None, told)
    for key in ("teachers_per_step", "micro", "resident"):
        value = getattr(train, key)
        fine = (value or 1) <= total or recipe.student is not None
        demand(fine, f"train.{key}: expected at most the {total} teachers there are, got {value}")
    for key, why in (("feature", "compares the teachers' outputs without guidance"),
                     ("adversarial", "compares predictions of x̂0, and this is of where steps end"),
                     ("mixed", "mixes predictions, and this is of where steps end"),
                     ("blockwise", "compares what layers say without guidance")):  # fmt: skip
        told = f"train.{key}: expected 0 with few_step, got {getattr(train, key)}"
        demand(not (train.few_step and getattr(train, key)), told, f"It {why}.")
    told = "train.unshrink: expected false with {}, got true"
    fine = not (train.unshrink and train.few_step)
    demand(fine, told.format("few_step"), "It compares predictions of ε, and this is of where steps end.")
    fine = not (train.unshrink and recipe.student)
    demand(fine, told.format("student"), "It would move the old styles, which stay as they are.")


def _check_economies(train: TrainSpec, demand: Demand) -> None:
    """What saves memory, and the precision it needs."""
    if train.fused_backward:
        alone = (("micro", train.micro, None), ("processes", train.processes, 1), ("blockwise", train.blockwise, 0))
        for key, value, only in alone:
            told = f"train.{key}: expected {'nothing' if only is None else only} with fused_backward, got {value}"
            demand(value == only, told, "Its step is taken inside one backward pass over all teachers.")
    for key in ("weights", "fused_backward"):
        narrow = train.precision == "fp16" or (key == "weights" and train.precision == "fp32")
        fine = getattr(train, key) in ("fp32", False) or not narrow
        demand(fine, f"train.precision: expected auto or bf16 with {key}, got {train.precision}")
