"""Kinds of models, and what else patches them, checked on latents in ComfyUI's own process; run by test_laws.py.

DMM_COMFYUI=… DMM_COMFYUI_PYTHON=… "$DMM_COMFYUI_PYTHON" -m pytest -m hosts tests/hosts/comfyui/inside_models.py
"""

from __future__ import annotations

import pytest
import torch

from tests.hosts.comfyui.harness import NAMES, ROOT
from tests.hosts.comfyui.inside_tools import (
    STEPS,
    apart,
    config_of,
    counted,
    encode,
    random_unet,
    sample,
    style,
    write_dmm,
    write_sdxl,
)

pytestmark = pytest.mark.hosts


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_default_is_what_the_stock_loader_shows(pack, tmp_path, prediction):
    """A file of SD1.5's width and little depth, which stock ComfyUI loads too: difference 0.0."""
    import comfy.sd

    path = write_dmm(
        tmp_path / "wide.safetensors", random_unet(config_of([320], 768)), text_encoders=[],
        prediction_type=prediction,
    )  # fmt: skip
    with torch.inference_mode():
        ours = pack.loading.load(path)
        stock = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=True, output_clip=False)
    text = [[torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(2)), {}]]
    a = sample(ours[0], text, text, steps=2, cfg=1.0)
    assert torch.isfinite(a).all()
    if prediction == "epsilon":
        assert apart(a, sample(stock[0], text, text, steps=2, cfg=1.0)) == 0
        with torch.inference_mode():
            assert apart(ours[2].decode(a), stock[2].decode(a)) == 0
    else:  # the stock loader takes every SD1.5 file for epsilon
        assert ours[0].model.model_type.name == "V_PREDICTION"
    with pytest.raises(ValueError, match="it holds no CLIP"):
        ours[1].tokenize("a cat")
    assert apart(a, sample(pack.host.apply(ours[0], style(pack, ours, "ink")), text, text, steps=2, cfg=1.0)) > 1e-3


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_authors_diffusers_layout(pack, tmp_path, family):
    """A bare UNet in diffusers' names with the codebook inside, as published; SDXL's style MLP is add_embedding2."""
    from dmm_core.checkpoint import open_checkpoint
    from dmm_core.checkpoint.writer import write_safetensors
    from dmm_core.style import Codebook

    sdxl = family == "sdxl"
    config = config_of([64, 128], 64, family, adm=1536 + 64) if sdxl else None
    base = open_checkpoint(ROOT / "mini_family" / "weights" / "base.safetensors")
    unet = random_unet(config) if sdxl else base.unet()
    codebook = Codebook(NAMES, 256)
    torch.nn.init.normal_(codebook.add_embedding.linear_2.weight, std=0.1)
    styles = {k.replace("add_embedding.", "add_embedding2." if sdxl else "add_embedding."): v.detach()
              for k, v in codebook.state_dict().items()}  # fmt: skip
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    write_safetensors(path, {**unet, **styles}, {})
    with torch.inference_mode():
        model, _, vae, book = pack.loading.load(path)
    assert len(book.names) == len(NAMES)
    text = [[torch.randn(1, 77, 64), {"pooled_output": torch.randn(1, 64)}]]
    one = pack.values.named(book, book.names[0], 1.0)
    live = sample(pack.host.apply(model, one), text, text, steps=2)
    assert torch.isfinite(live).all()
    assert apart(live, sample(pack.host.bake(model, one), text, text, steps=2)) < 2e-4
    assert apart(live, sample(model, text, text, steps=2)) > 1e-3
    with pytest.raises(ValueError, match="it holds no VAE"):
        vae.decode(live)


