"""Style files written from a host: the name a user typed, kept inside the folder and off other people's files."""

from __future__ import annotations

import re
from pathlib import Path

from dmm_core.checkpoint import write_style
from dmm_core.checkpoint.reader import read_header
from dmm_core.errors import BadInput

from .values import Style

_FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f]')  # Windows refuses these; a workflow should work everywhere


def target(filename: str, folder: str | Path) -> Path:
    """Where the file goes: ``.safetensors`` is added. Raises BadInput for a name that is none or leads elsewhere."""
    name = filename.strip().replace("\\", "/").removesuffix(".safetensors")
    parts = name.split("/")
    if not all(part.strip(" .") for part in parts):
        raise BadInput(f"{filename!r} is not a file's name", hint="Give a name such as my_style or styles/my_style.")
    if bad := _FORBIDDEN.search(name):
        raise BadInput(f"{filename!r} has the character {bad[0]!r}", hint="Leave it out; Windows does not allow it.")
    return Path(folder).joinpath(*parts[:-1], f"{parts[-1]}.safetensors")


def save_style(style: Style, filename: str, folder: str | Path) -> str:
    """Write the style file of a single style or mix; returns its name inside the folder.

    Raises:
        BadInput: a schedule or a batch, an impossible name, or a file there that is not a style file.
    """
    mix = style.single("saved")
    path = target(filename, folder)
    if path.exists():
        _require_style_file(path)
    used = {name: round(weight, 8) for name, weight in mix.items() if weight}
    vector = style.vectors()[0]
    write_style(path, vector=vector, name=path.stem, mix=used, dmm_hash=style.book.file_hash())
    return path.relative_to(folder).as_posix()


def _require_style_file(path: Path) -> None:
    """So that nobody's LoRA is lost."""
    try:
        kind = read_header(path)[1].get("dmm.kind")
    except BadInput:
        kind = None
    if kind != "style":
        raise BadInput("exists and is not a style file", path, "Choose another name.")
