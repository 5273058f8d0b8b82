"""What a UNet is told beside x_t and t: the prompt's embeddings, for SDXL its pooled one and the picture's size too.

The one place that knows how a stock diffusers UNet takes them, and how each family's text encoders give them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dmm_core.tokens import tokenize

PIXELS = 8  # of a latent's side


@dataclass(frozen=True, eq=False)
class Context:
    """Embeddings of B prompts: ``tokens`` (B, 77, C) for cross-attention, and SDXL's ``pooled`` (B, P)."""

    tokens: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """What there is of both."""
        return (self.tokens,) if self.pooled is None else (self.tokens, self.pooled)

    def __getitem__(self, rows: slice | Tensor) -> Context:
        return self.map(lambda part: part[rows])

    def map(self, change: Callable[[Tensor], Tensor]) -> Context:
        """The same change to each part."""
        return Context(change(self.tokens), None if self.pooled is None else change(self.pooled))

    def to(self, *args: Any) -> Context:
        """As ``Tensor.to``."""
        return self.map(lambda part: part.to(*args))

    def expand(self, rows: int) -> Context:
        """One prompt for ``rows`` rows."""
        return self.map(lambda part: part.expand(rows, *part.shape[1:]))

    @staticmethod
    def cat(contexts: Sequence[Context]) -> Context:
        """One after the other."""
        pooled = [context.pooled for context in contexts if context.pooled is not None]
        return Context(torch.cat([context.tokens for context in contexts]), torch.cat(pooled) if pooled else None)


@torch.no_grad()
def encode_prompts(encoders: Sequence[Any], prompts: Sequence[str], chunk: int = 64, to: tuple = ()) -> Context:
    """Embeddings of prompts by a checkpoint's text encoders, on their device; SDXL's second one pads with 0.

    ``to``: as ``Tensor.to`` takes it, for each chunk: thousands of prompts have no room on the device.
    """
    parts = []
    for start in range(0, len(prompts), chunk):
        some = list(prompts[start : start + chunk])
        told = embed(encoders, [tokenize(some, pad_with_zero=bool(i)) for i in range(len(encoders))])
        parts.append(told.to(*to) if to else told)
    return Context.cat(parts)


def embed(encoders: Sequence[Any], tokens: Sequence[Tensor]) -> Context:
    """Embeddings of token ids, (B, 77) for each encoder.

    SD1.5: the last hidden state after the final norm. SDXL: the last but one of both encoders side by side, and the
    second's projected end token as ``pooled``; the empty prompt is encoded like every other, as the hosts do it.
    """
    if len(encoders) == 1:
        return Context(encoders[0](tokens[0].to(encoders[0].device)).last_hidden_state)
    both = [
        encoder(ids.to(encoder.device), output_hidden_states=True)
        for encoder, ids in zip(encoders, tokens, strict=True)
    ]
    return Context(torch.cat([told.hidden_states[-2] for told in both], -1), both[-1].text_embeds)


def predict(unet: Any, x_t: Tensor, t: Tensor, context: Context, style: Tensor | None = None) -> Tensor:
    """What a stock UNet says of x_t (B, 4, h, w) at t (B,) or (), in its own type: (B, 4, h, w).

    ``style``: style vectors (B, d) for a UNet that takes them. SDXL hears that the picture is whole and of its size.
    """
    dtype = unet.conv_in.weight.dtype  # its first parameter may be an adapter's, in float32
    x, context = x_t.to(dtype), context.to(dtype)
    style = None if style is None else style.to(dtype)
    return unet(x, t, context.tokens, class_labels=style, added_cond_kwargs=added(context, x)).sample


def embedding(unet: Any, x_t: Tensor, t: Tensor, context: Context, style: Tensor) -> Tensor:
    """What ``predict`` tells a UNet's layers of time, style and, for SDXL, prompt and size: (B, d)."""
    dtype = unet.conv_in.weight.dtype
    x, context = x_t.to(dtype), context.to(dtype)
    emb = unet.time_embedding(unet.get_time_embed(x, t)) + unet.get_class_embed(x, style.to(dtype))
    if (more := added(context, x)) is not None:
        emb = emb + unet.get_aug_embed(emb, context.tokens, more)
    return emb


def added(context: Context, x_t: Tensor) -> dict[str, Tensor] | None:
    """What SDXL's UNet adds to its time embedding, as diffusers wants it (``added_cond_kwargs``)."""
    if context.pooled is None:
        return None
    sizes = time_ids(x_t.shape[-2], x_t.shape[-1], x_t.device).expand(len(x_t), -1)
    return {"text_embeds": context.pooled, "time_ids": sizes}


@cache  # a tensor made of Python numbers makes the device wait; a recording of kernels finds it where it was
def time_ids(height: int, width: int, device: torch.device) -> Tensor:
    """SDXL's six numbers (1, 6) for latents of this size: size before cropping, crop, size wanted."""
    size = [float(PIXELS * height), float(PIXELS * width)]
    return torch.tensor([[*size, 0.0, 0.0, *size]], device=device)
