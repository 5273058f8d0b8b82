"""From what a user chose in a host to a recipe: the merge that Merge Checkpoints and the tab DMM ask for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmm_core.errors import BadInput
from dmm_core.files import write_atomically
from dmm_core.outputs import target
from dmm_core.recipe import Recipe, recipe_from_dict


@dataclass(frozen=True)
class Place:
    """Where a host lets merges write: the folder of its checkpoints, and its own for unfinished work and prompts."""

    checkpoints: Path
    own: Path
    device: str = ""  # the host's; "" leaves it to the recipe

    def work(self, out: Path) -> Path:
        """The folder for an output's unfinished work."""
        return self.own / out.relative_to(self.checkpoints).with_name(out.stem + ".work")


def recipe_for(
    name: str, place: Place, teachers: Sequence[Path], data: Mapping[str, Any], *, prompts: str = "",
    base: Path | None = None, student: Path | None = None, folder: str | Path = ".", source: str | Path = "merge",
) -> Recipe:  # fmt: skip
    """The recipe of a merge, or of an extension of ``student``: ``data``, and over that what was chosen.

    Args:
        data: a recipe as far as it is known, e.g. its preset; ``folder`` is what its relative paths start from.
        prompts: one a line; kept in a file of ``place.own``.

    Raises:
        BadInput: too few teachers, an impossible name, or a fault in the recipe.
    """
    told = dict(data)
    if teachers:
        told["teachers"] = [str(path) for path in teachers]
    told |= {key: str(path) for key, path in (("base", base), ("student", student)) if path is not None}
    given, least = told.get("teachers"), 1 if told.get("student") else 2
    if not isinstance(given, list) or len(given) < least:
        words = "an extension needs a checkpoint to add" if least == 1 else "a merge needs at least two checkpoints"
        raise BadInput(words, hint="Choose them from the lists.")
    out = target(name, place.checkpoints)
    told |= {"out": str(out), "work": str(place.work(out))}
    train = told.get("train")
    if place.device and isinstance(train, Mapping | None):
        told["train"] = {"device": place.device, **(train or {})}
    if prompts.strip():
        told["data"] = {**(told.get("data") or {}), "prompts": str(_kept(prompts, place.own))}
    return recipe_from_dict(told, folder, source)


def _kept(prompts: str, folder: Path) -> Path:
    text = prompts.strip().encode("utf-8") + b"\n"  # a name by its content: other prompts, another recipe
    path = folder / f"prompts-{hashlib.sha256(text).hexdigest()[:12]}.txt"
    if not path.exists():
        write_atomically(path, text)
    return path


def preview_seconds(recipe: Recipe) -> float:
    """How often a host draws how far a merge is."""
    return 60.0 if recipe.preset != "mini" else 5.0
