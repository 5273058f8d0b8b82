"""Names that users type for new files, and what lies there already. For hosts; nobody's file is lost."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from dmm_core import jobs
from dmm_core.checkpoint.reader import read_header
from dmm_core.errors import BadInput
from dmm_core.recipe import Recipe

_FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f]')  # Windows refuses these; a name should work everywhere


def target(filename: str, folder: str | Path) -> Path:
    """Where the file goes: ``.safetensors`` is added. Raises BadInput for a name that is none or leads elsewhere."""
    name = filename.strip().replace("\\", "/").removesuffix(".safetensors")
    parts = name.split("/")
    if not all(part.strip(" .") for part in parts):
        raise BadInput(f"{filename!r} is not a file's name", hint="Give a name such as my_style or styles/my_style.")
    if bad := _FORBIDDEN.search(name):
        raise BadInput(f"{filename!r} has the character {bad[0]!r}", hint="Leave it out; Windows does not allow it.")
    return Path(folder).joinpath(*parts[:-1], f"{parts[-1]}.safetensors")


def require_style_file(path: Path) -> None:
    """Raises BadInput where something else lies at the path, so that nobody's LoRA is lost."""
    if not path.exists():
        return
    try:
        kind = read_header(path)[1].get("dmm.kind")
    except BadInput:
        kind = None
    if kind != "style":
        raise BadInput("exists and is not a style file", path, "Choose another name.")


def require_ours(out: Path) -> dict[str, str] | None:
    """The metadata of a merge that lies at the output, None if nothing does.

    Raises:
        BadInput: the file there is no merge, and would be lost.
    """
    if not out.exists():
        return None
    try:
        metadata = read_header(out)[1]
    except BadInput:
        metadata = {}
    if "dmm.format" not in metadata:
        raise BadInput("exists and is not a merge", out, "Choose another name.")
    return metadata


def finished(recipe: Recipe, metadata: Mapping[str, str]) -> bool:
    """Whether the file at the output is this very merge: the same recipe, of files that are older."""
    made = recipe.out.stat().st_mtime_ns
    inputs = [teacher.path for teacher in recipe.teachers] + [p for p in (recipe.base, recipe.student) if p]
    try:
        before = jobs.essence(json.loads(metadata["dmm.recipe"]))
        newer = any(path.stat().st_mtime_ns > made for path in inputs)
    except (KeyError, ValueError, OSError):
        return False
    return not newer and before == jobs.essence(json.loads(json.dumps(recipe.to_dict(names_only=True))))


def settled(recipe: Recipe, replace: bool) -> bool:
    """Whether the merge is made already.

    Raises:
        BadInput: another file lies at the output: none of ours, or a merge that is not to be replaced.
    """
    metadata = require_ours(recipe.out)
    if metadata is None:
        return False
    if finished(recipe, metadata):
        return True
    if not replace:
        raise BadInput("is a merge with other settings", recipe.out, "Choose another name, or turn replace on.")
    return False
