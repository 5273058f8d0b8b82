"""Style files written from a host: the name a user typed, kept inside the folder and off other people's files."""

from __future__ import annotations

from pathlib import Path

from dmm_core.checkpoint import write_style
from dmm_core.outputs import require_style_file, target

from .values import Style


def save_style(style: Style, filename: str, folder: str | Path) -> str:
    """Write the style file of a single style or mix; returns its name inside the folder.

    Raises:
        BadInput: a schedule or a batch, an impossible name, or a file there that is not a style file.
    """
    mix = style.single("saved")
    path = target(filename, folder)
    require_style_file(path)
    used = {name: round(weight, 8) for name, weight in mix.items() if weight}
    vector = style.vectors()[0]
    write_style(path, vector=vector, name=path.stem, mix=used, dmm_hash=style.book.file_hash())
    return path.relative_to(folder).as_posix()
