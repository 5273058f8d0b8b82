"""diffusers' and transformers' key names → LDM's, one rule a part; the way back is the inverse of the same map.

A map is made for the keys that a model has (``shapes``), so it is a bijection or fails when it is made. Checked in the
tests against diffusers' own converter, ``diffusers.loaders.single_file_utils``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT = {
    "sd15": ("cond_stage_model.transformer.",),
    "sdxl": ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
}

_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
           "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}  # fmt: skip
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
_OPEN_CLIP_LAYER = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
                    "self_attn.out_proj": "attn.out_proj"}  # fmt: skip
_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def _resnet(rest: str) -> str:
    name, _, leaf = rest.rpartition(".")
    return f"{_RESNET[name]}.{leaf}"


def unet_map(keys: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """diffusers key → LDM key (without prefix) of every given UNet key.

    LDM counts blocks through all levels: input block 0 is ``conv_in``, then each level has its layers and, but for the
    last, a downsampler; each output level has one layer more, and its upsampler comes last in that layer's block.
    """
    layers = config["layers_per_block"]
    attends = [kind.startswith("CrossAttn") for kind in config["up_block_types"]]
    return {key: _unet_key(key, layers, attends) for key in keys}


def _unet_key(key: str, layers: int, attends: list[bool]) -> str:
    name, _, leaf = key.rpartition(".")
    if name in _UNET_ENDS:
        return f"{_UNET_ENDS[name]}.{leaf}"
    if match := _MIDDLE.fullmatch(key):
        kind, number, rest = match[1], int(match[2]), match[3]
        return f"middle_block.1.{rest}" if kind == "attentions" else f"middle_block.{2 * number}.{_resnet(rest)}"
    match = _BLOCK.fullmatch(key)
    if not match:
        raise KeyError(key)
    side, level, kind, number, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if side == "down":
        index = 1 + level * (layers + 1) + (layers if kind == "downsamplers" else number)
        block = f"input_blocks.{index}"
    else:
        index = level * (layers + 1) + (layers if kind == "upsamplers" else number)
        block = f"output_blocks.{index}"
    if kind == "resnets":
        return f"{block}.0.{_resnet(rest)}"
    if kind == "attentions":
        return f"{block}.1.{rest}"
    if kind == "downsamplers":
        return f"{block}.0.op.{leaf}"
    return f"{block}.{2 if attends[level] else 1}.conv.{leaf}"


def vae_map(keys: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """diffusers key → LDM key (without prefix) of every given VAE key, KL or TAESD."""
    if config["kind"] == "taesd":
        return {key: _taesd_key(key) for key in keys}
    return {key: _kl_key(key, len(config["block_out_channels"])) for key in keys}


def _taesd_key(key: str) -> str:
    """LDM's decoder begins with a clamp, diffusers' does that outside: its numbers are one lower."""
    half, layers, number, rest = key.split(".", 3)
    if layers != "layers":
        raise KeyError(key)
    return f"taesd_{half}.{int(number) + (half == 'decoder')}.{rest}"


def _kl_key(key: str, levels: int) -> str:
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", key):
        return f"{match[1]}.mid.attn_1.{_VAE_ATTENTION[match[2]]}.{match[3]}"
    if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.resnets\.(\d)\.(.+)", key):
        return f"{match[1]}.mid.block_{int(match[2]) + 1}.{match[3]}"
    if match := re.fullmatch(r"encoder\.down_blocks\.(\d+)\.(resnets|downsamplers)\.(\d+)\.(.+)", key):
        part = f"block.{match[3]}" if match[2] == "resnets" else "downsample"
        return f"encoder.down.{match[1]}.{part}.{match[4]}"
    if match := re.fullmatch(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.(.+)", key):
        part = f"block.{match[3]}" if match[2] == "resnets" else "upsample"
        return f"decoder.up.{levels - 1 - int(match[1])}.{part}.{match[4]}"  # LDM counts from the finest level
    return key


def vae_is_matrix(key: str) -> bool:
    """Whether diffusers holds this VAE weight as (c, c) where LDM has a 1×1 convolution (c, c, 1, 1)."""
    return ".attentions.0.to_" in key and key.endswith(".weight")


def open_clip_map(keys: Iterable[str]) -> dict[str, str]:
    """transformers key → open_clip key. Queries, keys and values of a layer share one name: stacked in that order."""
    return {key: _open_clip_key(key) for key in keys}


def _open_clip_key(key: str) -> str:
    if key in _OPEN_CLIP:
        return _OPEN_CLIP[key]
    match = _LAYER.fullmatch(key)
    if not match:
        raise KeyError(key)
    layer, name, leaf = match.groups()
    if name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        return f"transformer.resblocks.{layer}.attn.in_proj_{leaf}"
    return f"transformer.resblocks.{layer}.{_OPEN_CLIP_LAYER[name]}.{leaf}"


def stacked_row(key: str) -> int | None:
    """0, 1 or 2 for a query, key or value projection of a text encoder, else None."""
    match = re.search(r"\.self_attn\.([qkv])_proj\.", key)
    return "qkv".index(match[1]) if match else None
