"""LoRA files: every naming, linear and convolution, against values by hand; what is refused; baked in by a merge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dmm_core.checkpoint import Checkpoint, NonFinite, open_checkpoint
from dmm_core.checkpoint.reader import Tensors
from dmm_core.cli import main
from dmm_core.lora import LoraError, layer_names, open_lora
from dmm_core.merge_files import merge_files
from dmm_core.merge_recipe import merge_recipe_from_dict
from tests.unit import tiny

UNET = "model.diffusion_model."
TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"
FC1 = "text_model.encoder.layers.0.mlp.fc1"
Q_PROJ = "text_model.encoder.layers.0.self_attn.q_proj"


def flat(layer: str) -> str:
    return layer.replace(".", "_")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("löras")
    for family in ("sd15", "sdxl"):
        tiny.write_tiny(folder / f"{family}.safetensors", family=family, vocab=200)
    return folder


@pytest.fixture(scope="module")
def sd15(folder) -> Checkpoint:
    return open_checkpoint(folder / "sd15.safetensors")


@pytest.fixture(scope="module")
def sdxl(folder) -> Checkpoint:
    return open_checkpoint(folder / "sdxl.safetensors")


def by_hand() -> tuple[Tensor, Tensor]:
    """down (2, 64), up (64, 2): up @ down is 0.5 at (3, 0), 2 at (3, 2) and -3 at (5, 2), else 0."""
    down, up = torch.zeros(2, 64), torch.zeros(64, 2)
    down[0, 0], down[1, 2] = 1, 2
    up[3, 0], up[3, 1], up[5, 1] = 0.5, 1, -1.5
    return down, up


def lora(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata or None)
    return path


def random_layer(name: str, out: int, into: int, rank: int = 2, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator)
    return {f"{name}.lora_down.weight": 0.1 * down, f"{name}.lora_up.weight": 0.1 * up}


def test_linear_by_hand(sd15, tmp_path):
    down, up = by_hand()
    name = f"lora_unet_{flat(TO_Q)}"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    fitted = open_lora(lora(tmp_path / "l.safetensors", tensors)).fit(sd15)
    delta = fitted.delta("unet", TO_Q + ".weight", 0.8)
    expected = torch.zeros(64, 64)
    expected[3, 0], expected[3, 2], expected[5, 2] = 0.2, 0.8, -1.2  # strength 0.8 · alpha 1 / rank 2
    assert torch.allclose(delta, expected)
    assert fitted.delta("unet", CONV + ".weight") is None and fitted.delta("unet", TO_Q + ".weight", 0) is None
    state = sd15.unet()
    changed = fitted.apply("unet", state, 0.8)
    assert [key for key in state if not torch.equal(state[key], changed[key])] == [TO_Q + ".weight"]
    assert torch.equal(changed[TO_Q + ".weight"], (state[TO_Q + ".weight"].float() + expected).half())


@pytest.mark.parametrize(
    ("name", "ends"),
    [(f"lora_unet_{flat(TO_Q)}", (".lora_down.weight", ".lora_up.weight")),
     ("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q", (".lora_down.weight", ".lora_up.weight")),
     (f"unet.{TO_Q}", (".lora_A.weight", ".lora_B.weight")), (f"unet.{TO_Q}", (".lora.down.weight", ".lora.up.weight")),
     (f"unet.{TO_Q}".replace("attn1.", "attn1.processor."), ("_lora.down.weight", "_lora.up.weight")),
     (f"base_model.model.{TO_Q}", (".lora_A.default.weight", ".lora_B.default.weight")),
     ("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q", (".lora_A.weight", ".lora_B.weight")),
     (f"lycoris_{flat(TO_Q)}", (".lora_down.weight", ".lora_up.weight"))],
)  # fmt: skip
def test_every_naming_of_a_layer(sd15, tmp_path, name, ends):
    down, up = by_hand()
    path = lora(tmp_path / "l.safetensors", {name + ends[0]: down.half(), name + ends[1]: up.half()})
    delta = open_lora(path).fit(sd15).delta("unet", TO_Q + ".weight")
    assert torch.equal(delta, up @ down), "no alpha means alpha = rank"


def test_names_are_of_one_layer_each(sd15, sdxl):
    for ck in (sd15, sdxl):
        names = layer_names(ck)
        assert len(set(names.values())) == sum(
            len(shape) > 1 and key.endswith(".weight")
            for part in ck.parts if part != "vae" for key, shape in ck.shapes(part).items()
        )  # fmt: skip
    assert layer_names(sdxl)[f"lora_te2_{flat(FC1)}"] == ("text_encoder_1", FC1 + ".weight")
    assert layer_names(sdxl)[f"lora_te1_{flat(FC1)}"] == ("text_encoder_0", FC1 + ".weight")
    assert layer_names(sd15)[f"text_encoder.{FC1}"] == ("text_encoder_0", FC1 + ".weight")


def test_convolutions(sd15, tmp_path):
    """LoCon: the small convolution, then a 1×1. By hand at one output: Σ_r up[o, r] · down[r, i, h, w]."""
    name = f"lora_unet_{flat(CONV)}"
    down, up = torch.randn(3, 64, 3, 3), torch.randn(64, 3, 1, 1)
    path = lora(tmp_path / "l.safetensors", {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up})
    delta = open_lora(path).fit(sd15).delta("unet", CONV + ".weight").reshape(64, 64, 3, 3)
    assert torch.allclose(delta[7, 5, 2, 1], sum(up[7, r, 0, 0] * down[r, 5, 2, 1] for r in range(3)))
    x = torch.randn(1, 64, 5, 5)
    two = torch.conv2d(torch.conv2d(x, down, padding=1), up)
    assert torch.allclose(torch.conv2d(x, delta, padding=1), two, atol=1e-4)


def test_middle_factor(sd15, tmp_path):
    name = f"lora_unet_{flat(CONV)}"
    down, mid, up = torch.randn(3, 64, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(64, 3, 1, 1)
    tensors = {f"{name}.lora_{k}.weight": t for k, t in (("down", down), ("mid", mid), ("up", up))}
    fitted = open_lora(lora(tmp_path / "l.safetensors", tensors)).fit(sd15)
    x = torch.randn(1, 64, 5, 5)
    three = torch.conv2d(torch.conv2d(torch.conv2d(x, down), mid, padding=1), up)
    delta = fitted.delta("unet", CONV + ".weight").reshape(64, 64, 3, 3)
    assert torch.allclose(torch.conv2d(x, delta, padding=1), three, atol=1e-2, rtol=1e-3)


def test_settings_of_peft(sd15, tmp_path):
    down, up = by_hand()
    tensors = {f"unet.{TO_Q}.lora_A.weight": down, f"unet.{TO_Q}.lora_B.weight": up}
    for settings, scale in (({"unet.lora_alpha": 8}, 4), ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 8 / 2**0.5),
                            ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 1}}, 0.5),
                            ({"text_encoder.lora_alpha": 8}, 1)):  # fmt: skip
        path = lora(tmp_path / "l.safetensors", tensors, lora_adapter_metadata=json.dumps(settings))
        assert torch.allclose(open_lora(path).fit(sd15).delta("unet", TO_Q + ".weight"), scale * (up @ down))
    lora(tmp_path / "l.safetensors", tensors, lora_adapter_metadata=json.dumps({"unet.use_dora": True}))
    with pytest.raises(LoraError, match="lacks DoRA's norms"):
        open_lora(tmp_path / "l.safetensors")


def test_settings_that_peft_keeps_beside_its_file(sd15, tmp_path):
    down, up = by_hand()
    tensors = {f"base_model.model.{TO_Q}.lora_A.weight": down, f"base_model.model.{TO_Q}.lora_B.weight": up}
    path = lora(tmp_path / "adapter_model.safetensors", tensors)
    change = lambda: open_lora(path).fit(sd15).delta("unet", TO_Q + ".weight")  # noqa: E731
    assert torch.allclose(change(), up @ down)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8}), encoding="utf-8")
    assert torch.allclose(change(), 4 * (up @ down))
    for text in ("{", "[]"):
        (tmp_path / "adapter_config.json").write_text(text, encoding="utf-8")
        with pytest.raises(LoraError, match=r"adapter_config\.json: .* it has the LoRA's alpha"):
            change()


@pytest.mark.parametrize(
    ("extra", "words"),
    [({f"lora_unet_{flat(CONV)}.hada_w1_a": (2, 2)}, f"other half of lora_unet_{flat(CONV)}.hada_w1_a"),
     ({f"lora_unet_{flat(CONV)}.lokr_w1": (2, 2)}, f"other half of lora_unet_{flat(CONV)}.lokr_w1"),
     ({f"lora_unet_{flat(TO_Q)}.hada_w1_a": (64, 2)}, "no layer together"),
     ({f"lora_unet_{flat(TO_Q)}.dora_scale": (63, 1)}, "do not make [64, 64]"),
     ({f"lora_unet_{flat(TO_Q)}.oft_blocks": (2, 32, 32)}, "is OFT, which is not read here"),
     ({f"lora_unet_{flat(TO_Q)}.on_input": ()}, "is IA3, which is not read here"),
     ({f"lora_unet_{flat(TO_Q)}.a1.weight": (64, 2)}, "is GLoRA, which is not read here"),
     ({"bundle_emb.x.string_to_param.*": (1, 8)}, "is a LoRA with embeddings"),
     ({f"lora_unet_{flat(TO_Q)}.diff_b": (64,)}, "full differences"), ({"something.else": (1,)}, "something.else"),
     ({f"lora_unet_{flat(CONV)}.lora_up.weight": (64, 2, 1, 1)}, f"other half of lora_unet_{flat(CONV)}.lora_up"),
     ({f"lora_unet_{flat(CONV)}.alpha": ()}, f"other half of lora_unet_{flat(CONV)}.alpha"),
     ({f"unet.{TO_Q}.lora_A.weight": (2, 64), f"unet.{TO_Q}.lora_B.weight": (64, 2)}, "two layers for"),
     (random_layer("lora_unet_input_blocks_7_1_transformer_blocks_5_attn1_to_q", 64, 64), "has no place"),
     (random_layer(f"lora_unet_{flat(CONV)}", 64, 64), "do not make [64, 64, 3, 3]"),
     (random_layer(f"lora_te_{flat(FC1)}", 128, 768), "do not make [128, 64]")],
)  # fmt: skip
def test_refused_by_name(sd15, tmp_path, extra, words):
    tensors = random_layer(f"lora_unet_{flat(TO_Q)}", 64, 64)
    tensors |= {key: torch.ones(value) if isinstance(value, tuple) else value for key, value in extra.items()}
    path = lora(tmp_path / "bad lora.safetensors", tensors)
    with pytest.raises(LoraError) as caught:
        open_lora(path).fit(sd15)
    assert words in str(caught.value) and "bad lora.safetensors" in str(caught.value)


def test_no_lora_at_all(folder, sd15, tmp_path):
    with pytest.raises(LoraError, match="holds no LoRA"):
        open_lora(folder / "sd15.safetensors")
    with pytest.raises(LoraError, match="is a folder"):
        open_lora(folder)
    bad = random_layer(f"lora_unet_{flat(TO_Q)}", 64, 64)
    bad[f"lora_unet_{flat(TO_Q)}.lora_up.weight"][0, 0] = float("inf")
    with pytest.raises(NonFinite, match="lora_up"):
        open_lora(lora(tmp_path / "inf.safetensors", bad)).fit(sd15).delta("unet", TO_Q + ".weight")


# ---------------------------------------------------------------- baked in


def test_baked_into_sdxl(folder, sdxl, tmp_path):
    """Also where a file stacks or transposes: the second text encoder's queries and its projection."""
    layers = {
        "lora_unet_input_blocks_0_0": None,
        f"lora_unet_{flat('mid_block.attentions.0.transformer_blocks.1.attn2.to_k')}": ("unet", 128, 128),
        f"lora_te1_{flat(FC1)}": ("text_encoder_0", 128, 64),
        f"lora_te2_{flat(Q_PROJ)}": ("text_encoder_1", 64, 64),
        "lora_te2_text_projection": ("text_encoder_1", 64, 64),
    }
    tensors: dict[str, Tensor] = {}
    for number, (name, sizes) in enumerate(layers.items()):
        if sizes:
            tensors |= random_layer(name, *sizes[1:], seed=number)
    path = lora(tmp_path / "xl lora.safetensors", tensors)
    spec = {"path": str(path), "strength": 0.5, "text_strength": 2.0}
    data = {"models": [str(sdxl.path)], "loras": [spec], "out": str(tmp_path / "baked.safetensors")}
    baked = open_checkpoint(merge_files(merge_recipe_from_dict(data)))
    fitted = open_lora(path).fit(sdxl)
    assert len(fitted.layers) == 4
    assert baked.metadata["modelspec.merged_from"] == "sdxl.safetensors, xl lora.safetensors"
    parts = {"unet": (sdxl.unet(), baked.unet(), 0.5)}
    parts |= {f"text_encoder_{i}": (sdxl.text_encoder(i), baked.text_encoder(i), 2.0) for i in range(2)}
    for part, (before, after, strength) in parts.items():
        expected = fitted.apply(part, before, strength)
        assert all(torch.equal(after[key], expected[key]) for key in expected)
        differ = {key for key in before if not torch.equal(before[key], after[key])}
        assert differ == {key for owner, key in fitted.layers if owner == part} and differ


