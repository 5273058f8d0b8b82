"""Where a page may read and write: models by their names in the lists, and nothing outside of those folders."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from dmm_core.asked import Place
from dmm_core.checkpoint.reader import read_header
from dmm_core.checkpoint.shapes import CODEBOOK
from dmm_core.errors import BadInput
from dmm_core.outputs import target

SUFFIX = ".safetensors"
Listing = Callable[[], Iterable[str | Path]]


@dataclass(frozen=True)
class Folders:
    """Folders of checkpoints and LoRAs, the first of each for what is written; ``own`` is the page's.

    Names are paths inside a folder, with ``/``. ``listing``: the host's own list of checkpoints; without one the
    folders are searched. In either case what lies outside, or leads there by a link, is not listed.
    """

    checkpoints: tuple[Path, ...]
    loras: tuple[Path, ...]
    own: Path
    listing: Listing | None = None

    def list_checkpoints(self) -> list[str]:
        return self._names(self.checkpoints, self.listing)

    def list_loras(self) -> list[str]:
        return self._names(self.loras)

    def list_students(self) -> list[str]:
        """Those of the checkpoints that are DMM files, by their headers."""
        return [name for name in self.list_checkpoints() if _has_styles(self.checkpoint(name))]

    def checkpoint(self, name: str | None) -> Path:
        """The file of that name. Raises BadInput: none of that name, or a name that leads elsewhere."""
        return _find(name, self.checkpoints, "checkpoint")

    def lora(self, name: str | None) -> Path:
        return _find(name, self.loras, "LoRA")

    def model(self, name: str | None) -> Path:
        """A checkpoint, or else a LoRA."""
        try:
            return self.checkpoint(name)
        except Missing:
            return self.lora(name)

    def new_checkpoint(self, name: str) -> Path:
        """Where a checkpoint of that name is to be written. Raises BadInput: an impossible name."""
        return _inside(target(name, self.checkpoints[0]), self.checkpoints[0], name)

    def new_lora(self, name: str) -> Path:
        return _inside(target(name, self.loras[0]), self.loras[0], name)

    def report(self, name: str) -> Path:
        """The folder for a file's evaluation."""
        return _inside(target(name, self.own / "evaluations").with_suffix(""), self.own, name)

    def place(self, device: str = "") -> Place:
        return Place(self.checkpoints[0], self.own, device)

    def require_known(self, path: Path) -> None:
        """Raises BadInput for a path outside of all these folders."""
        if not any(within(path, root) for root in (*self.checkpoints, *self.loras, self.own)):
            raise BadInput("lies outside of the model folders", path, "Put it there.")

    def _names(self, roots: tuple[Path, ...], listing: Listing | None = None) -> list[str]:
        found: dict[str, None] = {}
        for root in roots:
            for path in map(Path, listing()) if listing else _files(root):
                if path.suffix.lower() == SUFFIX and path.is_relative_to(root) and within(path, root):
                    found.setdefault(path.relative_to(root).as_posix())
        return sorted(found, key=str.casefold)


class Missing(BadInput):
    """There is no file of a name; it may have been deleted since it was listed."""


def _files(root: Path) -> Iterable[Path]:
    for folder, folders, names in os.walk(root):  # no links to folders: they lead out
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def within(path: Path, root: Path) -> bool:
    """Whether the path, all links followed, lies in the folder."""
    return path.resolve().is_relative_to(root.resolve())


def _find(name: str | None, roots: tuple[Path, ...], what: str) -> Path:
    text = (name or "").strip()
    if not text:
        raise BadInput(f"no {what} is chosen", hint="Choose one of the list.")
    slashed = text.replace("\\", "/")
    parts = PurePosixPath(slashed).parts
    if ".." in parts or slashed.startswith("/") or PureWindowsPath(text).drive or not text.isprintable():
        raise BadInput(f"{text!r} leads out of the folder of {what}s", hint="Choose one of the list.")
    for root in roots:
        path = root.joinpath(*parts)
        if os.path.lexists(path):
            if not within(path, root):
                raise BadInput(f"{text!r} is a link that leads out of the folder of {what}s", hint="Move the file in.")
            if path.is_file():
                return path
    raise Missing(f"there is no {what} {text!r}", hint="Was it deleted? Refresh the lists.")


def _inside(path: Path, root: Path, name: str) -> Path:
    if not within(path, root):
        raise BadInput(f"{name!r} leads out of {root.name} by a link", hint="Choose another name.")
    return path


_known: dict[tuple[str, int, int], bool] = {}


def _has_styles(path: Path) -> bool:
    """By the names of its tensors: ours and the published layout alike."""
    try:
        about = path.stat()
        key = (str(path), about.st_mtime_ns, about.st_size)
        if key not in _known:
            _known[key] = any(name.endswith(CODEBOOK) for name in read_header(path)[0])
        return _known[key]
    except (BadInput, OSError):
        return False
