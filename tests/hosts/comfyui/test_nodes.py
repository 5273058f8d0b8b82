"""The nodes in the real ComfyUI, through /prompt: what they show, what they refuse, and what they leave alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from tests.hosts.comfyui.graphs import CFG, PROMPT, SEED, STEPS, mix, node, plain, style, styled
from tests.hosts.comfyui.harness import NAMES, Failed, make_dmm

pytestmark = pytest.mark.hosts
ROUNDING = 2  # of 255: ComfyUI cuts where we round, and both sum in another order


def apart(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def test_sockets(server):
    expected = {
        "LoadDMM": ["MODEL", "CLIP", "VAE", "DMM_CODEBOOK"],
        "StyleVector": ["DMM_STYLE"],
        "StyleMix": ["DMM_STYLE"],
        "StyleBatch": ["DMM_STYLE", "INT"],
        "ApplyStyle": ["MODEL"],
        "ConditioningStyle": ["CONDITIONING"],
        "StyleSchedule": ["DMM_STYLE"],
        "SaveStyle": [],
        "BakeStyle": ["MODEL"],
    }
    info = server.get("/object_info")
    for name, outputs in expected.items():
        assert info[name]["output"] == outputs
        assert info[name]["category"] == "DMM"
    assert "/extensions/dmm/dmm.js" in server.get("/extensions")
    order = info["StyleMix"]["input_order"]
    assert order["required"] == ["codebook"], "saved widget values are positional"
    assert order["optional"] == [*(f"w{i}" for i in range(8)), "normalise", "first", "add"]


def test_styles_differ_and_equal_our_own_sampler(server, dmm_file):
    pytest.importorskip("diffusers")
    from dmm_core.models import load_pipeline
    from dmm_core.sample import decode, sample

    pipe = load_pipeline(dmm_file)
    made = {name: server.pictures(styled(style(name))) for name in NAMES}
    made["default"] = server.pictures(plain())
    for name, picture in made.items():
        for other in set(made) - {name}:
            assert apart(picture, made[other]) > 20, (name, other)
        vector = pipe.codebook.default_style() if name == "default" else pipe.codebook.style({name: 1.0})
        latents = sample(pipe, [PROMPT], seeds=[SEED], steps=STEPS, cfg_scale=CFG, style=vector)
        assert apart(picture, decode(pipe.vae, latents)) <= ROUNDING, name


def test_few_steps_by_euler_are_what_such_a_student_is_trained_for(server, dmm_file):
    """Sampler and schedule that the README names for students of few steps walk the timesteps of ``fewstep.py``."""
    pytest.importorskip("diffusers")
    from dmm_core.models import load_pipeline
    from dmm_core.sample import decode, sample

    pipe = dataclasses.replace(load_pipeline(dmm_file), few_step=CFG)
    for steps in (4, 8):
        graph = styled(style("clay"), steps=steps)
        graph["sampler"]["inputs"] |= {"sampler_name": "euler", "scheduler": "sgm_uniform", "cfg": 1.0}
        ours = sample(pipe, [PROMPT], seeds=[SEED], steps=steps, style=pipe.codebook.style({"clay": 1.0}))
        picture = server.pictures(graph)
        assert apart(picture, decode(pipe.vae, ours)) <= 2 * ROUNDING, steps
        graph["sampler"]["inputs"]["scheduler"] = "normal"
        assert apart(picture, server.pictures(graph)) > 10, "another schedule is another picture"


def test_default_is_the_plain_model(server):
    bare = server.pictures(plain())
    assert apart(bare, server.pictures(styled(style("ink", 0.0)))) == 0
    assert apart(bare, server.pictures(styled(mix(1, 1, 1)))) <= 1


def test_mix_of_one_is_the_style_and_chains(server):
    clay = server.pictures(styled(style("clay")))
    assert apart(clay, server.pictures(styled(mix(0, 1)))) == 0
    assert apart(clay, server.pictures(styled(mix(0, 0.5)))) == 0, "normalised"
    assert apart(clay, server.pictures(styled(mix(1, first=1)))) == 0
    assert apart(clay, server.pictures(styled(mix(0, 0.5, normalise=False)))) > 5
    whole = server.pictures(styled(mix(0.6, 0.2, 0.6)))
    chained = styled(mix(0.2, 0.6, first=1, add=["first", 0]), first=mix(0.6))
    assert apart(whole, server.pictures(chained)) <= 1, "sliders of both, normalised together"


def test_live_is_bake_is_style_file(server):
    bake = node("BakeStyle", model=["load", 0], style=["style", 0])
    save = node("SaveStyle", style=["style", 0], filename="tests/half and half")
    half = mix(0.5, 0, 0.5)
    live = server.pictures(styled(half, save=save))
    assert (server.base / "models" / "loras" / "tests" / "half and half.safetensors").is_file()
    lora = node("LoraLoaderModelOnly", model=["load", 0], strength_model=1.0,
                lora_name=str(Path("tests") / "half and half.safetensors"))  # fmt: skip
    assert apart(live, server.pictures(plain(["bake", 0], style=half, bake=bake))) <= 1
    assert apart(live, server.pictures(plain(["lora", 0], lora=lora))) <= 1


def test_later_style_replaces(server):
    ink, neon = server.pictures(styled(style("ink"))), server.pictures(styled(style("neon")))
    for first, second in (("ApplyStyle", "ApplyStyle"), ("ApplyStyle", "BakeStyle"), ("BakeStyle", "ApplyStyle"),
                          ("BakeStyle", "BakeStyle")):  # fmt: skip
        graph = plain(
            ["second", 0], a=style("ink"), b=style("neon"), first=node(first, model=["load", 0], style=["a", 0]),
            second=node(second, model=["first", 0], style=["b", 0]),
        )  # fmt: skip
        assert apart(neon, server.pictures(graph)) <= 1, (first, second)
    assert apart(ink, server.pictures(styled(style("ink")))) == 0, "the loaded model was left alone"


def test_baked_checkpoint_is_ordinary(server):
    from dmm_core.checkpoint import open_checkpoint

    key = "time_embedding.linear_2.bias"
    graph = {
        "load": node("LoadDMM", checkpoint="mini-dmm.safetensors"),
        "style": style("clay"),
        "bake": node("BakeStyle", model=["load", 0], style=["style", 0]),
        "save": node("CheckpointSave", model=["bake", 0], clip=["load", 1], vae=["load", 2], filename_prefix="baked"),
    }
    server.run(graph)
    baked = open_checkpoint(next((server.base / "output").glob("baked*.safetensors")))
    source = open_checkpoint(server.base / "models" / "checkpoints" / "mini-dmm.safetensors")
    assert baked.dmm is None and baked.styles == ()
    expected = source.unet()[key] + source.codebook().style({"clay": 1.0})
    assert (baked.unet()[key].float() - expected).abs().max() < 1e-6 * 4  # the sum, as float32 has it


def test_branches_of_one_model(server):
    alone = {name: server.pictures(styled(style(name))) for name in ("ink", "neon")}
    both = styled(style("ink"), style2=style("neon"), apply2=node("ApplyStyle", model=["load", 0], style=["style2", 0]))
    both["sampler2"] = json.loads(json.dumps(both["sampler"]))
    both["sampler2"]["inputs"]["model"] = ["apply2", 0]
    both["decode2"] = node("VAEDecode", samples=["sampler2", 0], vae=["load", 2])
    both["picture2"] = node("PreviewImage", images=["decode2", 0])
    assert apart(alone["neon"], server.pictures(both, "picture2")) == 0
    assert apart(alone["ink"], server.pictures(both, "picture")) == 0


def test_batch_shows_every_style(server):
    batch = node("StyleBatch", codebook=["load", 3])
    rows = server.pictures(styled(batch, batch=["style", 1]))
    assert len(rows) == len(NAMES)
    from_negative = {"latent": node("EmptyLatentImage", width=64, height=64, batch_size=3)}
    for i, name in enumerate(NAMES):
        same_noise = server.pictures(styled(style(name), **from_negative))
        assert apart(rows[i], same_noise[i]) <= 1, name


def test_conditioning_style(server):
    whole = server.pictures(styled(style("clay")))
    parts = {
        "style": style("clay"),
        "pos": node("ConditioningStyle", conditioning=["prompt", 0], style=["style", 0]),
        "neg": node("ConditioningStyle", conditioning=["empty", 0], style=["style", 0]),
    }
    both = plain(positive=["pos", 0], negative=["neg", 0], **parts)
    assert apart(whole, server.pictures(both)) <= 1
    one = server.pictures(plain(positive=["pos", 0], **parts))
    assert apart(whole, one) > 5, "the negative keeps the default"
    under = plain(["apply", 0], positive=["pos", 0], negative=["neg", 0], other=style("ink"),
                  apply=node("ApplyStyle", model=["load", 0], style=["other", 0]), **parts)  # fmt: skip
    assert apart(whole, server.pictures(under)) <= 1, "conditioning wins"


def test_schedule(server):
    def run(**more):
        how = {"mode": "blend", "start": 0.0, "end": 1.0, **more}
        schedule = node("StyleSchedule", style_1=["a", 0], style_2=["b", 0], **how)
        return server.pictures(styled(schedule, a=style("ink"), b=style("neon")))

    ink, neon = server.pictures(styled(style("ink"))), server.pictures(styled(style("neon")))
    assert apart(neon, run(start=0.0, end=0.0)) == 0
    blend, switch = run(), run(mode="switch")
    assert min(apart(a, b) for a, b in ((blend, ink), (blend, neon), (switch, ink), (switch, blend))) > 5


def test_only_what_changed_runs_again(server):
    server.run(styled(mix(0.3, 0.7)))
    server.run(styled(mix(0.4, 0.6)))
    assert {"load", "prompt", "empty", "latent"} <= set(server.cached)
    assert not {"style", "apply", "sampler"} & set(server.cached)


def test_200_slider_changes(server):
    """The loader runs once; the server grows by no more than 2 %, and ends as it began."""

    def change(i):
        graph = styled(mix(1 - i / 250, i / 250))
        graph["sampler"]["inputs"].update(steps=1, cfg=1.0)
        return graph

    first = server.pictures(change(0))
    for i in range(1, 21):  # what is allocated once
        server.run(change(i))
    before = server.resident()
    for i in range(21, 221):
        server.run(change(i))
        assert {"load", "prompt", "empty", "latent"} <= set(server.cached), i
    assert server.resident() <= 1.02 * before
    assert apart(first, server.pictures(change(0))) == 0


def test_a_rewritten_file_is_loaded_again(server):
    path = server.base / "models" / "checkpoints" / "changing.safetensors"
    make_dmm(path, seed=3)
    graph = styled(style("ink"))
    graph["load"]["inputs"]["checkpoint"] = "changing.safetensors"
    server.get("/object_info/LoadDMM")
    before = server.pictures(graph)
    make_dmm(path, seed=4)
    assert apart(before, server.pictures(graph)) > 5


def bad(**changes):
    graph = styled(style("ink"))
    graph.update(changes)
    return graph


OTHER = {"other": node("LoadDMM", checkpoint="other-dmm.safetensors")}
SCHEDULE = node("StyleSchedule", style_1=["a", 0], style_2=["b", 0], mode="blend", start=0.0, end=1.0)
TWO = {"a": style("ink"), "b": style("neon")}
BAD = {
    "no styles in the file": (bad(load=node("LoadDMM", checkpoint="plain.safetensors")), "ordinary checkpoint"),
    "unreadable header": (bad(load=node("LoadDMM", checkpoint="broken.safetensors")), "not a safetensors file"),
    "missing file": (bad(load=node("LoadDMM", checkpoint="gone.safetensors")), "gone.safetensors"),
    "unknown style": (bad(style=style("oil")), "there is no style 'oil'"),
    "no style": (bad(style=style("")), "no style is chosen"),
    "weights sum to 0": (bad(style=mix(0, 0, 0)), "sum to 0"),
    "first too large": (bad(style=mix(1, first=8)), "numbered from 0"),
    "another checkpoint": (bad(**OTHER, style=style("ink", loader="other")), "the style is of other-dmm"),
    "another checkpoint in a mix": (
        bad(**OTHER, a=style("ink", loader="other"), style=mix(1, add=["a", 0])),
        "the style is of other-dmm",
    ),
    "another checkpoint in a conditioning": (
        plain(
            positive=["pos", 0],
            **OTHER,
            a=style("ink", loader="other"),
            pos=node("ConditioningStyle", conditioning=["prompt", 0], style=["a", 0]),
        ),
        "the style is of other-dmm",
    ),
    "schedule of schedules": (
        bad(**TWO, c=SCHEDULE, style={**SCHEDULE, "inputs": {**SCHEDULE["inputs"], "style_1": ["c", 0]}}),
        "cannot be part of a schedule",
    ),
    "schedule backwards": (
        bad(**TWO, style={**SCHEDULE, "inputs": {**SCHEDULE["inputs"], "start": 0.9, "end": 0.1}}),
        "before it starts",
    ),
    "bake a schedule": (
        plain(["apply", 0], **TWO, s=SCHEDULE, apply=node("BakeStyle", model=["load", 0], style=["s", 0])),
        "a schedule cannot be baked",
    ),
    "save a batch": (
        bad(b=node("StyleBatch", codebook=["load", 3]), save=node("SaveStyle", style=["b", 0], filename="x")),
        "a batch of styles cannot be saved",
    ),
    "save outside": (bad(save=node("SaveStyle", style=["style", 0], filename="../x")), "is not a file's name"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(server, name):
    graph, sentence = BAD[name]
    with pytest.raises(Failed) as told:
        server.run(graph)
    assert sentence in str(told.value), told.value
    assert "\n" not in str(told.value)
    assert server.get("/queue")["queue_running"] == []


def test_server_is_still_usable(server):
    assert server.pictures(plain(steps=2)).shape == (1, 64, 64, 3)


def test_other_files_are_not_overwritten(server):
    lora = server.base / "models" / "loras" / "mine.safetensors"
    lora.write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(Failed, match="not a style file"):
        server.run(styled(style("ink"), save=node("SaveStyle", style=["style", 0], filename="mine")))
    assert lora.read_bytes() == b"\x02\0\0\0\0\0\0\0{}"


def test_route_lists_styles(server):
    answer = server.get("/dmm/styles?checkpoint=mini-dmm.safetensors")
    assert [entry["name"] for entry in answer["styles"]] == list(NAMES)
    assert sum(answer["default"].values()) == pytest.approx(1) and answer["usage"] == ""
    assert "4 to 8" in server.get("/dmm/styles?checkpoint=other-dmm.safetensors")["usage"]
    for name, expected in (("../../mini-dmm.safetensors", 404), ("nothing", 404), ("", 404),
                           ("plain.safetensors", 422), ("broken.safetensors", 422)):  # fmt: skip
        status, body = server.raw("/dmm/styles?checkpoint=" + name)
        assert status == expected, name
        assert json.loads(body)["error"]
