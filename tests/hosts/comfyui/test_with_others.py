"""Styles together with what stock nodes bring: LoRAs, ControlNets, merges, a bypassed node, a saved checkpoint."""

from __future__ import annotations

import numpy as np
import pytest

from tests.hosts.comfyui.browser import put_styles, workflow
from tests.hosts.comfyui.graphs import CFG, PROMPT, SEED, Graph, node, plain, style, styled
from tests.hosts.comfyui.harness import ROOT, Failed
from tests.hosts.comfyui.inside_tools import write_dmm
from tests.hosts.comfyui.other_files import CONTROLNET, LORA
from tests.hosts.comfyui.test_nodes import ROUNDING, apart

pytestmark = pytest.mark.hosts
STEPS = 8
EXAMPLE = "dmm_7_controlnet_lora_style.json"
INK, CLAY = style("ink"), style("clay")


def apply(of: str, kind: str = "ApplyStyle", by: str = "style") -> dict:
    return node(kind, model=[of, 0], style=[by, 0])


def show(server, model: str, batch: int | list = 1, **more) -> np.ndarray:
    """The picture of the model that a node makes."""
    return server.pictures(plain([model, 0], batch, STEPS, **more))


# ---------------------------------------------------------------- LoRA


def lora(of: str, strength: float = 1.0, name: str = LORA) -> dict:
    return node("LoraLoaderModelOnly", model=[of, 0], lora_name=name, strength_model=strength)


def test_lora_before_and_after(server):
    before = show(server, "apply", style=INK, lora=lora("load"), apply=apply("lora"))
    after = show(server, "lora", style=INK, apply=apply("load"), lora=lora("apply"))
    baked = show(server, "lora", style=INK, bake=apply("load", "BakeStyle"), lora=lora("bake"))
    assert apart(before, after) == 0
    assert apart(before, baked) <= 1
    assert apart(before, show(server, "apply", style=INK, apply=apply("load"))) > 20, "the LoRA does something"
    assert apart(before, show(server, "lora", lora=lora("load"))) > 20, "and so does the style"
    none = show(server, "lora", style=INK, apply=apply("load"), lora=lora("apply", 0.0))
    assert apart(none, show(server, "apply", style=INK, apply=apply("load"))) == 0


def test_lora_of_one_branch(server):
    """A LoRA on one of two branches leaves the other branch's style and weights alone."""
    alone = show(server, "apply", style=CLAY, apply=apply("load"))
    show(server, "lora", style=INK, a=apply("load"), lora=lora("a"))
    assert apart(alone, show(server, "apply", style=CLAY, apply=apply("load"))) == 0


# ---------------------------------------------------------------- ControlNet


def control(strength: float = 1.0, positive: str = "prompt", invert: bool = False) -> Graph:
    """Nodes of a ControlNet that reads a square; its conditionings are ``control`` 0 and 1."""
    return {
        "net": node("ControlNetLoader", control_net_name=CONTROLNET),
        "black": node("SolidMask", value=0.0, width=64, height=64),
        "square": node("SolidMask", value=1.0, width=32, height=32),
        "mask": node("MaskComposite", destination=["black", 0], source=["square", 0], x=16, y=16, operation="add"),
        "other": node("InvertMask", mask=["mask", 0]),
        "hint": node("MaskToImage", mask=["other" if invert else "mask", 0]),
        "control": node(
            "ControlNetApplyAdvanced", positive=[positive, 0], negative=["empty", 0], control_net=["net", 0],
            image=["hint", 0], strength=strength, start_percent=0.0, end_percent=1.0,
        ),
        "positive": ["control", 0],
        "negative": ["control", 1],
    }  # fmt: skip


def test_controlnet_and_style(server):
    parts = {"style": INK, "apply": apply("load")}
    both = show(server, "apply", **parts, **control())
    assert apart(both, show(server, "apply", **parts)) > 20, "the ControlNet does something"
    assert apart(both, show(server, "apply", **parts, **control(invert=True))) > 20, "it reads its picture"
    assert apart(both, show(server, "load", **control())) > 20, "the style does something"
    assert apart(both, show(server, "apply", **{**parts, "style": CLAY}, **control())) > 20
    assert apart(show(server, "apply", **parts), show(server, "apply", **parts, **control(0.0))) == 0
    baked = show(server, "bake", style=INK, bake=apply("load", "BakeStyle"), **control())
    assert apart(both, baked) <= 1


def test_controlnet_and_conditioning_style(server):
    """A conditioning keeps both, in either order; the negative keeps the default style."""
    first = {"styled": node("ConditioningStyle", conditioning=["prompt", 0], style=["style", 0])}
    before = show(server, "load", style=INK, **first, **control(positive="styled"))
    last = {"styled": node("ConditioningStyle", conditioning=["control", 0], style=["style", 0])}
    after = show(server, "load", style=INK, **last, **{**control(), "positive": ["styled", 0]})
    assert apart(before, after) == 0
    assert apart(before, show(server, "load", **control())) > 20
    assert apart(before, show(server, "apply", style=INK, apply=apply("load"), **control())) > 5


def test_controlnet_and_every_style_in_a_batch(server):
    parts = {**control(), "apply": apply("load"), "latent": node("EmptyLatentImage", width=64, height=64, batch_size=3)}
    rows = show(server, "apply", style=node("StyleBatch", codebook=["load", 3]), **parts)
    for i, name in enumerate(("ink", "clay", "neon")):
        assert apart(rows[i], show(server, "apply", style=style(name), **parts)[i]) <= 1, name


# ---------------------------------------------------------------- merges


