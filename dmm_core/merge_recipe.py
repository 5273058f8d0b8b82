"""The recipe of a weight-space merge: YAML or JSON in, frozen dataclasses out; what is wrong with it is found here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from dmm_core.errors import RecipeError
from dmm_core.merge import shares
from dmm_core.recipe_files import check_paths, read_file
from dmm_core.schema import Reader, plain


@dataclass(frozen=True)
class ModelSpec:
    """A checkpoint and its weight; negative ones extrapolate."""

    shorthand: ClassVar[str] = "path"
    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class LoraSpec:
    """A LoRA file to bake in. ``text_strength`` is the text encoder's (None: ``strength``)."""

    shorthand: ClassVar[str] = "path"
    path: Path
    strength: float = 1.0
    text_strength: float | None = None


@dataclass(frozen=True)
class MergeRecipe:
    """A weight-space merge.

    "weighted": Σ w_i θ_i / Σ w_i. ``alpha``, where given, replaces the first model's weight: it keeps 1 − alpha, and
    the others share alpha by their weights. "add_difference": the first model + alpha · Σ w_i (θ_i − ``base``) over
    the others (alpha is 1 where left out).

    ``blocks`` gives a block's own alpha by its name (``in.0`` … ``mid`` … ``out.0`` …, ``text``, ``vae``), or as a
    list in that order for the whole UNet; alpha is for the rest. ``dtype`` keep: each tensor as in the first model.
    """

    models: tuple[ModelSpec, ...]
    out: Path
    method: Literal["weighted", "add_difference"] = "weighted"
    base: Path | None = None
    alpha: float | None = None
    blocks: dict[str, float] | tuple[float, ...] | None = None
    loras: tuple[LoraSpec, ...] = ()
    dtype: Literal["keep", "fp32", "fp16", "bf16"] = "keep"
    title: str | None = None
    include_recipe: bool = True

    def to_dict(self, names_only: bool = False) -> dict[str, Any]:
        """What ``merge_recipe_from_dict`` reads back, of JSON's types; ``names_only`` leaves folders out of paths."""
        return plain(self, (lambda path: path.name) if names_only else (lambda path: path.as_posix()))

    @property
    def base_alpha(self) -> float:
        """What a block gets that ``blocks`` does not name."""
        if self.alpha is not None:
            return self.alpha
        return 1.0 if self.method == "add_difference" else 1 - shares([m.weight for m in self.models])[0]


def load_merge_recipe(path: str | Path) -> MergeRecipe:
    """The recipe in a YAML or JSON file; relative paths start from the file's folder. Raises RecipeError."""
    path = Path(path)
    return merge_recipe_from_dict(read_file(path), path.absolute().parent, path)


def merge_recipe_from_dict(data: Any, folder: str | Path = ".", source: str | Path = "recipe") -> MergeRecipe:
    """A checked recipe of a plain mapping; ``source`` is what errors name.

    Raises:
        RecipeError: what is wrong, with the key, what was expected and what is there.
    """
    if isinstance(data, Mapping) and "teachers" in data:
        raise RecipeError("is a recipe for dmm distill (it has teachers)", source, "A merge has models.")
    recipe: MergeRecipe = Reader(source, Path(folder).absolute()).read(MergeRecipe, data)
    _check_values(recipe, source)
    inputs: dict[str, Path | None] = {f"models[{i}].path": model.path for i, model in enumerate(recipe.models)}
    inputs |= {f"loras[{i}].path": lora.path for i, lora in enumerate(recipe.loras)}
    check_paths({**inputs, "base": recipe.base}, recipe.out, source)
    return recipe


def _check_values(recipe: MergeRecipe, source: str | Path) -> None:
    def demand(fine: bool, line: str, hint: str = "") -> None:
        if not fine:
            raise RecipeError(line, source, hint)

    count, weights = len(recipe.models), [model.weight for model in recipe.models]
    demand(count > 0, "models: expected at least one, got none")
    if recipe.method == "add_difference":
        demand(count > 1, "models: add_difference needs two (A and B of A + alpha (B - C)), got one")
        demand(recipe.base is not None, "base is missing, and add_difference needs it (C of A + alpha (B - C))")
        demand(weights[0] == 1, f"models[0].weight: the first is taken whole, got {weights[0]:g}", "Leave it out.")
    else:
        hint = "To keep the first model's text encoder and VAE: blocks: {text: 0, vae: 0}"
        demand(recipe.base is None, "base: weighted has none, it is for add_difference", hint)
        alone = recipe.alpha is None and not recipe.blocks
        demand(count > 1 or alone, "alpha and blocks need two models, got one")
        demand(recipe.alpha is None or weights[0] == 1, "give alpha or models[0].weight, not both",
               "alpha is the share of the models after the first.")  # fmt: skip
        told = f"the weights sum to 0, got {', '.join(f'{weight:g}' for weight in weights)}"
        demand(recipe.alpha is not None or abs(sum(weights)) > 1e-6, f"models: {told}")
        demand(alone or abs(sum(weights[1:])) > 1e-6, f"models after the first: {told}")
    out = recipe.out
    demand(out.suffix.lower() == ".safetensors", f"out: expected a name that ends in .safetensors, got {out.name!r}")