def test_sdxl_with_both_text_encoders(pack, tmp_path):
    """A tiny SDXL: both encoders, pooled output and sizes through ComfyUI's own code; live ≡ bake, one call a step."""
    path = write_sdxl(tmp_path / "xl.safetensors")
    with torch.inference_mode():
        model, clip, vae, book = pack.loading.load(path)
        prompt, empty = encode(clip, "a cat"), encode(clip, "")
    assert prompt[0][0].shape == (1, 77, 128) and prompt[0][1]["pooled_output"].shape == (1, 64)
    one = pack.values.named(book, "ink", 1.0)
    clone, calls = counted(pack.host.apply(model, one))
    live = sample(clone, prompt, empty)
    assert calls == [2] * STEPS and torch.isfinite(live).all()
    rounding = 1e-5 * live.abs().max().item()  # an untrained SDXL's latents grow beyond 100
    assert apart(live, sample(pack.host.bake(model, one), prompt, empty)) < rounding
    assert apart(live, sample(model, prompt, empty)) > 100 * rounding
    said = sample(model, pack.host.condition(prompt, one), pack.host.condition(empty, one))
    assert apart(live, said) < 2e-4
    with torch.inference_mode():
        assert vae.decode(live).shape == (1, 64, 64, 3)


def test_controlnet_never_gets_the_style(pack, loaded):
    """A ControlNet of ComfyUI's own class gives the same whatever the model's style, and acts on the picture."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops

    model, clip = loaded[:2]
    text, empty = encode(clip, "a cat"), encode(clip, "")
    config = {k: v for k, v in model.model.model_config.unet_config.items() if k not in ("out_channels", "num_classes")}
    config |= {"hint_channels": 3, "operations": comfy.ops.disable_weight_init}
    net = comfy.cldm.cldm.ControlNet(**config)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    outputs = []
    net.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    control = comfy.controlnet.ControlNet(net, compression_ratio=8)

    def run(name):
        outputs.clear()
        held = control.copy().set_cond_hint(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)), 1.0)
        conds = [[cond, {**about, "control": held, "control_apply_to_uncond": True}] for cond, about in text]
        latents = sample(pack.host.apply(model, style(pack, loaded, name)), conds, empty, steps=1)
        return latents, [tensor.clone() for part in outputs[0].values() for tensor in part if tensor is not None]

    (ink, first), (clay, second) = run("ink"), run("clay")
    assert first and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert apart(ink, clay) > 0.05
    bare = sample(pack.host.apply(model, style(pack, loaded, "ink")), text, empty, steps=1)
    assert apart(ink, bare) > 1e-3, "the ControlNet acts"


def test_lora_and_merge_in_any_order(pack, loaded):
    """A weight patch before or after the style is the same; a merge with another model keeps the first one's style."""
    model, clip = loaded[:2]
    text, empty = encode(clip, "a cat"), encode(clip, "")
    key = "diffusion_model.middle_block.0.in_layers.2.weight"
    change = torch.randn(model.model.state_dict()[key].shape, generator=torch.Generator().manual_seed(1)) * 0.1

    def lora(patcher):
        clone = patcher.clone()
        clone.add_patches({key: ("diff", (change,))}, 0.7)
        return clone

    ink = style(pack, loaded, "ink")
    before = sample(pack.host.apply(lora(model), ink), text, empty)
    assert apart(before, sample(lora(pack.host.apply(model, ink)), text, empty)) == 0
    assert apart(before, sample(pack.host.apply(model, ink), text, empty)) > 1e-3
    merged = pack.host.apply(model, ink).clone()
    for name, patch in lora(model).get_key_patches("diffusion_model.").items():
        merged.add_patches({name: patch}, 0.0, 1.0)  # as ModelMergeSimple does, with all of model 1
    assert apart(sample(merged, text, empty), sample(pack.host.apply(model, ink), text, empty)) < 1e-4


def test_attention_patch_beside_a_style(pack, loaded):
    """A patch of the IP-Adapter kind sees every call, and acts as it does on baked weights."""
    model, clip = loaded[:2]
    text, empty = encode(clip, "a cat"), encode(clip, "")
    seen = []

    def patch(q, k, v, extra):
        seen.append(extra["cond_or_uncond"])
        return q, k * 0.5, v

    def patched(patcher):
        clone = patcher.clone()
        clone.set_model_attn2_patch(patch)
        return clone

    ink = style(pack, loaded, "ink")
    live = sample(patched(pack.host.apply(model, ink)), text, empty)
    assert seen and all(rows == [1, 0] or rows == [0, 1] for rows in seen)
    assert apart(live, sample(patched(pack.host.bake(model, ink)), text, empty)) < 2e-4
    assert apart(live, sample(pack.host.apply(model, ink), text, empty)) > 1e-3
