"""What ``real.py`` checks: each function yields lines (what, seen, limit, passed). Pictures are compared in bytes."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from tests.hosts.webui.real_api import ROUNDING, SCRIPT, Array, Line, Webui, apart, changes, encode, other, same, true

DMM, PLAIN, STYLE, LORA = "dmm-check", "dmm-check-plain", "dmm-check-style", "dmm-check-lora"
MIX = {"ink": 0.7, "clay": 0.3}  # of the file STYLE
EQUAL = dict.fromkeys(("ink", "clay", "水彩, wet"), 1.0)  # the default, given by hand


def style(webui: Webui) -> Iterator[Line]:
    off, ink, clay = webui.draw(), webui.draw({"weights": "ink"}), webui.draw({"weights": "clay"})
    yield other("a style against the default", ink.pictures, off.pictures)
    yield other("a style against another", ink.pictures, clay.pictures)
    yield same("the same style again", ink.pictures, webui.draw({"weights": "ink"}).pictures)
    yield same("off again", off.pictures, webui.draw().pictures)


def plain_pictures(webui: Webui) -> Array:
    """Pictures that know nothing of the extension: one, with a LoRA, and of another checkpoint."""
    webui.load(DMM)
    made = [webui.draw().pictures[0], webui.draw(prompt=f"a cat <lora:{LORA}:1>").pictures[0]]
    webui.load(PLAIN)
    made.append(webui.draw().pictures[0])
    webui.load(DMM)
    return np.stack(made)


def plain(webui: Webui, kept: Array) -> Iterator[Line]:
    yield same("off, against the webui without the extension: plain, with a LoRA, on a plain checkpoint",
               plain_pictures(webui), kept)  # fmt: skip


def default(webui: Webui) -> Iterator[Line]:
    off = webui.draw().pictures
    for name, args in {
        "weights default": {"weights": "default"}, "all weights equal": {"weights": EQUAL},
        "enabled false": {"enabled": False, "weights": "ink"},
    }.items():  # fmt: skip
        yield same(f"{name}, against off", webui.draw(args).pictures, off)


def tag(webui: Webui) -> Iterator[Line]:
    mix = webui.draw({"weights": MIX})
    yield same("tags against args", webui.draw(prompt="a cat<dmm:ink:0.7><dmm:clay:0.3>").pictures, mix.pictures)
    sliders = [True, True, "both", "", "", 0, 1, "blend", "", 0.7, 0.3, *[0] * 14, json.dumps(["ink", "clay"])]
    yield same("the panel's sliders against args", webui.draw(sliders).pictures, mix.pictures)
    said = webui.draw(prompt="a cat<dmm:oil:1>")
    yield same("an unknown tag against off", said.pictures, webui.draw().pictures)
    yield true("an unknown tag is told in the infotext", "there is no such style" in said.infotexts[0], True)


def lora(webui: Webui) -> Iterator[Line]:
    prompt = f"a cat <lora:{LORA}:1>"
    before, alone, both = webui.draw({"weights": MIX}), webui.draw(prompt=prompt), webui.draw({"weights": MIX}, prompt)
    yield other("a style and a LoRA against the style", both.pictures, before.pictures)
    yield other("a style and a LoRA against the LoRA", both.pictures, alone.pictures)
    tags = f"a cat<dmm:clay:0.3> <lora:{LORA}:1><dmm:ink:0.7>"
    yield same("tags of both kinds in another order", webui.draw(prompt=tags).pictures, both.pictures)
    yield same("default style beside a LoRA against the LoRA", webui.draw({"weights": EQUAL}, prompt).pictures,
               alone.pictures)  # fmt: skip
    yield same("the style afterwards", webui.draw({"weights": MIX}).pictures, before.pictures)
    file = f"a cat <lora:{STYLE}:1>"
    yield same("style file in the stock loader against args", webui.draw(prompt=file).pictures, before.pictures,
               ROUNDING)  # fmt: skip
    yield same("the same beside a LoRA", webui.draw(prompt=f"{file}<lora:{LORA}:1>").pictures, both.pictures,
               ROUNDING)  # fmt: skip


def rows(webui: Webui) -> Iterator[Line]:
    """Which row of the UNet's batch gets which style: each against a picture that was drawn by itself."""
    ink, clay = webui.draw({"weights": "ink"}), webui.draw({"weights": "clay"}, seed=2)
    both = webui.draw({"batch": ["ink", "clay"]}, batch_size=2).pictures[-2:]
    yield same("batch of two styles, first", both[:1], ink.pictures, ROUNDING)
    yield same("batch of two styles, second", both[1:], clay.pictures, ROUNDING)
    both = webui.draw({"batch": ["ink", "clay"]}, n_iter=2).pictures[-2:]
    yield same("two batches of one", both, np.concatenate([ink.pictures, clay.pictures]), ROUNDING)
    halves = webui.draw({"weights": "ink", "negative": "ink"})
    yield same("the same style in both halves", halves.pictures, ink.pictures, ROUNDING)
    first = webui.draw({"weights": "ink", "negative": "clay"}).pictures
    yield other("another style in the negative half", first, ink.pictures)
    yield other("the halves exchanged", first, webui.draw({"weights": "clay", "negative": "ink"}).pictures)
    parts = "a cat AND a dog :0.5"
    wanted = [webui.draw({"weights": name}, parts, seed=seed).pictures for name, seed in (("ink", 1), ("clay", 2))]
    both = webui.draw({"batch": ["ink", "clay"]}, parts, batch_size=2).pictures[-2:]
    yield same("AND parts in a batch of two styles", both, np.concatenate(wanted), ROUNDING)
    alone = webui.draw({"weights": "ink", "negative": "clay"}, cfg_scale=1.0).pictures
    yield same("cfg 1: the negative half's style", alone, webui.draw({"weights": "ink"}, cfg_scale=1.0).pictures,
               ROUNDING)  # fmt: skip


