"""Write models: LDM single file, diffusers folder, DMM file, style file. All deterministic, atomic, and free of NaN."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmm_core.checkpoint import keymap
from dmm_core.checkpoint import metadata as meta
from dmm_core.checkpoint.detect import SCALING, Seen, text_config, unet_config, vae_config
from dmm_core.checkpoint.errors import BadMetadata, MissingKeys, UnsupportedModel, WrongShape
from dmm_core.checkpoint.shapes import CODEBOOK, Shapes, text_shapes, unet_shapes, vae_shapes
from dmm_core.checkpoint.writer import Lazy, write_safetensors
from dmm_core.style import Codebook, Mix

State = Mapping[str, Tensor]
TIME_BIAS = "time_embedding.linear_2.bias"


def write_checkpoint(
    path: str | Path, *, family: str, unet: State, vae: State | None = None, text_encoders: Sequence[State] = (),
    metadata: Mapping[str, str] | None = None, prediction_type: str = "epsilon", codebook: Codebook | None = None,
    vae_config: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Write an LDM single file from tensors in diffusers' and transformers' names, each in the type it has.

    Args:
        text_encoders: CLIP-L; for SDXL also CLIP-G after it.
        metadata: stays as it is, but for what follows from the model (architecture, prediction type, hash).
        codebook: written as it is, nothing folded: the authors' single-file layout. For ours there is ``write_dmm``.
        vae_config: where given, its ``scaling_factor`` and ``shift_factor`` for a TAESD; 1 and 0 otherwise.

    Raises:
        MissingKeys, WrongShape, UnsupportedModel, NonFinite: nothing is written then.
    """
    path = Path(path)
    tensors: dict[str, Tensor | Lazy] = {}
    config, shapes = checked_unet(path, family, unet)
    for key, name in keymap.unet_map(shapes, config).items():
        tensors[keymap.UNET + name] = unet[key]
    if codebook is not None:
        _checked_codebook(path, codebook, unet)
        tensors |= {keymap.UNET + key: tensor for key, tensor in codebook.state_dict().items()}
    if vae:
        tensors |= _ldm_vae(path, family, vae, vae_config or {})
    for number, state in enumerate(text_encoders):
        tensors |= _ldm_text(path, family, number, state)
    if prediction_type == "v_prediction":
        tensors["v_pred"] = torch.empty(0)  # by this key ComfyUI and others know such a model
    write_safetensors(path, tensors, meta.modelspec(family, prediction_type, metadata or {}, path.stem))
    return path


