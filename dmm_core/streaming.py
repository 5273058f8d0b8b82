"""A teacher whose blocks pass over the device one after the other: next to nothing of its weights stays there.

SDXL's UNet is 5 GB in bfloat16, a block of it 0.1 at most. A few blocks have places on the device; each one's weights
come while those before it work, and are overwritten when it is done.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from dmm_core.residency import Slot
from dmm_core.speed import ALIGNED

PLACES = 3  # blocks on the device: one works, one is there, one comes
BLOCK = re.compile(r".+\.(resnets|transformer_blocks)\.\d+\.")  # diffusers' keys of what passes over


def passes_over(key: str) -> bool:
    """Whether a UNet's tensor belongs to such a block; the others (a few hundredths of all) stay."""
    return BLOCK.match(key) is not None


def blocks_in_order(unet: Any) -> Iterator[nn.Module]:
    """The blocks as a forward pass comes to them."""
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        resnets, attentions = list(block.resnets), list(getattr(block, "attentions", None) or [])
        if block is unet.mid_block:
            yield resnets.pop(0)
        pairs = zip(attentions, resnets, strict=True) if block is unet.mid_block else zip_longest(resnets, attentions)
        for module in (module for pair in pairs for module in pair if module is not None):
            yield from getattr(module, "transformer_blocks", [module])


class Streamed(Slot):
    """A ``Slot`` for a UNet whose blocks' weights are on the meta device when it comes; all others are in place.

    Args:
        held: the first teacher's tensors on the host.
        device: where the blocks work.
    """

    def __init__(self, unet: Any, held: dict[str, Tensor], stream: Any, device: torch.device) -> None:
        names = {module: name for name, module in unet.named_modules()}
        self.blocks = list(blocks_in_order(unet))
        weights = [{f"{names[block]}.{name}": p for name, p in block.named_parameters()} for block in self.blocks]
        size = max(sum(_room(p) for p in block.values()) for block in weights)
        self.places = torch.empty(PLACES, size, dtype=torch.uint8, device=device)
        self.parts = [self._lay_out(unet, self.places[i % PLACES], block) for i, block in enumerate(weights)]
        for i, block in enumerate(self.blocks):
            block.register_forward_pre_hook(partial(self._enter, i))
            block.register_forward_hook(partial(self._leave, i))
        super().__init__(unet, held, stream)
        self.targets = {key: target for key, target in self.targets.items() if not passes_over(key)}
        self.inside: list[int | None] = [None] * PLACES  # the block that has each place
        self.there: list[Any] = [None] * PLACES  # when it has come
        self.left: list[Any] = [None] * PLACES  # when the one before it was done

    @staticmethod
    def _lay_out(unet: Any, place: Tensor, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Let a block's weights lie in a place, each laid out as it was."""
        parts, at = {}, 0
        for key, p in weights.items():
            values = place[at : at + p.numel() * p.element_size()].view(p.dtype)
            owner, _, leaf = key.rpartition(".")
            part = nn.Parameter(values.as_strided(p.shape, p.stride()), requires_grad=False)
            setattr(unet.get_submodule(owner), leaf, part)
            parts[key] = part.detach()
            at += _room(p)
        return parts

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Begin to put another teacher's weights in place: what stays, and the first blocks."""
        super().fill(tensors)
        self.inside = [None] * PLACES
        self._bring(0)

    # ------------------------------------------------------------ while the UNet works

    def _enter(self, i: int, module: nn.Module, inputs: Any) -> None:
        self._bring(i)
        if self.stream is not None:
            torch.cuda.current_stream().wait_event(self.there[i % PLACES])

    def _leave(self, i: int, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.stream is not None:
            self.left[i % PLACES] = torch.cuda.current_stream().record_event()

    @torch.no_grad()
    def _bring(self, first: int) -> None:
        """Begin to copy a block and those after it that have a place beside it, unless they are there."""
        for i in range(first, min(first + PLACES, len(self.blocks))):
            place = i % PLACES
            if self.inside[place] == i:
                continue
            if self.stream is not None:
                self.stream.wait_event(self.left[place] or torch.cuda.current_stream().record_event())
            with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
                for key, part in self.parts[i].items():
                    part.copy_(self.held[key], non_blocking=True)
            self.there[place] = self.stream.record_event() if self.stream is not None else None
            self.inside[place] = i


def _room(tensor: Tensor) -> int:
    """Bytes that a tensor takes in a place."""
    return -(-tensor.numel() * tensor.element_size() // ALIGNED) * ALIGNED
