"""Where latents and prompts come from: the teachers themselves (the default), an image folder, or a cache of either."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dmm_core.checkpoint.writer import write_safetensors
from dmm_core.diffusion import TIMESTEPS, add_noise
from dmm_core.errors import BadInput
from dmm_core.sizes import PIXELS, Size, nearest

NOISY = 350  # from this timestep on x_t is noisy enough to leave open which style a picture is to have
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True, eq=False)
class Between:
    """The first rows of a batch are on the way to another teacher's style."""

    teacher: int
    weight: Tensor  # (m,) of the other style in the mix, on the CPU; the batch's own has the rest

    def __len__(self) -> int:
        return len(self.weight)

    def __getitem__(self, rows: slice) -> Between | None:
        weight = self.weight[rows]
        return Between(self.teacher, weight) if len(weight) else None


@dataclass(frozen=True)
class Batch:
    """Rows for one teacher. Student and teacher read the SAME x_t, t and prompt numbers: the drop is in ``prompt``."""

    teacher: int
    x_t: Tensor  # (B, 4, h, w), all of one size
    t: Tensor  # (B,)
    noise: Tensor  # (B, 4, h, w)
    prompt: Tensor  # (B,) numbers of prompts; the last prompt is the empty one
    again: tuple[Tensor, ...] | None = None  # t (B,) and noise (B, 4, h, w) that diffuse x̂0 for the discriminator
    between: Between | None = None

    def split(self, rows: int) -> list[Batch]:
        """The same samples in batches of at most ``rows``."""
        columns = (self.x_t, self.t, self.noise, self.prompt, *(self.again or ()))
        parts = zip(*(x.split(rows) for x in columns), strict=True)
        made = [
            Batch(self.teacher, x_t, t, noise, prompt, tuple(more) or None) for x_t, t, noise, prompt, *more in parts
        ]
        if not self.between:
            return made
        return [replace(b, between=self.between[i * rows : (i + 1) * rows]) for i, b in enumerate(made)]


@dataclass(frozen=True)
class Pool:
    """Clean latents (n, 4, h, w) of one size and the number of the prompt that each belongs to (n,)."""

    latents: Tensor
    prompt: Tensor


Pools = tuple[Pool, ...]  # one teacher's, of a size each; none for a teacher that is not asked


class LatentData:
    """Draws training batches from the pools of every teacher, or from those for all.

    Args:
        prompts: all prompts WITHOUT the empty one, which gets the number ``len(prompts)``.
        pools: one entry, or one a teacher; several pools in an entry are of the same sizes in the same order.
        prompt_drop: share of rows whose prompt becomes the empty one (the paper's 10 %).
        foreign: share of the noisy rows (t from ``NOISY`` on) whose clean latents are any teacher's. A student that
            sees each style on that style's own pictures alone takes the style of x_t for what is wanted: where the
            teacher itself starts in another look and leaves it on the way, such a student does not follow.

    Raises:
        BadInput: the pools' sizes differ between teachers.
    """

    def __init__(
        self, prompts: Sequence[str], pools: Sequence[Pool | Pools], prompt_drop: float = 0.1, foreign: float = 0.0
    ) -> None:
        self.prompts = (*prompts, "")
        self.pools = [(entry,) if isinstance(entry, Pool) else tuple(entry) for entry in pools]
        self.prompt_drop, self.foreign = prompt_drop, foreign
        sizes = [[tuple(pool.latents.shape[-2:]) for pool in entry] for entry in self.pools if entry]
        if any(other != sizes[0] for other in sizes):
            raise BadInput(f"the teachers' latents are of different sizes: {sizes}", hint="Make them anew.")
        self.counts = torch.tensor([sum(map(len, of_size)) for of_size in zip(*self._latents(), strict=True)])

    def _latents(self) -> Iterator[list[Tensor]]:
        return ([pool.latents for pool in entry] for entry in self.pools if entry)

    def choose(self, rng: torch.Generator) -> int:
        """The size of a step's batches, each as likely as it is frequent; nothing is drawn where there is one alone."""
        return int(torch.multinomial(self.counts.double(), 1, generator=rng)) if len(self.counts) > 1 else 0

    def draw(self, teacher: int, rows: int, rng: torch.Generator, again: bool = False, size: int = 0) -> Batch:
        """``rows`` noised samples for a teacher. The one place where noise, timestep and prompt drop are drawn.

        ``again``: with what diffuses a clean prediction a second time. ``size``: what ``choose`` said.
        """
        pool = self.pools[teacher % len(self.pools)][size]
        pick = torch.randint(len(pool.latents), (rows,), generator=rng)
        x0, number = pool.latents[pick].float(), pool.prompt[pick]
        noise = torch.randn(x0.shape, generator=rng)
        t = torch.randint(TIMESTEPS, (rows,), generator=rng)
        self.exchange(x0, number, t, size, rng)
        dropped = torch.rand(rows, generator=rng) < self.prompt_drop
        prompt = torch.where(dropped, len(self.prompts) - 1, number)
        more = (
            (torch.randint(TIMESTEPS, (rows,), generator=rng), torch.randn(x0.shape, generator=rng)) if again else None
        )
        return Batch(teacher, add_noise(x0, noise, t), t, noise, prompt, more)

    def exchange(self, x0: Tensor, number: Tensor, t: Tensor, size: int, rng: torch.Generator) -> None:
        """Put latents of any teacher and the numbers of their prompts into a share of the noisy rows."""
        pools = [entry[size] for entry in self.pools if entry]
        if not self.foreign or len(pools) < 2:
            return
        chosen = (t >= NOISY) & (torch.rand(len(t), generator=rng) < self.foreign)
        for row in chosen.nonzero().flatten().tolist():
            other = pools[int(torch.randint(len(pools), (), generator=rng))]
            pick = torch.randint(len(other.latents), (), generator=rng)
            x0[row], number[row] = other.latents[pick].float(), other.prompt[pick]


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
        yield picture, _read(text).strip()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput("is no UTF-8 text that can be read", path, "Save it as UTF-8.") from error