@pytest.fixture(scope="module")
def clay_model(server) -> str:
    """A model of other weights: the teacher clay, with a codebook of its own."""
    from dmm_core.checkpoint import open_checkpoint
    from mini_family.family import teacher_unet

    base = open_checkpoint(ROOT / "mini_family" / "weights" / "base.safetensors")
    write_dmm(server.base / "models" / "checkpoints" / "clay-model.safetensors", teacher_unet(base, "clay"))
    return "clay-model.safetensors"


def merge(one: str, two: str, ratio: float) -> dict:
    return node("ModelMergeSimple", model1=[one, 0], model2=[two, 0], ratio=ratio)


def test_merge_keeps_the_style(server, clay_model):
    parts = {"style": INK, "apply": apply("load"), "clay": node("LoadDMM", checkpoint=clay_model)}
    made = {ratio: show(server, "merge", **parts, merge=merge("apply", "clay", ratio)) for ratio in (1.0, 0.5, 0.0)}
    assert apart(made[1.0], show(server, "apply", **parts)) <= 1
    for ratio, other in ((1.0, 0.5), (0.5, 0.0), (1.0, 0.0)):
        assert apart(made[ratio], made[other]) > 20, (ratio, other)
    for ratio, picture in made.items():
        bare = show(server, "merge", clay=parts["clay"], merge=merge("load", "clay", ratio))
        assert apart(picture, bare) > 20, "the style is still there"
        after = {"merge": merge("load", "clay", ratio), "apply": apply("merge")}
        assert apart(picture, show(server, "apply", **{**parts, **after})) == 0, "applied before or after the merge"


def test_another_style_after_a_merge_replaces_the_baked_one(server, clay_model):
    """The merge has halved the baked style; applying or baking another takes out just that half."""
    parts = {"style": INK, "second": CLAY, "clay": node("LoadDMM", checkpoint=clay_model)}
    for kind in ("ApplyStyle", "BakeStyle"):
        baked = {"bake": apply("load", "BakeStyle"), "merge": merge("bake", "clay", 0.5)}
        wanted = show(server, "last", **parts, merge=merge("load", "clay", 0.5), last=apply("merge", kind, "second"))
        made = show(server, "last", **parts, **baked, last=apply("merge", kind, "second"))
        assert apart(made, wanted) == 0, kind


def test_merge_into_another_model(server, clay_model):
    """The first model's style counts: the second gives weights alone, and a baked style is in them."""
    parts = {"style": INK, "clay": node("LoadDMM", checkpoint=clay_model)}
    live = show(server, "merge", **parts, apply=apply("load"), merge=merge("clay", "apply", 0.0))
    assert apart(live, show(server, "load")) == 0
    baked = show(server, "merge", **parts, bake=apply("load", "BakeStyle"), merge=merge("clay", "bake", 0.0))
    assert apart(baked, show(server, "apply", style=INK, apply=apply("load"))) <= 1
    with pytest.raises(Failed, match=r"the style is of mini-dmm\.safetensors, but the model is of clay-model"):
        show(server, "apply", **parts, merge=merge("clay", "load", 0.5), apply=apply("merge"))


# ---------------------------------------------------------------- saved checkpoints


def saved(server, name: str, **parts) -> None:
    """Save Checkpoint of the node ``model``; the file becomes one that ComfyUI lists."""
    save = node("CheckpointSave", model=["model", 0], clip=["load", 1], vae=["load", 2], filename_prefix=name)
    server.run({"load": node("LoadDMM", checkpoint="mini-dmm.safetensors"), "style": INK, **parts, "save": save})
    written = next((server.base / "output").glob(f"{name}_*.safetensors"))
    written.rename(server.base / "models" / "checkpoints" / f"{name}.safetensors")


def test_saved_bake_is_an_ordinary_checkpoint(server):
    """Load DMM says so in one sentence; elsewhere it draws in the style."""
    saved(server, "saved-ink", model=apply("load", "BakeStyle"))
    graph = plain(steps=2)
    graph["load"] = node("LoadDMM", checkpoint="saved-ink.safetensors")
    with pytest.raises(Failed) as told:
        server.run(graph)
    assert "is an ordinary checkpoint without styles" in str(told.value)
    assert "Load it with Load Checkpoint" in str(told.value)
    assert "\n" not in str(told.value)
    assert server.raw("/dmm/styles?checkpoint=saved-ink.safetensors")[0] == 422

    pytest.importorskip("diffusers")
    from dmm_core.models import load_pipeline
    from dmm_core.sample import decode, sample

    pipe = load_pipeline(server.base / "models" / "checkpoints" / "saved-ink.safetensors")
    latents = sample(pipe, [PROMPT], seeds=[SEED], steps=STEPS, cfg_scale=CFG)
    live = server.pictures(styled(INK, steps=STEPS))
    assert apart(live, decode(pipe.vae, latents)) <= ROUNDING


# ---------------------------------------------------------------- the example workflow


def test_example_workflow(server):
    """LoRA, ControlNet and style of the shipped example each do something."""
    put_styles(server)
    graph = workflow(ROOT / "workflows" / "api" / EXAMPLE)
    whole = server.pictures(graph, "6")
    assert whole.shape == (1, 64, 64, 3)
    for title, number, key in (("style", "7", "strength"), ("LoRA", "8", "strength_model"), ("net", "15", "strength")):
        without = workflow(ROOT / "workflows" / "api" / EXAMPLE)
        without[number]["inputs"][key] = 0.0
        assert apart(whole, server.pictures(without, "6")) > 20, title
