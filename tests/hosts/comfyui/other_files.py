"""Files of other tools, for the mini family's base: a LoRA and a ControlNet, untrained but of visible effect."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dmm_core.checkpoint.keymap import UNET
from dmm_core.checkpoint.writer import write_safetensors
from tests.hosts.comfyui.harness import ROOT

LORA, CONTROLNET = "my-lora.safetensors", "my-controlnet.safetensors"  # as the example workflow names them
CONTROL_LORA = "my-control-lora.safetensors"
LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1"
RANK = 4
HINT = (3, 16, 16, 32, 32, 96, 96, 256)  # channels of a ControlNet's hint encoder, whatever the UNet (arXiv:2302.05543)


def base_unet() -> dict[str, Tensor]:
    """The base's UNet under its file's own names, which are LDM's."""
    from safetensors.torch import load_file

    tensors = load_file(ROOT / "mini_family" / "weights" / "base.safetensors")
    return {key.removeprefix(UNET): value for key, value in tensors.items() if key.startswith(UNET)}


def write_lora(path: Path) -> Path:
    """All four matrices of one attention layer in kohya's names: up (out, r), down (r, in), alpha."""
    generator = torch.Generator().manual_seed(11)
    tensors: dict[str, Tensor] = {}
    for name in ("to_q", "to_k", "to_v", "to_out_0"):
        tensors[f"{LAYER}_{name}.lora_up.weight"] = torch.randn(64, RANK, generator=generator) * 0.3
        tensors[f"{LAYER}_{name}.lora_down.weight"] = torch.randn(RANK, 64, generator=generator) * 0.3
        tensors[f"{LAYER}_{name}.alpha"] = torch.tensor(float(RANK))
    write_safetensors(path, {key: value.half() for key, value in tensors.items()}, {"ss_network_dim": str(RANK)})
    return path


def write_controlnet(path: Path) -> Path:
    """The UNet's encoder once more, with a hint encoder and outputs that are not zero.

    In LDM names: ComfyUI takes these at any width, heads of 64 channels (``BASE`` in comfy/supported_models_base.py),
    but diffusers' names at full widths alone (``unet_config_from_diffusers_unet`` in comfy/model_detection.py).
    """
    unet = base_unet()
    tensors = {
        key: value for key, value in unet.items() if key.startswith(("input_blocks", "middle_block", "time_emb"))
    }
    tensors |= _control_parts(len(unet["input_blocks.0.0.bias"]))
    write_safetensors(path, {f"control_model.{key}": value for key, value in tensors.items()}, {})
    return path


def write_control_lora(path: Path) -> Path:
    """What a ControlNet has beside the UNet's encoder, whose weights ComfyUI takes from the model, and two matrices
    that change one of them (``ControlLora`` in comfy/controlnet.py)."""
    generator = torch.Generator().manual_seed(13)
    width = len(base_unet()["input_blocks.0.0.bias"])
    tensors = {**_control_parts(width), "lora_controlnet": torch.zeros(0)}
    tensors["time_embed.0.up"] = (torch.randn(4 * width, RANK, generator=generator) * 0.05).half()
    tensors["time_embed.0.down"] = (torch.randn(RANK, width, generator=generator) * 0.05).half()
    write_safetensors(path, tensors, {})
    return path


def _control_parts(width: int) -> dict[str, Tensor]:
    """A hint encoder, and outputs that are not zero."""
    generator = torch.Generator().manual_seed(12)
    tensors: dict[str, Tensor] = {}

    def conv(name: str, to: int, of: int, size: int, gain: float) -> None:
        scale = gain / (of * size * size) ** 0.5
        tensors[f"{name}.weight"] = (torch.randn(to, of, size, size, generator=generator) * scale).half()
        tensors[f"{name}.bias"] = torch.zeros(to).half()

    for i, (of, to) in enumerate(zip(HINT, (*HINT[1:], width), strict=True)):
        conv(f"input_hint_block.{2 * i}", to, of, 3, 2.0)
    for i, channels in enumerate((width, width, width, 2 * width)):  # what the encoder hands on
        conv(f"zero_convs.{i}.0", channels, channels, 1, 0.3)
    conv("middle_block_out.0", 2 * width, 2 * width, 1, 0.3)
    return tensors
