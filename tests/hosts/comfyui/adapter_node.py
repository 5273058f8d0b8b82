"""A node of another pack, for the tests: an attention patch of the IP-Adapter kind, in the server's custom_nodes.

As in IP-Adapter (arXiv:2308.06721), cross-attention gets a second term from keys and values of its own, on the rows
of the positive prompt alone: ``attention(q, k, v) + weight · attention(q, k′, v′)``.
"""

from __future__ import annotations

import torch
from comfy.ldm.modules.attention import optimized_attention

BLOCKS = [("middle", 0), *(("input", i) for i in range(12)), *(("output", i) for i in range(12))]
TOKENS = 4  # of the picture that would be looked at


def own_tokens(width: int, seed: int) -> torch.Tensor:
    """(1, T, width): what an image encoder and a projection would have made."""
    return torch.randn(1, TOKENS, width, generator=torch.Generator().manual_seed(seed))


def added(q: torch.Tensor, heads: int, positive: list[int]) -> torch.Tensor:
    """The second term (B, L, C); zero on the rows of the negative prompt."""
    keys, values = (own_tokens(q.shape[-1], seed).to(q).expand(len(q), -1, -1) for seed in (1, 2))
    rows = torch.tensor(positive).repeat_interleave(len(q) // len(positive)).to(q)[:, None, None]
    return optimized_attention(q, keys, values, heads) * rows


class AttentionAdapter:
    """``replace``: takes the place of every cross-attention; ``patch``: changes its keys and values."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "adapt", "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"model": ("MODEL",), "weight": ("FLOAT", {"default": 1.0}),
                             "how": (["replace", "patch"],)}}  # fmt: skip

    def adapt(self, model, weight, how):
        clone = model.clone()

        def replace(q, k, v, options):
            positive = [int(half == 0) for half in options["cond_or_uncond"]]
            return optimized_attention(q, k, v, options["n_heads"]) + weight * added(q, options["n_heads"], positive)

        def patch(q, k, v, options):
            return q, k * (1 - weight / 2), v * (1 + weight)

        if how == "patch":
            clone.set_model_attn2_patch(patch)
        else:
            for block, number in BLOCKS:
                clone.set_model_attn2_replace(replace, block, number)
        return (clone,)


NODE_CLASS_MAPPINGS = {"AttentionAdapter": AttentionAdapter}
