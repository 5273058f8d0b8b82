"""YAML as people mean it: ``1e-5`` is a number, and a key that stands twice is an error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from dmm_core.errors import RecipeError


class _Loader(yaml.SafeLoader):
    """SafeLoader; PyYAML's own takes ``1e-5`` for text (YAML 1.1 wants a dot) and the last of two equal keys."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    seen: set[str] = set()
    for key, _ in node.value:
        name = str(key.value)
        if name in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {name} is there twice", key.start_mark)
        seen.add(name)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse_yaml(text: str, path: Path) -> Any:
    """The one document in ``text``.

    Raises:
        RecipeError: not YAML, with the line.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader: makes plain values only
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        hint = "Write Windows paths without quotes, or in single ones." if "escape" in problem else ""
        raise RecipeError(f"{line}{problem}", path, hint) from error
