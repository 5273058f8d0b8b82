"""The first 14 stages of MobileNetV2 (Sandler et al., arXiv:1801.04381, Table 2), as a function of its weights.

The shipped weights were trained on ImageNet; ``assets/make_mobilenet.py`` says where they come from. Every batch
normalisation is folded into the convolution before it, so a block is only convolutions with a bias and ReLU6.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

DIM = 96
SIZE = 96  # pixels: small enough for ~100 pictures a second on one CPU thread
# expansion, output channels, blocks, stride of the first block
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def blocks() -> Iterator[tuple[str, int, bool]]:
    """Name of each inverted residual block, its stride, and whether its input is added to its output."""
    number, channels = 1, 32
    for _, out, count, first_stride in STAGES:
        for i in range(count):
            stride = first_stride if i == 0 else 1
            yield f"block{number}", stride, stride == 1 and channels == out
            number, channels = number + 1, out


def mobilenet_features(pixels: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Features (B, 96) of pictures (B, 3, H, W) in [0, 1]: the 96-channel stage, averaged over the picture."""

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = weights[f"{name}.weight"]
        groups = x.shape[1] // weight.shape[1]  # depthwise kernels have one input channel
        return F.conv2d(x, weight, weights[f"{name}.bias"], stride, weight.shape[-1] // 2, groups=groups)

    x = F.interpolate(pixels, (SIZE, SIZE), mode="bilinear", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(v, device=x.device, dtype=x.dtype).view(1, 3, 1, 1) for v in (MEAN, STD))
    x = F.relu6(conv((x - mean) / std, "stem", stride=2))
    for name, stride, residual in blocks():
        y = F.relu6(conv(x, f"{name}.expand")) if f"{name}.expand.weight" in weights else x
        y = F.relu6(conv(y, f"{name}.depthwise", stride))
        y = conv(y, f"{name}.project")  # linear, on purpose: a ReLU in the narrow part would lose information
        x = x + y if residual else y
    return x.mean((2, 3))
