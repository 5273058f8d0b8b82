"""The student's optimizer, in several economies: AdamW, 8-bit moments, bfloat16 weights, a step inside the backward.

Bytes a parameter, for weight + gradient + two moments: 16 (fp32), 12 (bf16 weights), about 10 or 6 with 8-bit moments;
``fused_backward`` frees every gradient at once, which takes 4 (or 2) away.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from dmm_core.at_once import adamw_at_once, clip_factor, fits
from dmm_core.errors import BadInput
from dmm_core.fused import works
from dmm_core.recipe import TrainSpec

EIGHT_BIT = "bitsandbytes"  # the library
TOGETHER = 1 << 22  # values that are copied to float32 at a time: a GPU's cache holds them until they are rounded
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def round_at_random_(x: Tensor, generator: torch.Generator) -> None:
    """float32 → the bfloat16 above or below, in place, so that the expected value is x: no small step is lost for ever.

    A bfloat16 is the upper half of a float32; uniform bits are added to the lower half, which then is cut off.
    """
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    x.view(torch.int32).add_(noise).bitwise_and_(-(1 << 16))


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

    Many weights are copied, stepped and rounded together. Their random bits follow from seed, step and the place of the
    first of them alone, so that a resumed run, and every one of several processes, rounds alike. Weights that are
    float32 (the codebook's) are not rounded.

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


class StudentOptimizer:
    """All of a student's trainable parameters, one optimizer for all of them or one for each (``fused_backward``).

    Args:
        groups: (parameters, peak learning rate) pairs.

    Raises:
        BadInput: 8-bit moments are asked for, and no library that has them is installed.
    """

    def __init__(self, groups: Sequence[tuple[Sequence[Tensor], float]], spec: TrainSpec, device: torch.device) -> None:
        if spec.optimizer == "adamw8bit" and not has_eight_bit():
            raise BadInput(
                f"train.optimizer adamw8bit needs {EIGHT_BIT}, which is not installed here, or too old",
                hint=f"Run: pip install -U {EIGHT_BIT}. Or set train.optimizer: adamw.",
            )
        self.spec, self.device = spec, device
        self.parameters = [p for parameters, _ in groups for p in parameters]
        self.places = {p: i for i, p in enumerate(self.parameters)}
        made: list[dict[str, Any]] = [{"params": list(ps), "peak": peak, "lr": peak} for ps, peak in groups]
        if spec.fused_backward:
            each = [{**group, "params": [p]} for group in made for p in group["params"]]
            self.optimizers = [self._build([group]) for group in each]
            inside = WeakMethod(self._step_inside)  # torch holds hooks where the garbage collector cannot see them
            for p in self.parameters:
                p.register_post_accumulate_grad_hook(lambda p: step(p) if (step := inside()) else None)
        else:
            self.optimizers = [self._build(made)]
        self.at_once = type(self.optimizers[0]) is StochasticAdamW and not spec.fused_backward and works(device)
        self.at_once = self.at_once and all(fits(group["params"]) for group in made)
        self.done: set[int] = set()  # places that were updated inside this step's backward pass
        for p, optimizer in self._owners():
            if not optimizer.state[p]:
                optimizer.state[p] = self._first_state(optimizer, p)  # now, so that memory does not grow later

    def _build(self, groups: list[dict[str, Any]]) -> Any:
        spec = self.spec
        more: dict[str, Any] = {"lr": spec.lr, "betas": spec.betas, "weight_decay": spec.weight_decay}
        narrow = any(p.dtype == torch.bfloat16 for p in self.parameters)
        self.fused = self.device.type == "cuda" or (self.device.type == "cpu" and TORCH >= (2, 4))
        if spec.optimizer == "adamw8bit":
            return EightBitAdamW(groups, self.places, spec.seed, self.fused, **more)
        if narrow:
            return StochasticAdamW(groups, self.places, spec.seed, self.fused, **more)
        return torch.optim.AdamW(groups, fused=self.fused, **more)

    def _first_state(self, optimizer: Any, p: Tensor) -> dict[str, Any]:
        return optimizer.first_state(p) if isinstance(optimizer, StochasticAdamW) else adam_state(p, self.fused)

    def _owners(self) -> Iterator[tuple[Tensor, Any]]:
        for i, p in enumerate(self.parameters):
            yield p, self.optimizers[i if self.spec.fused_backward else 0]

    # ------------------------------------------------------------ a step

    @property
    def lr(self) -> float:
        return float(self.optimizers[0].param_groups[0]["lr"])

    def begin(self, lr_factor: float, step: int) -> None:
        """Before the first backward pass of a step: learning rates are set, nothing is updated so far."""
        self.done.clear()
        for optimizer in self.optimizers:
            if isinstance(optimizer, StochasticAdamW):
                optimizer.number = step
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * lr_factor

    def zero_grad(self, stay: bool = False) -> None:
        """Gradients are 0, in their places if they ``stay`` there, else gone."""
        if not stay:
            for p in self.parameters:
                p.grad = None
            return
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        torch._foreach_zero_([p.grad for p in self.parameters])

    def step(self, scaler: Any) -> None:
        """Clip and update, unless the backward pass has done so; ``scaler.update`` is the caller's."""
        if self.spec.fused_backward:
            return
        (optimizer,) = self.optimizers
        scaler.unscale_(optimizer)
        if self.at_once:
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            optimizer.clip = clip_factor(gradients, self.spec.grad_clip)
        elif self.spec.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.spec.grad_clip)
        scaler.step(optimizer)

    @torch.no_grad()
    def _step_inside(self, p: Tensor) -> None:
        """A parameter's gradient is complete: use it and let it go. The norm of each gradient is clipped by itself."""
        place = self.places[p]
        if place not in self.done and p.grad is not None:  # a step that ran out of memory half-way is repeated
            if self.spec.grad_clip:
                p.grad.mul_((self.spec.grad_clip / (p.grad.norm() + 1e-6)).clamp(max=1.0))
            self.optimizers[place].step()
            self.done.add(place)
        p.grad = None

    # ------------------------------------------------------------ exact resume

    def state(self) -> dict[str, Tensor]:
        """Every moment and counter as plain tensors, ``place.name``."""
        tensors: dict[str, Tensor] = {}
        for i, (p, optimizer) in enumerate(self._owners()):
            for name, value in optimizer.state[p].items():
                tensors |= {f"{i}.{name}{part}": tensor for part, tensor in _plain(value).items()}
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put what ``state`` gave back in its place; KeyError where something is missing."""
        for i, (p, optimizer) in enumerate(self._owners()):
            for name, value in optimizer.state[p].items():
                for part, mine in _plain(value).items():
                    stored = tensors[f"{i}.{name}{part}"]
                    if isinstance(value, Tensor):
                        mine.copy_(stored)
                    else:
                        optimizer.state[p][name] = type(value)(stored.item())


def _plain(value: Any) -> dict[str, Tensor]:
    """A value of an optimizer's state as a tensor that a file can hold."""
    return {"": value} if isinstance(value, Tensor) else {"#": torch.tensor(value)}


def has_eight_bit() -> bool:
    """Whether bitsandbytes is here, and new enough to offer its kernels as torch's operators."""
    if not importlib.util.find_spec(EIGHT_BIT):
        return False
    importlib.import_module(EIGHT_BIT)
    return hasattr(torch.ops.bitsandbytes, "optimizer_update_8bit_blockwise")
