"""AdamW of all weights in one launch (Triton, CUDA): the arithmetic, the clipping and the rounding at random together.

A full-size UNet has 686 weights. Torch's own kernels, on float32 copies of some of them at a time, took 73 ms a step on
an H200, all of it launching (docs/results.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dmm_core.fused import trusts

BLOCK = 1024  # values a program; with more, it needs too many registers
ALIGNED = 16  # bytes that addresses are multiples of


def right(device: torch.device) -> bool:
    """Whether a first step goes as far as AdamW's first step does: the learning rate."""
    group = {"lr": 0.25, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
    for dtype in (torch.float32, torch.bfloat16):
        p = torch.ones(BLOCK + 3, device=device, dtype=dtype)
        p.grad = torch.ones_like(p)
        state = {name: torch.zeros(len(p), device=device) for name in ("exp_avg", "exp_avg_sq")}
        state["step"] = torch.zeros((), device=device)
        adamw_at_once([p], [state], group, clip_factor([p.grad], None), 0, 0)
        if not torch.allclose(p.float(), torch.full((len(p),), 0.75, device=device), atol=0.01):
            return False
    return True


works = trusts(right)


def fits(weights: Sequence[Tensor]) -> bool:
    """Whether these weights lie in memory as the kernel needs it: whole, and where torch's allocator puts tensors."""
    return all(
        p.dtype in (torch.bfloat16, torch.float32) and p.data_ptr() % ALIGNED == 0
        and p.numel() == 1 + sum((size - 1) * step for size, step in zip(p.shape, p.stride(), strict=True))
        for p in weights
    )  # fmt: skip


def by_type(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Those of one type together, bfloat16 weights and the codebook's: torch's foreach does lists of two one by one."""
    alike: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault(tensor.dtype, []).append(tensor)
    return list(alike.values())


def clip_factor(gradients: Sequence[Tensor], most: float | None) -> Tensor:
    """What gradients are multiplied by so that their norm together is ``most`` or less: (); nothing waits for it."""
    if not most:
        return torch.ones((), device=gradients[0].device)
    parts = [torch.stack(torch._foreach_norm(alike)).float() for alike in by_type(gradients)]
    norm = torch.linalg.vector_norm(torch.cat(parts))
    return (most / (norm + 1e-6)).clamp(max=1.0)


@torch.no_grad()
def adamw_at_once(
    weights: Sequence[Tensor], states: Sequence[dict[str, Any]], group: dict[str, Any], clip: Tensor, number: int,
    seed: int,
) -> None:  # fmt: skip
    """One step of weights of one type and device that have gradients.

    Args:
        states: ``exp_avg``, ``exp_avg_sq`` (float32, laid out as the weight) and ``step`` of each.
        group: ``lr``, ``betas``, ``eps``, ``weight_decay``.
        clip: see ``clip_factor``.
        number: of the step, from 0.
        seed: of the rounding; bfloat16 weights of a step are rounded with bits of their own for each seed and number.
    """
    from dmm_core import kernels as k

    first = weights[0]
    gradients = [_like(p.grad, p) for p in weights]
    columns = (weights, gradients, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states])
    table = torch.tensor([[tensor.data_ptr() for tensor in column] for column in columns])
    places = table.pin_memory().to(first.device, non_blocking=True) if first.is_cuda else table
    sizes, owner, start = _programs(tuple(p.numel() for p in weights), first.device)
    (beta1, beta2), lr, done = group["betas"], group["lr"], number + 1
    bits = hash((seed, number)) & 0x7FFFFFFF
    k.adamw_kernel[(len(owner),)](
        places, sizes, owner, start, clip, len(weights), bits, lr, beta1, beta2, group["eps"], group["weight_decay"],
        lr / (1 - beta1**done), math.sqrt(1 - beta2**done),
        NARROW=first.dtype == torch.bfloat16, BLOCK=BLOCK,
    )  # fmt: skip
    torch._foreach_add_([state["step"] for state in states], 1)


def _like(gradient: Tensor, weight: Tensor) -> Tensor:
    """The gradient with its values in the order of the weight's, where the kernel can read several at a time."""
    same = gradient.stride() == weight.stride() and gradient.data_ptr() % ALIGNED == 0
    return gradient if same else torch.empty_like(weight).copy_(gradient)


@lru_cache(maxsize=4)  # the groups of one student, and of a discriminator
def _programs(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The sizes; and of each program whose values it updates, and from which one on."""
    programs = torch.tensor([-(-size // BLOCK) for size in sizes])
    owner = torch.repeat_interleave(torch.arange(len(sizes)), programs)
    before = torch.repeat_interleave(programs.cumsum(0) - programs, programs)
    start = (torch.arange(len(owner)) - before) * BLOCK
    sized, owner, start = (part.to(device, torch.int32) for part in (torch.tensor(sizes), owner, start))
    return sized, owner, start
