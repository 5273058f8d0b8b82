"""Small pictures of the styles that travel inside the DMM file, for the hosts to show beside a style's name."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from dmm_core.checkpoint.metadata import THUMBNAIL_LIMIT
from dmm_core.report.draw import thumbnail

SIDE = 160  # pixels of the longer side at most
QUALITIES = (92, 85, 75, 60, 40)


def data_uri(picture: np.ndarray, limit: int = THUMBNAIL_LIMIT) -> str:
    """A picture (H, W, 3) uint8 as a JPEG data URI of at most ``limit`` characters: ``dmm.styles[].thumbnail``."""
    side = min(SIDE, max(picture.shape[:2]))
    while True:
        for quality in QUALITIES:
            buffer = io.BytesIO()
            thumbnail(picture, side).save(buffer, "JPEG", quality=quality, subsampling=0, optimize=True)
            uri = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
            if len(uri) <= limit:
                return uri
        side = side * 3 // 4


def shared_subject(prompts: Sequence[Tensor]) -> list[int]:
    """For every teacher the row of a prompt that all of them have drawn, so that styles compare; else its first row.

    ``prompts``: for every teacher the numbers (n,) of the prompts of its rows.
    """
    shared = set(prompts[0].tolist()).intersection(*(part.tolist() for part in prompts[1:]))
    return [part.tolist().index(min(shared)) if shared else 0 for part in prompts]


def of_latents(vae: Any, latents: Sequence[Tensor], prompts: Sequence[Tensor]) -> list[str]:
    """A data URI a teacher, of one of the latents (n, 4, h, w) that it drew for its prompts (n,)."""
    from dmm_core.sample import decode

    rows = shared_subject(prompts)
    chosen = [part[row : row + 1].float().to(vae.device) for part, row in zip(latents, rows, strict=True)]
    return [data_uri(decode(vae, latent)[0]) for latent in chosen]
