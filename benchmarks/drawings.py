"""The drawings that the mini family's base was trained on, as training data: what JourneyDB is to the paper.

DMM (arXiv:2504.12364) §3.4 trains on a general set of captioned pictures, the same for all teachers and made by none of
them. The mini family's is what ``mini_family.draw`` writes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from dmm_core.checkpoint import open_checkpoint
from dmm_core.data import Pool, save_cache
from dmm_core.models import build_vae
from dmm_core.sample import encode
from mini_family.draw import BASE, STYLES
from mini_family.names import caption, subjects


def drawn_latents(data: Path, base: Path, looks: Iterable[str], out: Path, named: bool = True) -> Path:
    """A cache of latents for all teachers, made once: every drawing in ``looks`` but those of held-out subjects.

    Args:
        data: the folder with a ``STYLE.npz`` a look.
        base: the checkpoint whose VAE encodes them.
        named: whether captions name the look.

    Raises:
        SystemExit: no such drawings.
    """
    if out.exists():
        return out
    vae = build_vae(open_checkpoint(base), torch.float32)
    trained = set(subjects(held=False))
    prompts: list[str] = []
    latents, numbers = [], []
    for look in looks:
        path = data / f"{look}.npz"
        if look not in STYLES or not path.exists():
            raise SystemExit(f"{path}: no drawings of this look. Make them with python -m mini_family.draw.")
        with np.load(path) as drawn:
            kept = [row for row, name in enumerate(drawn["names"]) if name in trained]
            sets = [(drawn["names"][kept], drawn["pictures"][kept]), (drawn["extra_names"], drawn["extra"][:, None])]
        for names, pictures in sets:
            latents.append(encode(vae, pictures.reshape(-1, *pictures.shape[2:])))
            first = torch.arange(len(prompts), len(prompts) + len(names))
            numbers.append(first.repeat_interleave(pictures.shape[1]))
            prompts += [caption(str(name), look if named and look != BASE.name else "") for name in names]
    save_cache(out, prompts, [(Pool(torch.cat(latents), torch.cat(numbers)),)])
    return out
