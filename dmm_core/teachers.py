"""N teachers, one after the other, on ONE device (the authors' script needs a GPU for each)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dmm_core.checkpoint import Checkpoint
from dmm_core.losses import BlockFeatures
from dmm_core.models import build_text_encoder, build_unet, encode_prompts, require_sd15


class Teachers:
    """The teachers' UNets, the least recently used ones dropped beyond ``resident``; their prompt embeddings stay.

    A dropped UNet is read from its file again when its turn comes; nothing is kept twice.

    Args:
        checkpoints: one a teacher, all of one architecture.
        resident: how many UNets may be on the device at once; None keeps all.
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        resident: int | None = None,
    ) -> None:
        self.checkpoints = [require_sd15(checkpoint) for checkpoint in checkpoints]
        self.device, self.dtype = torch.device(device), dtype
        self.resident = resident or len(self.checkpoints)
        self.loads = 0
        self._unets: OrderedDict[int, Any] = OrderedDict()
        self._embeddings: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.checkpoints)

    def unet(self, index: int) -> Any:
        """Teacher ``index``'s UNet on the device, in evaluation mode, without gradients."""
        if index in self._unets:
            self._unets.move_to_end(index)
            return self._unets[index]
        while len(self._unets) >= self.resident:
            self._unets.popitem(last=False)
        checkpoint = self.checkpoints[index]
        unet = build_unet(checkpoint.unet_config, checkpoint.unet(), self.dtype, checkpoint.path, styled=False)
        self._unets[index] = unet.to(self.device)
        self.loads += 1
        return self._unets[index]

    def embed(self, prompts: Sequence[str]) -> None:
        """Encode the prompts once with every teacher's own text encoder; equal encoders share the result."""
        by_encoder: dict[tuple, Tensor] = {}
        for index, checkpoint in enumerate(self.checkpoints):
            encoder = build_text_encoder(checkpoint, torch.float32).to(self.device)
            key = _fingerprint(encoder)
            if key not in by_encoder:
                by_encoder[key] = encode_prompts(encoder, list(prompts)).to("cpu", self.dtype)
            self._embeddings[index] = by_encoder[key]

    def context(self, index: int, prompts: Tensor) -> Tensor:
        """Teacher ``index``'s embeddings (B, 77, C) of prompt numbers (B,); ``embed`` comes first."""
        return self._embeddings[index][prompts].to(self.device)

    @torch.no_grad()
    def predict(
        self, index: int, x_t: Tensor, t: Tensor, prompts: Tensor, features: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Teacher ``index``'s ε for x_t (B, 4, h, w), and its blocks' outputs if they are asked for."""
        unet = self.unet(index)
        with BlockFeatures(unet, enabled=features) as blocks:
            eps = unet(x_t.to(self.dtype), t, self.context(index, prompts)).sample
        return eps.float(), blocks.take()


def _fingerprint(module: Any) -> tuple:
    """Equal for equal weights: every tensor's sum and first moment in float64."""
    sums = [(p.double().sum().item(), p.double().square().sum().item()) for p in module.parameters()]
    return tuple(sums)