def samplers(webui: Webui) -> Iterator[Line]:
    file = f"a cat <lora:{STYLE}:1>"
    for name in ("DPM++ 2M", "Heun", "DDIM"):
        live = webui.draw({"weights": MIX, "negative": MIX}, sampler_name=name).pictures
        stock = webui.draw(prompt=file, sampler_name=name).pictures
        yield same(f"{name}: args in halves against style file", live, stock, ROUNDING)
    moving = {"weights": "ink", "to": "clay", "mode": "switch", "start": 0.2, "end": 0.2}
    more = {"steps": 4, "scheduler": "Uniform"}  # the last steps of others change next to nothing
    drawn = webui.draw(moving, **more).pictures
    first, last = (webui.draw({"weights": name}, **more).pictures for name in ("ink", "clay"))
    yield "a schedule against its first style", *changes(drawn, first)
    yield "a schedule against its last style", *changes(drawn, last)


def hires(webui: Webui) -> Iterator[Line]:
    more: dict[str, Any] = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.7}
    if webui.forge:  # its API fails without (``hr_additional_modules`` of modules/processing.py is None then)
        more["hr_additional_modules"] = ["Use same choices"]
    drawn = {name: webui.draw({"weights": "ink", "apply_to": name}, **more) for name in ("both", "base", "hires")}
    off = webui.draw(**more)
    yield same("hires, default against off", webui.draw({"weights": EQUAL}, **more).pictures, off.pictures)
    yield other("hires, a style against off", drawn["both"].pictures, off.pictures)
    yield other("in the base pass alone against both", drawn["base"].pictures, drawn["both"].pictures)
    yield other("in the hires pass alone against both", drawn["hires"].pictures, drawn["both"].pictures)
    yield other("in the base pass alone against the hires pass alone", drawn["base"].pictures, drawn["hires"].pictures)
    file = webui.draw(prompt=f"a cat <lora:{STYLE}:1>", **more).pictures
    yield same("hires, args against style file", webui.draw({"weights": MIX}, **more).pictures, file, ROUNDING)


