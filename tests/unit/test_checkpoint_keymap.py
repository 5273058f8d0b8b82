"""Key maps and shapes against diffusers' own models and converter: full size without memory, tiny size by value."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dmm_core.checkpoint import keymap, open_checkpoint, write_checkpoint
from dmm_core.checkpoint.checkpoint import Checkpoint
from dmm_core.checkpoint.reader import DTYPES, TensorInfo, Tensors
from dmm_core.checkpoint.shapes import text_shapes, unet_shapes, vae_shapes
from tests.unit import tiny

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
oracle = pytest.importorskip("diffusers.loaders.single_file_utils")

FULL_UNET: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20], "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "cross_attention_dim": 2048,
        "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
FULL_KL = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
}  # fmt: skip
CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
CLIP_G = {"vocab_size": 49408, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
          "num_attention_heads": 20, "projection_dim": 1280, "hidden_act": "gelu"}  # fmt: skip


def meta_state(cls: type, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        made = cls(cls.config_class(**config)) if cls.__module__.startswith("transformers") else cls(**config)
    return dict(made.state_dict())


def sizes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items() if not key.endswith("position_ids")}


@pytest.fixture(scope="module")
def full() -> dict[str, dict[str, torch.Tensor]]:
    """State dicts of all full-size models, on the meta device."""
    return {
        "sd15": meta_state(diffusers.UNet2DConditionModel, FULL_UNET["sd15"]),
        "sdxl": meta_state(diffusers.UNet2DConditionModel, FULL_UNET["sdxl"]),
        "kl": meta_state(diffusers.AutoencoderKL, FULL_KL),
        "taesd": meta_state(diffusers.AutoencoderTiny, {}),
        "clip_l": meta_state(transformers.CLIPTextModel, CLIP_L),
        "clip_g": meta_state(transformers.CLIPTextModelWithProjection, CLIP_G),
    }


def as_ldm(full: dict[str, dict[str, torch.Tensor]], family: str) -> dict[str, tuple[int, ...]]:
    """Key → shape of a full-size single file, made of our maps from the real models' keys."""
    found: dict[str, tuple[int, ...]] = {}
    config = {
        "layers_per_block": 2,
        "up_block_types": FULL_UNET[family].get("up_block_types", ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3)),
    }
    unet = sizes(full[family])
    found |= {keymap.UNET + name: unet[key] for key, name in keymap.unet_map(unet, config).items()}
    vae = sizes(full["kl"])
    for key, name in keymap.vae_map(vae, {"kind": "kl", **FULL_KL}).items():
        found[keymap.VAE + name] = (*vae[key], 1, 1) if keymap.vae_is_matrix(key) else vae[key]
    found |= {keymap.TEXT[family][0] + key: shape for key, shape in sizes(full["clip_l"]).items()}
    if family == "sdxl":
        text = sizes(full["clip_g"])
        for key, name in keymap.open_clip_map(text).items():
            shape = text[key][::-1] if key == "text_projection.weight" else text[key]
            found[keymap.TEXT[family][1] + name] = (
                (3 * shape[0], *shape[1:]) if keymap.stacked_row(key) is not None else shape
            )
    return found


