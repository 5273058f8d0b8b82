"""Weight-space merges of whole files, by recipe and by command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmm_core.checkpoint import open_checkpoint, write_checkpoint, write_diffusers
from dmm_core.checkpoint.reader import Tensors
from dmm_core.cli import main
from dmm_core.errors import BadInput, RecipeError
from dmm_core.merge_files import merge_files
from dmm_core.merge_recipe import MergeRecipe, load_merge_recipe, merge_recipe_from_dict
from tests.unit import tiny

UNET = "model.diffusion_model."
VOCAB = 200  # small files, quick tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("modèles et 模型")
    for name, seed in (("a", 0), ("b", 40), ("c", 80)):
        tiny.write_tiny(folder / f"{name}.safetensors", seed=seed, vocab=VOCAB)
    for name, seed in (("xl a", 0), ("xl b", 40)):
        tiny.write_tiny(folder / f"{name}.safetensors", family="sdxl", seed=seed, vae_kind="kl", vocab=VOCAB)
    nan = load_file(folder / "b.safetensors")
    nan[UNET + "out.2.bias"][0] = float("nan")
    save_file(nan, folder / "nan.safetensors")
    tiny.write_tiny_dmm(folder / "dmm.safetensors", vocab=VOCAB)
    return folder


def merged(folder: Path, *models: object, out: str = "out.safetensors", **more: object) -> Tensors:
    """The output of a merge of files in the folder, by their stems."""
    listed = [{**m, "path": f"{m['path']}.safetensors"} if isinstance(m, dict) else f"{m}.safetensors" for m in models]
    if "base" in more:
        more["base"] = f"{more['base']}.safetensors"
    return Tensors.open(merge_files(merge_recipe_from_dict({"models": listed, "out": out, **more}, folder)))


def tensors(folder: Path, stem: str) -> Tensors:
    return Tensors.open(folder / f"{stem}.safetensors")


@pytest.mark.parametrize(("one", "two"), [("a", "b"), ("xl a", "xl b")])
def test_weighted_files(folder, one, two):
    out = merged(folder, {"path": one, "weight": 3}, {"path": two, "weight": 1})
    a, b = tensors(folder, one), tensors(folder, two)
    assert set(out) == set(a)
    for key in a:
        expected = a[key] if "vae_s" in key else (0.75 * a[key].float() + 0.25 * b[key].float()).to(a[key].dtype)
        assert out[key].dtype == a[key].dtype and torch.equal(out[key], expected), key


def test_one_model_alone_comes_out_as_it_is(folder):
    out, a = merged(folder, "a"), tensors(folder, "a")
    assert set(out) == set(a) and all(torch.equal(out[key], a[key]) for key in a)
    again = merged(folder, "a", "a", "a", out="again.safetensors")
    assert all(torch.equal(again[key], a[key]) for key in a), "float32 is finer than what rounding to float16 loses"


def test_add_difference_files(folder):
    out = merged(folder, "a", "b", base="c", method="add_difference", alpha=0.5)
    a, b, c = (tensors(folder, stem) for stem in "abc")
    for key in (UNET + "input_blocks.0.0.weight", "first_stage_model.taesd_encoder.0.weight"):
        assert torch.equal(out[key], (a[key].float() + 0.5 * (b[key].float() - c[key].float())).half())
    same = merged(folder, "a", "c", base="c", method="add_difference", out="same.safetensors")
    assert all(torch.equal(same[key], a[key]) for key in a)


def test_block_weights_in_files(folder):
    out = merged(folder, "a", "b", alpha=0.5, blocks={"mid": 1, "in.1": 0, "text": 0, "vae": 0.25})
    a, b = tensors(folder, "a"), tensors(folder, "b")
    alphas = {"middle_block.1.norm.bias": 1.0, "input_blocks.1.0.in_layers.2.weight": 0.0, "time_embed.0.weight": 0.5,
              "output_blocks.2.0.in_layers.2.weight": 0.5, "out.2.weight": 0.5}  # fmt: skip
    full = {UNET + name: alpha for name, alpha in alphas.items()}
    full |= {"first_stage_model.taesd_encoder.0.weight": 0.25}
    full |= {"cond_stage_model.transformer.text_model.final_layer_norm.weight": 0.0}
    for key, alpha in full.items():
        expected = ((1 - alpha) * a[key].float() + alpha * b[key].float()).half()
        assert torch.equal(out[key], expected), key
    blocks = [0.5, 0.0, 0.5, 0.5, 1.0, 0.5, 0.5, 0.5, 0.5]
    listed = merged(folder, "a", "b", alpha=0.5, blocks=blocks, out="listed.safetensors")
    assert all(torch.equal(listed[key], out[key]) for key in out if key.startswith(UNET))


@pytest.mark.parametrize("read", [100_000, 9973])
def test_pieces_make_no_difference(folder, monkeypatch, read):
    whole = merged(folder, "xl a", "xl b", out="whole.safetensors")
    monkeypatch.setattr("dmm_core.merge_files.READ", read)
    pieces = merged(folder, "xl a", "xl b", out="pieces.safetensors")
    assert whole.metadata["modelspec.hash_sha256"] == pieces.metadata["modelspec.hash_sha256"]


def test_dtype_and_what_is_not_merged(folder, tmp_path):
    state = load_file(folder / "a.safetensors")
    ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    state |= {ids: torch.arange(77)[None], "alphas_cumprod": torch.rand(10), "model_ema.decay": torch.ones(1)}
    save_file(state, tmp_path / "old.safetensors", {"modelspec.resolution": "64x64"})
    recipe = {"models": ["old.safetensors", str(folder / "b.safetensors")], "out": "neu é.safetensors"}
    out = Tensors.open(merge_files(merge_recipe_from_dict({**recipe, "dtype": "bf16", "title": "Both"}, tmp_path)))
    assert out[ids].dtype == torch.int64 and torch.equal(out[ids], state[ids])
    assert torch.equal(out["alphas_cumprod"], state["alphas_cumprod"]) and "model_ema.decay" not in out
    assert out[UNET + "out.2.weight"].dtype == torch.bfloat16
    spec = {key.removeprefix("modelspec."): value for key, value in out.metadata.items()}
    assert spec["merged_from"] == "old.safetensors, b.safetensors" and spec["title"] == "Both"
    assert spec["architecture"] == "stable-diffusion-v1" and spec["resolution"] == "64x64"
    assert json.loads(spec["dmm.merge"])["models"][1] == {"path": "b.safetensors", "weight": 1.0}
    assert str(folder) not in spec["dmm.merge"]
    assert (
        "dmm.merge"
        not in Tensors.open(merge_files(merge_recipe_from_dict({**recipe, "include_recipe": False}, tmp_path))).metadata
    )


@pytest.mark.parametrize(("family", "kind"), [("sd15", "taesd"), ("sdxl", "kl")])
def test_diffusers_folders_and_single_files_mix(tmp_path, family, kind):
    """Stacked and transposed tensors of SDXL's second text encoder, and the VAE's matrices, find each other."""
    for name, seed in (("a", 0), ("b", 40)):
        parts = tiny.model(family, kind, seed, VOCAB)
        write_checkpoint(tmp_path / f"{name}.safetensors", **parts)
        write_diffusers(tmp_path / name, **parts)
    single = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    results = []
    for number, pair in enumerate((single, [tmp_path / "a", single[1]], [single[0], tmp_path / "b"])):
        data = {"models": [{"path": str(pair[0]), "weight": 0.7}, {"path": str(pair[1]), "weight": 0.3}]}
        recipe = merge_recipe_from_dict({**data, "out": str(tmp_path / f"out{number}.safetensors")})
        results.append(Tensors.open(merge_files(recipe)))
    for other in results[1:]:
        assert set(other) == set(results[0])
        assert all(torch.equal(other[key], results[0][key]) for key in other)
    assert open_checkpoint(tmp_path / "out1.safetensors").layout == "ldm"


def refusal(folder: Path, *models: object, **more: object) -> str:
    before = sorted(folder.iterdir())
    with pytest.raises(BadInput) as caught:
        merged(folder, *models, out="never.safetensors", **more)
    assert sorted(folder.iterdir()) == before, "nothing may be written"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_do_not_fit(folder, tmp_path):
    assert "xl a.safetensors: its family is sdxl where a.safetensors is sd15" in refusal(folder, "a", "xl a")
    assert "dmm.safetensors: is a DMM file" in refusal(folder, "a", "dmm")
    line = refusal(folder, "a", "nan", "b")
    assert "nan.safetensors: model.diffusion_model.out.2.bias has 1 value that is NaN" in line
    small = tiny.model(vocab=VOCAB)
    for name, parts in {
        "wide": small | {"unet": tiny.unet(channels=(64, 192))},
        "no vae": small | {"vae": None},
        "kl": tiny.model(vae_kind="kl", vocab=VOCAB),
    }.items():
        write_checkpoint(tmp_path / f"{name}.safetensors", **parts)
    (tmp_path / "a.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    assert "wide.safetensors: its UNet is of another shape" in refusal(tmp_path, "a", "wide")
    assert "kl.safetensors: its VAE is of another shape" in refusal(tmp_path, "a", "kl")
    line = refusal(tmp_path, "a", "no vae")
    assert "no vae.safetensors: holds no VAE, and a.safetensors has one. blocks: {vae: 0} keeps" in line
    out = merged(tmp_path, "a", "no vae", blocks={"vae": 0})
    assert any(key.startswith("first_stage_model.") for key in out)
    half = load_file(folder / "a.safetensors")
    del half[UNET + "out.2.weight"]
    save_file(half, tmp_path / "half.safetensors")
    assert "half.safetensors: its UNet lacks" in refusal(tmp_path, "a", "half")
    assert "no block 'in.12' in these models" in refusal(tmp_path, "a", "a", blocks={"in.12": 0.1})


def test_too_large_for_the_type(folder, tmp_path):
    big = {key: tensor.float() for key, tensor in load_file(folder / "a.safetensors").items()}
    big[UNET + "out.2.bias"][0] = 1e6
    save_file(big, tmp_path / "big.safetensors")
    assert "has values too large for float16. Use dtype bf16 or fp32" in refusal(tmp_path, "big", dtype="fp16")
    assert merged(tmp_path, "big")[UNET + "out.2.bias"][0] == 1e6


# ---------------------------------------------------------------- recipes


def test_recipe_file(folder):
    path = folder / "merge.yaml"
    path.write_text(
        "models:\n  - {path: a.safetensors}\n  - b.safetensors\nalpha: 0.3\nblocks: {in.0: 0.5}\nout: x.safetensors\n",
        encoding="utf-8",
    )
    recipe = load_merge_recipe(path)
    assert recipe.blocks == {"in.0": 0.5} and recipe.base_alpha == 0.3 and recipe.models[1].weight == 1
    assert recipe.out == folder / "x.safetensors"
    assert merge_recipe_from_dict(recipe.to_dict()) == recipe
    listed = merge_recipe_from_dict({**recipe.to_dict(), "blocks": [0.1, 0.2]})
    assert listed.blocks == (0.1, 0.2) and merge_recipe_from_dict(listed.to_dict()) == listed


@pytest.mark.parametrize(
    ("change", "words"),
    [({"models": []}, "at least one"), ({"method": "ties"}, "one of weighted, add_difference"),
     ({"alfa": 1}, "unknown key alfa. Did you mean alpha"), ({"out": "x.ckpt"}, "ends in .safetensors"),
     ({"out": "a.safetensors"}, "is also models"), ({"models": ["a.safetensors"], "alpha": 0.5}, "need two models"),
     ({"method": "add_difference"}, "base is missing"), ({"base": "a.safetensors"}, "weighted has none"),
     ({"models": [{"path": "a.safetensors", "weight": 2}, "b.safetensors"], "alpha": 0.5}, "not both"),
     ({"models": [{"path": "a.safetensors", "weight": -1}, "b.safetensors"]}, "sum to 0"),
     ({"models": ["a.safetensor", "b.safetensors"]}, "Did you mean a.safetensors"),
     ({"blocks": {"mid": "half"}}, "blocks.mid: expected a number"), ({"blocks": 0.5}, "blocks: expected a mapping"),
     ({"loras": ["none.safetensors"]}, "loras[0].path: there is no"), ({"alpha": float("nan")}, "a number"),
     ({"teachers": ["a.safetensors"]}, "recipe for dmm distill")],
)  # fmt: skip
def test_recipes_that_cannot_be(folder, change, words):
    with pytest.raises(RecipeError) as caught:
        merge_recipe_from_dict({"models": ["a.safetensors", "b.safetensors"], "out": "x.safetensors", **change}, folder)
    assert words in str(caught.value)


def test_base_alpha():
    from dmm_core.merge_recipe import ModelSpec

    two = (ModelSpec(Path("a"), 0.6), ModelSpec(Path("b"), 0.4))
    assert MergeRecipe(two, Path("o")).base_alpha == pytest.approx(0.4)
    assert MergeRecipe(two, Path("o"), alpha=0.1).base_alpha == 0.1
    assert MergeRecipe(two, Path("o"), method="add_difference").base_alpha == 1


# ---------------------------------------------------------------- command


def refused(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    return told.err.strip().splitlines()[-1]


def test_command(folder, capsys, tmp_path):
    out = tmp_path / "aus gabe.safetensors"
    a, b, c = (folder / f"{stem}.safetensors" for stem in "abc")
    arguments = ["merge", "--model", a, b, "--weight", "0.6", "0.4", "--out", out, "--json"]
    assert main([str(argument) for argument in arguments]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["method"] == "weighted" and told["bytes"] == out.stat().st_size and told["family"] == "sd15"
    assert told["models"] == ["a.safetensors", "b.safetensors"]
    key = UNET + "out.2.weight"
    expected = 0.6 * Tensors.open(a)[key].float() + 0.4 * Tensors.open(b)[key].float()
    assert torch.allclose(Tensors.open(out)[key].float(), expected, rtol=1e-3)
    assert "there already" in refused(capsys, *arguments)
    assert main([str(x) for x in ["merge", "--model", a, b, "--base", c, "--alpha", 0.5, "--out", out, "--force"]]) == 0
    assert "add_difference of a.safetensors, b.safetensors" in capsys.readouterr().out
    recipe = tmp_path / "merge.yaml"
    recipe.write_text(f"models: ['{a}', '{b}']\nout: from recipe.safetensors\ndtype: bf16\n", encoding="utf-8")
    assert main(["merge", str(recipe)]) == 0
    assert open_checkpoint(tmp_path / "from recipe.safetensors").dtype == torch.bfloat16
    assert "a recipe or --dtype, not both" in refused(capsys, "merge", recipe, "--dtype", "fp16")
    assert "a recipe is missing" in refused(capsys, "merge", "--model", a)
    assert "one --weight a model, got 1 for 2" in refused(
        capsys, "merge", "--model", a, b, "--weight", "1", "--out", tmp_path / "n.safetensors"
    )
    line = refused(capsys, "merge", "--model", a, folder / "nan.safetensors", "--out", tmp_path / "n.safetensors")
    assert "nan.safetensors" in line and "out.2.bias" in line and not (tmp_path / "n.safetensors").exists()
