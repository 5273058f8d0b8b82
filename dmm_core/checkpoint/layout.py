"""Which tensors an LDM single file of a model has, and what each holds; for work that goes tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmm_core.checkpoint import keymap, parts
from dmm_core.checkpoint.checkpoint import Checkpoint
from dmm_core.checkpoint.save import taesd_scale

LEFTOVERS = ("model_ema.",)  # of training: a second UNet that nothing reads


@dataclass(frozen=True)
class Stored:
    """A tensor of the file: its shape, and the (part, key) that it holds: one, or three stacked on each other."""

    shape: tuple[int, ...]
    holds: tuple[tuple[str, str], ...]
    transposed: bool = False


def ldm_layout(ck: Checkpoint) -> dict[str, Stored]:
    """LDM key → what it holds, for every part of a model but the codebook; whatever layout the model came in."""
    held: dict[str, dict[int, tuple[str, str]]] = {}
    stored: dict[str, tuple[tuple[int, ...], bool]] = {}
    for part in ck.parts:
        if part == "codebook":
            continue
        candidates = _candidates(ck, part)
        for key, wanted in ck.shapes(part).items():
            source = candidates(key)[0]
            held.setdefault(source.key, {})[source.row or 0] = (part, key)
            stored[source.key] = (
                (*source.stored_shape(wanted), *((1, 1) if source.matrix else ())),
                source.transposed,
            )
    return {
        name: Stored(shape, tuple(held[name][row] for row in sorted(held[name])), transposed)
        for name, (shape, transposed) in stored.items()
    }


def _candidates(ck: Checkpoint, part: str) -> parts.Candidates:
    shapes = ck.shapes(part)
    if part == "unet":
        return parts.unet_candidates("ldm", keymap.UNET, shapes, ck.unet_config)
    if part == "vae":
        return parts.vae_candidates("ldm", shapes, ck.vae_config or {})
    second = ck.text_configs[int(part.removeprefix("text_encoder_"))]["kind"] == "clip_g"
    return parts.text_candidates(second, keymap.TEXT[ck.family][int(second)], shapes)


def others(ck: Checkpoint) -> list[str]:
    """Keys of an LDM file outside all parts, whose tensors stay as they are: ``position_ids``, ``v_pred`` …"""
    if ck.layout != "ldm":
        return []
    used = {source.key for part in ck.parts.values() for source in part.values()}
    return [key for key in ck.tensors if key not in used and not key.startswith(LEFTOVERS)]


def implied(ck: Checkpoint) -> dict[str, Tensor]:
    """Small tensors that an LDM file has for what a diffusers folder says in its configurations."""
    marks = {"v_pred": ck.prediction_type == "v_prediction", "ztsnr": ck.zero_snr}
    found: dict[str, Tensor] = {key: torch.empty(0) for key, marked in marks.items() if marked}
    if ck.vae_config and ck.vae_config["kind"] == "taesd":
        found |= taesd_scale(ck.family, ck.vae_config)
    return found
