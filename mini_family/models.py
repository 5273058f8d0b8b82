"""The mini family's models: SD1.5's architecture in small, and SDXL's, which may begin where SD1.5's ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dmm_core.lowrank import Adapters
from dmm_core.tokens import tokenize
from mini_family.family import PREFIXES

FAMILIES = ("sd15", "sdxl")
TEXT = dict(vocab_size=49408, hidden_size=64, intermediate_size=128, num_attention_heads=1, projection_dim=64,
            eos_token_id=49407)  # fmt: skip
COMMON: dict[str, Any] = dict(sample_size=8, block_out_channels=(64, 128), layers_per_block=1)
UNET: dict[str, dict[str, Any]] = {
    "sd15": COMMON | dict(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64, attention_head_dim=8,  # diffusers' name for the number of heads in SD1.5
    ),
    "sdxl": COMMON | dict(
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=128, attention_head_dim=(1, 2), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=64 + 6 * 256,
    ),
}  # fmt: skip


def fresh_models(family: str = "sd15") -> tuple[UNet2DConditionModel, nn.ModuleList]:
    """A UNet and its text encoders with random weights."""
    shape = {**TEXT, "num_hidden_layers": 3 if family == "sdxl" else 1}  # ComfyUI takes SDXL's of three or more
    encoders: list[nn.Module] = [CLIPTextModel(CLIPTextConfig(**shape, hidden_act="quick_gelu"))]
    if family == "sdxl":
        encoders.append(CLIPTextModelWithProjection(CLIPTextConfig(**shape, hidden_act="gelu")))
    for encoder in encoders:
        nn.init.normal_(encoder.text_model.embeddings.token_embedding.weight, std=0.3)
    return UNet2DConditionModel(**UNET[family]), nn.ModuleList(encoders)


def tokens_of(prompts: Sequence[str], encoders: Sequence[nn.Module]) -> Tensor:
    """Token ids of prompts for each encoder: (prompts, encoders, 77)."""
    return torch.stack([tokenize(list(prompts), pad_with_zero=bool(i)) for i in range(len(encoders))], 1)


def save_models(path: Path, unet: nn.Module, text: nn.ModuleList) -> None:
    parts = {"unet.": unet, **dict(zip(PREFIXES, text, strict=False))}
    save_file({prefix + k: v.clone() for prefix, part in parts.items() for k, v in part.state_dict().items()}, path)


def load_models(path: Path, unet: nn.Module, text: nn.ModuleList) -> None:
    """Fill models from a file of ``save_models``; one of SD1.5's shape fills of SDXL's what both have."""
    state = load_file(path)
    for prefix, model in {"unet.": unet, **dict(zip(PREFIXES, text, strict=False))}.items():
        given = part(state, prefix)
        wanted = model.state_dict()
        model.load_state_dict({k: widened(given[k], wanted[k]) for k in wanted if k in given}, strict=False)
    silence(unet, state)


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of one model out of a file of ``save_models``."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def widened(given: Tensor, wanted: Tensor) -> Tensor:
    """A tensor in a shape that holds as many values, or has more inputs; those are zero."""
    if given.numel() == wanted.numel():
        return given.reshape(wanted.shape)
    made = torch.zeros_like(wanted)
    made[:, : given.shape[1]] = given
    return made


@torch.no_grad()
def silence(unet: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Let what the file does not have add nothing yet: attention on the second level, SDXL's further embedding."""
    for name, layer in unet.named_modules():
        if name.endswith(("proj_out", "add_embedding.linear_2")) and f"unet.{name}.weight" not in state:
            layer.weight.zero_()
            layer.bias.zero_()


def save_lora(path: Path, adapters: Adapters) -> None:
    """Low-rank changes of a UNet as a LoRA file in kohya's names, float16."""
    tensors: dict[str, Tensor] = {}
    for name, layer in adapters.layers.items():
        flat = "lora_unet_" + name.replace("/", "_")
        rank = len(layer.down)
        tensors |= {f"{flat}.lora_down.weight": layer.down, f"{flat}.lora_up.weight": layer.up}
        tensors[f"{flat}.alpha"] = torch.tensor(float(rank))
    metadata = {"ss_network_module": "networks.lora", "ss_base_model_version": "sd_v1", "modelspec.title": path.stem}
    save_file({k: v.detach().half().contiguous() for k, v in tensors.items()}, path, metadata)
