"""Style files written from a host: the name a user typed, kept inside the folder and off other people's files."""

from __future__ import annotations

from pathlib import Path

from dmm_core.checkpoint import write_style
from dmm_core.errors import BadInput
from dmm_core.outputs import require_style_file, target

from .values import Style


def save_style(style: Style, filename: str, folder: str | Path) -> str:
    """Write the style file of a single style or mix; returns its name inside the folder.

    Raises:
        BadInput: a schedule or a batch, an impossible name, a file there that is not a style file, or one in use.
    """
    mix = style.single("saved")
    path = target(filename, folder)
    require_style_file(path)
    used = {name: round(weight, 8) for name, weight in mix.items() if weight}
    vector = style.vectors()[0]
    try:
        write_style(path, vector=vector, name=path.stem, mix=used, dmm_hash=style.book.file_hash())
    except PermissionError:  # Windows, where LoraLoader has the file mapped as long as it holds it (nodes.py)
        raise BadInput("cannot be written", path, "If a Load LoRA node has it loaded, choose another name.") from None
    return path.relative_to(folder).as_posix()
