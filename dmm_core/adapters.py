"""What a layer of a LoRA file adds to a weight: LoRA and LoCon, LoHa, LoKr, and DoRA over each of them.

Conventions are those of ComfyUI (``comfy/weight_adapter``) and of LyCORIS, which trains such files. All in float32.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

HADA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
LEFT = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
RIGHT = ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"})
FORMS = ({"down", "up"}, {"down", "up", "mid"}, HADA, HADA | {"hada_t1", "hada_t2"},
         *(left | right for left in LEFT for right in RIGHT))  # fmt: skip
DORA = {"dora_scale", "magnitude"}  # LyCORIS' name for it, and peft's
Values = Mapping[str, Tensor]  # of one layer, by role


def complete(roles: Collection[str]) -> bool | None:
    """Whether a layer's roles are all that it needs; None where no others would make a layer of them."""
    mine = set(roles) - {"alpha"} - DORA
    if mine in FORMS and len(DORA & set(roles)) < 2:
        return True
    return False if any(mine < form for form in FORMS) else None


def change(values: Values) -> Tensor:
    """The change before alpha, (out, rest) of a weight (out, in) or (out, in, h, w); meta tensors give its shape.

    Raises:
        RuntimeError: the shapes do not make a change.
    """
    if "down" in values:
        return _product(values["up"].flatten(1), values["down"].flatten(1), values.get("mid"))
    if "hada_w1_a" in values:
        first, second = (
            _product(*_sides(values, f"hada_w{i}", f"hada_t{i}"), values.get(f"hada_t{i}")) for i in (1, 2)
        )
        return first * second
    left = values["lokr_w1"] if "lokr_w1" in values else _product(*_sides(values, "lokr_w1"))
    if "lokr_w2" in values:
        right = values["lokr_w2"].flatten(1)
    else:
        right = _product(*_sides(values, "lokr_w2", "lokr_t2"), values.get("lokr_t2"))
    return torch.kron(left, right)  # of a convolution too: the kernel is the innermost part of its rows


def _sides(values: Values, name: str, middle: str = "") -> tuple[Tensor, Tensor]:
    """Both factors, the first one (out, rank): with a middle factor files have it the other way round."""
    first, second = values[f"{name}_a"], values[f"{name}_b"]
    return (first.T if middle in values else first), second


def _product(up: Tensor, down: Tensor, mid: Tensor | None = None) -> Tensor:
    """up (p, i) @ down (i, q); or up (p, i), mid (i, j, h, w), down (j, q): LoCon's "tucker" form. (p, rest)"""
    if mid is None:
        return up @ down
    return torch.einsum("pi,ijhw,jq->pqhw", up, mid, down).flatten(1)


def rank(values: Values) -> int | None:
    """What alpha is divided by; None where there are no low-rank factors, and alpha does not count."""
    for role in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if role in values:
            return len(values[role])
    return None


def magnitude(values: Values, shape: torch.Size | tuple[int, ...]) -> Tensor | None:
    """DoRA's norms as (out, 1, …) or (1, in, 1, …); None where the layer is none.

    Raises:
        ValueError: it has another shape.
    """
    ones = [1] * (len(shape) - 2)
    if "magnitude" in values:
        wanted = [(shape[0], 1, *ones)]
        norms = values["magnitude"]
    elif "dora_scale" in values:
        wanted = [(shape[0], 1, *ones), (1, shape[1], *ones)]
        norms = values["dora_scale"]
        wanted = wanted[:1] if norms.shape[:1] == shape[:1] else wanted[1:]
    else:
        return None
    if norms.numel() != max(wanted[0]):
        raise ValueError(f"norms {list(norms.shape)} for {list(shape)}")
    return norms.reshape(wanted[0])


def rescale(weight: Tensor, delta: Tensor, norms: Tensor) -> Tensor:
    """DoRA (arXiv:2402.09353) Eq. 5: what makes (W + Δ) · m / ‖W + Δ‖ of W. Δ in W's shape; ``norms`` of ``magnitude``.

    The norm is that of the CHANGED weight on both axes, as in the paper, LyCORIS and peft. ComfyUI (up to 0.33 at
    least) takes that of W itself where the norms are those of outputs.
    """
    changed = weight + delta
    others = tuple(d for d in range(weight.dim()) if norms.shape[d] == 1)
    length = torch.linalg.vector_norm(changed, dim=others, keepdim=True)
    return changed * (norms / (length + torch.finfo(weight.dtype).eps)) - weight
