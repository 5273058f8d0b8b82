"""A low-rank student: the folded UNet is the live one, only adapters and codebook learn, and only they are saved."""

from __future__ import annotations

import pytest
import torch

from dmm_core.checkpoint import open_checkpoint
from dmm_core.conditioning import Context
from dmm_core.lowrank import FASTER, LowRank
from dmm_core.models import build_unet
from tests.unit.merges import built, tiny_teachers


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    return tiny_teachers(tmp_path_factory.mktemp("teachers"), 2)


@pytest.mark.parametrize(
    "layer",
    [torch.nn.Linear(10, 6), torch.nn.Conv2d(5, 7, 3, stride=2, padding=1), torch.nn.Conv2d(4, 4, 1)],
    ids=["linear", "convolution", "1x1"],
)
@torch.no_grad()
def test_a_layer_beside_is_a_layer_with_the_change_in_it(layer):
    adapter = LowRank(layer, 3, torch.Generator().manual_seed(0))
    x = torch.randn(2, 10) if isinstance(layer, torch.nn.Linear) else torch.randn(2, layer.in_channels, 8, 8)
    assert not adapter(x).any(), "starts at zero"
    adapter.up.normal_()
    live = layer(x) + adapter(x)
    layer.weight += adapter.delta()
    torch.testing.assert_close(layer(x), live, rtol=1e-5, atol=1e-5)


def test_rank_is_at_most_the_layer_s():
    assert LowRank(torch.nn.Linear(10, 6), 64, torch.Generator()).down.shape == (6, 10)
    with pytest.raises(ValueError, match="grouped"):
        LowRank(torch.nn.Conv2d(4, 4, 3, groups=2), 2, torch.Generator())


def test_folded_is_live_through_the_file(tmp_path, teachers):
    """After training: the student with its hooks, and the DMM file that any host reads."""
    distillation = built(tmp_path / "o.safetensors", teachers, student="lora", rank=4, lr=1e-3, ema=0.5, feature=0.1)
    frozen = {key: value.clone() for key, value in distillation.student.unet.state_dict().items()}
    losses = [distillation.step().loss for _ in range(6)]
    assert losses[-1] < losses[0]
    distillation.use_average()
    student = distillation.student
    assert all(torch.equal(value, frozen[key]) for key, value in student.unet.state_dict().items())
    assert torch.equal(student.adapters.layers["conv_in"].up, distillation.average[1])
    like = open_checkpoint(teachers[0])
    path = student.save(tmp_path / "dmm.safetensors", like, torch.float32)
    read = open_checkpoint(path)
    unet = build_unet(read.unet_config, read.unet(), torch.float32, path, styled=True)
    x, context = torch.randn(2, 4, 8, 8), Context(torch.randn(2, 77, 64))
    t, styles = torch.tensor([10, 700]), torch.tensor([[1.0, 0.0], [0.3, 0.7]])
    with torch.no_grad():
        live = student(x, t, context, styles)
        folded = unet(x, t, context.tokens, class_labels=read.codebook()(styles)).sample
        student.adapters.layers["conv_in"].up.zero_()
        without = student(x, t, context, styles)
    torch.testing.assert_close(folded, live, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(live, without, atol=1e-3)


def test_adapters_learn_faster_than_a_whole_unet(tmp_path, teachers):
    """And the codebook as it does beside a whole one, whatever the optimizer's economy."""
    for more in ({}, {"fused_backward": True}):
        full, low = (
            built(tmp_path / "o.safetensors", teachers, student=kind, style_lr=0.5, **more) for kind in ("full", "lora")
        )
        rates = [
            {group["peak"] for optimizer in run.optimizer.optimizers for group in optimizer.param_groups}
            for run in (full, low)
        ]
        assert rates == [{1e-3, 0.5}, {FASTER * 1e-3, 0.5}]


def test_the_state_holds_what_learns(tmp_path, teachers):
    full = built(tmp_path / "o.safetensors", teachers)
    low = built(tmp_path / "o.safetensors", teachers, student="lora", rank=2)
    keys = [key for key in low.state()[0] if key.startswith("student.")]
    assert any("adapters" in key for key in keys) and any("codebook" in key for key in keys)
    assert not any(key.startswith("student.unet") for key in keys)
    size = lambda run: sum(t.numel() * t.element_size() for t in run.state()[0].values())  # noqa: E731
    assert size(low) < size(full) / 5
