"""Write diffusers folders: ordinary ones, and the authors' DMM layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dmm_core.checkpoint import metadata as meta
from dmm_core.checkpoint.save import State, checked_unet, text_parts, vae_parts
from dmm_core.checkpoint.shapes import codebook_shapes
from dmm_core.checkpoint.writer import Lazy, write_json, write_safetensors
from dmm_core.style import Codebook

WRITTEN_FOR = "0.30.0"  # diffusers' version in the configs; it only warns if the reader's is older


def write_diffusers(
    folder: str | Path, *, family: str, unet: State, vae: State | None = None, text_encoders: Sequence[State] = (),
    metadata: Mapping[str, str] | None = None, prediction_type: str = "epsilon", codebook: Codebook | None = None,
    vae_config: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Write a diffusers folder: unet/, vae/, text_encoder(_2)/, scheduler/ with their configs, and model_index.json.

    Every file is written atomically, the UNet last but for the index. ``metadata`` goes into the UNet's file.

    Args:
        codebook: makes it the authors' layout: ``model_embedding`` and the style MLP among the UNet's keys, which is
            ``add_embedding`` for SD1.5 and ``add_embedding2`` for SDXL. Nothing is folded.

    Raises:
        MissingKeys, WrongShape, UnsupportedModel, NonFinite
    """
    folder = Path(folder)
    config, shapes = checked_unet(folder, family, unet)
    if vae:
        found, vae_shapes = vae_parts(folder, family, vae)
        kind = found.pop("kind")
        found |= {key: value for key, value in (vae_config or {}).items() if key in ("scaling_factor", "shift_factor")}
        name = "AutoencoderTiny" if kind == "taesd" else "AutoencoderKL"
        _component(folder / "vae", "diffusion_pytorch_model", {k: vae[k] for k in vae_shapes}, found, _diffusers(name))
    pooled = 0
    for number, state in enumerate(text_encoders):
        found, text_shapes = text_parts(folder, number, state)
        pooled = found["projection_dim"] if found.pop("kind") == "clip_g" else 0
        cls = ("CLIPTextModel", "CLIPTextModelWithProjection")[number]
        name = f"text_encoder{'_2' if number else ''}"
        about = {"architectures": [cls], "model_type": "clip_text_model"}
        _component(folder / name, "model", {k: state[k] for k in text_shapes}, found, about)
    if family == "sdxl" and pooled:
        config["addition_time_embed_dim"] = (config["projection_class_embeddings_input_dim"] - pooled) // 6
    if size := meta.read_resolution(metadata or {}):
        config["sample_size"] = max(1, size // 8)
    tensors: dict[str, Tensor | Lazy] = {key: unet[key] for key in shapes}
    if codebook is not None:
        mlp = "add_embedding2." if family == "sdxl" else "add_embedding."
        for key in codebook_shapes(len(codebook), codebook.dim):
            tensors[key.replace("add_embedding.", mlp)] = codebook.state_dict()[key]
        kind = "model_merge_xl" if family == "sdxl" else "model_merge"
        config |= {"addition_embed_type": kind, "num_models": len(codebook)}
    write_json(folder / "scheduler" / "scheduler_config.json", _scheduler(prediction_type))
    strings = {"format": "pt", **meta.modelspec(family, prediction_type, metadata or {}, folder.name)}
    _component(folder / "unet", "diffusion_pytorch_model", tensors, config, _diffusers("UNet2DConditionModel"), strings)
    write_json(folder / "model_index.json", _index(folder, family))
    return folder


def _diffusers(name: str) -> dict[str, Any]:
    return {"_class_name": name, "_diffusers_version": WRITTEN_FOR}


def _component(
    folder: Path, stem: str, tensors: Mapping[str, Tensor | Lazy], config: Mapping[str, Any], about: Mapping[str, Any],
    strings: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    write_safetensors(folder / f"{stem}.safetensors", tensors, strings or {"format": "pt"})
    write_json(folder / "config.json", {**config, **about})


def _scheduler(prediction_type: str) -> dict[str, Any]:
    return {
        **_diffusers("DDIMScheduler"), "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
        "prediction_type": prediction_type,
    }  # fmt: skip


def _index(folder: Path, family: str) -> dict[str, Any]:
    """What diffusers' pipelines look for first. The tokenizer, the same for all models, is the reader's own."""
    index: dict[str, Any] = _diffusers("StableDiffusionPipeline" if family == "sd15" else "StableDiffusionXLPipeline")
    index["unet"] = ["diffusers", "UNet2DConditionModel"]
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    for name, cls in (("text_encoder", "CLIPTextModel"), ("text_encoder_2", "CLIPTextModelWithProjection")):
        if (folder / name / "config.json").is_file():
            index[name] = ["transformers", cls]
    vae = folder / "vae" / "config.json"
    if vae.is_file():
        index["vae"] = [
            "diffusers",
            "AutoencoderTiny" if "AutoencoderTiny" in vae.read_text(encoding="utf-8") else "AutoencoderKL",
        ]
    return index
