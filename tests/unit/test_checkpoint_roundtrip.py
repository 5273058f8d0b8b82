"""Law 5: save → load → save is byte-equal, LDM ↔ diffusers loses nothing; folding; metadata; the library's view."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from dmm_core.checkpoint import (
    BadMetadata,
    NonFinite,
    StyleCount,
    UnsupportedModel,
    fold,
    open_checkpoint,
    write_checkpoint,
    write_diffusers,
    write_dmm,
    write_style,
)
from dmm_core.checkpoint.reader import Tensors
from dmm_core.checkpoint.writer import write_safetensors
from tests.unit import tiny

FAMILIES = ["sd15", "sdxl"]
BIAS = "time_embedding.linear_2.bias"
VOCAB = 99


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A path with spaces and non-Latin letters."""
    path = tmp_path / "Модели 模型 é"
    path.mkdir()
    return path


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b) or set(a) == set(b)
    for key, tensor in a.items():
        assert tensor.dtype == b[key].dtype and torch.equal(tensor, b[key]), key


def again(ck) -> dict:
    """What a checkpoint gives back, as arguments of a writer."""
    return {
        "family": ck.family, "unet": ck.unet(), "vae": ck.vae() if ck.vae_config else None,
        "text_encoders": [ck.text_encoder(i) for i in range(len(ck.text_configs))],
        "prediction_type": ck.prediction_type, "vae_config": ck.vae_config,
    }  # fmt: skip


def matches(ck, model: dict) -> None:
    same(ck.unet(), model["unet"])
    same(ck.vae(), model["vae"])
    assert len(ck.text_configs) == len(model["text_encoders"])
    for index, state in enumerate(model["text_encoders"]):
        same(ck.text_encoder(index), state)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("vae", ["taesd", "kl"])
def test_ldm_and_diffusers_hold_the_same(folder, family, vae):
    model = tiny.model(family, vae, vocab=VOCAB)
    single = open_checkpoint(write_checkpoint(folder / "model ű.safetensors", **model))
    parts = open_checkpoint(write_diffusers(folder / "model ű", **model))
    assert (single.layout, parts.layout) == ("ldm", "diffusers")
    for ck in (single, parts):
        assert (ck.family, ck.dmm, ck.codebook(), ck.styles) == (family, None, None, ())
        matches(ck, model)
        assert ck.dtype == torch.float16
        ck.check_finite()
    ignore = {"sample_size"}
    assert {k: v for k, v in single.unet_config.items() if k not in ignore} == {
        k: v for k, v in tiny.unet_config(family).items() if k not in ignore
    }
    assert single.vae_config == parts.vae_config and single.text_configs == parts.text_configs
    assert single.unet_config == parts.unet_config


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_save_load_save_is_byte_equal(folder, family, prediction):
    model = tiny.model(family, "kl" if prediction == "epsilon" else "taesd", vocab=VOCAB)
    first = write_checkpoint(folder / "a.safetensors", **model, prediction_type=prediction, metadata={"x": "é"})
    ck = open_checkpoint(first)
    assert ck.prediction_type == prediction and ck.metadata["x"] == "é"
    second = write_checkpoint(folder / "b.safetensors", **again(ck), metadata=ck.metadata)
    assert first.read_bytes() == second.read_bytes()
    # through a diffusers folder and back
    parts = open_checkpoint(write_diffusers(folder / "parts", **again(ck), metadata=ck.metadata))
    assert parts.prediction_type == prediction
    third = write_checkpoint(folder / "c.safetensors", **again(parts), metadata={**ck.metadata})
    assert first.read_bytes() == third.read_bytes()
    before = {p.name: p.read_bytes() for p in sorted((folder / "parts").rglob("*")) if p.is_file()}
    write_diffusers(folder / "parts", **again(parts), metadata=parts.metadata)  # over itself: nothing is held open
    assert before == {p.name: p.read_bytes() for p in sorted((folder / "parts").rglob("*")) if p.is_file()}


