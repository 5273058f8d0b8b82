"""The Inception-v3 that "FID" means, as a function of its weights: pool features (B, 2048).

Architecture: Szegedy et al., arXiv:1512.00567, with the three departures of the network that FID was defined with
(Heusel et al., arXiv:1706.08500): average pools leave the padding out of the count, the last block pools by maximum,
and pictures enter as 2 x - 1. Keys are those of the weights that the pytorch-fid package made from the original.
Kernel sizes and channels come from the weights; only strides, paddings and the wiring are written here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

DIM = 2048
SIZE = 299
Block = Callable[[Tensor, str], Tensor]


def inception_features(pixels: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Features (B, 2048) of pictures (B, 3, H, W) in [0, 1]."""

    def conv(x: Tensor, name: str, stride: int = 1, same: bool = True) -> Tensor:
        """Convolution, batch normalisation (eps 1e-3), ReLU."""
        weight = weights[f"{name}.conv.weight"]
        padding = (weight.shape[2] // 2, weight.shape[3] // 2) if same else (0, 0)
        x = F.conv2d(x, weight, None, stride, padding)
        stats = [weights[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.relu(F.batch_norm(x, *stats, training=False, eps=1e-3))

    def chain(x: Tensor, block: str, *names: str) -> Tensor:
        for name in names:
            x = conv(x, f"{block}.{name}")
        return x

    def average(x: Tensor, block: str) -> Tensor:
        return conv(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), f"{block}.branch_pool")

    def a(x: Tensor, b: str) -> Tensor:
        double = chain(x, b, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
        five = chain(x, b, "branch5x5_1", "branch5x5_2")
        return torch.cat((chain(x, b, "branch1x1"), five, double, average(x, b)), 1)

    def shrink_b(x: Tensor, b: str) -> Tensor:
        double = conv(chain(x, b, "branch3x3dbl_1", "branch3x3dbl_2"), f"{b}.branch3x3dbl_3", 2, same=False)
        return torch.cat((conv(x, f"{b}.branch3x3", 2, same=False), double, F.max_pool2d(x, 3, 2)), 1)

    def c(x: Tensor, b: str) -> Tensor:
        seven = chain(x, b, *(f"branch7x7_{i}" for i in (1, 2, 3)))
        double = chain(x, b, *(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)))
        return torch.cat((chain(x, b, "branch1x1"), seven, double, average(x, b)), 1)

    def shrink_d(x: Tensor, b: str) -> Tensor:
        three = conv(chain(x, b, "branch3x3_1"), f"{b}.branch3x3_2", 2, same=False)
        seven = chain(x, b, *(f"branch7x7x3_{i}" for i in (1, 2, 3)))
        seven = conv(seven, f"{b}.branch7x7x3_4", 2, same=False)
        return torch.cat((three, seven, F.max_pool2d(x, 3, 2)), 1)

    def e(x: Tensor, b: str) -> Tensor:
        three, double = chain(x, b, "branch3x3_1"), chain(x, b, "branch3x3dbl_1", "branch3x3dbl_2")
        split = [conv(three, f"{b}.branch3x3_2a"), conv(three, f"{b}.branch3x3_2b")]
        split += [conv(double, f"{b}.branch3x3dbl_3a"), conv(double, f"{b}.branch3x3dbl_3b")]
        last = conv(F.max_pool2d(x, 3, 1, 1), f"{b}.branch_pool") if b == "Mixed_7c" else average(x, b)
        return torch.cat((chain(x, b, "branch1x1"), *split, last), 1)

    x = 2 * F.interpolate(pixels, (SIZE, SIZE), mode="bilinear", align_corners=False) - 1
    x = conv(conv(x, "Conv2d_1a_3x3", 2, same=False), "Conv2d_2a_3x3", same=False)
    x = F.max_pool2d(conv(x, "Conv2d_2b_3x3"), 3, 2)
    x = F.max_pool2d(conv(conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3", same=False), 3, 2)
    wiring: dict[str, Block] = {"5b": a, "5c": a, "5d": a, "6a": shrink_b, "6b": c, "6c": c, "6d": c, "6e": c}
    for number, block in {**wiring, "7a": shrink_d, "7b": e, "7c": e}.items():
        x = block(x, f"Mixed_{number}")
    return x.mean((2, 3))
