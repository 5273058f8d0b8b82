"""A low-rank student: y = W x + B (A x) beside every linear layer and convolution of a frozen, stock UNet.

Hooks on the layers rather than other modules in their place: the UNet keeps its parameter names, works with gradient
checkpointing and torch.compile, and needs no further library (peft renames what it wraps). W + B A is formed once, at
the end; in training only A x (rank numbers a position) is kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FASTER = 10  # the adapters' learning rate over a whole UNet's: at the same one they stay behind (docs/results.md)


class LowRank(nn.Module):
    """The change of one layer. Starts at zero: ``up`` is zero, ``down`` random with variance 1 / inputs.

    Raises:
        ValueError: a layer that is neither linear nor an ungrouped convolution.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        outputs, *inputs = layer.weight.shape
        self.shape = layer.weight.shape
        self.geometry: dict[str, Any] | None = None
        if isinstance(layer, nn.Conv2d):
            self.geometry = {"stride": layer.stride, "padding": layer.padding}
        if not isinstance(layer, nn.Linear) and (layer.groups, layer.dilation) != (1, (1, 1)):
            raise ValueError(f"no low-rank change of a grouped or dilated convolution {layer}")
        fan_in = torch.Size(inputs).numel()
        rank = min(rank, outputs, fan_in)
        self.down = nn.Parameter(torch.randn(rank, *inputs, generator=generator) * fan_in**-0.5)
        self.up = nn.Parameter(torch.zeros(outputs, rank, *(1,) * (len(inputs) - 1)))

    def forward(self, x: Tensor) -> Tensor:
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if self.geometry is None:
            return F.linear(F.linear(x, down), up)
        return F.conv2d(F.conv2d(x, down, **self.geometry), up)

    def delta(self) -> Tensor:
        """B A in the shape of the layer's weight."""
        return (self.up.flatten(1) @ self.down.flatten(1)).view(self.shape)


class Adapters(nn.Module):
    """``LowRank`` beside every linear layer and convolution of a UNet, at work as long as both live."""

    def __init__(self, unet: nn.Module, rank: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleDict()
        for name, layer in unet.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                adapter = LowRank(layer, rank, generator)
                self.layers[name.replace(".", "/")] = adapter  # no dots in names of modules
                layer.register_forward_hook(_beside(adapter))

    @torch.no_grad()
    def folded(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A UNet's tensors with the changes added, in float32 where there is one."""
        changed = {
            f"{name.replace('/', '.')}.weight": adapter.delta()
            for name, adapter in self.layers.items()
            if isinstance(adapter, LowRank)
        }
        return {key: value.float() + changed[key] if key in changed else value for key, value in state.items()}


def _beside(adapter: LowRank) -> Any:
    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + adapter(inputs[0])

    return add
