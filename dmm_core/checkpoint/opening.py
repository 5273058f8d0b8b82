"""Open a model file or folder: find out what it is, and where each tensor lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dmm_core.checkpoint import keymap, kinds, parts
from dmm_core.checkpoint import metadata as meta
from dmm_core.checkpoint.checkpoint import Checkpoint
from dmm_core.checkpoint.detect import SCALING, Seen, text_config, unet_config, vae_config
from dmm_core.checkpoint.errors import MissingFile, MissingKeys, NoUnetFolder, UnsupportedModel, WrongShape
from dmm_core.checkpoint.parts import Source, locate
from dmm_core.checkpoint.reader import Tensors, refuse_pickle, weight_files
from dmm_core.checkpoint.shapes import CODEBOOK, codebook_shapes, text_shapes, unet_shapes, vae_shapes

FOLDERS = ("unet", "vae", "text_encoder", "text_encoder_2")


def open_tensors(path: Path) -> tuple[Tensors, tuple[Path, ...]]:
    """The tensors at a path, and the UNet's file(s). A folder's keys begin with the component: ``unet/conv_in.weight``.

    Raises:
        MissingFile, PickleRefused, NotSafetensors, TruncatedFile, NoUnetFolder
    """
    refuse_pickle(path)
    if not path.exists():
        raise MissingFile(path)
    if not path.is_dir():
        return Tensors.open(path), (path,)
    unet_files = weight_files(path / "unet")
    if not unet_files:
        if weight_files(path):
            raise NoUnetFolder(path, "is one component of a diffusers model, or no model")
        raise NoUnetFolder(path)
    merged = Tensors({})
    for folder in FOLDERS:
        if files := weight_files(path / folder):
            part = Tensors.open(*files)
            merged.info |= {f"{folder}/{key}": info for key, info in part.info.items()}
            if folder == "unet":
                merged.metadata = part.metadata
    return merged, tuple(unet_files)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a .safetensors file or a diffusers folder; reads headers (and TAESD's scale) only.

    Raises:
        CheckpointError: one of its named kinds, each with one line that says what is wrong and what to do.
    """
    path = Path(path)
    tensors, files = open_tensors(path)
    layout, prefix = kinds.require_unet(path, tensors)
    if any(key.startswith("cond_stage_model.model.") for key in tensors):
        raise UnsupportedModel(path, "Stable Diffusion 2")
    if any(key.startswith("conditioner.embedders.0.model.") for key in tensors):
        raise UnsupportedModel(path, "the SDXL refiner")
    seen = _seen(tensors, path, prefix, "UNet")
    styles = _style_keys(seen)
    for key in styles.values():
        del seen.shapes[key]
    family, config = unet_config(seen, layout)
    ck = Checkpoint(path, layout, family, tensors, config, metadata=dict(tensors.metadata), weights_files=files)
    shapes = unet_shapes(config)
    ck.parts["unet"] = locate(tensors, path, "UNet", shapes, parts.unet_candidates(layout, prefix, shapes, config))
    _add_vae(ck)
    _add_text_encoders(ck)
    _add_codebook(ck, prefix, styles)
    _settle(ck)
    return ck


def _seen(tensors: Tensors, path: Path, prefix: str, part: str) -> Seen:
    start = len(prefix)
    return Seen(
        path, prefix, part, {key[start:]: info.shape for key, info in tensors.info.items() if key.startswith(prefix)}
    )


def _style_keys(seen: Seen) -> dict[str, str]:
    """Codebook key → the file's key without prefix. The published SDXL layout's style MLP is ``add_embedding2``."""
    if CODEBOOK not in seen.shapes:
        return {}
    mlp = "add_embedding2." if any(key.startswith("add_embedding2.") for key in seen.shapes) else "add_embedding."
    rows, dim = seen.need(CODEBOOK, 2)
    wanted = {key: key.replace("add_embedding.", mlp) for key in codebook_shapes(rows, dim)}
    if missing := [seen.prefix + key for key in wanted.values() if key not in seen.shapes]:
        raise MissingKeys(seen.path, "codebook", missing)
    for key, shape in codebook_shapes(rows, dim).items():
        if seen.shapes[wanted[key]] != shape:
            raise WrongShape(seen.path, seen.prefix + wanted[key], shape, seen.shapes[wanted[key]])
    return wanted


def _add_vae(ck: Checkpoint) -> None:
    prefix = keymap.VAE if ck.layout == "ldm" else "vae/"
    seen = _seen(ck.tensors, ck.path, prefix, "VAE")
    if not seen.shapes:
        return
    config = vae_config(seen, ck.layout, ck.family)
    shapes = vae_shapes(config)
    ck.parts["vae"] = locate(ck.tensors, ck.path, "VAE", shapes, parts.vae_candidates(ck.layout, shapes, config))
    if config["kind"] == "taesd" and f"{prefix}vae_scale" in ck.tensors:
        # ComfyUI decodes (latents / family's factor - shift) × scale; diffusers latents / scaling_factor + shift_factor
        scale = float(ck.tensors[f"{prefix}vae_scale"])
        shift = float(ck.tensors[f"{prefix}vae_shift"]) if f"{prefix}vae_shift" in ck.tensors else 0.0
        factor = SCALING[ck.family] / scale
        config["scaling_factor"] = 1.0 if abs(factor - 1) < 1e-3 else factor
        config["shift_factor"] = -shift * scale if shift else 0.0
    ck.vae_config = config


