"""The student's optimizer, in several economies: AdamW, 8-bit moments, bfloat16 weights, a step inside the backward.

Bytes a parameter, for weight + gradient + two moments: 16 (fp32), 12 (bf16 weights), about 10 or 6 with 8-bit moments;
``fused_backward`` frees every gradient at once, which takes 4 (or 2) away.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dmm_core.errors import BadInput
from dmm_core.recipe import TrainSpec

EIGHT_BIT = ("bitsandbytes", "torchao")
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def stochastic_round(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 → bfloat16, up or down at random so that the expected value is x: small steps are not lost for ever.

    A bfloat16 is the upper half of a float32; uniform bits are added to the lower half, which then is cut off.
    """
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW for bfloat16 weights: float32 arithmetic and moments, and the new weight rounded at random.

    A weight's random bits follow from seed, step and the weight's place alone, so that a resumed run, and every one
    of several processes, rounds alike. Weights that are float32 (the codebook's) are not rounded.
    """

    def __init__(self, groups: list[dict[str, Any]], places: dict[Tensor, int], seed: int, **defaults: Any) -> None:
        super().__init__(groups, {"eps": 1e-8, **defaults})
        self.places, self.seed = places, seed

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad.float(), self.state[p], group)

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        (b1, b2), lr = group["betas"], group["lr"]
        state["step"] += 1
        step = int(state["step"])  # lies on the CPU: no wait for the device
        state["exp_avg"].lerp_(gradient, 1 - b1)
        state["exp_avg_sq"].mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        root = state["exp_avg_sq"].sqrt().div_(math.sqrt(1 - b2**step)).add_(group["eps"])
        new = p.float() * (1 - lr * group["weight_decay"])
        new.addcdiv_(state["exp_avg"], root, value=-lr / (1 - b1**step))
        if p.dtype == torch.bfloat16:
            generator = torch.Generator(p.device).manual_seed(hash((self.seed, step, self.places[p])) & 0x7FFFFFFF)
            new = stochastic_round(new, generator)
        p.copy_(new)


class StudentOptimizer:
    """All of a student's trainable parameters, one optimizer for all of them or one for each (``fused_backward``).

    Args:
        groups: (parameters, peak learning rate) pairs.

    Raises:
        BadInput: 8-bit moments are asked for, and no library that has them is installed.
    """

    def __init__(self, groups: Sequence[tuple[Sequence[Tensor], float]], spec: TrainSpec, device: torch.device) -> None:
        self.spec, self.device = spec, device
        self.parameters = [p for parameters, _ in groups for p in parameters]
        self.places = {p: i for i, p in enumerate(self.parameters)}
        made: list[dict[str, Any]] = [{"params": list(ps), "peak": peak, "lr": peak} for ps, peak in groups]
        if spec.fused_backward:
            each = [{**group, "params": [p]} for group in made for p in group["params"]]
            self.optimizers = [self._build([group]) for group in each]
            for p in self.parameters:
                p.register_post_accumulate_grad_hook(self._step_inside)
        else:
            self.optimizers = [self._build(made)]
        self.done: set[int] = set()  # places that were updated inside this step's backward pass
        for p, optimizer in self._owners():
            if not optimizer.state[p]:
                optimizer.state[p] = self._first_state(optimizer, p)  # now, so that memory does not grow later

    def _build(self, groups: list[dict[str, Any]]) -> Any:
        spec = self.spec
        more: dict[str, Any] = {"lr": spec.lr, "betas": spec.betas, "weight_decay": spec.weight_decay}
        narrow = any(p.dtype == torch.bfloat16 for p in self.parameters)
        if spec.optimizer == "adamw8bit":
            return _eight_bit(groups, self.device, narrow, more)
        if narrow:
            return StochasticAdamW(groups, self.places, spec.seed, **more)
        self.fused = self.device.type == "cuda" or (self.device.type == "cpu" and TORCH >= (2, 4))
        return torch.optim.AdamW(groups, fused=self.fused, **more)

    def _first_state(self, optimizer: Any, p: Tensor) -> dict[str, Any]:
        kind = type(optimizer).__module__.partition(".")[0]
        if kind == "bitsandbytes":
            optimizer.init_state(optimizer.param_groups[0], p, 0, 0)
            return optimizer.state[p]
        if kind == "torchao":
            moments = (optimizer._new_buffer(p, True), optimizer._new_buffer(p, False))
            return dict(zip(("step", "exp_avg", "exp_avg_sq"), (torch.tensor(0.0), *moments), strict=True))
        where = p.device if isinstance(optimizer, torch.optim.AdamW) and self.fused else "cpu"
        zeros = [torch.zeros_like(p, dtype=torch.float32) for _ in range(2)]
        return {"step": torch.zeros((), device=where), "exp_avg": zeros[0], "exp_avg_sq": zeros[1]}

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
            for group in optimizer.param_groups:
                lr = group["peak"] * lr_factor
                group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else lr  # torchao's is a tensor
        if self.spec.optimizer == "adamw8bit":  # torchao rounds with the global generator
            torch.manual_seed(hash((self.spec.seed, step)) & 0x7FFFFFFF)

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    def step(self, scaler: Any) -> None:
        """Clip and update, unless the backward pass has done so; ``scaler.update`` is the caller's."""
        if self.spec.fused_backward:
            return
        (optimizer,) = self.optimizers
        scaler.unscale_(optimizer)
        if self.spec.grad_clip:
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

    def load_state(self, tensors: dict[str, Tensor]) -> None:
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
    """A value of an optimizer's state as tensors that a file can hold; 8-bit moments are several."""
    if not isinstance(value, Tensor):
        return {"#": torch.tensor(value)}
    if hasattr(value, "__tensor_flatten__"):
        return {f".{name}": getattr(value, name) for name in value.__tensor_flatten__()[0]}
    return {"": value}


def _eight_bit(groups: list[dict[str, Any]], device: torch.device, narrow: bool, more: dict[str, Any]) -> Any:
    """AdamW with 8-bit moments: bitsandbytes on CUDA, torchao elsewhere and for weights that are rounded at random."""
    there = [name for name in EIGHT_BIT if importlib.util.find_spec(name)]
    if device.type == "cuda" and not narrow and "bitsandbytes" in there:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(groups, **more)
    if "torchao" in there:
        from torchao.optim import AdamW8bit

        return AdamW8bit(groups, bf16_stochastic_round=narrow, **more)
    wanted = "torchao" if narrow or device.type != "cuda" else "bitsandbytes or torchao"
    raise BadInput(
        f"train.optimizer adamw8bit needs {wanted}, which is not installed here",
        hint=f"Run: pip install {wanted.partition(' ')[0]}. Or set train.optimizer: adamw.",
    )
