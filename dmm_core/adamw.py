"""AdamW for bfloat16 weights, rounded at random, and with 8-bit moments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from dmm_core.at_once import adamw_at_once

TOGETHER = 1 << 22  # values that are copied to float32 at a time: a GPU's cache holds them until they are rounded


def round_at_random_(x: Tensor, generator: torch.Generator) -> None:
    """float32 → the bfloat16 above or below, in place, so that the expected value is x: no small step is lost for ever.

    A bfloat16 is the upper half of a float32; uniform bits are added to the lower half, which then is cut off.
    """
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    broken = x.isnan()
    x.view(torch.int32).add_(noise).bitwise_and_(-(1 << 16))
    x.masked_fill_(broken, torch.nan)  # which the sum may have made a 0, that nobody would notice


def adam_state(p: Tensor, fused: bool) -> dict[str, Any]:
    """What torch's AdamW keeps of a weight, before its first step, with float32 moments."""
    zeros = [torch.zeros_like(p, dtype=torch.float32) for _ in range(2)]
    return {
        "step": torch.zeros((), device=p.device if fused else "cpu"),
        "exp_avg": zeros[0],
        "exp_avg_sq": zeros[1],
    }


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW for bfloat16 weights: torch's own step on float32 copies, float32 moments, new weights rounded at random.

    Many weights are copied, stepped and rounded together; with ``clip`` all of them in one kernel (``at_once.py``).
    Their random bits follow from seed, step and their places alone, so that a resumed run, and every one of several
    processes, rounds alike. Weights that are float32 (the codebook's) are not rounded.

    Args:
        places: a number for every weight.
        fused: one kernel for all of AdamW's arithmetic, where the device has it.
    """

    def __init__(
        self, groups: list[dict[str, Any]], places: dict[Tensor, int], seed: int, fused: bool = False, **defaults: Any
    ) -> None:
        super().__init__(groups, {"eps": 1e-8, **defaults})
        self.places, self.seed, self.fused = places, seed, fused
        self.clip: Tensor | None = None  # what gradients are multiplied by; where it is there, all are stepped at once
        self.number = 0  # of the step; the counters of its state lie on the device, which would have to be waited for

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for number, group in enumerate(self.param_groups):
            weights = [p for p in group["params"] if p.grad is not None]
            if self.clip is not None and weights:
                adamw_at_once(
                    weights, [self.state[p] for p in weights], group, self.clip, self.number, self.seed + number
                )
                continue
            for some in _together(weights):
                self.update(some, group)
        self.number += 1

    def update(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        """Step weights of one type and device."""
        first = weights[0]
        copies, parts = _float_copies(weights)
        _, gradients = _float_copies([p.grad for p in weights], like=weights)
        states = [self.state[p] for p in weights]
        adamw(
            parts, gradients, [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states], [],
            [state["step"] for state in states], fused=self.fused, amsgrad=False, beta1=group["betas"][0],
            beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            maximize=False,
        )  # fmt: skip
        if first.dtype == torch.bfloat16:
            round_at_random_(copies, self.generator(first))
        torch._foreach_copy_(weights, parts)

    def generator(self, first: Tensor) -> torch.Generator:
        """Random bits of this step for weights of which this is the first."""
        seed = hash((self.seed, self.number, self.places[first])) & 0x7FFFFFFF
        return torch.Generator(first.device).manual_seed(seed)

    def first_state(self, p: Tensor) -> dict[str, Any]:
        """Moments of 0, and the counter where the kernel wants it."""
        return adam_state(p, self.fused)


class EightBitAdamW(StochasticAdamW):
    """The same with 8-bit moments, 256 values of which share a scale: bitsandbytes' kernel, on any layout of weights.

    Its own optimizer class would make every weight contiguous in the order of its axes, wait for the device after each,
    and round bfloat16 weights to the nearest. Small weights keep float32 moments, as there.
    """

    SMALL, BLOCK = 4096, 256

    def first_state(self, p: Tensor) -> dict[str, Any]:
        if p.numel() < self.SMALL:
            return super().first_state(p)
        codes = [torch.zeros(p.numel(), dtype=torch.uint8, device=p.device) for _ in range(2)]
        scales = [torch.zeros(-(-p.numel() // self.BLOCK), device=p.device) for _ in range(2)]
        return {"step": 0, "codes1": codes[0], "codes2": codes[1], "absmax1": scales[0], "absmax2": scales[1]}

    def update(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        if small := [p for p in weights if "codes1" not in self.state[p]]:
            super().update(small, group)
        for p in weights:
            if "codes1" in self.state[p]:
                self.update_large(p, self.state[p], group)

    def update_large(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        narrow = p.dtype == torch.bfloat16
        flat, parts = _float_copies([p]) if narrow else (p.as_strided((p.numel(),), (1,)), [])
        gradient, _ = _float_copies([p.grad], like=[p])
        state["step"] += 1
        torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
            "adam", gradient, flat, state["codes1"], state["codes2"], *group["betas"], 0.0, 0.0, group["eps"],
            state["step"], group["lr"], _eight_bit_values(True, p.device), _eight_bit_values(False, p.device),
            state["absmax1"], state["absmax2"], group["weight_decay"], 1.0, False,
        )  # fmt: skip
        if narrow:
            round_at_random_(flat, self.generator(p))
            p.copy_(parts[0])


@cache
def _eight_bit_values(signed: bool, device: torch.device) -> Tensor:
    """What the codes 0 … 255 of a moment stand for, times its block's scale."""
    import bitsandbytes

    return bitsandbytes.functional.create_dynamic_map(signed=signed).to(device)


def _together(weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one type, up to TOGETHER values or a single weight."""
    held: list[Tensor] = []
    for p in weights:
        if held and (p.dtype != held[0].dtype or sum(q.numel() for q in held) + p.numel() > TOGETHER):
            yield held
            held = []
        held.append(p)
    if held:
        yield held


def _float_copies(tensors: Sequence[Tensor], like: Sequence[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
    """Tensors in float32 one after the other: all of them flat, and views laid out as they (or ``like``) are."""
    like = like or tensors
    flat = torch.empty(sum(p.numel() for p in like), dtype=torch.float32, device=like[0].device)
    views, at = [], 0
    for p in like:
        views.append(flat.as_strided(p.shape, p.stride(), at))
        at += p.numel()
    torch._foreach_copy_(views, list(tensors))
    return flat, views
