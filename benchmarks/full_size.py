"""The configurations of full-size SD1.5 and SDXL base models, for benchmarks that measure at users' sizes."""

from __future__ import annotations

from typing import Any

SD15: dict[str, Any] = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2, "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn", "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "transformer_layers_per_block": [1, 1, 1, 1], "cross_attention_dim": 768, "use_linear_projection": False,
    "attention_head_dim": 8,
}  # fmt: skip
SDXL: dict[str, Any] = {
    "sample_size": 128, "in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2, "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10], "cross_attention_dim": 2048, "use_linear_projection": True,
    "attention_head_dim": [5, 10, 20], "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
UNET = {"sd15": SD15, "sdxl": SDXL}
VAE: dict[str, Any] = {
    "kind": "kl", "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4,
    "in_channels": 3, "out_channels": 3,
}  # fmt: skip
CLIP: dict[str, Any] = {"vocab_size": 49408, "max_position_embeddings": 77}
CLIP_L = {**CLIP, "kind": "clip_l", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
CLIP_G = {**CLIP, "kind": "clip_g", "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
