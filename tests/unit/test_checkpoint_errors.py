"""Every kind of bad input has its own name and one line that says what is wrong; inspect says so without raising."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dmm_core.checkpoint import (
    BadMetadata,
    CheckpointError,
    LoraGiven,
    MissingFile,
    MissingKeys,
    NonFinite,
    NotACheckpoint,
    NotSafetensors,
    NoUnetFolder,
    PickleRefused,
    ScaledWeights,
    StyleCount,
    TruncatedFile,
    UnsupportedModel,
    WrongShape,
    inspect_file,
    open_checkpoint,
    write_checkpoint,
    write_diffusers,
    write_dmm,
    write_style,
)
from dmm_core.checkpoint.reader import Tensors
from dmm_core.checkpoint.writer import non_finite, write_safetensors
from dmm_core.errors import BadInput
from tests.unit import tiny

UNET = "model.diffusion_model."
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_tiny_dmm(tmp_path_factory.mktemp("модель 模") / "d m.safetensors", vocab=99)


@pytest.fixture
def changed(file: Path, tmp_path: Path) -> Callable[..., Path]:
    """The DMM file with tensors changed by a function, and with other metadata."""

    def change(edit: Callable[[State], object] = lambda state: None, **metadata: str | None) -> Path:
        tensors = Tensors.open(file)
        state = dict(tensors.items())
        edit(state)
        strings = tensors.metadata | {key.replace("__", "."): value for key, value in metadata.items()}
        path = tmp_path / "changed é.safetensors"
        write_safetensors(path, state, {k: v for k, v in strings.items() if v is not None})
        return path

    return change


def fails(path: Path, kind: type[CheckpointError], *parts: str) -> CheckpointError:
    """Opening raises exactly this kind: one line, with the path and the given parts."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert type(caught.value) is kind and isinstance(caught.value, BadInput)
    line = str(caught.value)
    assert "\n" not in line and all(part in line for part in parts), line
    return caught.value


def test_missing_file(tmp_path):
    fails(tmp_path / "no é.safetensors", MissingFile, "no é.safetensors", "no such file")