def _add_text_encoders(ck: Checkpoint) -> None:
    folders = ("text_encoder/", "text_encoder_2/")
    prefixes = keymap.TEXT[ck.family] if ck.layout == "ldm" else folders[: 1 if ck.family == "sd15" else 2]
    for number, (prefix, kind) in enumerate(zip(prefixes, ("clip_l", "clip_g"), strict=False)):
        seen = _seen(ck.tensors, ck.path, prefix, ("text encoder", "second text encoder")[number])
        if not seen.shapes:
            continue
        open_clip = ck.layout == "ldm" and kind == "clip_g"
        config = text_config(seen, kind, open_clip)
        shapes = text_shapes(config)
        part = locate(ck.tensors, ck.path, seen.part, shapes, parts.text_candidates(open_clip, prefix, shapes))
        ck.parts[f"text_encoder_{len(ck.text_configs)}"] = part
        ck.text_configs.append(config)


def _add_codebook(ck: Checkpoint, prefix: str, styles: dict[str, str]) -> None:
    if not styles:
        if "dmm.styles" in ck.metadata:
            raise MissingKeys(ck.path, "codebook", [prefix + CODEBOOK])
        return
    ck.parts["codebook"] = {key: Source(prefix + name) for key, name in styles.items()}
    rows, dim = ck.tensors.shape(prefix + CODEBOOK)
    if dim != ck.style_width:
        raise WrongShape(ck.path, prefix + CODEBOOK, (rows, ck.style_width), (rows, dim))
    ck.dmm = "ours" if "dmm.format" in ck.metadata else "authors"
    if ck.metadata.get("dmm.format", meta.FORMAT) != meta.FORMAT:
        raise UnsupportedModel(ck.path, f"a DMM file of format {ck.metadata['dmm.format']}, newer than this program")
    ck.style_info = meta.read_styles(ck.path, ck.metadata, rows, ck.family, dim)
    ck.default_style = meta.read_default(ck.path, ck.metadata, ck.styles)


def _settle(ck: Checkpoint) -> None:
    """What follows from several parts together, or from what is beside the tensors."""
    widths = [config["hidden_size"] for config in ck.text_configs]
    context = ck.unet_config["cross_attention_dim"]
    if len(widths) == (1 if ck.family == "sd15" else 2) and sum(widths) != context:
        source = next(s for key, s in ck.parts["unet"].items() if key.endswith("attn2.to_k.weight"))
        stored = ck.tensors.shape(source.key)
        raise WrongShape(ck.path, source.key, (stored[0], sum(widths)), stored)
    if ck.family == "sdxl":
        pooled = next((c["projection_dim"] for c in ck.text_configs if c["kind"] == "clip_g"), 0)
        left = ck.unet_config["projection_class_embeddings_input_dim"] - pooled
        if pooled and left > 0 and left % 6 == 0:  # six sizes, each embedded like a timestep
            ck.unet_config["addition_time_embed_dim"] = left // 6
    if resolution := meta.read_resolution(ck.metadata):
        ck.unet_config["sample_size"] = max(1, resolution // 8)
    scheduler = unet_json = vae_json = {}
    if ck.path.is_dir():
        scheduler = _json(ck.path / "scheduler" / "scheduler_config.json")
        unet_json, vae_json = _json(ck.path / "unet" / "config.json"), _json(ck.path / "vae" / "config.json")
    if str(scheduler.get("_class_name", "")).startswith("EDM"):
        raise UnsupportedModel(ck.path, "an EDM model, such as CosXL or Playground 2.5")
    if isinstance(unet_json.get("sample_size"), int):
        ck.unet_config["sample_size"] = unet_json["sample_size"]
    if ck.vae_config:
        for key in ("scaling_factor", "shift_factor"):
            if isinstance(vae_json.get(key), (int, float)):
                ck.vae_config[key] = float(vae_json[key])
    named = meta.prediction_type(ck.metadata.get("modelspec.prediction_type"))
    named = named or meta.prediction_type(scheduler.get("prediction_type"))
    told = (scheduler.get("rescale_betas_zero_snr") is True, ck.metadata.get("ss_zero_terminal_snr") == "True")
    ck.zero_snr = "ztsnr" in ck.tensors or any(told)
    if "v_pred" in ck.tensors and (named is None or ck.family == "sdxl"):  # as ComfyUI, whatever the metadata say
        named = "v_prediction"
    ck.prediction_type = named or "epsilon"


def _json(path: Path) -> dict[str, Any]:
    """A diffusers config beside the weights; nothing depends on its being there."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