@pytest.mark.parametrize("family", FAMILIES)
def test_dmm_file_round_trip(folder, family):
    model, book = tiny.model(family, vocab=VOCAB), tiny.codebook(default={"ink": 0.75, "水彩": 0.25})
    info = [{"name": name, "teacher": f"{name} v1.safetensors", "sha256": "ab" * 32} for name in tiny.NAMES]
    first = write_dmm(
        folder / "dmm 水.safetensors", **model, codebook=book, style_info=info, recipe={"seed": 1},
        report={"ratio": 1.03}, title="Mine", resolution=64,
    )  # fmt: skip
    ck = open_checkpoint(first)
    assert (ck.dmm, ck.layout, ck.styles, ck.style_info) == ("ours", "ldm", tiny.NAMES, info)
    assert ck.default_style == {"ink": 0.75, "水彩": 0.25} and ck.unet_config["sample_size"] == 8
    loaded = ck.codebook()
    assert loaded is not None and loaded.names == tiny.NAMES and loaded.default == book.default
    meta = ck.metadata
    assert json.loads(meta["dmm.recipe"]) == {"seed": 1} and json.loads(meta["dmm.report"]) == {"ratio": 1.03}
    second = write_dmm(
        folder / "2.safetensors", **again(ck), codebook=loaded, style_info=ck.style_info, extra_metadata=ck.metadata
    )
    assert first.read_bytes() == second.read_bytes()
    same({k: v for k, v in ck.unet().items() if k != BIAS}, {k: v for k, v in model["unet"].items() if k != BIAS})


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_folding_keeps_every_style(folder, dtype):
    """bias + MLP(e) is what it was for each style; the default's own vector becomes zero, and the bias shows it."""
    unet, book = tiny.unet(dtype=dtype), tiny.codebook()
    s0 = book.default_style()
    kept = {key: value.clone() for key, value in book.state_dict().items()}
    path = write_dmm(folder / "f.safetensors", family="sd15", unet=unet, vae=None, text_encoders=[], codebook=book)
    ck = open_checkpoint(path)
    loaded, bias = ck.codebook(), ck.unet()[BIAS]
    assert bias.dtype == torch.float32
    torch.testing.assert_close(bias, unet[BIAS].float() + s0, atol=1e-6, rtol=1e-6)
    stored = Tensors.open(path)["model.diffusion_model.add_embedding.linear_2.bias"]
    torch.testing.assert_close(stored, book.add_embedding.linear_2.bias - s0, atol=1e-6, rtol=1e-6)
    for name in tiny.NAMES:
        before = unet[BIAS].float() + book.style({name: 1.0})
        torch.testing.assert_close(bias + loaded.style({name: 1.0}), before, atol=2e-6, rtol=1e-6)
    assert loaded.default_style().abs().max() < 2e-7
    same(dict(book.state_dict()), kept)  # the argument is as it was
    twice, bias_again = fold(loaded, bias)
    assert torch.equal(bias, bias_again)
    same(dict(twice.state_dict()), dict(loaded.state_dict()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_authors_layouts(folder, family, layout):
    model, book = tiny.model(family, vocab=VOCAB), tiny.codebook()
    if layout == "ldm":
        ck = open_checkpoint(write_checkpoint(folder / "a.safetensors", **model, codebook=book))
    else:
        ck = open_checkpoint(write_diffusers(folder / "a", **model, codebook=book))
        config = json.loads((folder / "a" / "unet" / "config.json").read_text(encoding="utf-8"))
        assert config["num_models"] == 3
        assert config["addition_embed_type"] == ("model_merge_xl" if family == "sdxl" else "model_merge")
        mlp = "add_embedding2" if family == "sdxl" else "add_embedding"
        assert f"unet/{mlp}.linear_1.weight" in ck.tensors
    assert (ck.dmm, ck.family, ck.layout) == ("authors", family, layout)
    assert ck.styles == ("style 1", "style 2", "style 3")
    matches(ck, model)
    loaded = ck.codebook()
    assert loaded is not None
    same(dict(loaded.state_dict()), dict(book.state_dict()))


def test_sdxl_file_of_ours_may_have_add_embedding2(folder):
    """A single SDXL file that names the style MLP as the published folder does."""
    path = write_checkpoint(folder / "a.safetensors", **tiny.model("sdxl", vocab=VOCAB), codebook=tiny.codebook())
    state = {key.replace("add_embedding.", "add_embedding2."): value for key, value in Tensors.open(path).items()}
    write_safetensors(path, state, {})
    same(dict(open_checkpoint(path).codebook().state_dict()), dict(tiny.codebook().state_dict()))


def test_metadata_follows_the_standard(folder):
    import hashlib

    path = tiny.write_tiny_dmm(folder / "m.safetensors", vocab=VOCAB)
    meta = open_checkpoint(path).metadata
    assert meta["modelspec.sai_model_spec"] == "1.0.1"
    assert meta["modelspec.architecture"] == "stable-diffusion-v1"
    assert meta["modelspec.prediction_type"] == "epsilon" and meta["modelspec.resolution"] == "64x64"
    assert meta["modelspec.merged_from"] == ", ".join(tiny.NAMES) and meta["modelspec.date"].endswith("Z")
    assert {"dmm.format": "1"}.items() <= meta.items()
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert meta["modelspec.hash_sha256"] == "0x" + hashlib.sha256(data[start:]).hexdigest()
    assert open_checkpoint(path).sha256() == hashlib.sha256(data).hexdigest()
    xl = open_checkpoint(tiny.write_tiny(folder / "x.safetensors", family="sdxl", vocab=VOCAB))
    assert xl.metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"


def test_the_safetensors_library_reads_what_we_write(folder):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tiny.write_tiny_dmm(folder / "m.safetensors", family="sdxl", vae_kind="kl", vocab=VOCAB)
    same(safetensors.load_file(path), dict(Tensors.open(path).items()))


def test_we_read_what_the_library_writes(folder):
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {
        "a": torch.randn(3, 4), "b": torch.randn(2).bfloat16(), "c": torch.tensor(2.5), "d": torch.empty(0, 3),
        "e": torch.arange(3), "f": torch.tensor([True, False]), "g": torch.randn(5).to(torch.float8_e4m3fn).float(),
    }  # fmt: skip
    safetensors.save_file(tensors, folder / "x.safetensors", {"k": "ü"})
    ours = Tensors.open(folder / "x.safetensors")
    same(dict(ours.items()), tensors)
    same(dict(ours.read(ours)), tensors)
    assert ours.metadata == {"k": "ü"}
    write_safetensors(folder / "y.safetensors", tensors, {"k": "ü"})
    same(safetensors.load_file(folder / "y.safetensors"), tensors)


def test_style_file(folder):
    book = tiny.codebook()
    vector = book.style({"ink": 0.5, "néon": 0.5})
    path = write_style(
        folder / "s.safetensors", vector=vector, name="half", mix={"ink": 0.5, "néon": 0.5}, dmm_hash="ff"
    )
    tensors = Tensors.open(path)
    assert set(tensors) == {"lora_unet_time_embed_2.diff", "lora_unet_time_embed_2.diff_b"}
    assert torch.equal(tensors["lora_unet_time_embed_2.diff"], torch.zeros(1))
    assert torch.equal(tensors["lora_unet_time_embed_2.diff_b"], vector)
    assert json.loads(tensors.metadata["dmm.style_weights"]) == {"ink": 0.5, "néon": 0.5}
    assert tensors.metadata["dmm.style_name"] == "half" and tensors.metadata["dmm.model_sha256"] == "ff"
    full = write_style(folder / "l.safetensors", vector=torch.zeros(1280), name="x", mix={"x": 1.0}, dmm_hash="ff" * 32)
    assert full.stat().st_size < 6000


def test_taesd_scale_is_comfyuis(folder):
    """ComfyUI gives its TAESD latents / 0.18215, so that factor undoes it; other scales come back as diffusers' own."""
    path = tiny.write_tiny(folder / "m.safetensors", vocab=VOCAB)
    assert float(Tensors.open(path)["first_stage_model.vae_scale"]) == pytest.approx(0.18215)
    assert open_checkpoint(path).vae_config["scaling_factor"] == 1.0
    given = {"scaling_factor": 0.5, "shift_factor": 0.25}
    write_checkpoint(path, **tiny.model(vocab=VOCAB), vae_config=given)
    config = open_checkpoint(path).vae_config
    assert (config["scaling_factor"], config["shift_factor"]) == (pytest.approx(0.5), pytest.approx(0.25))


def test_extra_keys_and_old_names_are_tolerated(folder):
    """What published files have beside the model, and how older programs named some of it."""
    model = tiny.model("sd15", "kl", vocab=VOCAB)
    path = write_checkpoint(folder / "m.safetensors", **model)
    state = dict(Tensors.open(path).items())
    old = {key.replace("transformer.text_model.", "transformer."): value for key, value in state.items()}
    extra = {"model_ema.decay": torch.ones(()), "alphas_cumprod": torch.ones(4), "betas": torch.ones(4),
             "cond_stage_model.transformer.embeddings.position_ids": torch.arange(77)[None],
             "first_stage_model.loss.logvar": torch.ones(())}  # fmt: skip
    write_safetensors(path, {**old, **extra}, {})
    matches(open_checkpoint(path), model)
    parts = write_diffusers(folder / "parts", **model)
    vae = parts / "vae" / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, value in Tensors.open(vae).items():
        for new, legacy in names.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{legacy}.")
        renamed[key] = value
    write_safetensors(vae, renamed, {})
    text = parts / "text_encoder" / "model.safetensors"
    ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    write_safetensors(text, {**dict(Tensors.open(text).items()), **ids}, {})
    matches(open_checkpoint(parts), model)


def test_sharded_and_half_precision_folders(folder):
    model = tiny.model(vocab=VOCAB)
    parts = write_diffusers(folder / "parts", **model)
    whole = parts / "unet" / "diffusion_pytorch_model.safetensors"
    state = dict(Tensors.open(whole).items())
    names = {key: f"diffusion_pytorch_model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(state)}
    for name in set(names.values()):
        write_safetensors(whole.parent / name, {k: v for k, v in state.items() if names[k] == name}, {})
    index = whole.parent / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}), encoding="utf-8")
    whole.unlink()
    vae = parts / "vae" / "diffusion_pytorch_model.safetensors"
    os.replace(vae, vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
    ck = open_checkpoint(parts)
    matches(ck, model)
    assert len(ck.weights_files) == 2 and len(ck.sha256()) == 64


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_unet_alone(folder, prefix):
    """As programs save it for their UNet loaders: LDM names with any prefix, or diffusers' names with none."""
    unet = tiny.unet()
    path = write_checkpoint(folder / "u.safetensors", family="sd15", unet=unet)
    tensors = {key.replace("model.diffusion_model.", prefix): value for key, value in Tensors.open(path).items()}
    write_safetensors(path, tensors, {})
    ck = open_checkpoint(path)
    same(ck.unet(), unet)
    assert ck.vae_config is None and ck.text_configs == []
    if not prefix:
        write_safetensors(path, unet, {})
        assert open_checkpoint(path).layout == "diffusers"
        same(open_checkpoint(path).unet(), unet)


def test_prediction_type_of_other_programs(folder):
    path = tiny.write_tiny(folder / "m.safetensors", vocab=VOCAB)
    state = dict(Tensors.open(path).items())
    for metadata, extra, expected in (
        ({}, {}, "epsilon"),
        ({}, {"v_pred": torch.empty(0)}, "v_prediction"),
        ({"modelspec.prediction_type": "v"}, {}, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, {"v_pred": torch.empty(0)}, "epsilon"),
    ):
        write_safetensors(path, {**state, **extra}, metadata)
        assert open_checkpoint(path).prediction_type == expected


def test_sdxl_predicts_what_its_tensors_say(folder):
    """As ComfyUI decides: scripts that merge write epsilon into the metadata of whatever they get."""
    path = tiny.write_tiny(folder / "x.safetensors", family="sdxl", vocab=VOCAB)
    state = dict(Tensors.open(path).items())
    write_safetensors(path, {**state, "v_pred": torch.empty(0)}, {"modelspec.prediction_type": "epsilon"})
    assert open_checkpoint(path).prediction_type == "v_prediction"
    for key in ("edm_vpred.sigma_max", "edm_mean", "edm_std"):
        write_safetensors(path, {**state, key: torch.ones(1)}, {})
        with pytest.raises(UnsupportedModel, match="is an EDM model, such as"):
            open_checkpoint(path)


def test_nothing_is_left_behind_when_writing_fails(folder):
    path = tiny.write_tiny_dmm(folder / "m.safetensors", vocab=VOCAB)
    before = path.read_bytes()
    model = tiny.model(vocab=VOCAB)
    model["unet"]["conv_out.weight"][0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFinite, match=r"model\.diffusion_model\.out\.2\.weight has 1 value that is NaN"):
        write_dmm(path, **model, codebook=tiny.codebook())
    assert path.read_bytes() == before and [p.name for p in folder.iterdir()] == ["m.safetensors"]
    with pytest.raises(NonFinite):
        write_style(folder / "s.safetensors", vector=torch.tensor([float("inf")]), name="x", mix={}, dmm_hash="")
    assert [p.name for p in folder.iterdir()] == ["m.safetensors"]


def test_what_a_dmm_file_may_say(folder):
    model, path = tiny.model(vocab=VOCAB), folder / "m.safetensors"
    book = tiny.codebook()
    named = [{"name": name} for name in tiny.NAMES]
    with pytest.raises(StyleCount, match="names 2 styles but its codebook has 3 rows"):
        write_dmm(path, **model, codebook=book, style_info=named[:2])
    with pytest.raises(BadMetadata, match="in the place of"):
        write_dmm(path, **model, codebook=book, style_info=named[::-1])
    with pytest.raises(BadMetadata, match="thumbnail"):
        write_dmm(path, **model, codebook=book, style_info=[{**s, "thumbnail": "x" * 20000} for s in named])
    with pytest.raises(BadMetadata, match="JSON"):
        write_dmm(path, **model, codebook=book, recipe={"lr": float("nan")})
    assert not path.exists()
