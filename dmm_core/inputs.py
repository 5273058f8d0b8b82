"""The files that a merge began with: whether they are still the same when it goes on.

A checkpoint is often replaced by a later version of the same name. What was drawn by the one and learned from it must
not be mixed with the other's.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from dmm_core.errors import BadInput
from dmm_core.files import write_atomically
from dmm_core.recipe import Recipe, work_folder
from dmm_core.stages import something_made

SPOTS, SPOT = 32, 1 << 15  # places of a file that are read, and bytes of each: a whole one would take seconds


def mark(path: Path) -> str:
    """What tells a file, or a folder's safetensors files, from another version: sizes and some of the bytes.

    "" for what cannot be read, which those tell who open it.
    """
    try:
        return _mark(sorted(path.rglob("*.safetensors")) if path.is_dir() else [path])
    except OSError:
        return ""


def _mark(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for part in files:
        size = part.stat().st_size
        digest.update(f"{part.name} {size} ".encode())
        with part.open("rb") as file:
            for spot in range(SPOTS):
                file.seek(max(0, size - SPOT) * spot // (SPOTS - 1))
                digest.update(file.read(SPOT))
    return digest.hexdigest()


def require_same(recipe: Recipe) -> None:
    """Raises BadInput where the work folder holds what was made with another version of a file of this recipe.

    Reads a megabyte of each. What other files than the recipe's were noted for is left to those who compare recipes.
    """
    if path := changed(recipe):
        folder = work_folder(recipe)
        told = f"is not the file of this name that an unfinished merge began with (in {folder})"
        raise BadInput(told, path, "Put that one back to go on. Or delete that folder, and what it learnt is lost.")


def changed(recipe: Recipe) -> Path | None:
    """The first file of the recipe that is no longer what was noted; None also where nothing was made of it yet."""
    if not something_made(work_folder(recipe)):
        return None
    return next((path for path, before in zip(_files(recipe), _noted(recipe), strict=False)
                 if before[0] == path.name and mark(path) not in ("", before[1])), None)  # fmt: skip


def note(recipe: Recipe) -> None:
    """Note the recipe's files in its work folder, before anything is made of them."""
    if not _noted(recipe) or not something_made(work_folder(recipe)):
        noted = [(path.name, mark(path)) for path in _files(recipe)]
        write_atomically(_list(recipe), json.dumps(noted, indent=1).encode())


def _files(recipe: Recipe) -> list[Path]:
    return [*(teacher.path for teacher in recipe.teachers), *(p for p in (recipe.base, recipe.student) if p)]


def _list(recipe: Recipe) -> Path:
    return work_folder(recipe) / "files.json"


def _noted(recipe: Recipe) -> list[tuple[str, str]]:
    """Names and marks; none where nobody has noted them, or they cannot be read."""
    try:
        return [(str(name), str(told)) for name, told in json.loads(_list(recipe).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []
