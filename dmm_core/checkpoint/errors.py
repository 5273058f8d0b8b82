"""What can be wrong with a model file, each with its own name and one clear line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dmm_core.errors import BadInput

CONVERT = (
    "Pickles can run any code when opened. Save it as .safetensors with a tool you trust "
    "(ComfyUI: CheckpointSave; A1111: Checkpoint Merger, 'No interpolation', safetensors) and give that file."
)


class CheckpointError(BadInput):
    """Base of what can be wrong with a model file or folder."""


class MissingFile(CheckpointError):
    """Nothing is there."""

    def __init__(self, path: str | Path) -> None:
        super().__init__("there is no such file or folder", path, "Check the path.")


class PickleRefused(CheckpointError):
    """A pickle, by its name or by its first bytes; it is never opened as one."""

    def __init__(self, path: str | Path) -> None:
        super().__init__("is a pickle, not a safetensors file", path, CONVERT)


class NotSafetensors(CheckpointError):
    """The header is not one of the safetensors format."""

    def __init__(self, path: str | Path, why: str) -> None:
        super().__init__(f"is not a safetensors file ({why})", path, "Give a .safetensors file or a diffusers folder.")


class TruncatedFile(CheckpointError):
    """Shorter than its header says: an interrupted download or copy."""

    def __init__(self, path: str | Path, expected: int, got: int) -> None:
        what = f"is cut off: it should have {expected:,} bytes and has {got:,}"
        super().__init__(what, path, "Download or copy it again.")


class NoUnetFolder(CheckpointError):
    """A folder that is no diffusers model."""

    def __init__(self, path: str | Path, why: str = "holds no unet/ folder with .safetensors weights") -> None:
        super().__init__(why, path, "Give a diffusers model folder (with unet/, vae/, text_encoder/) or a single file.")


class NotACheckpoint(CheckpointError):
    """A safetensors file of another kind: a VAE alone, an embedding, anything without a UNet."""


class LoraGiven(NotACheckpoint):
    """A LoRA where a whole checkpoint is needed."""

    def __init__(self, path: str | Path) -> None:
        super().__init__("holds a LoRA, not a checkpoint", path, "Give the full model, or name the LoRA as a LoRA.")


class UnsupportedModel(CheckpointError):
    """A whole model, of an architecture that is neither SD1.5 nor SDXL base."""

    def __init__(self, path: str | Path, name: str) -> None:
        super().__init__(f"is {name}; only SD1.5 and SDXL base models work here", path, "Give one of those.")


class ScaledWeights(CheckpointError):
    """8-bit codes and scales beside them. The codes alone are no weights."""

    def __init__(self, path: str | Path, key: str) -> None:
        what = f"holds 8-bit codes with scales ({key}), not weights"
        super().__init__(what, path, "Give the fp16, bf16 or fp32 version of this model.")


class MissingKeys(CheckpointError):
    """Tensors that the architecture needs are not there. ``keys`` are named as in the file."""

    def __init__(self, path: str | Path | None, part: str, keys: Sequence[str]) -> None:
        self.part, self.keys = part, tuple(keys)
        count = "1 tensor" if len(keys) == 1 else f"{len(keys)} tensors"
        what = f"its {part} lacks {count}: {keys[0]}{' …' if len(keys) > 1 else ''}"
        super().__init__(what, path, "The file is incomplete; get it again or save it again from its source.")


class WrongShape(CheckpointError):
    """A tensor whose shape does not fit the rest of the model."""

    def __init__(self, path: str | Path | None, key: str, expected: Sequence[int], got: Sequence[int]) -> None:
        self.key, self.expected, self.got = key, tuple(expected), tuple(got)
        what = f"{key} has shape {list(got)} where the rest of the model needs {list(expected)}"
        super().__init__(what, path, "The file is damaged or of another architecture.")


class StyleCount(CheckpointError):
    """Not as many style names as rows in the codebook."""

    def __init__(self, path: str | Path | None, names: int, rows: int) -> None:
        super().__init__(
            f"names {names} styles but its codebook has {rows} rows", path, "Metadata and tensors must be of one model."
        )


class NonFinite(CheckpointError):
    """A tensor with NaN or infinity. ``key`` names it."""

    def __init__(self, path: str | Path | None, key: str, count: int) -> None:
        self.key, self.count = key, count
        values = "1 value that is" if count == 1 else f"{count} values that are"
        super().__init__(f"{key} has {values} NaN or infinite", path, "Such a model makes black pictures; use another.")


class BadMetadata(CheckpointError):
    """Metadata of ours that cannot be read, or that must not be written."""

    def __init__(self, path: str | Path | None, key: str, why: str) -> None:
        super().__init__(f"the metadata {key} {why}", path)
