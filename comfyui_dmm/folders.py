"""Models in diffusers' folder layout, the authors' published form: listed as ComfyUI lists them, read as a single file.

ComfyUI's own loader of such folders (comfy/diffusers_load.py) does not know a UNet that has a codebook inside.
"""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths
import torch
from torch import Tensor

from dmm_core.checkpoint import Checkpoint
from dmm_core.checkpoint.layout import implied, ldm_layout
from dmm_core.checkpoint.parts import read_part

INDEX = "model_index.json"  # tells a model's folder from others


def listed() -> dict[str, Path]:
    """Name → folder, of all models in ``models/diffusers``; names and order as in ComfyUI's ``DiffusersLoader``."""
    found: dict[str, Path] = {}
    for top in folder_paths.get_folder_paths("diffusers"):
        for root, _, names in os.walk(top, followlinks=True):
            if INDEX in names:
                found.setdefault(os.path.relpath(root, top), Path(root))
    return found


def stamp(path: Path) -> str:
    """Changes when a file, or a file of a folder, is rewritten. Raises OSError where there is nothing."""
    files = sorted(path.rglob("*.*")) if path.is_dir() else [path]
    return " ".join(f"{about.st_mtime_ns} {about.st_size}" for about in (file.stat() for file in files))


def as_single_file(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors that a single file of this model has, in their own types; without the codebook."""
    sd = implied(checkpoint)
    held = {part: read_part(checkpoint.tensors, place) for part, place in checkpoint.parts.items()}
    for name, stored in ldm_layout(checkpoint).items():
        pieces = [held[part].pop(key) for part, key in stored.holds]
        tensor = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        sd[name] = (tensor.T if stored.transposed else tensor).contiguous().reshape(stored.shape)
    return sd
