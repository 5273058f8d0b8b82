"""What a safetensors file is, by its keys: a model we work with, or which other thing."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from dmm_core.checkpoint.errors import LoraGiven, NotACheckpoint, ScaledWeights, UnsupportedModel
from dmm_core.checkpoint.keymap import UNET, VAE

UNET_PREFIXES = (UNET, "diffusion_model.", "unet/", "")
STYLE_FILE = {"lora_unet_time_embed_2.diff", "lora_unet_time_embed_2.diff_b"}
_SCALES = ("scaled_fp8", ".scale_weight", ".weight_scale", ".comfy_quant")  # comfy/model_detection.py, comfy/ops.py
_LORA_STARTS = ("lora_unet_", "lora_te", "lycoris_", "lora_transformer_")
_LORA_PARTS = (".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", ".lora.down.", ".lora.up.", "_lora.down.",
               "_lora.up.", ".hada_w1_", ".lokr_w", ".oft_blocks", ".oft_diag", ".lora_linear_layer.")  # fmt: skip
# Part of a key → the architecture that has it. Order matters: the first that is found names the file.
_OTHERS = {
    "double_stream_modulation_img": "Flux.2",
    "double_blocks.": "Flux",
    "single_transformer_blocks.": "Flux",
    "joint_blocks.": "Stable Diffusion 3",
    "pos_embed.proj.": "a diffusion transformer",
    "joint_transformer_blocks.": "AuraFlow",
    "double_layers.": "AuraFlow",
    "cap_embedder.": "Lumina or Z-Image",
    "txt_in.individual_token_refiner": "HunyuanVideo",
    "clip_txt_mapper.": "Stable Cascade",
    "channelwise.": "Stable Cascade",
    "head.modulation": "Wan",
    "patchify_proj.": "LTX-Video",
    "txt_norm.": "Qwen-Image",
    "temporal_transformer_blocks.": "a video UNet",
    "time_mixer.mix_factor": "a video UNet",
    "edm_vpred.sigma_max": "an EDM model, such as CosXL",  # these three: comfy/supported_models.py
    "edm_mean": "an EDM model, such as Playground 2.5",
    "edm_std": "an EDM model, such as Playground 2.5",
    "transformer_blocks.0.attn1.to_q": "a diffusion transformer",
}
_NOT_MODELS = {
    "control_model.": "a ControlNet",
    "input_hint_block.": "a ControlNet",
    "controlnet_cond_embedding.": "a ControlNet",
    "motion_modules.": "an AnimateDiff motion module",
    "ip_adapter.": "an IP-Adapter",
    "emb_params": "a textual-inversion embedding",
    "string_to_param": "a textual-inversion embedding",
}


def is_lora(keys: Collection[str]) -> bool:
    """LoRA and its relatives, whatever trained them."""
    return any(key.startswith(_LORA_STARTS) or any(part in key for part in _LORA_PARTS) for key in keys)


def unet_layout(keys: Collection[str]) -> tuple[str, str] | None:
    """("ldm" or "diffusers", prefix) of the UNet among the keys; None without one."""
    for prefix in UNET_PREFIXES:
        if any(key.startswith(f"{prefix}input_blocks.") for key in keys):
            return "ldm", prefix
        if any(key.startswith(f"{prefix}down_blocks.") for key in keys):
            return "diffusers", prefix
    return None


def other_kind(keys: Collection[str]) -> tuple[str, str] | None:
    """("part" or "model", name) where the keys are not those of a Stable Diffusion UNet; None where they may be."""
    for marks, kind in ((_NOT_MODELS, "part"), (_OTHERS, "model")):
        for mark, name in marks.items():
            if mark == "transformer_blocks.0.attn1.to_q":  # also inside every Stable Diffusion UNet
                hit = any(key.startswith(("transformer_blocks.0.attn1", UNET + mark)) for key in keys)
            else:
                hit = any(mark in key for key in keys)
            if hit:
                return kind, name
    if unet_layout(keys):
        return None
    if any(
        key.startswith((VAE, "vae/")) or key in ("decoder.conv_in.weight", "decoder.layers.0.weight") for key in keys
    ):
        return "part", "a VAE without a UNet"
    if any("text_model.encoder.layers." in key or "resblocks." in key for key in keys):
        return "part", "a text encoder without a UNet"
    return "part", "something without a UNet"


def require_unet(path: Path, keys: Collection[str]) -> tuple[str, str]:
    """Layout and prefix of the UNet.

    Raises:
        LoraGiven, NotACheckpoint, UnsupportedModel, ScaledWeights
    """
    if is_lora(keys):
        raise LoraGiven(path)
    if found := other_kind(keys):
        kind, name = found
        if kind == "model":
            raise UnsupportedModel(path, name)
        raise NotACheckpoint(f"holds {name}, not a checkpoint", path, "Give the full model.")
    layout = unet_layout(keys)
    assert layout is not None  # other_kind names what has none
    if scale := next((key for key in keys if key.endswith(_SCALES)), None):
        raise ScaledWeights(path, scale)
    return layout
