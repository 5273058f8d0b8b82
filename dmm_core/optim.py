"""The student's optimizer, in several economies: AdamW, 8-bit moments, bfloat16 weights, a step inside the backward.

Bytes a parameter, for weight + gradient + two moments: 16 (fp32), 12 (bf16 weights), about 10 or 6 with 8-bit moments;
``fused_backward`` frees every gradient at once, which takes 4 (or 2) away.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor

from dmm_core.adamw import EightBitAdamW, StochasticAdamW, adam_state
from dmm_core.at_once import by_type, clip_factor, fits, works
from dmm_core.errors import BadInput
from dmm_core.recipe import TrainSpec

EIGHT_BIT = "bitsandbytes"  # the library
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


class StudentOptimizer:
    """All of a student's trainable parameters, one optimizer for all of them or one for each (``fused_backward``).

    Args:
        groups: (parameters, peak learning rate) pairs.

    Raises:
        BadInput: 8-bit moments are asked for, and no library that has them is installed.
    """

    def __init__(self, groups: Sequence[tuple[Sequence[Tensor], float]], spec: TrainSpec, device: torch.device) -> None:
        require_library(spec)
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
        for alike in by_type(p.grad for p in self.parameters):
            torch._foreach_zero_(alike)

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


def require_library(spec: TrainSpec) -> None:
    """Raises BadInput: 8-bit moments are asked for, and no library that has them is installed."""
    if spec.optimizer == "adamw8bit" and not has_eight_bit():
        raise BadInput(
            f"train.optimizer adamw8bit needs {EIGHT_BIT}, which is not installed here, or too old",
            hint=f"Run: pip install -U {EIGHT_BIT}. Or set train.optimizer: adamw.",
        )


def has_eight_bit() -> bool:
    """Whether bitsandbytes is here, and new enough to offer its kernels as torch's operators."""
    if not importlib.util.find_spec(EIGHT_BIT):
        return False
    importlib.import_module(EIGHT_BIT)
    return hasattr(torch.ops.bitsandbytes, "optimizer_update_8bit_blockwise")
