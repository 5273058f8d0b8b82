"""Model folders for the tests of ``dmm_core.studio``."""

from __future__ import annotations

from pathlib import Path

from dmm_core.studio.folders import Folders
from tests.unit import tiny


def make_folders(place: Path) -> Folders:
    """Three tiny checkpoints, a, c and sub/b; no LoRA."""
    made = Folders((place / "check points",), (place / "lörа",), place / "own")
    for folder in (*made.checkpoints, *made.loras, made.own):
        folder.mkdir()
    for seed, name in ((0, "a"), (50, "sub/b"), (90, "c")):
        path = made.checkpoints[0] / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        tiny.write_tiny(path, seed=seed)
    return made
