"""A tiny SDXL through /prompt: the tests of test_nodes.py with two text encoders, pooled output and sizes.

``DMM_SDXL_FILE`` names another one, such as the trained one of ``benchmarks/kinds.py``, among whose styles these are.
"""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest

from tests.hosts.comfyui.graphs import CFG, SEED, Graph, mix, node, style
from tests.hosts.comfyui.inside_tools import write_sdxl
from tests.hosts.comfyui.test_nodes import ROUNDING, apart

pytestmark = pytest.mark.hosts
FILE = "tiny-xl.safetensors"
STEPS = 5  # of 1000 timesteps alike: of 6, "simple" and our own sampler take some that are one apart
INK, CLAY, NEON = style("ink"), style("clay"), style("neon")


@pytest.fixture(scope="module", autouse=True)
def _file(server) -> None:
    path = server.base / "models" / "checkpoints" / FILE
    given = os.environ.get("DMM_SDXL_FILE")
    if given:
        shutil.copyfile(given, path)
    else:
        write_sdxl(path)


@pytest.fixture(scope="module")
def names(server) -> tuple[str, ...]:
    """The file's styles."""
    from dmm_core.checkpoint import open_checkpoint

    return open_checkpoint(server.base / "models" / "checkpoints" / FILE).styles


def text(content: str = "a cat", more: str | None = None, width: int = 1024, target: int = 1024, crop: int = 0) -> dict:
    """The stock node for SDXL: a text for each encoder, the picture's size, where it was cut, the size wanted."""
    return node(
        "CLIPTextEncodeSDXL", clip=["load", 1], width=width, height=1024, crop_w=crop, crop_h=0, target_width=target,
        target_height=1024, text_g=content, text_l=content if more is None else more,
    )  # fmt: skip


def graph(model: str = "load", batch: int | list = 1, **more) -> Graph:
    """Load DMM → KSampler → picture, of the model that a node makes."""
    positive, negative = more.pop("positive", "prompt"), more.pop("negative", "empty")
    return {
        "load": node("LoadDMM", checkpoint=FILE),
        "prompt": text(),
        "empty": text(""),
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=batch),
        "sampler": node(
            "KSampler", model=[model, 0], seed=SEED, steps=STEPS, cfg=CFG, sampler_name="euler", scheduler="simple",
            positive=[positive, 0], negative=[negative, 0], latent_image=["latent", 0], denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["load", 2]),
        "picture": node("PreviewImage", images=["decode", 0]),
        **more,
    }  # fmt: skip


def apply(by: str = "style", kind: str = "ApplyStyle", of: str = "load") -> dict:
    return node(kind, model=[of, 0], style=[by, 0])


def show(server, made: dict, batch: int | list = 1, **more) -> np.ndarray:
    """The picture in a style."""
    return server.pictures(graph("apply", batch, style=made, apply=apply(), **more))


def test_both_encoders_and_sizes_count(server):
    """What a prompt brings reaches the UNet: each encoder's text, the sizes and the crop."""
    plain = server.pictures(graph())
    for what, prompt in {
        "CLIP-G and pooled": text("a red house", "a cat"), "CLIP-L": text("a cat", "a red house"),
        "size": text(width=256), "target size": text(target=256), "crop": text(crop=400),
    }.items():  # fmt: skip
        assert apart(plain, server.pictures(graph(prompt=prompt))) > 0, what
    ordinary = node("CLIPTextEncode", text="a cat", clip=["load", 1])
    assert np.isfinite(server.pictures(graph(prompt=ordinary))).all()


def test_pictures_equal_our_own_sampler(server, names):
    """Both text encoders, pooled output and sizes as ``dmm generate`` and the trainer hand them to the UNet."""
    pytest.importorskip("diffusers")
    from dmm_core.models import load_pipeline
    from dmm_core.sample import decode, sample

    pipe = load_pipeline(server.base / "models" / "checkpoints" / FILE)
    sizes = {"width": 64, "height": 64, "crop_w": 0, "crop_h": 0, "target_width": 64, "target_height": 64}
    texts = {
        name: node("CLIPTextEncodeSDXL", clip=["load", 1], text_g=content, text_l=content, **sizes)
        for name, content in (("prompt", "a cat"), ("empty", ""))
    }
    for name in names:
        made = graph("apply", style=style(name), apply=apply(), **texts)
        made["sampler"]["inputs"]["sampler_name"] = "dpmpp_2m"
        vector = pipe.codebook.style({name: 1.0})
        latents = sample(pipe, ["a cat"], seeds=[SEED], steps=STEPS, cfg_scale=CFG, style=vector)
        assert apart(server.pictures(made), decode(pipe.vae, latents)) <= 2 * ROUNDING, (
            name
        )  # untrained: rounding grows


