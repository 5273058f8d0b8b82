"""Norms and gated units in one pass say what torch's say, and so do their gradients.

The kernels run on a GPU where there is one, else in Triton's interpreter where that is (``pip install triton``).
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dmm_core import fused, layers
from dmm_core.conditioning import Context, predict
from dmm_core.losses import BlockFeatures
from dmm_core.models import build_unet
from tests.unit import tiny

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are imported
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")


@needs_triton
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("channels", "groups", "height", "width"), [(80, 8, 12, 17), (64, 16, 1, 1), (96, 4, 3, 5)])
def test_norm_and_its_gradients(silu, dtype, channels, groups, height, width):
    x = (3 + 2 * torch.randn(2, channels, height, width)).to(memory_format=torch.channels_last).to(dtype)
    weight, bias = 1 + 0.3 * torch.randn(channels), torch.randn(channels)
    x, weight, bias, dy = (part.to(DEVICE) for part in (x, weight, bias, torch.randn(2, channels, height, width)))
    told = []
    for ours in (True, False):
        inputs = [tensor.detach().clone().requires_grad_() for tensor in (x, weight, bias)]
        if ours:
            y = fused.GroupNormSiLU.apply(*inputs, groups, 1e-5, silu)
            assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
        else:  # in float64
            y = F.group_norm(inputs[0].double(), groups, inputs[1].double(), inputs[2].double(), 1e-5)
            y = F.silu(y) if silu else y
        y.backward(dy.to(y.dtype))
        told.append([y.detach().double(), *(tensor.grad.double() for tensor in inputs)])
    for mine, theirs in zip(*told, strict=True):
        assert (mine - theirs).norm() <= (1e-2 if dtype == torch.bfloat16 else 1e-5) * theirs.norm() + 1e-6


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shift_before_the_norm_and_its_gradients(dtype):
    """Of a size that several programs share, and that fills none of them."""
    shapes = ((2, 96, 13, 11), (96,), (96,), (2, 96), (2, 96, 13, 11))
    x, weight, bias, shift, dy = (torch.randn(*shape).to(DEVICE) for shape in shapes)
    x = x.to(dtype, memory_format=torch.channels_last)
    told = []
    for ours in (True, False):
        inputs = [part.detach().clone().requires_grad_() for part in (x, weight, bias, shift)]
        if ours:
            y = fused.GroupNormSiLU.apply(*inputs[:3], 4, 1e-5, True, inputs[3])
        else:
            map_, *rest, added = (part.double() for part in inputs)
            y = F.silu(F.group_norm(map_ + added[:, :, None, None], 4, *rest, 1e-5))
        y.backward(dy.to(y.dtype))
        told.append([y.detach().double(), *(part.grad.double() for part in inputs)])
    for mine, theirs in zip(*told, strict=True):
        assert (mine - theirs).norm() <= (1e-2 if dtype == torch.bfloat16 else 1e-5) * theirs.norm() + 1e-6


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "channels"), [((3, 50), 40), ((2, 700), 96), ((1,), 1280)])
def test_layer_norm_and_its_gradients(monkeypatch, dtype, rows, channels):
    monkeypatch.setattr(fused, "PROGRAMS", 8)  # each has several rows to do
    x, dy = torch.randn(2, *rows, channels).to(DEVICE).unbind()
    weight, bias = (torch.randn(channels).to(DEVICE, dtype) for _ in range(2))
    told = []
    for ours in (True, False):
        inputs = [part.detach().to(dtype).requires_grad_() for part in (x, weight, bias)]
        double = [part.double() for part in inputs]
        y = fused.RowNorm.apply(*inputs, 1e-5) if ours else F.layer_norm(double[0], (channels,), *double[1:], 1e-5)
        y.backward(dy.to(y.dtype))
        told.append([y.detach().double(), *(part.grad.double() for part in inputs)])
    for mine, theirs in zip(*told, strict=True):
        assert (mine - theirs).norm() <= (2e-2 if dtype == torch.bfloat16 else 1e-5) * theirs.norm() + 1e-6


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_s_sum_and_its_gradients(dtype):
    x, h = (torch.randn(3, 80, 9, 17).to(DEVICE, dtype, memory_format=torch.channels_last) for _ in range(2))
    bias, dy = torch.randn(80).to(DEVICE, dtype), torch.randn(3, 80, 9, 17).to(DEVICE)
    inputs = [part.requires_grad_() for part in (x, h, bias)]
    y = fused.Plus.apply(*inputs)
    assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == dtype
    y.backward(dy.to(dtype))
    wanted = x.double() + h.double() + bias.double()[:, None, None]
    close = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert (y - wanted).norm() <= close * wanted.norm()
    for part, theirs in ((x, dy), (h, dy), (bias, dy.sum((0, 2, 3)))):
        assert (part.grad - theirs).norm() <= close * theirs.norm()


@needs_triton
def test_values_far_from_zero_keep_their_variance():
    x = (1000 + torch.randn(1, 32, 8, 8, device=DEVICE)).to(memory_format=torch.channels_last)
    ones, zeros = torch.ones(32, device=DEVICE), torch.zeros(32, device=DEVICE)
    y = fused.GroupNormSiLU.apply(x, ones, zeros, 4, 1e-5, False)
    wanted = F.group_norm(x.double(), 4)
    assert (y - wanted).norm() < 1e-3 * wanted.norm()


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_unit_and_its_gradient(dtype):
    x, dy = torch.randn(3, 7, 2 * 50).to(DEVICE, dtype), torch.randn(3, 7, 50).to(DEVICE)
    told = []
    for ours in (True, False):
        given = x.detach().clone().requires_grad_()
        value, gate = given.double().chunk(2, -1)
        y = fused.Gated.apply(given) if ours else value * F.gelu(gate)
        y.backward(dy.to(y.dtype))
        told.append([y.detach().double(), given.grad.double()])
    for mine, theirs in zip(*told, strict=True):
        assert (mine - theirs).norm() <= (1e-2 if dtype == torch.bfloat16 else 1e-6) * theirs.norm()


def gradients(unet) -> list[torch.Tensor]:
    """What a UNet says, its blocks' outputs, and the gradients of its weights."""
    generator = torch.Generator().manual_seed(1)
    width = unet.config.cross_attention_dim
    x, tokens = (torch.randn(*shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 77, width)))
    pooled = None
    if unet.config.addition_embed_type:
        beside = 6 * unet.config.addition_time_embed_dim
        pooled = torch.randn(2, unet.config.projection_class_embeddings_input_dim - beside, generator=generator)
    style = torch.zeros(2, unet.time_embedding.linear_2.out_features)
    x, tokens, style, t = (part.to(DEVICE) for part in (x, tokens, style, torch.tensor([5, 800])))
    context = Context(tokens, pooled).to(DEVICE)
    with BlockFeatures(unet) as blocks:
        said = predict(unet, x, t, context, style)
    told = [said, *blocks.take()]
    sum(part.square().mean() for part in told).backward()
    return [part.detach() for part in told] + [p.grad for p in unet.parameters()]


