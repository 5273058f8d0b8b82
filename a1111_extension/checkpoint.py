"""Which DMM file the webui draws with, or why there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modules import shared

from dmm_core.errors import BadInput

from .styles import Book, open_book

Stand = tuple[str, int, int]  # a file, its time and its size
LOADED = "dmm_loaded"  # on the webui's model: the file as it was loaded
_read: dict[Stand, Book | str] = {}  # what was found; the last one alone


def current_path(drawing: bool = False) -> Path | None:
    """The file that the next picture is drawn with, or that the present one is.

    The loaded one, ``sd_model.sd_checkpoint_info.filename`` (modules/sd_models.py); before there is any, the one that
    the webui says is chosen (``select_checkpoint``). Forge loads a chosen one with the next picture only: there it is
    ``model_data.forge_loading_parameters`` that counts, but not for the present picture, for they name the first
    pass's checkpoint while another one draws the hires pass or refines (modules/processing.py, sd_samplers_common.py).
    """
    from modules import sd_models

    chosen = (getattr(_data(), "forge_loading_parameters", None) or {}).get("checkpoint_info")
    loaded = getattr(_model(), "sd_checkpoint_info", None)
    info = (loaded or chosen) if drawing else (chosen or loaded)
    if info is None:
        try:
            info = sd_models.select_checkpoint()
        except Exception:  # no checkpoint at all: the webui says so itself
            info = None
    name = getattr(info, "filename", None)
    return Path(name) if name else None


def current(drawing: bool = False) -> Book | str:
    """That checkpoint's styles; or one line that says why there are none.

    ``drawing``: the model that draws has its place. Before that Forge still loads a rewritten file (``renew``).
    """
    path = current_path(drawing)
    if path is None:
        return "Off: no checkpoint is loaded yet."
    try:
        key = _stand(path)
        if rewritten(key) and (drawing or not _is_forge()):
            again = "load it again (choose another checkpoint, then this one)"
            return f"Off: {path.name} was rewritten after it was loaded; {again}."
        if key not in _read:
            found = _open(path)
            _read.clear()
            _read[key] = found
        return _read[key]
    except OSError:
        return f"Off: {path.name} is gone from the disk."


def remember(sd_model: Any) -> None:
    """``on_model_loaded``: the file as it is now. Kept on the model, of which A1111 may hold several."""
    name = getattr(getattr(sd_model, "sd_checkpoint_info", None), "filename", None)
    try:
        setattr(sd_model, LOADED, _stand(Path(name)) if name else None)
    except OSError:
        setattr(sd_model, LOADED, None)


def rewritten(now: Stand) -> bool:
    """Whether the model in memory is another state of this file. False where nobody told when it was loaded."""
    loaded = getattr(_model(), LOADED, None)
    return loaded is not None and loaded[0] == now[0] and loaded != now


def renew() -> None:
    """``before_process``: let Forge load a rewritten DMM file with this picture, as it loads a newly chosen one.

    ``forge_model_reload`` (modules/sd_models.py) compares the file's name alone; ``need_global_unload`` is what
    ``refresh_model_loading_parameters`` (modules_forge/main_entry.py) sets too: it drops the cached prompts.
    """
    if not _is_forge() or not isinstance(book := current(), Book) or not rewritten(_stand(book.path)):
        return
    from modules import processing

    _data().forge_hash = ""
    processing.need_global_unload = True


def _stand(path: Path) -> Stand:
    about = path.stat()
    return str(path), about.st_mtime_ns, about.st_size


def _data() -> Any:
    from modules import sd_models

    return getattr(sd_models, "model_data", None)


def _model() -> Any:
    """What is loaded; ``shared.sd_model`` would load one in A1111 and reForge."""
    data = _data()
    return data.sd_model if data is not None else shared.sd_model


def _is_forge() -> bool:
    return hasattr(_data(), "forge_hash")


def _open(path: Path) -> Book | str:
    try:
        return open_book(path)
    except BadInput as error:
        if error.path is None:
            return f"Off: {error}"
        return f"Off: {Path(error.path).name} {error.what}. {error.hint}".strip()