def open_shapes(
    shapes: dict[str, tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, path: str = "full.safetensors"
) -> Checkpoint:
    """``open_checkpoint`` of a file that has these shapes and no data."""
    info = {key: TensorInfo(Path(path), "F16", shape, 0, 0) for key, shape in shapes.items()}
    monkeypatch.setattr("dmm_core.checkpoint.opening.open_tensors", lambda p: (Tensors(info), (p,)))
    return open_checkpoint(path)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_full_size_is_detected_and_complete(full, family, monkeypatch):
    ck = open_shapes(as_ldm(full, family), monkeypatch)
    assert (ck.layout, ck.family, ck.dmm) == ("ldm", family, None)
    for part, name in (("unet", family), ("vae", "kl"), ("text_encoder_0", "clip_l")):
        assert ck.shapes(part) == sizes(full[name]), part
        assert set(ck.parts[part]) == set(sizes(full[name]))
    if family == "sdxl":
        assert ck.shapes("text_encoder_1") == sizes(full["clip_g"])
    stored = {source.key for part in ck.parts.values() for source in part.values()}
    assert stored == set(as_ldm(full, family)), "every key of the file is some part's"
    assert sizes(meta_state(diffusers.UNet2DConditionModel, ck.unet_config)) == sizes(full[family])
    assert ck.unet_config["attention_head_dim"] == FULL_UNET[family]["attention_head_dim"]
    assert ck.unet_config["sample_size"] == (64 if family == "sd15" else 128)
    kl = {key: value for key, value in ck.vae_config.items() if key != "kind"}
    assert sizes(meta_state(diffusers.AutoencoderKL, kl)) == sizes(full["kl"])
    assert [c["num_attention_heads"] for c in ck.text_configs] == [12, 20][: len(ck.text_configs)]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_full_size_diffusers_folder(full, family, monkeypatch):
    names = {"unet/": family, "vae/": "kl", "text_encoder/": "clip_l"} | (
        {"text_encoder_2/": "clip_g"} if family == "sdxl" else {}
    )
    shapes = {prefix + key: shape for prefix, name in names.items() for key, shape in sizes(full[name]).items()}
    ck = open_shapes(shapes, monkeypatch, "folder")
    assert (ck.layout, ck.family) == ("diffusers", family)
    assert {source.key for part in ck.parts.values() for source in part.values()} == set(shapes)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_authors_layouts_at_full_size(full, family, layout, monkeypatch):
    """Every key of the published files is the UNet's or the codebook's, and nothing is left over."""
    unet = {"unet/" + key: shape for key, shape in sizes(full[family]).items()}
    shapes, prefix = (unet, "unet/") if layout == "diffusers" else (as_ldm(full, family), keymap.UNET)
    rows = 8 if family == "sd15" else 4
    mlp = "add_embedding2" if family == "sdxl" else "add_embedding"
    extra = {f"{prefix}model_embedding.weight": (rows, 1280)}
    for n in (1, 2):
        extra |= {f"{prefix}{mlp}.linear_{n}.weight": (1280, 1280), f"{prefix}{mlp}.linear_{n}.bias": (1280,)}
    ck = open_shapes({**shapes, **extra}, monkeypatch)
    assert (ck.family, ck.dmm, len(ck.styles), ck.style_width) == (family, "authors", rows, 1280)
    assert {source.key for source in ck.parts["codebook"].values()} == set(extra)
    assert {source.key for part in ck.parts.values() for source in part.values()} == {*shapes, *extra}
    assert ck.styles[0] == ("JuggernautReborn" if family == "sd15" else "JuggernautXLV10")
    assert ck.shapes("unet") == sizes(full[family])


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_full_unet_map_is_the_oracles(full, family):
    """Each LDM key carries its own name through diffusers' converter and must come out where our map says."""
    config = {
        "layers_per_block": 2,
        "up_block_types": FULL_UNET[family].get("up_block_types", ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3)),
    }
    ours = keymap.unet_map(full[family], config)
    assert len(set(ours.values())) == len(ours)
    named = {keymap.UNET + name: name for name in ours.values()}
    theirs = oracle.convert_ldm_unet_checkpoint(
        named, {"layers_per_block": 2, "addition_embed_type": "text_time" if family == "sdxl" else None}
    )
    assert theirs == ours


