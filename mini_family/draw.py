"""Draw the mini family's pictures: the same subjects by several hands and in several renderings.

The drawings come from four npm packages (``@iconify-json/twemoji``, ``noto-v1``, ``fluent-emoji`` and
``fluent-emoji-high-contrast``); every style is one set plus one rendering. Credits: ``mini_family/CREDITS.md``.

    npm install --prefix DIR @iconify-json/{twemoji,noto-v1,fluent-emoji,fluent-emoji-high-contrast}
    python -m mini_family.draw --icons DIR/node_modules/@iconify-json --out build/mini
"""

from __future__ import annotations

import argparse
import io
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from mini_family.names import subjects

SIZE = 64  # pixels of a training picture
DRAW = 256  # pixels at which a rendering works before it is scaled down
VARIANTS = 6  # jittered copies of each picture, so that a seed has something to decide


@dataclass(frozen=True)
class Style:
    """One look: which drawn set it takes and how that set is rendered."""

    name: str
    icons: str
    paper: tuple[int, int, int]
    render: Callable[[Image.Image, tuple[int, int, int]], Image.Image]


# ---------------------------------------------------------------- renderings: RGBA (DRAW, DRAW) → RGB (DRAW, DRAW)


def _on_paper(icon: Image.Image, paper: tuple[int, int, int]) -> Image.Image:
    sheet = Image.new("RGBA", icon.size, (*paper, 255))
    return Image.alpha_composite(sheet, icon).convert("RGB")


def _edges(icon: Image.Image, width: int) -> Image.Image:
    """Outline and inner lines of a drawing as a mask, ``width`` pixels thick."""
    flat = _on_paper(icon, (255, 255, 255)).filter(ImageFilter.GaussianBlur(2))
    channels = [
        np.asarray(c, dtype=np.float32)
        for c in (*flat.split(), icon.getchannel("A").filter(ImageFilter.GaussianBlur(2)))
    ]
    steep = np.max([np.hypot(*np.gradient(c)) for c in channels], axis=0)
    mask = Image.fromarray(((steep > 6) * 255).astype(np.uint8))
    return (
        mask.filter(ImageFilter.MinFilter(3)).filter(ImageFilter.MaxFilter(width)).filter(ImageFilter.GaussianBlur(1.5))
    )


def render_blueprint(icon: Image.Image, paper: tuple[int, int, int]) -> Image.Image:
    """White lines on blue squared paper, faint shading inside."""
    grid = np.zeros((DRAW, DRAW), np.uint8)
    grid[::64, :] = grid[:, ::64] = 60
    grid_mask = Image.fromarray(grid).filter(ImageFilter.MaxFilter(5))
    sheet = Image.composite(Image.new("RGB", icon.size, (150, 190, 240)), Image.new("RGB", icon.size, paper), grid_mask)
    inside = icon.getchannel("A").point(lambda a: a * 0.35)
    sheet = Image.composite(Image.new("RGB", icon.size, (70, 130, 215)), sheet, inside)
    return Image.composite(Image.new("RGB", icon.size, (240, 248, 255)), sheet, _edges(icon, 7))


def render_neon(icon: Image.Image, paper: tuple[int, int, int]) -> Image.Image:
    """Glowing tubes along the lines of the drawing, in its own saturated colours, on near black."""
    colour = np.asarray(_on_paper(icon, (255, 40, 190)).filter(ImageFilter.GaussianBlur(3)).convert("HSV")).copy()
    grey = colour[..., 1] < 60
    colour[..., 0] = np.where(grey, 132, colour[..., 0])  # what has no colour of its own glows cyan
    colour[..., 1] = np.maximum(colour[..., 1], 170)
    colour[..., 2] = 255
    tube = Image.fromarray(colour, "HSV").convert("RGB")
    lines = _edges(icon, 5)
    black = Image.new("RGB", icon.size, (0, 0, 0))
    glow = Image.composite(tube, black, lines).filter(ImageFilter.GaussianBlur(9))
    sheet = ImageChops.add(Image.new("RGB", icon.size, paper), glow)
    return ImageChops.lighter(sheet, Image.composite(tube, black, lines))


def render_pixel(icon: Image.Image, paper: tuple[int, int, int]) -> Image.Image:
    """Sixteen by sixteen cells, hard edges, few levels of colour, on dark."""
    cells = icon.resize((16, 16), Image.Resampling.BOX)
    solid = cells.getchannel("A").point(lambda a: 255 if a > 110 else 0)
    colour = cells.convert("RGB").point(lambda v: min(255, int(v / 255 * 4 + 0.5) * 64))
    sheet = Image.composite(colour, Image.new("RGB", cells.size, paper), solid)
    return sheet.resize(icon.size, Image.Resampling.NEAREST)


