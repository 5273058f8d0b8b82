"""What makes a step fast: compiled blocks give the same, and a step never waits for the device."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dmm_core.checkpoint import open_checkpoint
from dmm_core.losses import BlockFeatures
from dmm_core.lowrank import Adapters
from dmm_core.models import build_unet
from dmm_core.plan import choose_precision
from dmm_core.speed import REPEATED, packed, quicken, side_by_side, to_device, wants_channels_last
from tests.unit.merges import built, tiny_teachers


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    return tiny_teachers(tmp_path_factory.mktemp("teachers"), 2)


def unet(path):
    checkpoint = open_checkpoint(path)
    return build_unet(checkpoint.unet_config, checkpoint.unet(), torch.float32, path, styled=False), checkpoint


def test_compiled_blocks_give_the_same_also_with_other_weights(teachers):
    """Regional compilation through dynamo (its eager backend needs no compiler), gradients and hooks included."""
    (plain, _), (fast, _), (_, other) = unet(teachers[0]), unet(teachers[0]), unet(teachers[1])
    for model in (plain, fast):
        Adapters(model, 2, 0)
    names = set(fast.state_dict())
    quicken(fast, False, True, backend="eager")
    assert set(fast.state_dict()) == names
    compiled = [m for m in fast.modules() if m._compiled_call_impl is not None]
    assert compiled and {type(m).__name__ for m in compiled} == set(REPEATED)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    arguments = (x, torch.tensor([10, 700]), torch.ones(2, 77, 64))
    for state in (None, other.unet()):
        found = []
        for model in (plain, fast):
            if state is not None:
                with torch.no_grad():
                    for key, tensor in model.state_dict().items():
                        tensor.copy_(state[key])
            model.requires_grad_(True).zero_grad()
            with BlockFeatures(model) as blocks:
                out = model(*arguments).sample
            (out.square().mean() + sum(b.square().mean() for b in blocks.take())).backward()
            found.append((out.detach(), model.conv_in.weight.grad.clone()))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


class NoWaiting(TorchDispatchMode):
    """Refuses what reads a number off a tensor: on a GPU that waits for everything launched so far."""

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "the step reads a tensor's value"
        assert function is not torch.ops.aten.nonzero.default, "the step asks for a size that depends on values"
        return function(*arguments, **(kwargs or {}))


@pytest.mark.parametrize(
    "extra", [{}, {"feature": 0.1, "micro": 1, "resident": 1, "ema": 0.9}, {"fused_backward": True}]
)
def test_a_step_waits_for_nothing(tmp_path, teachers, extra):
    distillation = built(tmp_path / "o.safetensors", teachers, **extra)
    with NoWaiting():
        result = distillation.step()
        with pytest.raises(AssertionError, match="reads a tensor"):
            torch.ones(1).item()
    assert result.loss > 0 and len(result.score) == 2, "read now, not in the step"


@pytest.mark.parametrize(("capability", "wanted"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((12, 0), "bf16")])
def test_bfloat16_is_chosen_where_it_is_not_emulated(monkeypatch, capability, wanted):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(str(device)) or capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)  # as torch says of a Turing card
    monkeypatch.setattr(torch.version, "hip", None)
    assert choose_precision("auto", "cuda:1") == wanted and asked == ["cuda:1"]


def test_layout_is_chosen_by_device():
    assert wants_channels_last(None, torch.device("cuda")) and not wants_channels_last(None, torch.device("cpu"))
    assert wants_channels_last(True, torch.device("cpu")) and not wants_channels_last(False, torch.device("cuda"))
    (x,) = to_device((torch.ones(2),), torch.device("cpu"))
    assert x.device.type == "cpu"


def test_work_side_by_side_keeps_its_order_its_bits_and_the_threads_of_the_process(teachers):
    model, _ = unet(teachers[0])
    x = torch.randn(5, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    seen = set()

    def work(part):
        assert not torch.is_grad_enabled()
        seen.add(threading.get_ident())
        return model(part, torch.tensor([10, 700]), torch.ones(2, 77, 64)).sample

    try:
        torch.set_num_threads(2)
        made = list(side_by_side(work, list(x), torch.device("cpu")))
        assert torch.get_num_threads() == 2 and threading.get_ident() not in seen
        torch.set_num_threads(1)
        alone = list(side_by_side(work, list(x), torch.device("cpu")))
        assert threading.get_ident() in seen
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(made, alone, strict=True))


def test_an_error_side_by_side_is_told_and_the_threads_come_back():
    threads = torch.get_num_threads()

    def work(item):
        raise ValueError(item)

    try:
        torch.set_num_threads(2)
        with pytest.raises(ValueError, match="first"):
            list(side_by_side(work, ["first", "second"], torch.device("cpu")))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_tensors_are_carried_together_and_come_back_as_they_were():
    tensors = [torch.randn(3, 5), torch.arange(7), torch.randn(2, 4, 6).bfloat16().transpose(1, 2), torch.tensor(2.5),
               torch.empty(0, 4), torch.tensor([True, False])]  # fmt: skip
    carried = []
    there = packed(tensors, lambda host: carried.append(host) or host.clone())
    assert len(carried) == 1
    for a, b in zip(tensors, there, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b) and b.data_ptr() % b.element_size() == 0
    assert packed([], lambda host: host) == []
