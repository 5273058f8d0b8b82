"""Tiny random models for tests: state dicts in diffusers' and transformers' names, and whole files, in milliseconds.

Sizes by default: UNet channels (64, 128), context 64, one layer a level; TAESD; CLIP of width 64 with one layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmm_core.checkpoint import write_checkpoint, write_dmm
from dmm_core.checkpoint.shapes import Shapes, text_shapes, unet_shapes, vae_shapes
from dmm_core.style import Codebook

State = dict[str, Tensor]
NAMES = ("ink", "néon", "水彩")
CHANNELS = (64, 128)
TIME_IDS = 6  # SDXL: two sizes and a position, each of two numbers


def unet_config(family: str = "sd15", channels: Sequence[int] = CHANNELS, context: int | None = None) -> dict[str, Any]:
    """kwargs of ``UNet2DConditionModel``. SDXL: no attention on the first level, two transformer blocks on the last."""
    xl = family == "sdxl"
    attends = [bool(i) if xl else i + 1 < len(channels) for i in range(len(channels))]
    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": list(channels),
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "transformer_layers_per_block": [1] * (len(channels) - 1) + [2 if xl else 1],
        "cross_attention_dim": context or (128 if xl else 64),
        "use_linear_projection": xl,
        "attention_head_dim": [c // 64 for c in channels] if xl else 8,
    }
    if xl:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 24,
            "projection_class_embeddings_input_dim": 64 + TIME_IDS * 24,
        }
    return config


def vae_config(kind: str = "taesd") -> dict[str, Any]:
    if kind == "taesd":
        blocks: dict[str, Any] = {"num_encoder_blocks": [1, 3, 3, 3], "num_decoder_blocks": [3, 3, 3, 1]}
        widths = {"encoder_block_out_channels": [64] * 4, "decoder_block_out_channels": [64] * 4}
        return {"kind": kind, "in_channels": 3, "out_channels": 3, "latent_channels": 4, **blocks, **widths}
    sizes: dict[str, Any] = {"block_out_channels": [32, 64], "layers_per_block": 1, "latent_channels": 4}
    return {"kind": kind, "in_channels": 3, "out_channels": 3, **sizes}


def text_config(kind: str = "clip_l", vocab: int = 49408) -> dict[str, Any]:
    return {
        "kind": kind, "vocab_size": vocab, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
        "num_attention_heads": 1, "max_position_embeddings": 77, "projection_dim": 64,
        "hidden_act": "quick_gelu" if kind == "clip_l" else "gelu",
    }  # fmt: skip


def random_state(shapes: Shapes, seed: int = 0, dtype: torch.dtype = torch.float16) -> State:
    """Weights scaled by their fan-in, norms near 1, small biases: models of these give outputs of order 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            value = noise * (0.3 if "embedding.weight" in key else torch.Size(shape[1:]).numel() ** -0.5)
        else:
            value = (1 + 0.1 * noise) if key.endswith("weight") else 0.1 * noise
        state[key] = value.to(dtype)
    return state


def unet(family: str = "sd15", seed: int = 0, dtype: torch.dtype = torch.float16, **sizes: Any) -> State:
    return random_state(unet_shapes(unet_config(family, **sizes)), seed, dtype)


def vae(kind: str = "taesd", seed: int = 1, dtype: torch.dtype = torch.float16) -> State:
    return random_state(vae_shapes(vae_config(kind)), seed, dtype)


def text_encoder(kind: str = "clip_l", seed: int = 2, dtype: torch.dtype = torch.float16, vocab: int = 49408) -> State:
    return random_state(text_shapes(text_config(kind, vocab)), seed, dtype)


def text_encoders(
    family: str = "sd15", seed: int = 2, dtype: torch.dtype = torch.float16, vocab: int = 49408
) -> list[State]:
    both = ("clip_l", "clip_g") if family == "sdxl" else ("clip_l",)
    return [text_encoder(kind, seed + i, dtype, vocab) for i, kind in enumerate(both)]


def codebook(
    names: Sequence[str] = NAMES, dim: int = 4 * CHANNELS[0], seed: int = 3, default: Mapping[str, float] | None = None
) -> Codebook:
    """A codebook whose styles differ: also the last layer, which a new one has at zero, is random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        book = Codebook(names, dim, default)
        torch.nn.init.normal_(book.add_embedding.linear_2.weight, std=dim**-0.5)
        torch.nn.init.normal_(book.add_embedding.linear_2.bias, std=0.5)
    return book.requires_grad_(False)


def model(
    family: str = "sd15", vae_kind: str = "taesd", seed: int = 0, vocab: int = 49408, dtype: torch.dtype = torch.float16
) -> dict[str, Any]:
    """The keyword arguments that all writers take: family, unet, vae, text_encoders."""
    return {
        "family": family,
        "unet": unet(family, seed, dtype),
        "vae": vae(vae_kind, seed + 1, dtype),
        "text_encoders": text_encoders(family, seed + 2, dtype, vocab),
    }


def write_tiny(path: Path, **choices: Any) -> Path:
    """An ordinary LDM checkpoint; choices as of ``model``."""
    return write_checkpoint(path, **model(**choices), metadata={"modelspec.resolution": "64x64"})


def write_tiny_dmm(path: Path, names: Sequence[str] = NAMES, **choices: Any) -> Path:
    """A DMM file of random styles; choices as of ``model``."""
    return write_dmm(path, **model(**choices), codebook=codebook(names), resolution=64)


def write_clip(folder: Path) -> Path:
    """A random CLIP of pictures and texts, in a folder as the hub has it: 32 pixels, embeddings of 16 numbers."""
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(
            CLIPConfig(
                text_config={**sizes, "eos_token_id": 49407}, projection_dim=16,
                vision_config={**sizes, "image_size": 32, "patch_size": 8},
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    return folder
