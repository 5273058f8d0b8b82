"""What the report's pictures are drawn with: text, colours, scaled pictures. Pillow alone."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAPER, INK, MUTED, LINE, ACCENT = "#ffffff", "#1b1f27", "#667085", "#d9dde5", "#d9480f"

# Near to far: lightness rises evenly from 0.30 to 0.96 (OKLab) while the hue turns from violet to straw, so that the
# order survives grey print and colour blindness.
RAMP = ("#2c196d", "#153d8a", "#00609c", "#0082a1", "#00a09d", "#51b897", "#97cc9a", "#cedeaf", "#f7f3d8")

# Pillow's own font is Latin without accents. Names in other scripts are drawn in whichever of these is installed.
FALLBACK_FONTS = (
    "DejaVuSans.ttf", "arial.ttf", "Arial.ttf", "segoeui.ttf", "msyh.ttc", "YuGothM.ttc", "malgun.ttf",
    "PingFang.ttc", "Hiragino Sans GB.ttc", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "wqy-microhei.ttc",
)  # fmt: skip


def ramp_color(value: float, largest: float) -> tuple[int, int, int]:
    """Colour of a distance between 0 (near, dark) and ``largest`` (far, light).

    By the square root, because a student's distances to its own teachers are a small part of those between styles.
    """
    place = float(np.sqrt(np.clip(value / largest, 0, 1))) if largest > 0 else 0.0
    table = np.array([[int(code[i : i + 2], 16) for i in (1, 3, 5)] for code in RAMP], dtype=float)
    r, g, b = (round(float(np.interp(place * (len(RAMP) - 1), range(len(RAMP)), table[:, k]))) for k in range(3))
    return r, g, b


def text_color(background: tuple[int, int, int]) -> str:
    """Dark or white text, whichever reads better (the eye prefers white a little beyond equal contrast)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in background)]
    return INK if 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.28 else "#ffffff"


@lru_cache(maxsize=64)
def font(size: int, name: str = "") -> Any:
    """Pillow's own font, or an installed one by file name (OSError if it is not there)."""
    if name:
        return ImageFont.truetype(name, size)
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1 has one small bitmap font
        return ImageFont.load_default()


@lru_cache(maxsize=512)
def font_for(text: str, size: int) -> Any:
    """The first font that has every character of the text; the default one where none has."""
    default = font(size)
    for name in ("", *FALLBACK_FONTS):
        try:
            candidate = font(size, name)
            missing = _mask(candidate, "\uffff")
            if all(c.isspace() or _mask(candidate, c) != missing for c in text):
                return candidate
        except (OSError, ValueError):  # not installed, or a bitmap font that is asked for what it cannot encode
            continue
    return default


def _mask(of: Any, character: str) -> tuple[Any, bytes]:
    mask = of.getmask(character)
    return mask.size, bytes(mask)


def text_width(text: str, size: int) -> int:
    return round(font_for(text, size).getlength(text))


def shorten(text: str, size: int, width: int) -> str:
    """The text, cut with … where it is wider than ``width`` pixels."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(text + "…", size) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def wrap(text: str, size: int, width: int, lines: int = 2) -> list[str]:
    """The text in at most ``lines`` lines of ``width`` pixels, broken at spaces, the last one cut if need be."""
    rows: list[str] = []
    for word in text.split():
        if rows and (text_width(f"{rows[-1]} {word}", size) <= width or len(rows) == lines):
            rows[-1] += f" {word}"
        else:
            rows.append(word)
    return [shorten(row, size, width) for row in rows]


def write(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, fill: str = INK, anchor: str = "lm"
) -> None:
    """Text at a point; ``anchor`` as in Pillow (l/m/r, then a/m/s). Old bitmap fonts know no anchor: placed by size."""
    chosen = font_for(text, size)
    try:
        draw.text(at, text, font=chosen, fill=fill, anchor=anchor)
    except ValueError:
        left, top, right, bottom = draw.textbbox((0, 0), text, font=chosen)
        shift = {"l": 0.0, "m": 0.5, "r": 1.0}
        x = at[0] - shift[anchor[0]] * (right - left)
        draw.text((x, at[1] - (0 if anchor[1] == "a" else (bottom - top) / 2)), text, font=chosen, fill=fill)


def write_slanted(canvas: Image.Image, at: tuple[int, int], text: str, size: int, fill: str = INK) -> None:
    """Text that rises by 40 degrees to the right, its lower left end at a point."""
    mask = Image.new("L", (text_width(text, size) + 8, size + 10), 0)
    write(ImageDraw.Draw(mask), (2, mask.height / 2), text, size, fill="#ffffff")
    mask = mask.rotate(40, Image.Resampling.BICUBIC, expand=True)
    canvas.paste(Image.new("RGB", mask.size, fill), (at[0], at[1] - mask.height), mask)


def thumbnail(picture: np.ndarray, side: int) -> Image.Image:
    """A picture (H, W, 3) uint8 scaled so that its longer side is ``side`` pixels."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def cell_side(picture: np.ndarray) -> int:
    """Side in pixels at which a picture is shown: small ones twice as large, large ones smaller."""
    longer = max(picture.shape[:2])
    return 2 * longer if longer <= 96 else min(longer, 192)


def place(canvas: Image.Image, picture: np.ndarray, at: tuple[int, int], side: int) -> None:
    """A picture centred in the square cell at a point, with a hairline so that white ones end somewhere."""
    image = thumbnail(picture, side)
    x, y = at[0] + (side - image.width) // 2, at[1] + (side - image.height) // 2
    canvas.paste(image, (x, y))
    ImageDraw.Draw(canvas).rectangle((x - 1, y - 1, x + image.width, y + image.height), outline=LINE)