@pytest.mark.parametrize("how", ["torch's", pytest.param("kernels", marks=needs_triton)])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_whole_unet_says_the_same(monkeypatch, how, family, checkpointing):
    monkeypatch.setattr(fused, "works", lambda device: how == "kernels")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    told, names = [], []
    for ours in (True, False):
        unet = build_unet(tiny.unet_config(family), tiny.unet(family), torch.float32, Path("tiny"), styled=True)
        unet.to(DEVICE, memory_format=torch.channels_last).requires_grad_(True).train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        if ours:
            layers.fuse(unet)
        told.append(gradients(unet))
        names.append(list(unet.state_dict()))
        del unet
    assert names[0] == names[1] and len(told[0]) > len(names[0])
    for mine, theirs in zip(*told, strict=True):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm() + 1e-7


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_no_map_is_turned_over(family):
    """Each block's output has the channels last, whatever kind of block it is: a turned map would have to be copied."""
    unet = build_unet(tiny.unet_config(family), tiny.unet(family), torch.float32, Path("tiny"), styled=True)
    layers.fuse(unet.to(DEVICE, memory_format=torch.channels_last).requires_grad_(True).train())
    seen = []
    for module in unet.modules():
        if type(module).__name__ in ("ResnetBlock2D", "Transformer2DModel", "Conv2d", "Conv", "Norm"):
            module.register_forward_hook(
                lambda module, inputs, output: seen.append(output[0] if isinstance(output, tuple) else output)
            )
    gradients(unet)
    maps = [output for output in seen if output.ndim == 4]
    assert len(maps) > 20 and all(layers.is_channels_last(output) for output in maps)


def test_every_norm_between_convolutions_is_taken_over():
    unet = build_unet(tiny.unet_config("sd15"), tiny.unet("sd15"), torch.float32, Path("tiny"), styled=True)
    layers.fuse(unet)
    norms = [module for module in unet.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert norms and all(isinstance(norm, layers.Norm) for norm in norms)
    assert not any(
        type(module) in (torch.nn.LayerNorm, torch.nn.GroupNorm) or type(module).__name__ == "AttnProcessor2_0"
        for module in unet.modules()
    )
