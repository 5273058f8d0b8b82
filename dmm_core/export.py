"""A fixed mix of a DMM file's styles as a file: a style file, or an ordinary checkpoint. Needs torch alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dmm_core.checkpoint import Checkpoint, write_checkpoint, write_style
from dmm_core.checkpoint.metadata import FEW_STEP
from dmm_core.checkpoint.save import TIME_BIAS
from dmm_core.errors import BadInput


def export(
    checkpoint: Checkpoint, mix: Mapping[str, float], out: Path, name: str, bake: bool = False, normalize: bool = True
) -> dict[str, float]:
    """Write the mix to ``out``; returns the weights that were used, those of 0 left out.

    Args:
        bake: an ordinary checkpoint with this mix as its only style, instead of a style file for stock LoRA loaders.

    Raises:
        BadInput: a file without styles, an unknown style, or weights that sum to 0 and are to be normalised.
    """
    codebook = checkpoint.codebook()
    if codebook is None:
        raise BadInput("is an ordinary checkpoint and holds no styles to mix", checkpoint.path, "Give a DMM file.")
    try:
        weights = codebook.weights(mix, normalize=normalize)
    except BadInput as error:
        raise type(error)(error.what, checkpoint.path, error.hint) from None
    # What the file's own UNet must gain: the default style is folded into its bias, and out of this vector.
    vector = codebook(weights).detach()
    used = {style: round(float(weight), 8) for style, weight in zip(codebook.names, weights, strict=True) if weight}
    if bake:
        _bake(out, checkpoint, vector, name)
    else:
        write_style(out, vector=vector, name=name, mix=used, dmm_hash=checkpoint.sha256())
    return used


def _bake(out: Path, checkpoint: Any, vector: Tensor, name: str) -> None:
    """The checkpoint without codebook, ``time_embed.2.bias`` + s in its place."""
    unet = dict(checkpoint.unet())
    bias = unet[TIME_BIAS]
    unet[TIME_BIAS] = (bias.float() + vector.float()).to(bias.dtype)
    kept = lambda key: key == FEW_STEP or not key.startswith("dmm.")  # noqa: E731  it is drawn in few steps still
    metadata = {key: value for key, value in checkpoint.metadata.items() if kept(key)}
    metadata.pop("modelspec.hash_sha256", None)  # of the tensors that it was
    write_checkpoint(
        out, family=checkpoint.family, unet=unet, vae=checkpoint.vae() if checkpoint.vae_config else None,
        text_encoders=[checkpoint.text_encoder(i) for i in range(len(checkpoint.text_configs))],
        metadata={**metadata, "modelspec.title": name},
        prediction_type=checkpoint.prediction_type, vae_config=checkpoint.vae_config,
    )  # fmt: skip