def write_dmm(
    path: str | Path, *, family: str, unet: State, vae: State | None, text_encoders: Sequence[State],
    codebook: Codebook, style_info: Sequence[Mapping[str, Any]] | None = None,
    recipe: object = None, report: object = None, prediction_type: str = "epsilon",
    title: str | None = None, resolution: str | int | None = None,
    extra_metadata: Mapping[str, str] | None = None, vae_config: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Write a DMM file: an ordinary checkpoint that shows the default style, and the codebook that changes it.

    With s0 the default style's vector, ``time_embed.2.bias`` + s0 and ``linear_2.bias`` − s0 are stored, both in
    float32 whatever type the rest has, so that their sum survives; the arguments are not changed. A codebook that is
    folded already stays as it is.

    Args:
        style_info: one entry a style: name, teacher (file name), sha256, optionally thumbnail (data URI ≤ 16 KiB).
        recipe, report: anything JSON can hold.
        extra_metadata: more strings; title, date and resolution are taken from here where not given.

    Raises:
        StyleCount, BadMetadata, MissingKeys, WrongShape, UnsupportedModel, NonFinite
    """
    path = Path(path)
    info = [{"name": name} for name in codebook.names] if style_info is None else style_info
    metadata = {**(extra_metadata or {}), "dmm.format": meta.FORMAT}
    metadata["dmm.styles"] = meta.styles_json(path, codebook.names, info)
    metadata["dmm.default_style"] = meta.to_json(codebook.default)
    for key, value in (("dmm.recipe", recipe), ("dmm.report", report)):
        if value is not None:
            metadata[key] = _json(path, key, value)
    if title is not None:
        metadata["modelspec.title"] = title
    if resolution is not None:
        metadata["modelspec.resolution"] = f"{resolution}x{resolution}" if isinstance(resolution, int) else resolution
    teachers = [str(entry.get("teacher") or entry["name"]) for entry in info]
    metadata.setdefault("modelspec.merged_from", ", ".join(teachers))
    if TIME_BIAS not in unet:
        raise MissingKeys(path, "UNet", [TIME_BIAS])
    _checked_codebook(path, codebook, unet)
    folded, bias = fold(codebook, unet[TIME_BIAS])
    return write_checkpoint(
        path, family=family, unet={**unet, TIME_BIAS: bias}, vae=vae, text_encoders=text_encoders, metadata=metadata,
        prediction_type=prediction_type, codebook=folded, vae_config=vae_config,
    )  # fmt: skip


@torch.no_grad()
def fold(codebook: Codebook, bias: Tensor) -> tuple[Codebook, Tensor]:
    """Copies in float32 of a codebook with its default style moved into the UNet's time bias (d,), and of that bias.

    Computed in float64. A default style that is zero to rounding is left alone, so that folding twice changes nothing.
    """
    exact = copy.deepcopy(codebook).double().cpu()
    layer = exact.add_embedding.linear_2
    hidden = torch.nn.functional.silu(
        exact.add_embedding.linear_1(exact.weights(exact.default) @ exact.model_embedding.weight)
    )
    rounding = 1e-6 * (hidden.abs() @ layer.weight.abs().T + layer.bias.abs() + 1e-30)
    total = bias.detach().cpu().double()
    unfolded = bool((exact.default_style().abs() > rounding).any())
    before = layer.bias.clone()
    if unfolded:
        exact.fold()
    folded = exact.float().requires_grad_(False)
    stored = folded.add_embedding.linear_2.bias
    for _ in range(4 if unfolded else 0):  # what float32 leaves over: aim for a default style of exactly 0
        stored -= folded.default_style()
    return folded, (total + (before - stored.double())).float() if unfolded else total.float()


def write_style(path: str | Path, *, vector: Tensor, name: str, mix: Mix, dmm_hash: str) -> Path:
    """Write a style file: a LoRA-format file that makes a stock loader, at strength 1, show one style of a DMM file.

    Args:
        vector: s − s0, (d,): ``codebook.style(mix)`` of a codebook as read from a DMM file, where s0 is folded in.
        mix: the weights that the vector was made of.
        dmm_hash: sha256 of the DMM file it belongs to.

    Raises:
        NonFinite, BadMetadata
    """
    path = Path(path)
    if vector.ndim != 1:
        raise ValueError(f"a style vector has one dimension, got shape {tuple(vector.shape)}")
    if not all(math.isfinite(weight) for weight in mix.values()):
        raise BadMetadata(path, "dmm.style_weights", f"must hold finite numbers, got {dict(mix)}")
    tensors = {
        # The zero matrix is for A1111, which ignores a bias that comes without its weight.
        "lora_unet_time_embed_2.diff": torch.zeros(1),
        "lora_unet_time_embed_2.diff_b": vector.detach().cpu().float(),
    }
    strings = {
        "dmm.format": meta.FORMAT,
        "dmm.kind": "style",
        "dmm.style_name": name,
        "dmm.style_weights": meta.to_json({key: float(weight) for key, weight in mix.items()}),
        "dmm.model_sha256": dmm_hash,
        "modelspec.title": name,
    }
    write_safetensors(path, tensors, strings)
    return path


def checked_unet(path: Path, family: str, unet: State) -> tuple[dict[str, Any], Shapes]:
    """Configuration and shapes of UNet tensors in diffusers' names, checked: complete, and of this family."""
    seen = Seen(path, "", "UNet", {key: tuple(tensor.shape) for key, tensor in unet.items()})
    found, config = unet_config(seen, "diffusers")
    if found != family:
        raise UnsupportedModel(path, f"to be written as {family} but its UNet is {found}")
    shapes = unet_shapes(config)
    complete(path, "UNet", unet, shapes)
    return config, shapes


def complete(path: Path, part: str, state: State, shapes: Shapes) -> None:
    """Raises MissingKeys or WrongShape unless the tensors have all of the shapes; what is too much is not written."""
    if missing := [key for key in shapes if key not in state]:
        raise MissingKeys(path, part, missing)
    for key, shape in shapes.items():
        if tuple(state[key].shape) != shape:
            raise WrongShape(path, key, shape, tuple(state[key].shape))


def vae_parts(path: Path, family: str, vae: State) -> tuple[dict[str, Any], Shapes]:
    """Configuration and shapes of VAE tensors in diffusers' names, checked."""
    config = vae_config(Seen(path, "", "VAE", {key: tuple(t.shape) for key, t in vae.items()}), "diffusers", family)
    shapes = vae_shapes(config)
    complete(path, "VAE", vae, shapes)
    return config, shapes


def text_parts(path: Path, number: int, state: State) -> tuple[dict[str, Any], Shapes]:
    """Configuration and shapes of a text encoder's tensors in transformers' names, checked; number 1 is CLIP-G."""
    seen = Seen(path, "", "text encoder", {key: tuple(t.shape) for key, t in state.items()})
    config = text_config(seen, ("clip_l", "clip_g")[number], open_clip=False)
    shapes = text_shapes(config)
    complete(path, "text encoder", state, shapes)
    return config, shapes


def _checked_codebook(path: Path, codebook: Codebook, unet: State) -> None:
    width = tuple(unet[TIME_BIAS].shape)
    if width != (codebook.dim,):
        raise WrongShape(path, CODEBOOK, (len(codebook), *width), (len(codebook), codebook.dim))


def _json(path: Path, key: str, value: object) -> str:
    try:
        return meta.to_json(value)
    except (TypeError, ValueError) as error:
        raise BadMetadata(path, key, f"cannot be written as JSON ({error})") from error


def _ldm_vae(path: Path, family: str, vae: State, given: Mapping[str, Any]) -> dict[str, Tensor | Lazy]:
    config, shapes = vae_parts(path, family, vae)
    tensors: dict[str, Tensor | Lazy] = {}
    for key, name in keymap.vae_map(shapes, config).items():
        matrix = config["kind"] == "kl" and keymap.vae_is_matrix(key)
        tensors[keymap.VAE + name] = vae[key][:, :, None, None] if matrix else vae[key]
    if config["kind"] == "taesd":
        tensors |= taesd_scale(family, given)
    return tensors


def taesd_scale(family: str, config: Mapping[str, Any]) -> State:
    """How ComfyUI scales a TAESD's latents, from diffusers' ``scaling_factor`` and ``shift_factor``."""
    scale = SCALING[family] / float(config.get("scaling_factor") or 1.0)
    shift = 0.0 - float(config.get("shift_factor") or 0.0) / scale
    return {f"{keymap.VAE}vae_scale": torch.tensor(scale), f"{keymap.VAE}vae_shift": torch.tensor(shift)}


def _ldm_text(path: Path, family: str, number: int, state: State) -> dict[str, Tensor | Lazy]:
    prefixes = keymap.TEXT[family]
    if number >= len(prefixes):
        raise ValueError(f"{family} has {len(prefixes)} text encoder(s)")
    _, shapes = text_parts(path, number, state)
    if number == 0:
        return {prefixes[0] + key: state[key] for key in shapes}
    tensors: dict[str, Tensor | Lazy] = {}
    stacks: dict[str, list[Tensor]] = {}
    for key, name in keymap.open_clip_map(shapes).items():
        if keymap.stacked_row(key) is None:
            tensors[prefixes[1] + name] = state[key].T if key == "text_projection.weight" else state[key]
        else:
            stacks.setdefault(name, [torch.empty(0)] * 3)[keymap.stacked_row(key) or 0] = state[key]
    return tensors | {prefixes[1] + name: torch.cat(rows) for name, rows in stacks.items()}
