"""What users did that we cannot work with, told in one line: which file, what is wrong, what to do."""

from __future__ import annotations

from pathlib import Path


class BadInput(ValueError):
    """Base of every error that is the input's fault. ``str(error)`` is one line fit for a user; commands exit with 2.

    Args:
        what: what is wrong, e.g. ``"holds a LoRA, not a checkpoint"``.
        path: the file or folder it is wrong with, if there is one.
        hint: what to do about it.
    """

    def __init__(self, what: str, path: str | Path | None = None, hint: str = "") -> None:
        self.what, self.path, self.hint = what, path, hint
        line = f"{path}: {what}" if path is not None else what
        super().__init__(" ".join((f"{line}. {hint}" if hint else line).split("\n")))


class StyleError(BadInput):
    """An unknown style name, or weights that no mix can be made of."""


class RecipeError(BadInput):
    """A recipe with an unknown key or an impossible value."""


def one_line(error: BaseException) -> str:
    """What any error says, fit for a user."""
    if isinstance(error, BadInput):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's; this module does without torch
        return "the GPU's memory is not enough. Close other programs that use it."
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
