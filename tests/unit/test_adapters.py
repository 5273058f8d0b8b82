"""LoHa, LoKr and DoRA: values by hand on linear layers and convolutions; SDXL; baked in; what trains them as oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dmm_core import adapters
from dmm_core.checkpoint import Checkpoint, open_checkpoint
from dmm_core.lora import open_lora
from dmm_core.lora_teacher import lora_teacher
from dmm_core.merge_files import merge_files
from dmm_core.merge_recipe import merge_recipe_from_dict
from tests.unit import tiny

TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"
FC1 = "text_model.encoder.layers.0.mlp.fc1"
Q_PROJ = "text_model.encoder.layers.0.self_attn.q_proj"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def sd15(tmp_path_factory) -> Checkpoint:
    path = tmp_path_factory.mktemp("bäse") / "sd15.safetensors"
    return open_checkpoint(tiny.write_tiny(path, vocab=200, dtype=torch.float32))


def fitted(folder: Path, ck: Checkpoint, layer: str, **roles: Tensor):
    name = "lora_unet_" + layer.replace(".", "_")
    path = folder / "l.safetensors"
    save_file({f"{name}.{role}": tensor.contiguous() for role, tensor in roles.items()}, path)
    return open_lora(path).fit(ck)


# ---------------------------------------------------------------- by hand


def test_loha_multiplies_two_products(sd15, tmp_path):
    w1_a, w1_b, w2_a, w2_b = normal(64, 3), normal(3, 64, seed=1), normal(64, 3, seed=2), normal(3, 64, seed=3)
    roles = {"hada_w1_a": w1_a, "hada_w1_b": w1_b, "hada_w2_a": w2_a, "hada_w2_b": w2_b, "alpha": torch.tensor(1.5)}
    delta = fitted(tmp_path, sd15, TO_Q, **roles).delta("unet", TO_Q + ".weight", 0.8)
    first = sum(w1_a[7, r] * w1_b[r, 11] for r in range(3))
    second = sum(w2_a[7, r] * w2_b[r, 11] for r in range(3))
    assert delta[7, 11] == pytest.approx(0.8 * 1.5 / 3 * float(first * second), rel=1e-5)


def test_loha_with_middle_factors(sd15, tmp_path):
    """Factors of a convolution's channels stand the other way round: (rank, out) and (rank, in)."""
    parts = {f"hada_w{i}_{side}": normal(2, 64, seed=10 * i + ord(side)) for i in (1, 2) for side in "ab"}
    parts |= {f"hada_t{i}": normal(2, 2, 3, 3, seed=i) for i in (1, 2)}
    delta = fitted(tmp_path, sd15, CONV, **parts).delta("unet", CONV + ".weight").reshape(64, 64, 3, 3)
    both = [
        sum(parts[f"hada_t{i}"][p, q, 2, 0] * parts[f"hada_w{i}_a"][p, 5] * parts[f"hada_w{i}_b"][q, 9]
            for p in range(2) for q in range(2)) for i in (1, 2)
    ]  # fmt: skip
    assert delta[5, 9, 2, 0] == pytest.approx(float(both[0] * both[1]), rel=1e-4)


def test_lokr_is_a_kronecker_product(sd15, tmp_path):
    w1, w2 = normal(4, 8), normal(16, 8, seed=1)
    delta = fitted(tmp_path, sd15, TO_Q, lokr_w1=w1, lokr_w2=w2, alpha=torch.tensor(7.0)).delta(
        "unet", TO_Q + ".weight"
    )
    assert delta[2 * 16 + 5, 3 * 8 + 1] == pytest.approx(float(w1[2, 3] * w2[5, 1]), rel=1e-6), "alpha does not count"


@pytest.mark.parametrize("middle", [False, True])
def test_lokr_of_low_rank_on_a_convolution(sd15, tmp_path, middle):
    w1_a, w1_b = normal(8, 2), normal(2, 8, seed=1)
    roles = {"lokr_w1_a": w1_a, "lokr_w1_b": w1_b, "alpha": torch.tensor(1.0)}
    if middle:
        t2, w2_a, w2_b = normal(2, 2, 3, 3, seed=2), normal(2, 8, seed=3), normal(2, 8, seed=4)
        roles |= {"lokr_t2": t2}
        right = sum(t2[p, q, 1, 2] * w2_a[p, 3] * w2_b[q, 6] for p in range(2) for q in range(2))
    else:
        w2_a, w2_b = normal(8, 2, seed=3), normal(2, 8 * 9, seed=4)
        right = sum(w2_a[3, r] * w2_b.reshape(2, 8, 3, 3)[r, 6, 1, 2] for r in range(2))
    delta = fitted(tmp_path, sd15, CONV, lokr_w2_a=w2_a, lokr_w2_b=w2_b, **roles).delta("unet", CONV + ".weight")
    left = sum(w1_a[4, r] * w1_b[r, 7] for r in range(2))
    made = delta.reshape(64, 64, 3, 3)[4 * 8 + 3, 7 * 8 + 6, 1, 2]
    assert made == pytest.approx(0.5 * float(left * right), rel=1e-4)


