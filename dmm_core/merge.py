"""Weight-space merges: each method one pure function on tensors, computed in float32.

The weighted average is also the student's start, and the baseline of every report. Whole files: ``merge_files.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

State = dict[str, Tensor]


def weighted_sum(models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ w_i θ_i, a new float32 tensor; any one shape. For two models "Weighted sum" in A1111: (1 − α) A + α B."""
    _one_each(models, weights)
    total = models[0].to(torch.float32, copy=True).mul_(weights[0])
    for model, weight in zip(models[1:], weights[1:], strict=True):
        total.add_(model.to(torch.float32), alpha=weight)
    return total


def add_difference(a: Tensor, others: Sequence[Tensor], base: Tensor, alphas: Sequence[float]) -> Tensor:
    """A + Σ α_i (B_i − C), a new float32 tensor. ``base`` is C, what the B_i were tuned from; B_i − C is a delta.

    For one B "Add difference" in A1111. The differences are taken first, so B = C gives exactly A.
    """
    _one_each(others, alphas)
    start, total = base.to(torch.float32), a.to(torch.float32, copy=True)
    for other, alpha in zip(others, alphas, strict=True):
        total.add_(other.to(torch.float32, copy=True).sub_(start), alpha=alpha)
    return total


def shares(weights: Sequence[float], alpha: float | None = None) -> list[float]:
    """Factors that sum to 1: w_i / Σ w. With ``alpha``, the first model has 1 − alpha and the others share alpha.

    Raises:
        ValueError: weights, or with ``alpha`` those after the first, that sum to 0.
    """
    first, rest = ([], weights) if alpha is None else ([1 - alpha], weights[1:])
    total = sum(rest)
    if abs(total) < 1e-9:
        raise ValueError(f"the weights sum to 0: {list(rest)}")
    return [*first, *(weight / total * (1 if alpha is None else alpha) for weight in rest)]


def weighted_average(states: Sequence[Callable[[], State]], weights: Sequence[float] | None = None) -> State:
    """Σ w_i θ_i / Σ w_i in float32, one state dict in memory beside the sum.

    Args:
        states: one function a model, which loads its tensors; all with the same keys and shapes.
        weights: one a model; equal where left out.
    """
    weights = list(weights) if weights is not None else [1.0] * len(states)
    _one_each(states, weights)
    merged: State = {}
    for load, share in zip(states, shares(weights), strict=True):
        for key, tensor in load().items():
            part = tensor.to(torch.float32) * share
            merged[key] = merged[key].add_(part) if key in merged else part
    return merged


def _one_each(models: Sequence, weights: Sequence[float]) -> None:
    if len(weights) != len(models) or not models:
        raise ValueError(f"expected one weight a model, got {len(weights)} for {len(models)}")
