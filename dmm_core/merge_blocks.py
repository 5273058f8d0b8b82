"""Block weights as the field has them ("MBW"): which block a tensor is in, and how much of the merge it gets.

Blocks: ``in.0`` … ``mid`` … ``out.0`` … of the UNet in LDM's order, then ``text`` (text encoders) and ``vae``. As usual
the time (and SDXL's size) embedding counts as ``in.0``, and the last norm and convolution as the last ``out``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from dmm_core.errors import BadInput

_UNET = re.compile(r"model\.diffusion_model\.(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\.(\d+)")
MIDDLE, TEXT, VAE = "mid", "text", "vae"


def unet_blocks(names: Iterable[str]) -> list[str]:
    """The blocks of a UNet by its tensors' LDM names, in order: SD1.5 has 12 + 1 + 12, SDXL 9 + 1 + 9."""
    found = [match for match in map(_UNET.match, names) if match]
    inner = 1 + max((int(m[2]) for m in found if m[1] == "input_blocks"), default=-1)
    outer = 1 + max((int(m[2]) for m in found if m[1] == "output_blocks"), default=-1)
    return [*(f"in.{i}" for i in range(inner)), MIDDLE, *(f"out.{i}" for i in range(outer))]


def block_of(name: str, part: str, blocks: Sequence[str]) -> str:
    """The block of a tensor, by its LDM name and its part ("unet", "vae", "text_encoder_0" …)."""
    if part != "unet":
        return VAE if part == "vae" else TEXT
    match = _UNET.match(name)
    if match is None:
        raise ValueError(f"no UNet tensor: {name}")
    kind = match[1]
    if kind in ("input_blocks", "output_blocks"):
        return f"{'in' if kind == 'input_blocks' else 'out'}.{match[2]}"
    return {"middle_block": MIDDLE, "out": blocks[-1]}.get(kind, blocks[0])


def block_alphas(
    given: Mapping[str, float] | Sequence[float] | None, alpha: float, blocks: Sequence[str]
) -> dict[str, float]:
    """Every block's alpha: what is given for it, else the base alpha.

    Args:
        given: by name; or a number for each of the UNet's ``blocks``, in order.

    Raises:
        BadInput: a block that this architecture has not, or a list of another length.
    """
    known = [*blocks, TEXT, VAE]
    if given is not None and not isinstance(given, Mapping):
        if len(given) != len(blocks):
            inner = blocks.index(MIDDLE)
            told = f"{len(blocks)} numbers ({inner} in, mid, {len(blocks) - inner - 1} out)"
            raise BadInput(f"blocks: expected {told} for these models, got {len(given)}")
        given = dict(zip(blocks, given, strict=True))
    for name in given or {}:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"Did you mean {near[0]}?" if near else ""
            told = f"{blocks[0]} to {blocks[blocks.index(MIDDLE) - 1]}, mid, out.0 to {blocks[-1]}, text and vae"
            raise BadInput(f"blocks: there is no block {name!r} in these models, which have {told}", hint=hint)
    return dict.fromkeys(known, alpha) | dict(given or {})
