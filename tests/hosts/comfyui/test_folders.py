"""A student as a diffusers folder, the authors' published layout, in models/diffusers: through Load DMM and /prompt."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import quote

import pytest
import torch

from tests.hosts.comfyui.graphs import Graph, mix, node, plain, style, styled
from tests.hosts.comfyui.harness import NAMES, ROOT, Failed
from tests.hosts.comfyui.inside_tools import write_dmm
from tests.hosts.comfyui.test_nodes import apart

pytestmark = pytest.mark.hosts
FILE, FOLDER = "one-file.safetensors", str(Path("by hand") / "as published")
STEPS = 8


def write_both(server, seed: int = 5) -> None:
    """One student twice: as our file, its default style folded in, and in the authors' layout, where nothing is."""
    from dmm_core.checkpoint import open_checkpoint, write_diffusers
    from dmm_core.style import Codebook

    base = open_checkpoint(ROOT / "mini_family" / "weights" / "base.safetensors")
    torch.manual_seed(seed)
    codebook = Codebook(NAMES, base.style_width)
    torch.nn.init.normal_(codebook.add_embedding.linear_2.weight, std=0.1)
    unet, codebook = base.unet(), codebook.requires_grad_(False)
    write_dmm(server.base / "models" / "checkpoints" / FILE, unet, codebook=codebook)
    write_diffusers(
        server.base / "models" / "diffusers" / FOLDER, family="sd15", unet=unet, codebook=codebook, vae=base.vae(),
        vae_config=base.vae_config, text_encoders=[base.text_encoder()],
        metadata={"dmm.styles": json.dumps([{"name": name} for name in NAMES])},
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _both(server) -> None:
    write_both(server)
    cut = server.base / "models" / "diffusers" / "half" / "unet"
    cut.mkdir(parents=True)
    (cut.parent / "model_index.json").write_text("{}", encoding="utf-8")
    (server.base / "models" / "diffusers" / "no model").mkdir()


def of(checkpoint: str, graph: Graph) -> Graph:
    graph["load"]["inputs"]["checkpoint"] = checkpoint
    return graph


def test_listed_with_its_styles(server):
    """As ComfyUI lists such folders; the route serves listed names alone."""
    info = server.get("/object_info")
    listed = info["LoadDMM"]["input"]["required"]["checkpoint"][1]["options"]
    assert {FOLDER, "half", FILE} <= set(listed) and "no model" not in listed
    assert set(info["DiffusersLoader"]["input"]["required"]["model_path"][0]) <= set(listed)
    answer = server.get(f"/dmm/styles?checkpoint={quote(FOLDER)}")
    assert [entry["name"] for entry in answer["styles"]] == list(NAMES)
    whole = str(server.base / "models" / "diffusers" / FOLDER)
    for name in ("no model", "by hand", f"{FOLDER}/../as published", whole, "../diffusers/half", "."):
        assert server.raw(f"/dmm/styles?checkpoint={quote(name)}")[0] == 404, name
    assert server.raw("/dmm/styles?checkpoint=half")[0] == 422


def test_same_pictures_as_the_single_file(server):
    """Every style, a mix, the default, baked, and on one half of the guidance; CLIP and VAE are the folder's own."""
    bake = {"style": style("clay"), "bake": node("BakeStyle", model=["load", 0], style=["style", 0])}
    half = {"style": style("neon"), "pos": node("ConditioningStyle", conditioning=["prompt", 0], style=["style", 0])}
    graphs = {name: styled(style(name), steps=STEPS) for name in NAMES}
    graphs["mix"] = styled(mix(0.5, 0.3, 0.2), steps=STEPS)
    graphs["default"] = plain(steps=STEPS)
    graphs["baked"] = plain(["bake", 0], steps=STEPS, **bake)
    graphs["positive alone"] = plain(positive=["pos", 0], steps=STEPS, **half)
    pictures = {}
    for name, graph in graphs.items():
        pictures[name] = server.pictures(of(FOLDER, graph))
        assert apart(pictures[name], server.pictures(of(FILE, graph))) <= 1, name
    assert min(apart(pictures["ink"], pictures[name]) for name in ("clay", "neon", "mix", "default")) > 20


def test_its_style_file(server):
    """It names the folder's UNet."""
    from dmm_core.checkpoint import open_checkpoint
    from dmm_core.checkpoint.reader import read_header

    save = node("SaveStyle", style=["style", 0], filename="of a folder")
    server.run(of(FOLDER, styled(style("ink"), steps=2, save=save)))
    strings = read_header(server.base / "models" / "loras" / "of a folder.safetensors")[1]
    assert strings["dmm.model_sha256"] == open_checkpoint(server.base / "models" / "diffusers" / FOLDER).sha256()


def test_a_rewritten_folder_is_loaded_again(server):
    graph = of(FOLDER, styled(style("ink"), steps=2))
    before = server.pictures(graph)
    server.run(of(FOLDER, styled(style("clay"), steps=2)))
    assert "load" in server.cached
    write_both(server, seed=6)
    assert apart(before, server.pictures(graph)) > 5
    write_both(server)


def test_a_broken_folder_is_one_sentence(server):
    with pytest.raises(Failed, match=r"half: holds no unet/ folder") as told:
        server.run(of("half", plain(steps=2)))
    assert "\n" not in str(told.value)
