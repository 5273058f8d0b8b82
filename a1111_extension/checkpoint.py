"""Which DMM file the webui draws with, or why there is none."""

from __future__ import annotations

from pathlib import Path

from modules import shared

from dmm_core.errors import BadInput

from .styles import Book, open_book

_read: dict[tuple[str, int, int], Book | str] = {}  # file, time and size → what was found; the last one alone


def current_path() -> Path | None:
    """The file that the next picture is drawn with.

    The loaded one, ``sd_model.sd_checkpoint_info.filename`` (modules/sd_models.py); before there is any, the one that
    the webui says is chosen (``select_checkpoint``). Forge loads a chosen one with the next picture only: there it is
    ``model_data.forge_loading_parameters`` that counts.
    """
    from modules import sd_models

    data = getattr(sd_models, "model_data", None)
    info = (getattr(data, "forge_loading_parameters", None) or {}).get("checkpoint_info")
    if info is None:  # ``shared.sd_model`` would load a model in A1111 and reForge
        info = getattr(data.sd_model if data is not None else shared.sd_model, "sd_checkpoint_info", None)
    if info is None:
        try:
            info = sd_models.select_checkpoint()
        except Exception:  # no checkpoint at all: the webui says so itself
            info = None
    name = getattr(info, "filename", None)
    return Path(name) if name else None


def current() -> Book | str:
    """That checkpoint's styles; or one line that says why there are none."""
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
