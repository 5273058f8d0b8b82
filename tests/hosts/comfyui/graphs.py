"""Workflows in ComfyUI's API format, made by a few words."""

from __future__ import annotations

from typing import Any

Graph = dict[str, Any]
STEPS, CFG, SEED = 10, 2.0, 7
PROMPT = "a cat"


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def plain(model: list | None = None, batch: int | list = 1, steps: int = STEPS, **more: Any) -> Graph:
    """Load DMM → KSampler → picture; ``model``, ``positive`` and ``negative`` are links, the rest further nodes."""
    positive, negative = more.pop("positive", ["prompt", 0]), more.pop("negative", ["empty", 0])
    return {
        "load": node("LoadDMM", checkpoint="mini-dmm.safetensors"),
        "prompt": node("CLIPTextEncode", text=PROMPT, clip=["load", 1]),
        "empty": node("CLIPTextEncode", text="", clip=["load", 1]),
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=batch),
        "sampler": node(
            "KSampler", model=model or ["load", 0], seed=SEED, steps=steps, cfg=CFG, sampler_name="dpmpp_2m",
            scheduler="simple", positive=positive, negative=negative, latent_image=["latent", 0], denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["load", 2]),
        "picture": node("PreviewImage", images=["decode", 0]),
        **more,
    }  # fmt: skip


def style(name: str, strength: float = 1.0, loader: str = "load") -> dict[str, Any]:
    return node("StyleVector", codebook=[loader, 3], style=name, strength=strength)


def mix(*weights: float, **more: Any) -> dict[str, Any]:
    sliders = {f"w{i}": w for i, w in enumerate(weights)}
    return node("StyleMix", codebook=["load", 3], **{"normalise": True, "first": 0, **sliders, **more})


def styled(made: dict[str, Any], batch: int | list = 1, **more: Any) -> Graph:
    """A picture through ApplyStyle of a style node."""
    apply = node("ApplyStyle", model=["load", 0], style=["style", 0])
    return plain(["apply", 0], batch, style=made, apply=apply, **more)
