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

from dmm_core import fused
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
            fused.fuse(unet)
        told.append(gradients(unet))
        names.append(list(unet.state_dict()))
        del unet
    assert names[0] == names[1] and len(told[0]) > len(names[0])
    for mine, theirs in zip(*told, strict=True):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm() + 1e-7


def test_every_norm_between_convolutions_is_taken_over():
    unet = build_unet(tiny.unet_config("sd15"), tiny.unet("sd15"), torch.float32, Path("tiny"), styled=True)
    fused.fuse(unet)
    norms = [module for module in unet.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert norms and all(isinstance(norm, fused.Norm) for norm in norms)
    assert not any(
        isinstance(module, torch.nn.SiLU) and name != "time_embedding.act" for name, module in unet.named_modules()
    )
