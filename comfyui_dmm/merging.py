"""What Merge Checkpoints is asked for: from its widgets to a recipe, and what is made of it already."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.model_management as host
import folder_paths

from dmm_core import jobs
from dmm_core.checkpoint.errors import MissingFile
from dmm_core.checkpoint.reader import read_header
from dmm_core.errors import BadInput
from dmm_core.files import write_atomically
from dmm_core.recipe import Recipe, recipe_from_dict
from dmm_core.recipe_files import read_file

from . import files

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
    return files.target(name, folder_paths.get_folder_paths("checkpoints")[0])


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
        source = folder / recipe.strip().strip('"')
        read = read_file(source)
        if not isinstance(read, Mapping):
            raise BadInput("is no recipe", source, "It begins with keys such as train: and data:.")
        data |= read
        folder = source.absolute().parent
    if teachers:
        data["teachers"] = [str(path) for path in teachers]
    if base != NONE:
        data["base"] = str(find(base))
    if not isinstance(data.get("teachers"), list) or len(data["teachers"]) < 2:
        raise BadInput("a merge needs at least two checkpoints", hint="Choose them in checkpoint_1 and checkpoint_2.")
    out = output(name)
    own = Path(folder_paths.get_user_directory()) / "dmm"
    relative = out.relative_to(folder_paths.get_folder_paths("checkpoints")[0])
    data |= {"out": str(out), "work": str(own / relative.with_name(out.stem + ".work"))}
    data["train"] = _on_this_device(data.get("train"))
    if prompts.strip():
        text = prompts.strip().encode("utf-8") + b"\n"  # a name by its content: other prompts, another recipe
        path = own / f"prompts-{hashlib.sha256(text).hexdigest()[:12]}.txt"
        if not path.exists():
            write_atomically(path, text)
        data["data"] = {**(data.get("data") or {}), "prompts": str(path)}
    return recipe_from_dict(data, folder, source)


def _on_this_device(train: Any) -> Any:
    """ComfyUI's device, unless the recipe names one."""
    device = str(host.get_torch_device())
    known = device in ("cpu", "mps") or device.startswith(("cuda", "xpu"))
    return {"device": device, **(train or {})} if known and isinstance(train, Mapping | None) else train


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
    inputs = [teacher.path for teacher in recipe.teachers] + ([recipe.base] if recipe.base else [])
    try:
        before = jobs.essence(json.loads(metadata["dmm.recipe"]))
        newer = any(path.stat().st_mtime_ns > made for path in inputs)
    except (KeyError, ValueError, OSError):
        return False
    return not newer and before == jobs.essence(json.loads(json.dumps(recipe.to_dict(names_only=True))))


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