def _rows(table: Path) -> Iterator[tuple[Path, str]]:
    for number, line in enumerate(_read(table).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            picture, text = table.parent / row["file_name"], row["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"line {number} is no row with file_name and text", table) from error
        if not isinstance(text, str):
            raise BadInput(f"line {number} has a text that is none", table, 'Write "" for no caption.')
        if not picture.is_file():
            raise BadInput(f"line {number} names {row['file_name']}, which is not there", table)
        yield picture, text


def encode_images(vae: Any, folder: str | Path, sizes: Sequence[Size]) -> tuple[list[str], Pools]:
    """Latents of an image folder, a pool for each of the ``sizes`` of latents that has pictures.

    Every picture goes to the size that is most like its own shape, scaled to cover it and cut in the middle.
    """
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    from dmm_core.sample import encode

    captions: list[str] = []
    rows: dict[int, list[tuple[int, Tensor]]] = {number: [] for number in range(len(sizes))}
    for path, caption in captioned_images(folder):
        try:
            with Image.open(path) as image:
                upright = ImageOps.exif_transpose(image).convert("RGB")
                which = nearest((upright.height, upright.width), sizes)
                height, width = sizes[which]
                picture = ImageOps.fit(upright, (PIXELS * width, PIXELS * height))
        except (OSError, UnidentifiedImageError) as error:
            raise BadInput("is no picture that can be read", path, "Remove it, or save it again as PNG.") from error
        rows[which].append((len(captions), encode(vae, np.asarray(picture)[None]).cpu()))
        captions.append(caption)
    prompts = sorted(set(captions))
    number = {text: i for i, text in enumerate(prompts)}
    return prompts, tuple(
        Pool(torch.cat([latent for _, latent in part]), torch.tensor([number[captions[i]] for i, _ in part]))
        for part in rows.values() if part
    )  # fmt: skip


# ---------------------------------------------------------------- cache


def save_cache(path: str | Path, prompts: Sequence[str], pools: Sequence[Pools], origin: str = "") -> None:
    """One safetensors file with all latents (float16) and prompts, written atomically.

    ``latents.N`` and ``prompt.N`` are teacher N's; further sizes are ``latents.N.1`` and so on. ``origin`` tells what
    they were made with.
    """
    tensors = {}
    for i, entry in enumerate(pools):
        for j, pool in enumerate(entry):
            name = f"{i}.{j}" if j else str(i)
            tensors[f"latents.{name}"] = pool.latents.half().contiguous()
            tensors[f"prompt.{name}"] = pool.prompt.contiguous()
    sizes = [len(entry) for entry in pools]
    about = {
        "prompts": json.dumps(list(prompts)),
        "pools": str(len(pools)),
        "sizes": json.dumps(sizes),
        "origin": origin,
    }
    write_safetensors(Path(path), tensors, about)


def load_cache(path: str | Path, origin: str = "") -> tuple[list[str], list[Pools]]:
    """What ``save_cache`` wrote, or an earlier version of it, which knew one size alone.

    Raises:
        BadInput: no such file, not a cache of latents, or one of another ``origin``, where that is asked.
    """
    try:
        with safe_open(str(path), "pt") as file:
            about = file.metadata() or {}
            prompts = json.loads(about["prompts"])
            count = int(about["pools"])
            names = [[f"{i}.{j}" if j else str(i) for j in range(sizes)]
                     for i, sizes in enumerate(json.loads(about.get("sizes", "null")) or [1] * count)]  # fmt: skip
            pools = [
                tuple(
                    Pool(*(file.get_tensor(f"{part}.{name}").clone() for part in ("latents", "prompt")))
                    for name in entry
                )
                for entry in names
            ]  # copies: Windows cannot delete a file that tensors are mapped to
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise BadInput("is no cache of latents", path, "Delete it, and it is made again.") from error
    if origin and about.get("origin", "") not in ("", origin):
        told = "holds latents made with other settings than the recipe's"
        raise BadInput(told, path, "Use the recipe as it was, or delete the folder to begin anew.")
    return prompts, pools
