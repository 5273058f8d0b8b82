"""Names that users type for new files, and what lies there already. For hosts; nobody's file is lost."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from dmm_core import jobs
from dmm_core.checkpoint import open_checkpoint
from dmm_core.checkpoint.reader import read_header, sha256
from dmm_core.errors import BadInput
from dmm_core.recipe import FREE, Recipe

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


def finished(recipe: Recipe, metadata: Mapping[str, str], free: Collection[str] = FREE) -> bool:
    """Whether the file at the output is this very merge: the same recipe but for ``free``, of the same teachers.

    Base and student are known by their names alone, and all files are older than the merge.
    """
    made = recipe.out.stat().st_mtime_ns
    inputs = [teacher.path for teacher in recipe.teachers] + [p for p in (recipe.base, recipe.student) if p]
    try:
        before = jobs.essence(json.loads(metadata["dmm.recipe"]), free)
        newer = any(path.stat().st_mtime_ns > made for path in inputs)
    except (KeyError, ValueError, OSError):
        return False
    wanted = jobs.essence(json.loads(json.dumps(recipe.to_dict(names_only=True))), free)
    return not newer and before == wanted and _same_teachers(recipe, metadata)


def _same_teachers(recipe: Recipe, metadata: Mapping[str, str]) -> bool:
    """Whether the teachers have the hashes that the merge has noted. It reads them in whole, hence is asked last."""
    try:
        styles = json.loads(metadata["dmm.styles"])
        noted = [style.get("sha256") for style in styles[len(styles) - len(recipe.teachers) :]]  # the new ones are last
        return noted == [_sha256(teacher.path) for teacher in recipe.teachers]
    except (KeyError, ValueError, AttributeError, TypeError, OSError, BadInput):
        return False


_hashes: dict[tuple[str, int, int], str] = {}


def _sha256(path: Path) -> str:
    """As ``Checkpoint.sha256``, and of a LoRA; a file's is kept while it stays as it is."""
    if path.is_dir():
        return open_checkpoint(path).sha256()
    about = path.stat()
    key = (str(path), about.st_mtime_ns, about.st_size)
    if key not in _hashes:
        _hashes[key] = sha256(path)
    return _hashes[key]


def settled(recipe: Recipe, replace: bool, free: Collection[str] = FREE) -> bool:
    """Whether the merge is made already, also where it might be replaced: ``replace`` is for other settings.

    Raises:
        BadInput: another file lies at the output: none of ours, or a merge that is not to be replaced.
    """
    metadata = require_ours(recipe.out)
    if metadata is None:
        return False
    if finished(recipe, metadata, free):
        return True
    if not replace:
        raise BadInput("is a merge with other settings", recipe.out, "Choose another name, or turn replace on.")
    return False
