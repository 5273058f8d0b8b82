"""A running webui as ``real.py`` sees it: pictures over its HTTP API (started with --api), and what the probe tells."""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

SCRIPT = "dmm styles"
Array = np.ndarray
VISIBLE = 3.0  # of 255, mean: what a style, or another style, is to change
ROUNDING = 2  # of 255: a float that falls to either side of a byte
Line = tuple[str, str, str, bool]  # of the table: what, seen, limit, passed


@dataclass(frozen=True)
class Drawn:
    """Pictures (B, H, W, 3) of one request, their infotexts, and what was said under them."""

    pictures: Array
    infotexts: list[str]
    comments: list[str]


class Webui:
    def __init__(self, url: str, size: int, steps: int) -> None:
        self.url, self.size, self.steps = url.rstrip("/"), size, steps
        self.drawn = 0
        self.forge = self.answers("/sdapi/v1/sd-modules")

    def ask(self, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=1800) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path}: {error.code} {error.read()[:2000].decode(errors='replace')}") from error

    def answers(self, path: str) -> bool:
        try:
            self.ask(path)
        except RuntimeError:
            return False
        return True

    def draw(self, args: object = None, prompt: str = "a cat", path: str = "txt2img", **more: Any) -> Drawn:
        """One request. ``args``: the extension's object, or a list of the panel's values; None names it not at all."""
        body: dict[str, Any] = {
            "prompt": prompt, "negative_prompt": "blurred", "seed": 1, "steps": self.steps, "cfg_scale": 4.0,
            "width": self.size, "height": self.size, "sampler_name": "Euler",
        }  # fmt: skip
        if args is not None:
            body["alwayson_scripts"] = {SCRIPT: {"args": args if isinstance(args, list) else [args]}}
        body = {key: value for key, value in {**body, **more}.items() if value is not None}
        told = self.ask(f"/sdapi/v1/{path}", body)
        self.drawn += 1
        info = json.loads(told["info"])
        pictures = [decode(text) for text in told["images"]]  # a grid, where there is one, comes first
        pictures = [picture for picture in pictures if picture.shape == pictures[-1].shape]
        return Drawn(np.stack(pictures), info["infotexts"], info.get("comments") or [])

    def load(self, name: str) -> None:
        """Another checkpoint, by the name of its file."""
        self.ask("/sdapi/v1/options", {"sd_model_checkpoint": f"{name}.safetensors"})

    def probe(self) -> dict[str, Any] | None:
        try:
            return self.ask("/dmm-probe")
        except RuntimeError:
            return None


def decode(text: str) -> Array:
    with Image.open(io.BytesIO(base64.b64decode(text.rpartition(",")[2]))) as image:
        return np.asarray(image.convert("RGB"), dtype=np.int16)


def encode(picture: Array) -> str:
    file = io.BytesIO()
    Image.fromarray(picture.astype(np.uint8)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def apart(first: Array, second: Array) -> int:
    """The largest difference of any value, of 255."""
    if first.shape != second.shape:
        raise AssertionError(f"pictures of other sizes: {first.shape} and {second.shape}")
    return int(np.abs(first - second).max())


def mean_apart(first: Array, second: Array) -> float:
    return float(np.abs(first - second).mean())


def same(what: str, first: Array, second: Array, limit: int = 0) -> Line:
    seen = apart(first, second)
    return what, f"{seen}/255", f"≤ {limit}/255" if limit else "0", seen <= limit


def other(what: str, first: Array, second: Array) -> Line:
    seen = mean_apart(first, second)
    return what, f"{seen:.1f}/255 mean", f"≥ {VISIBLE:g}", seen >= VISIBLE


def changes(first: Array, second: Array) -> tuple[str, str, bool]:
    """More than rounding can make of it."""
    seen = apart(first, second)
    return f"{seen}/255", f"> {2 * ROUNDING}/255", seen > 2 * ROUNDING


def true(what: str, seen: object, wanted: object) -> Line:
    return what, str(seen), str(wanted), seen == wanted