def img2img(webui: Webui) -> Iterator[Line]:
    size = webui.size
    ramp = np.linspace(0, 255, size)[None, :, None]
    mask = np.zeros((size, size, 3))
    mask[:, size // 2 :] = 255
    given: dict[str, Any] = {"path": "img2img", "init_images": [encode(np.broadcast_to(ramp, (size, size, 3)))]}
    given |= {"denoising_strength": 0.9, "inpainting_fill": 1}
    for kind, more in (("img2img", given), ("inpaint", {**given, "mask": encode(mask)})):
        off, ink = webui.draw(**more).pictures, webui.draw({"weights": "ink"}, **more).pictures
        yield other(f"{kind}, a style against off", ink, off)
        equal, again = webui.draw({"weights": EQUAL}, **more).pictures, webui.draw(**more).pictures
        nearest = min((off, again), key=lambda one: apart(one, equal))  # Forge inpaints now so, now so, by itself
        yield f"{kind}, off against off (the webui's own)", f"{apart(off, again)}/255", "", True
        yield same(f"{kind}, default against off", equal, nearest)
        yield same(f"{kind}, tag against args", webui.draw(prompt="a cat<dmm:ink:1>", **more).pictures, ink)
    yield same("inpaint: the half outside of the mask", ink[:, :, : size // 4], off[:, :, : size // 4], ROUNDING)


def switch(webui: Webui) -> Iterator[Line]:
    """Another checkpoint and back, by the options and for one request alone."""
    webui.load(PLAIN)
    before = webui.draw().pictures
    webui.load(DMM)
    ink = webui.draw({"weights": "ink"}).pictures
    webui.load(PLAIN)
    said = webui.draw({"weights": "ink"})
    yield same("plain checkpoint after a style, asked for it", said.pictures, before)
    yield true("and it says so", "is an ordinary checkpoint without styles" in said.infotexts[0], True)
    yield same("plain checkpoint after a style, off", webui.draw().pictures, before)
    override = {"override_settings": {"sd_model_checkpoint": f"{DMM}.safetensors"}}
    there = webui.draw({"weights": "ink"}, **override, override_settings_restore_afterwards=True)
    yield same("the DMM file for one request", there.pictures, ink)
    yield same("and after it", webui.draw().pictures, before)
    webui.load(DMM)
    yield same("back again, the style", webui.draw({"weights": "ink"}).pictures, ink)


def infotext(webui: Webui) -> Iterator[Line]:
    args = {"weights": {"ink": 0.7, "水彩, wet": 0.3}, "negative": "clay", "to": "ink=0.5, clay=0.5", "mode": "switch",
            "start": 0.25, "normalise": False}  # fmt: skip
    body = {"prompt": "a cat", "seed": 1, "steps": 3, "width": webui.size, "height": webui.size,
            "sampler_name": "Euler", "alwayson_scripts": {SCRIPT: {"args": [args]}}}  # fmt: skip
    raw = webui.ask("/sdapi/v1/txt2img", body)["images"][0]
    text = webui.ask("/sdapi/v1/png-info", {"image": raw})["info"]
    with Image.open(io.BytesIO(base64.b64decode(raw))) as image:
        first = np.asarray(image.convert("RGB"), dtype=np.int16)[None]
    again = webui.draw(None, **dict.fromkeys(("prompt", "negative_prompt", "seed", "steps", "cfg_scale", "width",
                                              "height", "sampler_name")), infotext=text,
                       **({"styles": []} if webui.forge else {}))  # fmt: skip
    yield same("a picture from another's infotext alone", again.pictures, first)
    yield true("their infotexts are equal", again.infotexts[0] == text, True)
    off = webui.draw().infotexts[0]
    yield true("no DMM key in the infotext when off", "DMM" in off, False)


def grid(webui: Webui) -> Iterator[Line]:
    info = next(
        one for one in webui.ask("/sdapi/v1/script-info") if one["name"] == "x/y/z plot" and not one["is_img2img"]
    )
    axes = info["args"][0]["choices"]
    values = {"x_type": axes.index("[DMM] style"), "x_values": "ink,clay", "y_type": axes.index("[DMM] slider 3")}
    reforge = [False, False, 0] if len(info["args"]) > 18 else []  # labels of pictures, no grid, pictures of a grid
    args: list[Any] = [values["x_type"], values["x_values"], ["ink", "clay"], values["y_type"], "0,0.5", [], 0, "", [],
                       False, *reforge, True, False, False, False, False, False, 0, True]  # fmt: skip
    told = webui.draw(script_name="x/y/z plot", script_args=args)
    wanted = [{name: 1.0, "水彩, wet": third} for third in (0.0, 0.5) for name in ("ink", "clay")]
    alone = [webui.draw({"weights": mix}).pictures[0] for mix in wanted]
    pictures = [picture for picture in told.pictures if picture.shape == alone[0].shape]
    yield true("X/Y/Z plot: pictures", len(pictures), 4)
    yield same("each against its args", np.stack(pictures), np.stack(alone))


def bad(webui: Webui) -> Iterator[Line]:
    off = webui.draw().pictures
    for args, sentence in (
        ({"weights": {"ink": 0}}, "the style weights sum to 0"), ({"weights": "oil"}, "'oil' in 'oil'"),
        ({"wieghts": "ink"}, "there is no argument 'wieghts'"),
    ):  # fmt: skip
        said = webui.draw(args)
        text = said.infotexts[0] + " ".join(said.comments)
        yield true(f"bad input {args}: a sentence in the infotext", sentence.split("'")[0].strip() in text, True)
        yield same("and the picture as off", said.pictures, off)


def memory(webui: Webui) -> Iterator[Line]:
    """Resident memory over 20 pictures with changing sliders, after 20 with the extension off as a control."""
    if webui.probe() is None:
        yield "memory", "the probe is not there (real_files.py)", "20 pictures ≤ 2 %", False
        return

    def grow(args: Callable[[int], object]) -> float:
        before = webui.probe()["resident"]  # type: ignore[index]
        for i in range(20):
            webui.draw(args(i), steps=1)
        return webui.probe()["resident"] / before - 1  # type: ignore[index]

    first = webui.draw({"weights": "ink"}).pictures
    control = grow(lambda i: None)
    growth = grow(lambda i: {"weights": {"ink": i / 20, "clay": 1 - i / 20, "水彩, wet": 0.1}})
    yield "20 pictures with the extension off (control)", f"{control:+.2%}", "", True
    yield "20 pictures with changing sliders", f"{growth:+.2%}", "≤ 2 %", growth <= 0.02
    yield same("the first style afterwards", webui.draw({"weights": "ink"}).pictures, first)


def hooks(webui: Webui) -> Iterator[Line]:
    webui.draw({"weights": "ink"})
    yield true("hooks on the UNet after a picture in a style", (webui.probe() or {}).get("hooks"), 0)
    webui.draw({"enabled": False, "weights": "ink"})
    yield true("hooks after one with enabled false", (webui.probe() or {}).get("hooks"), 0)


CHECKS: dict[str, Callable[[Webui], Iterator[Line]]] = {
    check.__name__: check
    for check in (style, default, tag, lora, rows, samplers, hires, img2img, infotext, grid, bad, hooks, switch, memory)
}
