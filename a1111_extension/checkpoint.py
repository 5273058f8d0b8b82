"""Which DMM file the webui has loaded, or why there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modules import shared

from dmm_core.errors import BadInput

from .styles import Book, open_book

_read: dict[tuple[str, int, int], Book | str] = {}  # file, time and size → what was found; the last one alone


def current_path() -> Path | None:
    """The loaded checkpoint's file: ``sd_model.sd_checkpoint_info.filename`` (modules/sd_models.py).

    In Forge a placeholder without one stands in its place until the first picture; then the chosen one counts, if the
    webui says which that is (``sd_models.select_checkpoint``).
    """
    info = getattr(_model(), "sd_checkpoint_info", None)
    if info is None:
        try:
            from modules.sd_models import select_checkpoint

            info = select_checkpoint()
        except Exception:  # no checkpoint at all: the webui says so itself
            info = None
    name = getattr(info, "filename", None)
    return Path(name) if name else None


def _model() -> Any:
    """The loaded model, without loading one: ``shared.sd_model`` does that in A1111 and reForge."""
    from modules import sd_models

    data = getattr(sd_models, "model_data", None)
    return data.sd_model if data is not None else shared.sd_model


def current() -> Book | str:
    """The loaded checkpoint's styles; or one line that says why there are none."""
    path = current_path()
    if path is None:
        return "Off: no checkpoint is loaded yet."
    try:
        about = path.stat()
        key = (str(path), about.st_mtime_ns, about.st_size)
        if key not in _read:
            found = _open(path)
            _read.clear()
            _read[key] = found
        return _read[key]
    except OSError:
        return f"Off: {path.name} is gone from the disk."


def _open(path: Path) -> Book | str:
    try:
        return open_book(path)
    except BadInput as error:
        if error.path is None:
            return f"Off: {error}"
        return f"Off: {Path(error.path).name} {error.what}. {error.hint}".strip()