def test_full_text_maps_are_the_oracles(full):
    text = {keymap.TEXT["sd15"][0] + key: key for key in full["clip_l"]}
    assert oracle.convert_ldm_clip_checkpoint(text) == {key: key for key in full["clip_l"]}
    shapes = {
        k.removeprefix(keymap.TEXT["sdxl"][1]): v
        for k, v in as_ldm(full, "sdxl").items()
        if k.startswith(keymap.TEXT["sdxl"][1])
    }
    stored = {keymap.TEXT["sdxl"][1] + key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    theirs = oracle.convert_open_clip_checkpoint(_text_model(1280), stored, prefix=keymap.TEXT["sdxl"][1])
    assert {k: tuple(v.shape) for k, v in theirs.items()} == sizes(full["clip_g"])


def _text_model(width: int) -> Any:
    return SimpleNamespace(config=SimpleNamespace(hidden_size=width))


def test_full_vae_map_is_the_oracles(full):
    ours = keymap.vae_map(full["kl"], {"kind": "kl", **FULL_KL})
    assert len(set(ours.values())) == len(ours)
    # every tensor gets a number of its own as its only dimension's size, so that it can be followed
    numbers = {name: torch.empty(i + 1, device="meta") for i, name in enumerate(ours.values())}
    theirs = oracle.convert_ldm_vae_checkpoint({keymap.VAE + name: t for name, t in numbers.items()}, FULL_KL)
    assert {key: tuple(t.shape) for key, t in theirs.items()} == {
        key: tuple(numbers[name].shape) for key, name in ours.items()
    }


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_values_are_the_oracles(family, tmp_path):
    """A tiny file of ours through diffusers' converter, and through our reader: the same tensors."""
    path = write_checkpoint(tmp_path / "m.safetensors", **tiny.model(family, "kl", vocab=99))
    ck = open_checkpoint(path)
    state = dict(Tensors.open(path).items())
    theirs = oracle.convert_ldm_unet_checkpoint(
        state, {"layers_per_block": 1, "addition_embed_type": "text_time" if family == "sdxl" else None}
    )
    same(ck.unet(), theirs)
    same(ck.vae(), oracle.convert_ldm_vae_checkpoint(state, ck.vae_config))
    clip_l = {k: v for k, v in state.items() if k.startswith(keymap.TEXT[family][0])}
    same(ck.text_encoder(0), oracle.convert_ldm_clip_checkpoint(clip_l))
    if family == "sdxl":
        same(
            ck.text_encoder(1),
            oracle.convert_open_clip_checkpoint(_text_model(64), state, prefix=keymap.TEXT["sdxl"][1]),
        )


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert set(a) == set(b)
    for key, tensor in a.items():
        assert tensor.dtype == b[key].dtype and torch.equal(tensor, b[key]), key


def test_taesd_numbers_match_comfyui():
    """ComfyUI's decoder: clamp 0, convolution 1, ReLU 2, blocks 3–5, upsampling 6, … 19 (comfy/taesd/taesd.py)."""
    names = keymap.vae_map(vae_shapes(tiny.vae_config()), tiny.vae_config())
    numbers = {int(match[1]) for name in names.values() if (match := re.match(r"taesd_decoder\.(\d+)\.", name))}
    assert numbers == {1, 3, 4, 5, 7, 8, 9, 10, 12, 13, 14, 15, 17, 18, 19}
    assert {int(n.split(".")[1]) for n in names.values() if n.startswith("taesd_encoder")} == set(range(15))


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_shapes_are_diffusers_at_tiny_size(family):
    config = tiny.unet_config(family)
    assert unet_shapes(config) == sizes(meta_state(diffusers.UNet2DConditionModel, config))
    for kind, cls in (("kl", diffusers.AutoencoderKL), ("taesd", diffusers.AutoencoderTiny)):
        full = {k: v for k, v in tiny.vae_config(kind).items() if k != "kind"}
        extra = (
            {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
            if kind == "kl"
            else {}
        )
        assert vae_shapes(tiny.vae_config(kind)) == sizes(meta_state(cls, {**full, **extra}))
    for kind, cls in (("clip_l", transformers.CLIPTextModel), ("clip_g", transformers.CLIPTextModelWithProjection)):
        text = tiny.text_config(kind)
        assert text_shapes(text) == sizes(meta_state(cls, {k: v for k, v in text.items() if k != "kind"}))


@pytest.mark.parametrize("channels, layers", [((64,), 2), ((64, 64, 128), 1), ((64, 96, 128, 128), 3)])
def test_other_sizes(channels, layers):
    """The rules hold for any number of levels and layers, not only for those of the published models."""
    config = {**tiny.unet_config(channels=channels), "layers_per_block": layers}
    if len(channels) == 1:
        config |= {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
    state = meta_state(diffusers.UNet2DConditionModel, config)
    assert unet_shapes(config) == sizes(state)
    ours = keymap.unet_map(state, config)
    named = {keymap.UNET + name: name for name in ours.values()}
    assert oracle.convert_ldm_unet_checkpoint(named, {"layers_per_block": layers}) == ours


def test_dtypes_are_those_of_safetensors():
    assert set(DTYPES) >= {"F64", "F32", "F16", "BF16", "I64", "U8", "BOOL"}