def test_styles_differ_and_default_is_the_plain_model(server, names):
    made = {name: show(server, style(name)) for name in names}
    made["default"] = server.pictures(graph())
    for name, picture in made.items():
        for other in set(made) - {name}:
            assert apart(picture, made[other]) > 20, (name, other)
    assert apart(made["default"], show(server, style("ink", 0.0))) == 0
    assert apart(made["default"], show(server, mix(*[1] * len(names)))) <= 1
    assert apart(made["clay"], show(server, mix(0, 1))) == 0


def test_live_is_bake_is_style_file(server):
    half = mix(0.5, 0, 0.5)
    live = show(server, half, save=node("SaveStyle", style=["style", 0], filename="xl half"))
    assert apart(live, server.pictures(graph("bake", style=half, bake=apply(kind="BakeStyle")))) <= 1
    lora = node("LoraLoaderModelOnly", model=["load", 0], strength_model=1.0, lora_name="xl half.safetensors")
    assert apart(live, server.pictures(graph("lora", lora=lora))) <= 1


def test_branches_of_one_model(server):
    alone = show(server, INK), show(server, NEON)
    both = graph("apply", style=INK, apply=apply(), style2=NEON, apply2=apply("style2"))
    both["sampler2"] = {**both["sampler"], "inputs": {**both["sampler"]["inputs"], "model": ["apply2", 0]}}
    both["decode2"] = node("VAEDecode", samples=["sampler2", 0], vae=["load", 2])
    both["picture2"] = node("PreviewImage", images=["decode2", 0])
    assert apart(alone[1], server.pictures(both, "picture2")) == 0
    assert apart(alone[0], server.pictures(both, "picture")) == 0


def test_batch_shows_every_style(server, names):
    rows = show(server, node("StyleBatch", codebook=["load", 3]), ["style", 1])
    for i, name in enumerate(names):
        assert apart(rows[i], show(server, style(name), len(names))[i]) <= 1, name


def test_conditioning_style(server):
    """On both halves of the guidance it is the model's style; a masked region has its own."""
    parts = {"style": CLAY, **{
        key: node("ConditioningStyle", conditioning=[of, 0], style=["style", 0])
        for key, of in (("pos", "prompt"), ("neg", "empty"))
    }}  # fmt: skip
    whole = show(server, CLAY)
    assert apart(whole, server.pictures(graph(positive="pos", negative="neg", **parts))) <= 1
    assert apart(whole, server.pictures(graph(positive="pos", **parts))) > 5
    left = {
        "mask": node("SolidMask", value=1.0, width=32, height=64),
        "area": node("ConditioningSetMask", conditioning=["prompt", 0], mask=["wide", 0], strength=1.0,
                     set_cond_area="default"),
        "black": node("SolidMask", value=0.0, width=64, height=64),
        "wide": node("MaskComposite", destination=["black", 0], source=["mask", 0], x=0, y=0, operation="add"),
        "rest": node("InvertMask", mask=["wide", 0]),
        "area2": node("ConditioningSetMask", conditioning=["prompt", 0], mask=["rest", 0], strength=1.0,
                      set_cond_area="default"),
        "style": INK, "style2": NEON,
        "one": node("ConditioningStyle", conditioning=["area", 0], style=["style", 0]),
        "two": node("ConditioningStyle", conditioning=["area2", 0], style=["style2", 0]),
        "both": node("ConditioningCombine", conditioning_1=["one", 0], conditioning_2=["two", 0]),
    }  # fmt: skip
    halves = server.pictures(graph(positive="both", **left))
    for other in ({**left, "style2": INK}, {**left, "style": NEON}):
        assert apart(halves, server.pictures(graph(positive="both", **other))) > 5


def test_schedule(server):
    def run(**more):
        how = {"mode": "blend", "start": 0.0, "end": 1.0, **more}
        return show(server, node("StyleSchedule", style_1=["a", 0], style_2=["b", 0], **how), a=INK, b=NEON)

    ink, neon = show(server, INK), show(server, NEON)
    assert apart(neon, run(end=0.0)) == 0
    assert min(apart(run(), ink), apart(run(), neon), apart(run(), run(mode="switch"))) > 5
