"""What recipes of every kind have in common: a file of plain values, and paths that must be there."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmm_core.errors import RecipeError


def read_file(path: Path) -> Any:
    """What a YAML or JSON file holds, as plain values. Raises RecipeError: no such file, no text, no YAML or JSON."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError("is not UTF-8 text", path, "A recipe is a YAML file, not a checkpoint.") from error
    except OSError as error:
        raise RecipeError(f"cannot be read ({error.strerror})", path) from error
    return _parse(text, path)


def check_paths(inputs: Mapping[str, Path | None], out: Path, source: str | Path, work: Path | None = None) -> None:
    """Raise RecipeError unless inputs are there, and ``out`` lies in a folder that can be made and is none of them.

    ``work``: a folder for what is thrown away in the end, in which none of them may lie.
    """
    for key, path in {"out": out, **inputs}.items():
        if path is not None and not _is_text(path):
            raise RecipeError(f"{key}: {str(path)!r} has bytes that are no text", source, "Rename the file or folder.")
        if work is not None and path is not None and work.absolute() in path.absolute().parents:
            raise RecipeError(f"work: {key} lies in it, {path}", source, "Name a folder that holds nothing else.")
    for key, path in inputs.items():
        if path is None:
            continue
        if not path.exists():
            raise RecipeError(f"{key}: there is no {path}", source, _similar_file(path))
        if out.exists() and os.path.samefile(path, out):
            raise RecipeError(f"out: {out} is also {key}, and would be lost", source, "Choose another name.")
    if out.is_dir():
        raise RecipeError(f"out: expected a file's name, got the folder {out}", source)
    for key, path in {"out": out, **({"work": work / "state"} if work is not None else {})}.items():
        nearest = next((folder for folder in path.absolute().parents if folder.exists()), None)
        told = f"{key}: {path if key == 'out' else path.parent} cannot be written"
        if nearest is None or not nearest.is_dir():
            why = "there is no such drive" if nearest is None else f"{nearest} is not a folder"
            raise RecipeError(f"{told}, {why}", source)
        if not os.access(nearest, os.W_OK):
            raise RecipeError(f"{told}, {nearest} is read-only", source)


def _is_text(path: Path) -> bool:
    """Whether the name can be written into a file's metadata; Linux takes any bytes for a name."""
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:
        return False


def _similar_file(path: Path) -> str:
    try:
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.iterdir()], 1)
    except OSError:
        return ""
    return f"Did you mean {near[0]}?" if near else ""


def _parse(text: str, path: Path) -> Any:
    if path.suffix.lower() == ".json":
        try:
            return json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, path))
        except json.JSONDecodeError as error:
            raise RecipeError(f"line {error.lineno} is not valid JSON: {error.msg}", path) from error
    from dmm_core.yaml_reader import parse_yaml

    return parse_yaml(text, path)


def _unique(pairs: list[tuple[Any, Any]], path: Path) -> Mapping[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise RecipeError(f"the key {key} is there twice", path)
        seen[key] = value
    return seen