@pytest.mark.parametrize("layer", [TO_Q, CONV])
@pytest.mark.parametrize("axis", ["out", "in", "peft"])
def test_dora_sets_the_norms_of_the_changed_weight(sd15, tmp_path, layer, axis):
    key = layer + ".weight"
    weight = sd15.tensor("unet", key)
    out, into, *kernel = weight.shape
    ones = [1] * len(kernel)
    down, up = normal(2, into, *kernel), normal(out, 2, *ones, seed=1)
    norms = {"out": (out, 1, *ones), "in": (1, into, *ones), "peft": (1, out, *ones) if kernel else (out,)}[axis]
    magnitudes = 1 + normal(*norms, seed=2).abs()
    role = "lora_magnitude_vector" if axis == "peft" else "dora_scale"
    lora = fitted(tmp_path, sd15, layer, **{"lora_down.weight": down, "lora_up.weight": up, role: magnitudes})
    assert lora.needs_weight("unet", key)
    changed = weight + lora.delta("unet", key, 1.0, weight).reshape(weight.shape)
    others = tuple(d for d in range(weight.dim()) if d != int(axis == "in"))
    lengths = torch.linalg.vector_norm(changed, dim=others)
    assert torch.allclose(lengths, magnitudes.flatten(), rtol=1e-4)
    plain = weight + (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    shrunk = plain * (magnitudes.flatten() / torch.linalg.vector_norm(plain, dim=others)).reshape(
        [-1 if d == int(axis == "in") else 1 for d in range(weight.dim())]
    )
    assert torch.allclose(changed, shrunk, atol=1e-5), "the direction is the change's"
    half = lora.delta("unet", key, 0.5, weight)
    assert torch.allclose(half.reshape(weight.shape), (changed - weight) / 2, atol=1e-6)


def test_forms():
    assert adapters.complete({"down", "up", "alpha"}) and adapters.complete({"lokr_w1", "lokr_w2_a", "lokr_w2_b"})
    assert adapters.complete({"down", "alpha"}) is False and adapters.complete({"hada_w1_a"}) is False
    assert adapters.complete({"down", "up", "hada_w1_a"}) is None and adapters.complete({"lokr_w1", "mid"}) is None
    assert not adapters.complete({"down", "up", "dora_scale", "magnitude"})


# ---------------------------------------------------------------- whole files


def test_teacher_and_merge_of_sdxl_agree(tmp_path):
    """A mixed file for UNet and both text encoders, DoRA also where the file stores a tensor stacked or transposed."""
    path = tiny.write_tiny(tmp_path / "xl.safetensors", family="sdxl", vocab=200, dtype=torch.float32)
    ck = open_checkpoint(path)
    k = "mid_block.attentions.0.transformer_blocks.1.attn2.to_k"  # 128, 128
    names = {"unet": f"lora_unet_{k}", "loha": f"lora_te1_{FC1}", "lokr": f"lora_te2_{Q_PROJ}",
             "dora": "lora_te2_text_projection"}  # fmt: skip
    names = {what: name.replace(".", "_") for what, name in names.items()}
    tensors = {f"{names['unet']}.lora_down.weight": normal(2, 128), f"{names['unet']}.lora_up.weight": normal(128, 2)}
    tensors |= {f"{names['unet']}.dora_scale": 1 + normal(128, 1).abs()}
    for part, shape in (("w1_a", (128, 2)), ("w1_b", (2, 64)), ("w2_a", (128, 2)), ("w2_b", (2, 64))):
        tensors[f"{names['loha']}.hada_{part}"] = normal(*shape, seed=ord(part[3]))
    tensors |= {f"{names['lokr']}.lokr_w1": normal(8, 8), f"{names['lokr']}.lokr_w2": normal(8, 8, seed=1)}
    tensors |= {f"{names['dora']}.lora_down.weight": normal(2, 64), f"{names['dora']}.lora_up.weight": normal(64, 2)}
    tensors |= {f"{names['dora']}.dora_scale": 1 + normal(1, 64).abs()}
    save_file(tensors, tmp_path / "mixed.safetensors")
    teacher = lora_teacher(tmp_path / "mixed.safetensors", ck, 0.7)
    spec = {"path": str(tmp_path / "mixed.safetensors"), "strength": 0.7}
    data = {"models": [str(path)], "loras": [spec], "out": str(tmp_path / "baked.safetensors")}
    baked = open_checkpoint(merge_files(merge_recipe_from_dict(data)))
    pairs = [(teacher.unet(), baked.unet(), ck.unet())]
    pairs += [(teacher.text_encoder(i), baked.text_encoder(i), ck.text_encoder(i)) for i in (0, 1)]
    for mine, theirs, plain in pairs:
        for key in plain:
            torch.testing.assert_close(mine[key], theirs[key], rtol=1e-6, atol=1e-6)
    changed = sum(not torch.equal(mine[key], plain[key]) for mine, _, plain in pairs for key in plain)
    assert changed == 4


def test_two_loras_are_baked_one_after_the_other(sd15, tmp_path):
    """DoRA normalises what the LoRA before it has made, as in ComfyUI."""
    name = "lora_unet_" + TO_Q.replace(".", "_")
    plain = {f"{name}.lora_down.weight": normal(2, 64), f"{name}.lora_up.weight": normal(64, 2)}
    save_file(plain, tmp_path / "a.safetensors")
    save_file(plain | {f"{name}.dora_scale": 1 + normal(64, 1).abs()}, tmp_path / "b.safetensors")
    loras = [{"path": str(tmp_path / f"{which}.safetensors")} for which in "ab"]
    data = {"models": [str(sd15.path)], "loras": loras, "out": str(tmp_path / "baked.safetensors")}
    baked = open_checkpoint(merge_files(merge_recipe_from_dict(data))).unet()
    first, second = (open_lora(spec["path"]).fit(sd15) for spec in loras)
    expected = second.apply("unet", first.apply("unet", sd15.unet()))
    torch.testing.assert_close(baked[TO_Q + ".weight"], expected[TO_Q + ".weight"])


# ---------------------------------------------------------------- oracles


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algo", "tucker", "dora"),
    [("lora", True, None), ("lora", False, "out"), ("loha", False, None), ("loha", True, "in"), ("lokr", False, "out"),
     ("lokr", True, None)],
)  # fmt: skip
def test_lycoris_makes_the_same_model(sd15, tmp_path, algo, tucker, dora):
    """Random weights that LyCORIS itself put into diffusers' UNet and saved. What it trains is its forward pass."""
    lycoris = pytest.importorskip("lycoris")
    from dmm_core.models import build_unet

    def unet(tensors):
        return build_unet(sd15.unet_config, tensors, torch.float32, sd15.path, styled=False)

    torch.manual_seed(0)
    theirs = unet(sd15.unet())
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Attention", "ResnetBlock2D"]})
    net = lycoris.create_lycoris(
        theirs, 1.0, linear_dim=3, linear_alpha=2, conv_dim=2, conv_alpha=1, algo=algo, use_tucker=tucker,
        factor=8, decompose_both=True, dora_wd=dora is not None, wd_on_output=dora == "out",
    )  # fmt: skip
    net.apply_to()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "dora" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            else:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    net.save_weights(str(tmp_path / "l.safetensors"), torch.float32, {})
    lora = open_lora(tmp_path / "l.safetensors").fit(sd15)
    assert len(lora.layers) > 15 and any(key.endswith("conv1.weight") for _, key in lora.layers)
    ours = unet(lora.apply("unet", sd15.unet()))
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([20, 800]), torch.randn(2, 77, 64)
    with torch.no_grad():
        told, plain = ours(x, t, context).sample, unet(sd15.unet())(x, t, context).sample
        torch.testing.assert_close(told, theirs(x, t, context).sample, rtol=1e-3, atol=1e-3)
    assert (told - plain).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dora", "loha", "lokr"])
def test_peft_makes_the_same_model(sd15, tmp_path, kind):
    peft = pytest.importorskip("peft")
    from dmm_core.models import build_unet

    torch.manual_seed(0)
    unet = build_unet(sd15.unet_config, sd15.unet(), torch.float32, sd15.path, styled=False)
    targets = {"target_modules": ["to_q", "to_out.0", "conv1", "proj_in"]}
    config = {
        "dora": lambda: peft.LoraConfig(r=3, lora_alpha=3, use_dora=True, init_lora_weights=False, **targets),
        "loha": lambda: peft.LoHaConfig(r=3, alpha=3, init_weights=False, use_effective_conv2d=True, **targets),
        "lokr": lambda: peft.LoKrConfig(r=3, alpha=3, init_weights=False, use_effective_conv2d=True, **targets),
    }[kind]()
    model = peft.get_peft_model(unet, config)
    state = peft.get_peft_model_state_dict(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "l.safetensors")
    lora = open_lora(tmp_path / "l.safetensors").fit(sd15)
    ours = lora.apply("unet", sd15.unet())
    theirs = model.merge_and_unload().state_dict()
    assert len(lora.layers) > 8
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
