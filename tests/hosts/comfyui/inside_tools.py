"""What the tests inside ComfyUI's process share: files to load, sampling without a server, and counting calls."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.hosts.comfyui.harness import NAMES, ROOT

STEPS, CFG = 6, 2.0


def write_dmm(path: Path, unet: dict | None = None, family: str = "sd15", **more) -> Path:
    """A DMM file without diffusers: of the mini family's base, or of the given UNet tensors."""
    from dmm_core.checkpoint import open_checkpoint
    from dmm_core.checkpoint import write_dmm as write
    from dmm_core.style import Codebook

    base = open_checkpoint(ROOT / "mini_family" / "weights" / "base.safetensors")
    tensors = base.unet() if unet is None else unet
    torch.manual_seed(5)
    codebook = Codebook(NAMES, len(tensors["time_embedding.linear_2.bias"]))
    torch.nn.init.normal_(codebook.add_embedding.linear_2.weight, std=1.6 / codebook.dim**0.5)
    parts = {"vae": base.vae(), "vae_config": base.vae_config, "text_encoders": [base.text_encoder()],
             "codebook": codebook.requires_grad_(False), **more}  # fmt: skip
    return write(path, family=family, unet=tensors, resolution=64, **parts)


def encode(clip, text):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def sample(model, positive, negative, batch=1, steps=STEPS, sampler="euler", cfg=CFG):
    import comfy.sample

    empty = torch.zeros(batch, 4, 8, 8)
    noise = comfy.sample.prepare_noise(empty, 3)
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, steps, cfg, sampler, "simple", positive, negative, empty, denoise=1.0, seed=3
        )


def counted(model):
    """A clone that notes how many rows each call of the UNet has."""
    from comfy.patcher_extension import WrappersMP

    calls, clone = [], model.clone()

    def count(executor, x, *args, **kwargs):
        calls.append(len(x))
        return executor(x, *args, **kwargs)

    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "count", count)
    return clone, calls


def apart(a, b) -> float:
    return (a - b).abs().max().item()


def style(pack, loaded, name, strength=1.0):
    return pack.values.named(loaded[3], name, strength)


def random_unet(pack_config: dict) -> dict:
    """Random tensors of a UNet in diffusers' names, scaled so that numbers stay tame."""
    from dmm_core.checkpoint.shapes import unet_shapes

    generator = torch.Generator().manual_seed(1)
    made = {}
    for key, shape in unet_shapes(pack_config).items():
        width = max(1, int(torch.tensor(shape[1:]).prod())) if len(shape) > 1 else 1
        scale = 0.5 * width**-0.5 if len(shape) > 1 else 0.02
        made[key] = torch.randn(shape, generator=generator) * scale
        if "norm" in key and key.endswith("weight"):
            made[key] = made[key] + 1
    return made


def config_of(channels, context, family="sd15", depth=1, adm=0):
    config = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": channels, "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D"] * len(channels), "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["CrossAttnUpBlock2D"] * len(channels),
        "transformer_layers_per_block": [depth] * len(channels), "cross_attention_dim": context,
        "use_linear_projection": family == "sdxl", "attention_head_dim": 8,
    }  # fmt: skip
    if family == "sdxl":
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256,
                   "projection_class_embeddings_input_dim": adm}  # fmt: skip
    return config


def random_text(config: dict) -> dict:
    from dmm_core.checkpoint.shapes import text_shapes

    generator = torch.Generator().manual_seed(3)
    return {
        key: torch.randn(shape, generator=generator) * 0.05 + float("norm" in key and key.endswith("weight"))
        for key, shape in text_shapes(config).items()
    }


def write_sdxl(path: Path) -> Path:
    """A tiny SDXL DMM file, untrained: both text encoders, 64 wide each, pooled output and sizes as SDXL takes them."""
    sizes = {"vocab_size": 49408, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
             "num_attention_heads": 1, "max_position_embeddings": 77, "projection_dim": 64}  # fmt: skip
    text = [random_text({**sizes, "kind": kind}) for kind in ("clip_l", "clip_g")]
    unet = random_unet(config_of([64, 128], 128, "sdxl", adm=1536 + 64))
    return write_dmm(path, unet, "sdxl", text_encoders=text)
