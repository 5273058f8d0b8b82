"""Architecture and sizes from keys and tensor shapes alone: configurations for diffusers and transformers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from dmm_core.checkpoint.errors import MissingKeys, UnsupportedModel, WrongShape
from dmm_core.checkpoint.shapes import Shapes

SCALING = {"sd15": 0.18215, "sdxl": 0.13025}  # latents = encoder output × this
RESOLUTION = {"sd15": 512, "sdxl": 1024}
_NAMES = {  # layout → first convolution, middle attention, size conditioning
    "ldm": ("input_blocks.0.0.weight", "middle_block.1", "label_emb.0.0.weight", "out.2.weight"),
    "diffusers": ("conv_in.weight", "mid_block.attentions.0", "add_embedding.linear_1.weight", "conv_out.weight"),
}


@dataclass
class Seen:
    """One part's shapes, in the file's names without their prefix; errors name a key in full."""

    path: Path
    prefix: str
    part: str
    shapes: Shapes

    def need(self, key: str, dims: int) -> tuple[int, ...]:
        if key not in self.shapes:
            raise MissingKeys(self.path, self.part, [self.prefix + key])
        if len(self.shapes[key]) != dims:
            raise WrongShape(self.path, self.prefix + key, ["?"] * dims, self.shapes[key])  # type: ignore[list-item]
        return self.shapes[key]

    def numbers(self, pattern: str) -> set[int]:
        """The number that group 1 of the pattern finds at the start of keys."""
        compiled = re.compile(pattern)
        return {int(match[1]) for key in self.shapes if (match := compiled.match(key))}

    def count(self, pattern: str) -> int:
        return max(self.numbers(pattern), default=-1) + 1


@dataclass
class Level:
    channels: int
    layers: int
    depth: int  # transformer blocks in each attention; 0 without attention


def _ldm_levels(seen: Seen) -> list[Level]:
    levels = [Level(0, 0, 0)]
    for i in range(1, seen.count(r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{i}.0.op.weight" in seen.shapes or f"input_blocks.{i}.0.op.bias" in seen.shapes:
            levels.append(Level(0, 0, 0))
            continue
        level = levels[-1]
        channels = seen.need(f"input_blocks.{i}.0.out_layers.3.weight", 4)[0]
        level.channels, level.layers = level.channels or channels, level.layers + 1
        level.depth = max(level.depth, seen.count(rf"input_blocks\.{i}\.1\.transformer_blocks\.(\d+)\."))
    return levels


def _diffusers_levels(seen: Seen) -> list[Level]:
    levels = []
    for b in range(seen.count(r"down_blocks\.(\d+)\.")):
        layers = seen.count(rf"down_blocks\.{b}\.resnets\.(\d+)\.")
        channels = seen.need(f"down_blocks.{b}.resnets.0.conv2.weight", 4)[0]
        depth = seen.count(rf"down_blocks\.{b}\.attentions\.\d+\.transformer_blocks\.(\d+)\.")
        levels.append(Level(channels, layers, depth))
    return levels


def unet_config(seen: Seen, layout: str) -> tuple[str, dict[str, Any]]:
    """Family, and what ``diffusers.UNet2DConditionModel`` takes.

    Raises:
        UnsupportedModel: SD2, the SDXL refiner, inpainting models; MissingKeys, WrongShape
    """
    conv_in, middle, sizes, conv_out = _NAMES[layout]
    first, into = seen.need(conv_in, 4)[:2]
    levels = _ldm_levels(seen) if layout == "ldm" else _diffusers_levels(seen)
    if empty := [b for b, level in enumerate(levels) if not level.layers]:
        raise MissingKeys(seen.path, "UNet", [f"{seen.prefix}(level {empty[0]} of the encoder)"])
    context = seen.need(f"{middle}.transformer_blocks.0.attn2.to_k.weight", 2)[1]
    proj_in = f"{middle}.proj_in.weight"
    linear = len(seen.shapes.get(proj_in, ())) == 2
    family = _family(seen, sizes in seen.shapes, linear, context, first, into)
    middle_depth = seen.count(re.escape(middle) + r"\.transformer_blocks\.(\d+)\.")
    if levels[-1].depth not in (0, middle_depth):
        raise UnsupportedModel(
            seen.path,
            f"a UNet whose middle has {middle_depth} transformer blocks and whose last level has {levels[-1].depth}",
        )
    channels = [level.channels for level in levels]
    attends = [bool(level.depth) for level in levels]
    depths = [*(max(1, level.depth) for level in levels[:-1]), middle_depth]
    config: dict[str, Any] = {
        "sample_size": RESOLUTION[family] // 8,
        "in_channels": into,
        "out_channels": seen.need(conv_out, 4)[0],
        "block_out_channels": channels,
        "layers_per_block": max(level.layers for level in levels),
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "transformer_layers_per_block": depths,
        "cross_attention_dim": context,
        "use_linear_projection": linear,
        # diffusers reads this as the NUMBER of heads: 8 for SD1.5, heads 64 wide for SDXL
        "attention_head_dim": 8 if family == "sd15" else [max(1, c // 64) for c in channels],
    }
    if family == "sdxl":
        width = seen.need(sizes, 2)[1]
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": width,
        }
    return family, config


def _family(seen: Seen, sized: bool, linear: bool, context: int, first: int, into: int) -> str:
    if into != 4:
        raise UnsupportedModel(seen.path, f"a model with {into} input channels (inpainting or editing)")
    if context == 1024 or (linear and not sized):
        raise UnsupportedModel(seen.path, "Stable Diffusion 2")
    if sized and first == 384:
        raise UnsupportedModel(seen.path, "the SDXL refiner")
    return "sdxl" if sized else "sd15"


def vae_config(seen: Seen, layout: str, family: str) -> dict[str, Any]:
    """``kind`` and what ``AutoencoderKL`` or ``AutoencoderTiny`` takes."""
    tiny = "taesd_" if layout == "ldm" else r"encoder\.layers\."
    if seen.numbers(rf"{tiny}(?:encoder\.|decoder\.)?(\d+)\."):
        return _taesd_config(seen, layout)
    blocks = r"encoder\.down\.(\d+)\." if layout == "ldm" else r"encoder\.down_blocks\.(\d+)\."
    layer = "encoder.down.{}.block.{}" if layout == "ldm" else "encoder.down_blocks.{}.resnets.{}"
    levels = seen.count(blocks)
    channels = [seen.need(layer.format(b, 0) + ".conv2.weight", 4)[0] for b in range(levels)]
    layers = max(
        (seen.count(re.escape(layer.format(b, "#")).replace(r"\#", r"(\d+)") + r"\.") for b in range(levels)), default=0
    )
    if not channels:
        raise MissingKeys(seen.path, "VAE", [seen.prefix + layer.format(0, 0) + ".conv2.weight"])
    return {
        "kind": "kl",
        "in_channels": seen.need("encoder.conv_in.weight", 4)[1],
        "out_channels": seen.need("decoder.conv_out.weight", 4)[0],
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latent_channels": seen.need("decoder.conv_in.weight", 4)[1],
        "sample_size": RESOLUTION[family],
        "scaling_factor": SCALING[family],
        "use_quant_conv": any(key.startswith("quant_conv.") for key in seen.shapes),
        "use_post_quant_conv": any(key.startswith("post_quant_conv.") for key in seen.shapes),
    }


def _taesd_config(seen: Seen, layout: str) -> dict[str, Any]:
    ldm = layout == "ldm"
    encoder, decoder = ("taesd_encoder.", "taesd_decoder.") if ldm else ("encoder.layers.", "decoder.layers.")
    down = sorted(seen.numbers(re.escape(encoder) + r"(\d+)\.weight"))
    up = [i - ldm for i in sorted(seen.numbers(re.escape(decoder) + r"(\d+)\.weight"))]
    if len(down) < 2 or len(up) < 2:
        raise MissingKeys(seen.path, "VAE", [f"{seen.prefix}{encoder if len(down) < 2 else decoder}0.weight"])
    width, into = seen.need(f"{encoder}0.weight", 4)[:2]
    gaps = [b - a for a, b in pairwise(up)]
    # each stage: its blocks, then (but for the last) upsampling and a convolution; the first begins with an activation
    decoder_blocks = [gaps[0] - 3, *(g - 2 for g in gaps[1:-1]), gaps[-1] - 1] if len(gaps) > 1 else [gaps[0] - 2]
    return {
        "kind": "taesd",
        "in_channels": into,
        "out_channels": seen.need(f"{decoder}{up[-1] + ldm}.weight", 4)[0],
        "latent_channels": seen.need(f"{decoder}{int(ldm)}.weight", 4)[1],
        "encoder_block_out_channels": [width] * (len(down) - 1),
        "decoder_block_out_channels": [width] * len(gaps),
        "num_encoder_blocks": [b - a - 1 for a, b in pairwise(down)],
        "num_decoder_blocks": decoder_blocks,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
    }


def text_config(seen: Seen, kind: str, open_clip: bool) -> dict[str, Any]:
    """``kind`` and what ``transformers.CLIPTextConfig`` takes."""
    if open_clip:
        token, position = "token_embedding.weight", "positional_embedding"
        layers, wide = r"transformer\.resblocks\.(\d+)\.", "transformer.resblocks.0.mlp.c_fc.weight"
    else:
        stem = "text_model." if any(key.startswith("text_model.") for key in seen.shapes) else ""
        token, position = f"{stem}embeddings.token_embedding.weight", f"{stem}embeddings.position_embedding.weight"
        layers, wide = re.escape(stem) + r"encoder\.layers\.(\d+)\.", f"{stem}encoder.layers.0.mlp.fc1.weight"
    vocabulary, hidden = seen.need(token, 2)
    projection = hidden
    if kind == "clip_g":
        shape = seen.need("text_projection" if open_clip else "text_projection.weight", 2)
        projection = shape[1] if open_clip else shape[0]
    return {
        "kind": kind,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": seen.need(wide, 2)[0],
        "num_hidden_layers": seen.count(layers),
        "num_attention_heads": max(1, hidden // 64),
        "max_position_embeddings": seen.need(position, 2)[0],
        "hidden_act": "quick_gelu" if kind == "clip_l" else "gelu",
        "projection_dim": projection,
        # 2 tells transformers that the end token is the highest number in a prompt; true of any vocabulary
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
