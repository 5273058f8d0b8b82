"""Teachers whose blocks pass over the device one after the other say what teachers say that stay."""

from __future__ import annotations

import pytest
import torch

from dmm_core import teachers
from dmm_core.checkpoint import open_checkpoint
from dmm_core.conditioning import Context, predict
from dmm_core.models import build_unet
from dmm_core.streaming import PLACES, blocks_in_order, passes_over
from dmm_core.teachers import Teachers
from tests.unit.merges import built, tiny_teachers

ORDER = (0, 1, 1, 0, 2)


@pytest.fixture
def streams(monkeypatch):
    """As if the CPU had memory of its own."""
    monkeypatch.setattr(teachers, "STREAMS", ("cpu", "cuda"))


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def checkpoints(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp(request.param)
    return [open_checkpoint(path) for path in tiny_teachers(folder, 3, request.param)]


def predictions(asked: Teachers) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    width = asked.checkpoints[0].unet_config["cross_attention_dim"]
    pooled = torch.randn(3, 64, generator=generator) if asked.checkpoints[0].family == "sdxl" else None
    asked._embeddings = dict.fromkeys(range(3), Context(torch.randn(3, 77, width, generator=generator), pooled))
    x, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([10, 700])
    asked.expect(ORDER)
    told = (asked.predict(i, x, t, torch.tensor([0, 2]), features=True, layers=True) for i in ORDER)
    return [part for eps, blocks, layers in told for part in (eps, *blocks, *layers)]


@pytest.mark.parametrize("channels_last", [False, True])
def test_they_say_the_same(streams, checkpoints, channels_last):
    stay, pass_over = (Teachers(checkpoints, resident=n, channels_last=channels_last) for n in (3, 0))
    for a, b in zip(predictions(stay), predictions(pass_over), strict=True):
        assert torch.equal(a, b)
    (slot,) = pass_over._unets.values()
    held = sum(p.numel() for key, p in slot.unet.named_parameters() if not passes_over(key))
    assert slot.places.numel() + 4 * held < 0.7 * sum(4 * p.numel() for p in slot.unet.parameters())
    assert not any(p.is_meta for p in slot.unet.parameters())


def test_blocks_come_before_they_work(streams, checkpoints):
    """In the order of ``blocks_in_order``: otherwise a block would be brought when it is asked."""
    first = checkpoints[0]
    unet = build_unet(first.unet_config, first.unet(), torch.float32, first.path, styled=False)
    blocks, seen = list(blocks_in_order(unet)), []
    assert len(blocks) > PLACES
    for block in blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(module))
    width = first.unet_config["cross_attention_dim"]
    pooled = torch.zeros(1, 64) if first.family == "sdxl" else None
    predict(unet, torch.zeros(1, 4, 8, 8), torch.tensor([1]), Context(torch.zeros(1, 77, width), pooled))
    assert seen == blocks
    inside = {p for block in blocks for p in block.parameters()}
    assert {key for key, p in unet.named_parameters() if p in inside} == {
        key for key in unet.state_dict() if passes_over(key)
    }


def test_it_may_begin_and_end_in_mid_run(streams, checkpoints):
    expected = predictions(Teachers(checkpoints))
    asked = Teachers(checkpoints, resident=2)
    for resident in (2, 0, 1, 0):
        asked.keep(resident)
        assert all(torch.equal(a, b) for a, b in zip(expected, predictions(asked), strict=True))


def test_elsewhere_one_teacher_stays(checkpoints):
    asked = Teachers(checkpoints, resident=0)
    assert asked.resident == 1
    asked.keep(0)
    assert asked.resident == 1


@pytest.mark.parametrize("more", [{}, {"few_step": 3.0}])
def test_training_learns_the_same(streams, tmp_path, more):
    paths = tiny_teachers(tmp_path, 3)
    losses = []
    for resident in (None, 0):
        run = built(tmp_path / "out.safetensors", paths, resident=resident, **more)
        assert run.teachers.resident == (3 if resident is None else 0)
        losses.append([run.step().loss for _ in range(3)])
    assert losses[0] == losses[1]


def test_what_is_given_up_last(streams, tmp_path):
    run = built(tmp_path / "out.safetensors", tiny_teachers(tmp_path, 2), checkpointing=True, micro=1, batch=1)
    said = [run.economy.give_up_something() for _ in range(2)]
    assert "1 teachers on the device" in said[0] and "one block of a teacher" in said[1]
    run.be_sparing()
    assert run.teachers.resident == 0 and run.step().loss > 0
