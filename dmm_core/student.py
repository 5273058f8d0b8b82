"""The student: a stock UNet whose class-label input takes the style vector, and the codebook that makes it.

emb = time_embed(t) + s,   s = MLP(Σ w_i e_i)        DMM (arXiv:2504.12364) §3.3
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmm_core.checkpoint import Checkpoint, write_dmm
from dmm_core.conditioning import Context, predict
from dmm_core.lowrank import Adapters
from dmm_core.models import build_unet
from dmm_core.style import Codebook, Mix

TIME_BIAS = "time_embedding.linear_2.bias"  # diffusers' name of time_embed.2.bias


class Student(nn.Module):
    """UNet and codebook together: noise predictions (B, 4, h, w) for rows of any styles.

    With ``adapters`` the UNet is frozen, and they are what learns beside the codebook.
    """

    def __init__(self, unet: Any, codebook: Codebook, adapters: Adapters | None = None) -> None:
        super().__init__()
        if unet.config.class_embed_type != "identity":
            raise ValueError("a student's UNet is built with class_embed_type='identity'")
        self.unet, self.codebook, self.adapters = unet, codebook, adapters

    def forward(self, x_t: Tensor, t: Tensor, context: Context, weights: Tensor) -> Tensor:
        """ε of x_t (B, 4, h, w) at t (B,), B prompts, style weights (B, N)."""
        return predict(self.unet, x_t, t, context, self.codebook(weights))

    @classmethod
    def start(
        cls, like: Checkpoint, tensors: dict[str, Tensor], names: tuple[str, ...], default: Mix | None, seed: int,
        dtype: torch.dtype = torch.float32, rank: int | None = None, earlier: Codebook | None = None,
    ) -> Student:  # fmt: skip
        """An untrained student from a UNet's tensors (base, or average of the teachers): every style is that UNet.

        Args:
            dtype: of the UNet's weights; codebook and adapters are float32.
            rank: of the adapters; None trains the UNet itself.
            earlier: a codebook whose styles come first in ``names``, and stay as they are until training moves them.
        """
        unet = build_unet(like.unet_config, tensors, dtype, like.path, styled=True).requires_grad_(rank is None)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            codebook = Codebook(names, unet.time_embedding.linear_2.out_features, default)
        if earlier is not None:
            codebook.take_over(earlier)
        return cls(unet, codebook, None if rank is None else Adapters(unet, rank, seed))

    def learning(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """What is trained: of the UNet (itself, or its adapters), and the codebook."""
        return list((self.adapters or self.unet).parameters()), list(self.codebook.parameters())

    def learned(self) -> dict[str, Tensor]:
        """The tensors that training changes; the frozen ones can be made again from the teachers."""
        state = self.state_dict()
        return {key: value for key, value in state.items() if self.adapters is None or not key.startswith("unet.")}

    def folded(self) -> dict[str, Tensor]:
        """The UNet's tensors, the adapters' changes in them."""
        state = self.unet.state_dict()
        return self.adapters.folded(state) if self.adapters else state

    def save(self, path: str | Path, like: Checkpoint, dtype: torch.dtype = torch.float16, **about: Any) -> Path:
        """Write the DMM file: this UNet and codebook with the text encoder and VAE of ``like``.

        The codebook is folded and stored at float32, since its sum with the time embedding must survive.
        ``about`` goes to ``write_dmm``: style_info, recipe, report, title, …
        """
        unet = {k: v.detach().to("cpu", dtype).contiguous() for k, v in self.folded().items()}
        bias = self.unet.state_dict()[TIME_BIAS].detach().cpu().float()
        codebook = Codebook(self.codebook.names, self.codebook.dim, self.codebook.default)
        codebook.load_state_dict({k: v.detach().cpu().float() for k, v in self.codebook.state_dict().items()})
        write_dmm(
            Path(path), family=like.family, unet={**unet, TIME_BIAS: bias}, vae=like.vae() if like.vae_config else None,
            text_encoders=[like.text_encoder(i) for i in range(len(like.text_configs))], codebook=codebook,
            prediction_type=like.prediction_type,
            vae_config=like.vae_config, resolution=8 * int(like.unet_config["sample_size"]), **about,
        )  # fmt: skip
        return Path(path)


@torch.no_grad()
def bake(unet: Any, style: Tensor) -> None:
    """Make a fixed style part of a UNet, in place: ``time_embed.2.bias += s`` for s (d,)."""
    unet.time_embedding.linear_2.bias += style.to(unet.time_embedding.linear_2.bias)


@contextmanager
def live_style(unet: Any, style: Tensor) -> Iterator[None]:
    """Add s (d,) or (B, d) to the time embedding while entered: what the hosts' hook does."""
    handle = unet.time_embedding.register_forward_hook(lambda module, inputs, output: output + style.to(output))
    try:
        yield
    finally:
        handle.remove()