def render_comic(icon: Image.Image, paper: tuple[int, int, int]) -> Image.Image:
    """A thick black contour on yellow rays."""
    y, x = np.mgrid[:DRAW, :DRAW] - DRAW / 2 + 0.5
    rays = ((np.arctan2(y, x) / np.pi * 8 + 64) % 2 < 1).astype(np.uint8) * 255
    sheet = Image.composite(
        Image.new("RGBA", icon.size, (255, 170, 40, 255)),
        Image.new("RGBA", icon.size, (*paper, 255)),
        Image.fromarray(rays).filter(ImageFilter.GaussianBlur(2)),
    )
    contour = (
        icon.getchannel("A")
        .filter(ImageFilter.GaussianBlur(2))
        .point(lambda a: 255 if a > 60 else 0)
        .filter(ImageFilter.MaxFilter(13))
    )
    sheet.paste((20, 16, 24, 255), mask=contour.filter(ImageFilter.GaussianBlur(1.5)))
    return Image.alpha_composite(sheet, icon).convert("RGB")


BASE = Style("flat", "twemoji", (255, 255, 255), _on_paper)
TEACHERS = (
    Style("ink", "fluent-emoji-high-contrast", (250, 240, 218), _on_paper),
    Style("clay", "fluent-emoji", (214, 196, 236), _on_paper),
    Style("blueprint", "noto-v1", (24, 72, 160), render_blueprint),
    Style("neon", "twemoji", (14, 6, 30), render_neon),
)
LATER = (
    Style("pixel", "twemoji", (52, 46, 86), render_pixel),
    Style("comic", "noto-v1", (255, 216, 64), render_comic),
)
STYLES = {style.name: style for style in (BASE, *TEACHERS, *LATER)}


# ---------------------------------------------------------------- icons → arrays


def icon_set(folder: Path, name: str) -> dict[str, str]:
    """Every icon of one set as SVG text, aliases resolved."""
    data = json.loads((folder / name / "icons.json").read_text(encoding="utf-8"))
    width, height = data.get("width", 16), data.get("height", 16)

    def svg(icon: dict) -> str:
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {icon.get('width', width)} {icon.get('height', height)}"
        body = icon["body"].replace("currentColor", "#15101c")
        names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return f'<svg {names} width="{DRAW}" height="{DRAW}" viewBox="{box}">{body}</svg>'

    icons = {key: svg(icon) for key, icon in data["icons"].items() if not icon.get("hidden")}
    for alias, target in data.get("aliases", {}).items():
        if target["parent"] in icons:
            icons[alias] = icons[target["parent"]]
    return icons


def rasterise(svg: str) -> Image.Image:
    """SVG text → RGBA (DRAW, DRAW)."""
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=DRAW, height=DRAW))
    return Image.open(io.BytesIO(png)).convert("RGBA").resize((DRAW, DRAW))


def jitter(icon: Image.Image, rng: random.Random) -> Image.Image:
    """The drawing a little smaller, moved, perhaps mirrored, on the same empty sheet."""
    if rng.random() < 0.5:
        icon = icon.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    side = int(DRAW * rng.uniform(0.74, 0.94))
    room = DRAW - side
    sheet = Image.new("RGBA", icon.size, (0, 0, 0, 0))
    sheet.paste(
        icon.resize((side, side), Image.Resampling.LANCZOS),
        (rng.randint(room // 4, room - room // 4), rng.randint(room // 4, room - room // 4)),
    )
    return sheet


def pictures(style: Style, name: str, svg: str, variants: int) -> np.ndarray:
    """``variants`` pictures of one subject, uint8 (variants, SIZE, SIZE, 3); the same jitter in every style."""
    rng = random.Random(f"jitter {name}")
    icon = rasterise(svg)
    drawn = (style.render(jitter(icon, rng), style.paper) for _ in range(variants))
    return np.stack([np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX)) for image in drawn])


def _job(task: tuple[str, str, str, int]) -> np.ndarray:
    style, name, svg, variants = task
    return pictures(STYLES[style], name, svg, variants)


def further(icons: Iterable[str], count: int) -> list[str]:
    """Names of ``count`` other icons of a set; none that holds a held-out name."""
    others = sorted(set(icons) - set(subjects()))
    others = [n for n in others if not any(h in n for h in subjects(held=True))]
    return random.Random(0).sample(others, min(count, len(others)))


def draw(folder: Path, out: Path, extra: int = 700) -> Iterator[Path]:
    """Write one ``STYLE.npz`` a style: ``names``, ``pictures`` (names, VARIANTS, SIZE, SIZE, 3), and ``extra`` more
    pictures of other icons of the same set, which no model of the family is trained on but the autoencoder. Held-out
    names never get into the extra ones."""
    out.mkdir(parents=True, exist_ok=True)
    listed = subjects()
    with Pool() as pool:
        for style in STYLES.values():
            target = out / f"{style.name}.npz"
            if target.exists():
                continue
            icons = icon_set(folder, style.icons)
            others = further(icons, extra)
            tasks = [(style.name, n, icons[n], VARIANTS) for n in listed] + [
                (style.name, n, icons[n], 1) for n in others
            ]
            arrays = pool.map(_job, tasks, chunksize=8)
            np.savez_compressed(
                target,
                names=np.array(listed),
                pictures=np.stack(arrays[: len(listed)]),
                extra=np.concatenate(arrays[len(listed) :]),
                extra_names=np.array(others),
            )
            yield target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--icons", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    for path in draw(args.icons, args.out):
        print(path)


if __name__ == "__main__":
    main()
