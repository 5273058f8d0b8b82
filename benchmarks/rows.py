"""Tables that grow by a JSON line a run, so that a benchmark can be stopped and called again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def has(path: Path, key: Mapping[str, Any]) -> bool:
    """Whether a line says all of ``key``; what it does not tell counts as None."""
    return any(all(line.get(name) == value for name, value in key.items()) for line in read(path))


def append(path: Path, *lines: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
