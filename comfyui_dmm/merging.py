"""What Merge Checkpoints is asked for: from its widgets to a recipe, and what is made of it already."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.model_management as host
import folder_paths

from dmm_core.asked import Place, recipe_for
from dmm_core.checkpoint.errors import MissingFile
from dmm_core.errors import BadInput
from dmm_core.outputs import target
from dmm_core.recipe import Recipe
from dmm_core.recipe_files import read_file

NONE = "none"
LORA = "lora: "  # before the name of a LoRA in the lists
NODE = "Merge Checkpoints"


# ---------------------------------------------------------------- what is asked for


def choices(loras: bool = True) -> list[str]:
    """What may teach: checkpoints, and LoRAs on top of the base; the base is a checkpoint."""
    found = [LORA + name for name in folder_paths.get_filename_list("loras")] if loras else []
    return [NONE, *folder_paths.get_filename_list("checkpoints"), *found]


def find(name: str) -> Path:
    """The path of a listed checkpoint or LoRA. Raises MissingFile for every other name."""
    if name.startswith(LORA):
        path = folder_paths.get_full_path("loras", name.removeprefix(LORA))
    else:
        path = folder_paths.get_full_path("checkpoints", name)
    if path is None:
        raise MissingFile(Path(name))
    return Path(path)


def output(name: str) -> Path:
    return target(name, folder_paths.get_folder_paths("checkpoints")[0])


def listed(path: Path) -> str:
    """What Load DMM calls a file that was just written."""
    folder_paths.filename_list_cache.pop("checkpoints", None)
    relative = path.relative_to(folder_paths.get_folder_paths("checkpoints")[0])
    return next((n for n in folder_paths.get_filename_list("checkpoints") if Path(n) == relative), str(relative))


def recipe_of(name: str, teachers: list[Path], base: str, preset: str, prompts: str, recipe: str) -> Recipe:
    """The node's recipe: what its recipe file says, and over that what its widgets say.

    Raises:
        BadInput: a file that is not there, fewer than two checkpoints, an impossible name, or a fault in the recipe.
    """
    data: dict[str, Any] = {"preset": preset}
    source: str | Path = NODE
    folder = Path(folder_paths.get_input_directory())
    if recipe.strip():
        source = recipe_file(recipe)
        read = read_file(source)
        if not isinstance(read, Mapping):
            raise BadInput("is no recipe", source, "It begins with keys such as train: and data:.")
        data |= read
        folder = source.absolute().parent
    place = Place(Path(folder_paths.get_folder_paths("checkpoints")[0]), _own(), _device())
    chosen = find(base) if base != NONE else None
    return recipe_for(name, place, teachers, data, prompts=prompts, base=chosen, folder=folder, source=source)


def recipe_file(named: str) -> Path:
    """What the widget names: a whole path, or a file in ComfyUI's input folder."""
    return Path(folder_paths.get_input_directory()) / named.strip().strip('"')


def _own() -> Path:
    return Path(folder_paths.get_user_directory()) / "dmm"


def _device() -> str:
    """ComfyUI's device, where a recipe can name it."""
    device = str(host.get_torch_device())
    return device if device in ("cpu", "mps") or device.startswith(("cuda", "xpu")) else ""


class Made:
    """What this session has made. ComfyUI keeps a node's result while its fingerprint stays as it is: that of a
    finished merge does, until its file is gone or another one.
    """

    def __init__(self) -> None:
        self.stamps: dict[Path, int] = {}
        self.losses: dict[Path, int] = {}

    def note(self, path: Path) -> None:
        self.stamps[path] = path.stat().st_mtime_ns

    def fingerprint(self, path: Path) -> int:
        now = path.stat().st_mtime_ns if path.exists() else None
        if self.stamps.get(path, now) != now:
            del self.stamps[path]
            self.losses[path] = self.losses.get(path, 0) + 1
        return self.losses.get(path, 0)


MADE = Made()
