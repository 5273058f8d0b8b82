"""Weight-space merges. So far the weighted average: the student's start, and the baseline of every report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

State = dict[str, Tensor]


def weighted_average(states: Sequence[Callable[[], State]], weights: Sequence[float] | None = None) -> State:
    """Σ w_i θ_i / Σ w_i in float32, one state dict in memory beside the sum.

    Args:
        states: one function a model, which loads its tensors; all with the same keys and shapes.
        weights: one a model; equal where left out.
    """
    weights = list(weights) if weights is not None else [1.0] * len(states)
    if len(weights) != len(states) or not states:
        raise ValueError(f"expected one weight a model, got {len(weights)} for {len(states)}")
    total = sum(weights)
    merged: State = {}
    for load, weight in zip(states, weights, strict=True):
        for key, tensor in load().items():
            part = tensor.to(torch.float32) * (weight / total)
            merged[key] = merged[key].add_(part) if key in merged else part
    return merged
