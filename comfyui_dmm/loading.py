"""DMM files through ComfyUI's own loaders: its dtypes, its offloading, its VAE and CLIP.

``dmm_core`` says what the file is and reads the codebook; everything else is handed over as stock loaders take it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.sd
import comfy.supported_models
import comfy.utils
import folder_paths
from comfy.model_base import ModelType

from dmm_core.checkpoint import Checkpoint, keymap, open_checkpoint
from dmm_core.checkpoint.errors import MissingFile
from dmm_core.errors import BadInput

from . import folders, host
from .values import Book, Style, fixed

FOLDERS = ("checkpoints", "diffusion_models")


class AbsentPartError(BadInput, AttributeError):
    """A part that the file does not hold was used; an AttributeError too, so that ``hasattr`` is simply false."""


class Absent:
    """Stands for a CLIP or VAE that the file lacks: whoever uses it is told so."""

    def __init__(self, what: str, path: Path) -> None:
        self._sentence = (f"it holds no {what}", path, f"Load a {what} with its own loader node.")

    def __getattr__(self, name: str) -> Any:
        raise AbsentPartError(*self._sentence)


def choices() -> list[str]:
    """What Load DMM offers: the files of both folders, each name once, and models in diffusers' folder layout."""
    files = (name for folder in FOLDERS for name in folder_paths.get_filename_list(folder))
    return list(dict.fromkeys([*files, *folders.listed()]))


def find(name: str) -> Path:
    """The path of a file or folder that ComfyUI lists. Raises MissingFile for every other name."""
    for folder in FOLDERS:
        if name in folder_paths.get_filename_list(folder) and (path := folder_paths.get_full_path(folder, name)):
            return Path(path)
    if path := folders.listed().get(name):
        return path
    raise MissingFile(Path(name))


def open_dmm(path: Path) -> Checkpoint:
    """The headers of a file or folder. Raises BadInput for what is no checkpoint, or none with styles."""
    checkpoint = open_checkpoint(path)
    if not checkpoint.dmm:
        raise BadInput(
            "is an ordinary checkpoint without styles", path, "Load it with Load Checkpoint, or choose a DMM file."
        )
    return checkpoint


def load(path: Path) -> tuple[Any, Any, Any, Book]:
    """MODEL, CLIP, VAE and codebook; ``Absent`` for a CLIP or VAE that is not in the file.

    Raises:
        BadInput: the file is no DMM file, or cannot be read.
    """
    checkpoint = open_dmm(path)
    codebook = checkpoint.codebook()
    assert codebook is not None
    if path.is_dir():
        sd, metadata = folders.as_single_file(checkpoint), checkpoint.metadata
    else:
        sd, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
        sd = _plain(checkpoint, sd)
    with _known_to_comfy(checkpoint, sd, metadata):
        model, clip, vae, _ = comfy.sd.load_state_dict_guess_config(
            sd, output_vae=bool(checkpoint.vae_config), output_clip=bool(checkpoint.text_configs),
            embedding_directory=folder_paths.get_folder_paths("embeddings"), metadata=metadata,
            te_model_options=_text_options(checkpoint),
        ) or (None,) * 4  # fmt: skip
    if model is None:
        raise BadInput("its UNet is of a kind that this ComfyUI does not know", path, "Update ComfyUI.")
    book = Book.of(checkpoint, codebook)
    host.prepare(model, book, _unfolded_default(book))
    absent_clip = clip is None or len(checkpoint.text_configs) < len(keymap.TEXT[checkpoint.family])
    return (
        model,
        Absent("CLIP", path) if absent_clip else clip,
        vae if checkpoint.vae_config else Absent("VAE", path),
        book,
    )


def _unfolded_default(book: Book) -> Style | None:
    """The default style, where the weights alone do not show it: in the authors' layouts nothing is folded in."""
    default, every = fixed(book, [book.codebook.default], True), fixed(book, [{n: 1.0} for n in book.names], True)
    return default if default.vectors().abs().max() > 1e-4 * every.vectors().abs().max() else None


def _plain(checkpoint: Checkpoint, sd: dict[str, Any]) -> dict[str, Any]:
    """The file's tensors under an ordinary checkpoint's keys: without the codebook, the UNet in LDM names.

    With the codebook's keys inside, stock detection takes a diffusers UNet for SDXL.
    """
    for source in checkpoint.parts["codebook"].values():
        sd.pop(source.key)
    names = keymap.unet_map(checkpoint.shapes("unet"), checkpoint.unet_config)
    for key, source in checkpoint.parts["unet"].items():
        sd[keymap.UNET + names[key]] = sd.pop(source.key)
    return sd


@contextmanager
def _known_to_comfy(checkpoint: Checkpoint, sd: dict[str, Any], metadata: Any) -> Iterator[None]:
    """While entered, ComfyUI's list of models has one for this UNet, where it has none of its own.

    ``SD15`` and ``SDXL`` match full widths only, and ``SD15`` is never v-prediction; all else in them is right.
    """
    models = comfy.supported_models.models
    config = comfy.model_detection.detect_unet_config(sd, keymap.UNET, metadata=metadata)
    match = next((m for m in models if m.matches(config, sd)), None) if config else None
    stock = comfy.supported_models.SD15 if checkpoint.family == "sd15" else comfy.supported_models.SDXL
    v_prediction = checkpoint.prediction_type == "v_prediction"
    if config is None or (match is not None and not (v_prediction and match is comfy.supported_models.SD15)):
        yield
        return

    class Relaxed(stock):  # type: ignore[misc, valid-type]
        unet_config = {key: config.get(key) for key in stock.unet_config}  # noqa: RUF012 - as in ComfyUI's own

        def model_type(self, state_dict: dict[str, Any], prefix: str = "") -> ModelType:
            return ModelType.V_PREDICTION if v_prediction else super().model_type(state_dict, prefix)

    models.insert(0, Relaxed)
    try:
        yield
    finally:
        models.remove(Relaxed)


def _text_options(checkpoint: Checkpoint) -> dict[str, Any]:
    """Sizes of text encoders other than the full ones, as ``SDClipModel`` takes them (comfy/sd1_clip.py)."""
    wanted = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    full = {"clip_l": 768, "clip_g": 1280}
    return {
        f"{config['kind']}_model_config": {key: config[key] for key in wanted}
        for config in checkpoint.text_configs
        if config["hidden_size"] != full[config["kind"]]
    }