class Bomb:
    def __reduce__(self) -> tuple:
        return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize("name", ["m.ckpt", "m.pt", "m.BIN", "m.pth", "m.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_never_opened(tmp_path, name, zipped):
    path = tmp_path / name
    if zipped:
        torch.save({"state_dict": Bomb()}, path)
    else:
        path.write_bytes(pickle.dumps({"state_dict": Bomb()}))
    fails(path, PickleRefused, "is a pickle", "safetensors")
    with pytest.raises(PickleRefused):
        inspect_file(path)


def test_pickles_in_a_folder(tmp_path, file):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"x")
    fails(tmp_path, PickleRefused, "diffusion_pytorch_model.bin")


def test_folders(tmp_path):
    fails(tmp_path, NoUnetFolder, "no unet/ folder")
    (tmp_path / "unet").mkdir()
    fails(tmp_path, NoUnetFolder, "no unet/ folder")
    parts = write_diffusers(tmp_path / "parts", **tiny.model(vocab=99))
    fails(parts / "unet", NoUnetFolder, "one component")


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_truncated(tmp_path, file, kept):
    path = tmp_path / "t.safetensors"
    path.write_bytes(file.read_bytes()[:kept])
    fails(path, TruncatedFile, "is cut off")


@pytest.mark.parametrize("data", [b"\xff" * 20, b"\x08" + b"\0" * 7 + b"not json", b"\x02" + b"\0" * 7 + b"[]"])
def test_not_safetensors(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    fails(path, NotSafetensors, "not a safetensors file")


@pytest.mark.parametrize("entry", [{"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, {"shape": []}, 3])
def test_damaged_header(tmp_path, entry):
    raw = json.dumps({"a": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0" * 100)
    fails(path, NotSafetensors, "header")


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.input_blocks.1.0.out_layers.3.weight",
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.norm1.weight",
        "model.diffusion_model.output_blocks.3.1.proj_out.bias",
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.time_embed.2.bias",
        "first_stage_model.taesd_decoder.19.weight",
        "first_stage_model.taesd_encoder.0.bias",
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc2.bias",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
        "model.diffusion_model.add_embedding.linear_2.bias",
    ],
)
def test_missing_keys(changed, key):
    error = fails(changed(lambda state: state.pop(key)), MissingKeys, "lacks", "incomplete")
    assert isinstance(error, MissingKeys)
    if "taesd_decoder.19" not in key:  # without the last layer, another one looks like it
        assert key in error.keys


def test_half_a_text_encoder(changed):
    def halve(state: State) -> None:
        for key in [k for k in state if ".self_attn." in k]:
            del state[key]

    fails(changed(halve), MissingKeys, "its text encoder lacks 8 tensors")


@pytest.mark.parametrize(
    "key, shape",
    [
        ("model.diffusion_model.input_blocks.1.0.in_layers.2.weight", (64, 32, 3, 3)),
        ("model.diffusion_model.time_embed.2.bias", (128,)),
        ("model.diffusion_model.output_blocks.0.0.in_layers.0.weight", (64,)),
        ("model.diffusion_model.add_embedding.linear_1.weight", (256, 208)),
        ("model.diffusion_model.model_embedding.weight", (3, 128)),
        ("first_stage_model.taesd_decoder.3.conv.0.weight", (64, 32, 3, 3)),
        ("cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.bias", (64,)),
        ("model.diffusion_model.input_blocks.0.0.weight", (64, 4)),
    ],
)
def test_wrong_shape(changed, key, shape):
    fails(changed(lambda state: state.update({key: torch.zeros(shape)})), WrongShape, "has shape [")


def test_text_encoder_of_another_width(changed, tmp_path):
    model = tiny.model(vocab=99)
    model["unet"] = tiny.unet(context=96)
    fails(write_checkpoint(tmp_path / "x.safetensors", **model), WrongShape, "attn2.to_k", "96")


@pytest.mark.parametrize(
    "keys, name",
    [
        (["double_blocks.0.img_attn.norm.key_norm.scale"], "Flux"),
        (["model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale"], "Flux"),
        (["model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight"], "Stable Diffusion 3"),
        (["transformer_blocks.0.attn1.to_q.weight"], "diffusion transformer"),
        (["model.diffusion_model.cap_embedder.0.weight"], "Lumina"),
    ],
)
def test_other_architectures(tmp_path, keys, name):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {key: torch.zeros(2) for key in keys}, {})
    fails(path, UnsupportedModel, name, "only SD1.5 and SDXL")


@pytest.mark.parametrize("scale", ["scaled_fp8", "input_blocks.1.1.proj_in.scale_weight", "out.2.comfy_quant"])
def test_codes_with_scales_are_no_weights(changed, scale):
    """ComfyUI multiplies them out (comfy/model_detection.py); taken as they are, a teacher would draw noise."""
    path = changed(lambda state: state.update({UNET + scale: torch.ones(())}))
    fails(path, ScaledWeights, "8-bit codes with scales", scale, "fp16")
    assert "8-bit" in inspect_file(path)["problem"]


def test_a_header_too_deep_and_a_damaged_list_of_shards(tmp_path):
    deep = b'{"a":' * 100_000
    path = tmp_path / "deep.safetensors"
    path.write_bytes(len(deep).to_bytes(8, "little") + deep)
    fails(path, NotSafetensors, "header")
    (tmp_path / "model" / "unet").mkdir(parents=True)
    index = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    for text in ('{"weight_map": {"a": "b.safe', "[]", "{}", '{"weight_map": {"a": 3}}'):
        index.write_text(text)
        fails(tmp_path / "model", NotSafetensors, index.name, "list of files")


def test_sd2_refiner_and_inpainting(tmp_path, changed):
    def linear(state: State) -> None:
        for key in [k for k in state if k.endswith(("proj_in.weight", "proj_out.weight")) and k.startswith(UNET)]:
            state[key] = state[key][:, :, 0, 0]

    fails(changed(linear), UnsupportedModel, "Stable Diffusion 2")
    sd2 = {"cond_stage_model.model.ln_final.weight": torch.ones(8)}
    fails(changed(lambda state: state.update(sd2)), UnsupportedModel, "Stable Diffusion 2")
    refiner = {"conditioner.embedders.0.model.ln_final.weight": torch.ones(8)}
    fails(changed(lambda state: state.update(refiner)), UnsupportedModel, "refiner")
    wide = {f"{UNET}input_blocks.0.0.weight": torch.zeros(64, 9, 3, 3)}
    fails(changed(lambda state: state.update(wide)), UnsupportedModel, "9 input channels")
    big = tiny.unet(context=1024)
    write_safetensors(tmp_path / "u.safetensors", big, {})
    fails(tmp_path / "u.safetensors", UnsupportedModel, "Stable Diffusion 2")


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha",
        "lora_unet_mid_block_attentions_0_proj_in.hada_w1_a",
        "transformer.double_blocks.0.img_attn.proj.lora_B.weight",
    ],
)
def test_lora(tmp_path, key):
    path = tmp_path / "l.safetensors"
    write_safetensors(path, {key: torch.zeros(2)}, {})
    fails(path, LoraGiven, "holds a LoRA, not a checkpoint")
    assert inspect_file(path)["kind"] == "lora"


@pytest.mark.parametrize(
    "key, name",
    [
        ("first_stage_model.decoder.conv_in.weight", "VAE without a UNet"),
        ("decoder.conv_in.weight", "VAE without a UNet"),
        ("text_model.encoder.layers.0.mlp.fc1.weight", "text encoder"),
        ("emb_params", "textual-inversion"),
        ("control_model.input_blocks.0.0.weight", "ControlNet"),
        ("down_blocks.0.motion_modules.0.norm.weight", "AnimateDiff"),
        ("something", "without a UNet"),
    ],
)
def test_not_a_checkpoint(tmp_path, key, name):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {key: torch.zeros(2)}, {})
    fails(path, NotACheckpoint, name)
    found = inspect_file(path)
    assert found["kind"] == "unknown" and name in found["problem"]


def test_parts_that_are_not_there(tmp_path):
    ck = open_checkpoint(write_checkpoint(tmp_path / "u.safetensors", family="sd15", unet=tiny.unet()))
    with pytest.raises(NotACheckpoint, match="no VAE"):
        ck.vae()
    with pytest.raises(NotACheckpoint, match="no text encoder"):
        ck.text_encoder(0)


def test_style_count(changed):
    fails(changed(dmm__styles='[{"name": "a"}]'), StyleCount, "names 1 styles", "3 rows")


@pytest.mark.parametrize(
    "metadata",
    [
        {"dmm__styles": "nonsense"},
        {"dmm__styles": '{"a": 1}'},
        {"dmm__styles": '["a", "b", "c"]'},
        {"dmm__styles": json.dumps([{"name": "a"}] * 3)},
        {"dmm__default_style": "[]"},
        {"dmm__default_style": '{"unknown": 1}'},
        {"dmm__default_style": '{"ink": 0}'},
    ],
)
def test_bad_metadata(changed, metadata):
    fails(changed(**metadata), BadMetadata, next(iter(metadata)).replace("__", "."))


def test_codebook_without_names_and_names_without_codebook(changed):
    ck = open_checkpoint(changed(dmm__styles=None, dmm__default_style=None))
    assert ck.styles == ("style 1", "style 2", "style 3") and ck.default_style["style 1"] == pytest.approx(1 / 3)
    key = f"{UNET}model_embedding.weight"
    fails(changed(lambda state: state.pop(key)), MissingKeys, key)


def test_a_newer_format(changed):
    fails(changed(dmm__format="2"), UnsupportedModel, "format 2")


def test_non_finite(file, tmp_path):
    """Written by others: ours refuse to write such a file."""
    safetensors = pytest.importorskip("safetensors.torch")
    state = dict(Tensors.open(file).items())
    key = f"{UNET}out.2.weight"
    state[key][0, 0, 0, 0], state[key][0, 0, 0, 1] = float("nan"), float("inf")
    path = tmp_path / "n.safetensors"
    safetensors.save_file(state, path)
    ck = open_checkpoint(path)
    with pytest.raises(NonFinite, match="2 values that are NaN or infinite") as caught:
        ck.check_finite()
    assert caught.value.key == key
    assert inspect_file(path)["non_finite"] is None
    assert inspect_file(path, check_values=True)["non_finite"] == [{"tensor": key, "count": 2}]


def test_large_values_are_finite(tmp_path):
    """A sum that overflows is no NaN."""
    write_safetensors(
        tmp_path / "x.safetensors", {"a": torch.full((9,), 3e38), "b": torch.full((9,), 1e300, dtype=torch.float64)}, {}
    )


def test_inspect(file, tmp_path):
    found = json.loads(json.dumps(inspect_file(file, check_values=True)))
    assert (found["kind"], found["layout"], found["family"], found["dmm"]) == ("dmm", "ldm", "sd15", "ours")
    assert [style["name"] for style in found["styles"]] == list(tiny.NAMES) and found["problem"] is None
    assert found["dtype"] == "float16" and found["non_finite"] == [] and found["size"] == file.stat().st_size
    counts = found["parameters"]
    assert (
        counts["unet"] == sum(t.numel() for t in tiny.unet().values()) and counts["other"] == 2
    )  # vae_scale, vae_shift
    assert counts["all"] == sum(value for key, value in counts.items() if key != "all")
    parts = write_diffusers(tmp_path / "parts", **tiny.model("sdxl", vocab=99), codebook=tiny.codebook())
    found = json.loads(json.dumps(inspect_file(parts)))
    assert (found["kind"], found["layout"], found["family"], found["dmm"]) == ("dmm", "diffusers", "sdxl", "authors")
    assert len(found["architecture"]["text_encoders"]) == 2 and found["size"] > 1000
    style = write_style(tmp_path / "s.safetensors", vector=torch.ones(4), name="n", mix={"ink": 1}, dmm_hash="0")
    found = inspect_file(style)
    assert (found["kind"], found["styles"], found["default_style"]) == ("style", [{"name": "n"}], {"ink": 1.0})


def test_writers_check_what_they_get(tmp_path):
    model = tiny.model(vocab=99)
    path = tmp_path / "x.safetensors"
    with pytest.raises(MissingKeys, match="UNet"):
        unet = {key: value for key, value in model["unet"].items() if key != "conv_out.bias"}
        write_checkpoint(path, **{**model, "unet": unet})
    with pytest.raises(UnsupportedModel, match="sdxl"):
        write_checkpoint(path, **{**model, "family": "sdxl"})
    with pytest.raises(WrongShape):
        write_dmm(path, **model, codebook=tiny.codebook(dim=64))
    with pytest.raises(MissingKeys, match="VAE"):
        vae = {key: value for key, value in model["vae"].items() if key != "decoder.layers.2.conv.0.bias"}
        write_diffusers(tmp_path / "f", **{**model, "vae": vae})
    assert not path.exists()


def test_no_map_keeps_a_file_open(file, tmp_path):
    """Tensors that live on must not hinder replacing the file (Windows), nor change with it."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(file.read_bytes())
    ck = open_checkpoint(path)
    unet = ck.unet()
    kept = {key: value.clone() for key, value in unet.items()}
    path.write_bytes(b"\0" * path.stat().st_size)
    assert all(torch.equal(unet[key], kept[key]) for key in kept)
    single = ck.parts["unet"]["conv_in.bias"]
    assert single.key.startswith(UNET)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_values_are_looked_at_by_an_old_torch_too(monkeypatch, dtype):
    """torch 2.1, which A1111 has, finds no range of float16 on a CPU."""
    whole = torch.Tensor.aminmax

    def old(tensor):
        if tensor.dtype == torch.float16:
            raise RuntimeError("\"aminmax_cpu\" not implemented for 'Half'")
        return whole(tensor)

    monkeypatch.setattr(torch.Tensor, "aminmax", old)
    assert non_finite(torch.ones(3).to(dtype)) == 0
    assert non_finite(torch.tensor([1.0, float("nan")]).to(dtype)) == 1