def test_command(folder, sd15, tmp_path, capsys):
    path = lora(tmp_path / "my lora.safetensors", random_layer(f"lora_unet_{flat(TO_Q)}", 64, 64))
    out = tmp_path / "out.safetensors"
    arguments = ["merge", "--model", str(sd15.path), "--lora", f"{path}=0.5", "--out", str(out), "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["loras"] == ["my lora.safetensors"]
    key = UNET + "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    delta = open_lora(path).fit(sd15).delta("unet", TO_Q + ".weight", 0.5)
    assert torch.equal(Tensors.open(out)[key], (sd15.tensors[key].float() + delta).half())
    wrong = str(folder / "sdxl.safetensors")
    assert main(["merge", "--model", wrong, "--lora", str(path), "--out", str(tmp_path / "n.safetensors")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "my lora.safetensors: has a layer for which sdxl.safetensors (sdxl) has no place" in line
    assert not (tmp_path / "n.safetensors").exists()


# ---------------------------------------------------------------- oracle


@pytest.mark.slow
def test_peft_makes_the_same_model(sd15, tmp_path):
    """A random LoRA that peft itself put into diffusers' UNet, saved by diffusers; the merged weights are equal."""
    peft = pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from peft.utils import get_peft_model_state_dict

    unet = UNet2DConditionModel(**sd15.unet_config)
    unet.load_state_dict({key: tensor.float() for key, tensor in sd15.unet().items()})
    unet.add_adapter(
        peft.LoraConfig(
            r=3, lora_alpha=5, init_lora_weights=False, target_modules=["to_q", "to_out.0", "conv1", "proj_in"]
        )
    )
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, get_peft_model_state_dict(unet), safe_serialization=True,
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )  # fmt: skip
    fitted = open_lora(tmp_path / "pytorch_lora_weights.safetensors").fit(sd15)
    ours = fitted.apply("unet", {key: tensor.float() for key, tensor in sd15.unet().items()}, 0.7)
    unet.fuse_lora(lora_scale=0.7)
    unet.unload_lora()
    theirs = unet.state_dict()
    assert ours.keys() == theirs.keys() and fitted.layers
    for key in ours:
        assert torch.allclose(ours[key], theirs[key], atol=1e-6), key
