"""Where latents and prompts come from: the teachers themselves (the default), an image folder, or a cache of either."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dmm_core.checkpoint.writer import write_safetensors
from dmm_core.diffusion import TIMESTEPS, add_noise
from dmm_core.errors import BadInput

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Batch:
    """Rows for one teacher. Student and teacher read the SAME x_t, t and prompt numbers: the drop is in ``prompt``."""

    teacher: int
    x_t: Tensor  # (B, 4, h, w)
    t: Tensor  # (B,)
    noise: Tensor  # (B, 4, h, w)
    prompt: Tensor  # (B,) numbers of prompts; the last prompt is the empty one
    again: tuple[Tensor, ...] | None = None  # t (B,) and noise (B, 4, h, w) that diffuse x̂0 for the discriminator

    def split(self, rows: int) -> list[Batch]:
        """The same samples in batches of at most ``rows``."""
        columns = (self.x_t, self.t, self.noise, self.prompt, *(self.again or ()))
        parts = zip(*(x.split(rows) for x in columns), strict=True)
        return [
            Batch(self.teacher, x_t, t, noise, prompt, tuple(more) or None) for x_t, t, noise, prompt, *more in parts
        ]


@dataclass(frozen=True)
class Pool:
    """Clean latents (n, 4, h, w) and the number of the prompt that each belongs to (n,)."""

    latents: Tensor
    prompt: Tensor


class LatentData:
    """Draws training batches from one pool a teacher, or from one pool for all.

    Args:
        prompts: all prompts WITHOUT the empty one, which gets the number ``len(prompts)``.
        pools: one, or one a teacher.
        prompt_drop: share of rows whose prompt becomes the empty one (the paper's 10 %).
    """

    def __init__(self, prompts: Sequence[str], pools: Sequence[Pool], prompt_drop: float = 0.1) -> None:
        self.prompts = (*prompts, "")
        self.pools = list(pools)
        self.prompt_drop = prompt_drop

    def draw(self, teacher: int, rows: int, rng: torch.Generator, again: bool = False) -> Batch:
        """``rows`` noised samples for a teacher. The one place where noise, timestep and prompt drop are drawn.

        ``again``: with what diffuses a clean prediction a second time.
        """
        pool = self.pools[teacher % len(self.pools)]
        pick = torch.randint(len(pool.latents), (rows,), generator=rng)
        x0 = pool.latents[pick].float()
        noise = torch.randn(x0.shape, generator=rng)
        t = torch.randint(TIMESTEPS, (rows,), generator=rng)
        dropped = torch.rand(rows, generator=rng) < self.prompt_drop
        prompt = torch.where(dropped, len(self.prompts) - 1, pool.prompt[pick])
        more = (
            (torch.randint(TIMESTEPS, (rows,), generator=rng), torch.randn(x0.shape, generator=rng)) if again else None
        )
        return Batch(teacher, add_noise(x0, noise, t), t, noise, prompt, more)


# ---------------------------------------------------------------- prompts


def read_prompts(path: str | Path) -> list[str]:
    """One prompt a line, UTF-8; empty lines and lines that start with # are left out."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot be read as a list of prompts ({error})", path) from error
    prompts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not prompts:
        raise BadInput("holds no prompt", path, "Write one prompt a line.")
    return prompts


def built_in_prompts(count: int, seed: int = 0) -> list[str]:
    """Prompts of everyday variety for those who have none, the same for the same seed."""
    table = json.loads((Path(__file__).parent / "assets" / "prompts.json").read_text(encoding="utf-8"))
    rng = random.Random(seed)
    made = (table["form"], table["subject"], table["place"], table["light"])
    return [" ".join(rng.choice(part) for part in made).replace(" ,", ",") for _ in range(count)]


# ---------------------------------------------------------------- images with captions


def captioned_images(folder: str | Path) -> Iterator[tuple[Path, str]]:
    """(picture, caption) pairs: a ``.txt`` beside each picture, or rows {"file_name", "text"} of ``metadata.jsonl``.

    Raises:
        BadInput: no such folder, no picture, a picture without a caption, or a broken row.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput("is no folder", folder)
    table = folder / "metadata.jsonl"
    pairs = list(_rows(table)) if table.exists() else list(_texts(folder))
    if not pairs:
        raise BadInput(
            "holds no pictures", folder, f"Put {', '.join(PICTURES)} files there, each with a .txt beside it."
        )
    yield from pairs


def _texts(folder: Path) -> Iterator[tuple[Path, str]]:
    for picture in sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES):
        text = picture.with_suffix(".txt")
        if not text.exists():
            raise BadInput(f"has no caption file {text.name} beside it", picture, "Write one, or a metadata.jsonl.")
        yield picture, text.read_text(encoding="utf-8-sig").strip()


def _rows(table: Path) -> Iterator[tuple[Path, str]]:
    for number, line in enumerate(table.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            picture, text = table.parent / row["file_name"], row["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"line {number} is no row with file_name and text", table) from error
        if not picture.is_file():
            raise BadInput(f"line {number} names {row['file_name']}, which is not there", table)
        yield picture, text


def encode_images(vae: Any, folder: str | Path, size: int) -> tuple[list[str], Pool]:
    """Latents of an image folder at ``size`` pixels square (scaled by the short side, cut in the middle)."""
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    from dmm_core.sample import encode

    captions, latents = [], []
    for path, caption in captioned_images(folder):
        try:
            with Image.open(path) as image:
                picture = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (size, size))
        except (OSError, UnidentifiedImageError) as error:
            raise BadInput("is no picture that can be read", path, "Remove it, or save it again as PNG.") from error
        captions.append(caption)
        latents.append(encode(vae, np.asarray(picture)[None]).cpu())
    prompts = sorted(set(captions))
    number = {text: i for i, text in enumerate(prompts)}
    return prompts, Pool(torch.cat(latents), torch.tensor([number[c] for c in captions]))


# ---------------------------------------------------------------- cache


def save_cache(path: str | Path, prompts: Sequence[str], pools: Sequence[Pool]) -> None:
    """One safetensors file with all latents (float16) and prompts, written atomically."""
    tensors = {}
    for i, pool in enumerate(pools):
        tensors[f"latents.{i}"] = pool.latents.half().contiguous()
        tensors[f"prompt.{i}"] = pool.prompt.contiguous()
    write_safetensors(Path(path), tensors, {"prompts": json.dumps(list(prompts)), "pools": str(len(pools))})


def load_cache(path: str | Path) -> tuple[list[str], list[Pool]]:
    """What ``save_cache`` wrote.

    Raises:
        BadInput: no such file, or not a cache of latents.
    """
    try:
        with safe_open(str(path), "pt") as file:
            about = file.metadata() or {}
            prompts = json.loads(about["prompts"])
            pools = [
                Pool(file.get_tensor(f"latents.{i}"), file.get_tensor(f"prompt.{i}"))
                for i in range(int(about["pools"]))
            ]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise BadInput("is no cache of latents", path, "Delete it, and it is made again.") from error
    return prompts, pools
