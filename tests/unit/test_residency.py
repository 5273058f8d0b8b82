"""Teachers that take turns on the device: the same predictions, no module built twice, equal tensors held once."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmm_core.checkpoint import open_checkpoint
from dmm_core.conditioning import Context
from dmm_core.residency import HostStore, host_store
from dmm_core.teachers import Teachers
from tests.unit.merges import built, tiny_teachers

ORDER = (0, 1, 2, 3, 0, 1, 2, 3)


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[Path]:
    """Four teachers; the last one differs from the first in its middle block alone."""
    folder = tmp_path_factory.mktemp("teachers ü")
    paths = tiny_teachers(folder, 4)
    first, other = load_file(paths[0]), load_file(paths[1])
    save_file(
        {key: other[key] if "middle_block" in key else value for key, value in first.items()},
        paths[3],
        metadata={"modelspec.resolution": "64x64"},
    )
    return paths


@pytest.fixture(scope="module")
def checkpoints(paths):
    return [open_checkpoint(path) for path in paths]


def predictions(teachers: Teachers) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([10, 700])
    teachers._embeddings = dict.fromkeys(range(4), Context(torch.randn(3, 77, 64, generator=generator)))
    teachers.expect(ORDER)
    return [teachers.predict(i, x, t, torch.tensor([0, 2]))[0] for i in ORDER]


@pytest.fixture(scope="module")
def expected(checkpoints):
    return predictions(Teachers(checkpoints))


@pytest.mark.parametrize("resident", [1, 2, 3])
def test_predictions_are_those_of_teachers_that_all_stay(checkpoints, expected, resident):
    teachers = Teachers(checkpoints, resident=resident)
    assert all(torch.equal(a, b) for a, b in zip(predictions(teachers), expected, strict=True))
    assert len(teachers._unets) == resident


def test_modules_are_built_once_and_overwritten(checkpoints, monkeypatch):
    import dmm_core.teachers

    build, calls = dmm_core.teachers.build_unet, []
    monkeypatch.setattr(dmm_core.teachers, "build_unet", lambda *a, **k: calls.append(1) or build(*a, **k))
    teachers = Teachers(checkpoints, resident=2)
    pointers = set()
    for _ in range(2):
        predictions(teachers)
        pointers |= {p.data_ptr() for slot in teachers._unets.values() for p in slot.unet.parameters()}
    assert len(calls) == 2 and len(pointers) == 2 * len(list(teachers.unet(0).parameters()))


def test_the_next_teacher_comes_while_the_present_one_works(checkpoints):
    teachers = Teachers(checkpoints, resident=2)
    teachers._embeddings = dict.fromkeys(range(4), Context(torch.zeros(1, 77, 64)))
    teachers.expect(ORDER)
    for now, after in zip(ORDER, (*ORDER[1:], None), strict=True):
        teachers.predict(now, torch.zeros(1, 4, 8, 8), torch.tensor([3]), torch.tensor([0]))
        loads = teachers.loads
        assert after is None or after in teachers._unets
        if after is not None:
            teachers.unet(after)
        assert teachers.loads == loads


def test_as_many_come_ahead_as_have_a_place(checkpoints):
    teachers = Teachers(checkpoints, resident=3)
    teachers._embeddings = dict.fromkeys(range(4), Context(torch.zeros(1, 77, 64)))
    ask = lambda index: teachers.predict(index, torch.zeros(1, 4, 8, 8), torch.tensor([3]), torch.tensor([0]))  # noqa: E731
    teachers.expect([0, 0, 1, 2, 3])
    for _ in range(2):
        ask(0)
        assert set(teachers._unets) == {0, 1, 2}
    ask(1)
    assert set(teachers._unets) == {1, 2, 3} and teachers.loads == 4


def test_an_unexpected_teacher_is_served_too(checkpoints, expected):
    teachers = Teachers(checkpoints, resident=1)
    predictions(teachers)
    teachers.expect([0, 1])
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    eps, *_ = teachers.predict(2, x, torch.tensor([10, 700]), torch.tensor([0, 2]))
    assert torch.equal(eps, expected[2])


def test_equal_tensors_are_held_and_copied_once(checkpoints):
    store = HostStore(torch.float32)
    first, second, third, last = (store.tensors(checkpoint) for checkpoint in checkpoints)
    same = {key for key in first if last[key] is first[key]}
    assert same == {key for key in first if not key.startswith("mid_block")}
    assert all(last[key] is second[key] for key in first if key.startswith("mid_block"))
    assert not any(first[key] is third[key] for key in first)
    assert store.bytes == sum(t.numel() * 2 for c in checkpoints[:3] for t in c.unet().values())
    assert store.shared_bytes == sum(t.numel() * 2 for t in checkpoints[3].unet().values())


def test_what_both_have_in_common_is_not_copied(checkpoints):
    teachers = Teachers(checkpoints, resident=1)
    teachers.unet(0)
    slot = teachers._unets[0]
    versions = {key: tensor._version for key, tensor in slot.targets.items()}
    teachers.unet(3)
    changed = {key for key, tensor in slot.targets.items() if tensor._version > versions[key]}
    assert changed and all(key.startswith("mid_block") for key in changed)


def test_tensors_are_mapped_and_the_file_stays_as_it_is(checkpoints, paths):
    before = paths[0].read_bytes()
    store = HostStore(torch.float32)
    state = checkpoints[0].unet()
    assert all(torch.equal(tensor, state[key]) for key, tensor in store.tensors(checkpoints[0]).items())
    teachers = Teachers(checkpoints, resident=1)
    with torch.no_grad():
        for p in teachers.unet(0).parameters():
            p.zero_()
    assert paths[0].read_bytes() == before
    assert all(torch.equal(t, state[key]) for key, t in teachers.store.tensors(checkpoints[0]).items())


@pytest.mark.parametrize("channels_last", [False, True])
def test_pinned_copies_have_the_device_s_type_and_layout(checkpoints, channels_last):
    """Without a GPU the memory is ordinary; the way is the same."""
    store = HostStore(torch.bfloat16, pinned=True, channels_last=channels_last)
    state = checkpoints[0].unet()
    held = store.tensors(checkpoints[0])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for key, tensor in held.items():
        assert torch.equal(tensor, state[key].bfloat16())
        assert tensor.ndim != 4 or tensor.is_contiguous(memory_format=layout), key
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * 2) for t in set(held.values()))
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans)), "two tensors overlap"


def test_what_a_lora_made_is_not_kept_beside_its_pinned_copy(checkpoints, monkeypatch):
    """Tensors in a mapped file cost nothing and are kept to compare others with; computed ones cost their size."""
    store = HostStore(torch.bfloat16, pinned=True)
    store.tensors(checkpoints[0])
    before = sum(map(len, store._seen.values()))
    monkeypatch.setattr(type(checkpoints[1]), "changed", lambda self, part, key, tensor: tensor.float() + 1)
    changed = store.tensors(checkpoints[1])
    assert sum(map(len, store._seen.values())) == before
    assert all(torch.equal(tensor, (checkpoints[1].unet()[key]).bfloat16()) for key, tensor in changed.items())


def test_pinned_only_where_there_is_room(checkpoints, monkeypatch):
    for room, pinned in ((1 << 40, True), (1 << 10, False), (None, True)):
        monkeypatch.setattr("dmm_core.residency.available_ram", lambda room=room: room)
        assert host_store(checkpoints, torch.device("cuda"), torch.bfloat16, False).pinned is pinned
        assert not host_store(checkpoints, torch.device("cpu"), torch.bfloat16, False).pinned


def test_fewer_places_in_mid_run_change_nothing(checkpoints, expected):
    teachers = Teachers(checkpoints)
    predictions(teachers)
    teachers.keep(1)
    assert len(teachers._unets) == 1
    assert all(torch.equal(a, b) for a, b in zip(predictions(teachers), expected, strict=True))


def test_no_encoder_and_no_vae_stays(tmp_path, paths):
    """Prompts are embedded once, on the CPU; what is left for training is student and teachers."""
    import gc

    from diffusers import AutoencoderTiny
    from transformers import CLIPTextModel

    distillation = built(tmp_path / "o.safetensors", paths[:2])
    gc.collect()
    left = [o for o in gc.get_objects() if isinstance(o, (AutoencoderTiny, CLIPTextModel))]
    assert not left and distillation.context.tokens.device.type == "cpu"


@pytest.mark.parametrize(
    "more", [{}, {"fused_backward": True}, {"student": "lora"}, {"weights": "bf16", "precision": "auto"}]
)
def test_a_merge_that_is_over_leaves_nothing_behind(tmp_path, paths, more):
    """The next stage, in the same process, needs the memory."""
    import gc
    import weakref

    run = built(tmp_path / "o.safetensors", paths[:2], **more)
    run.step()
    held = [run.student.unet, run.optimizer, run.learned[0], *(slot.unet for slot in run.teachers._unets.values())]
    left = [weakref.ref(thing) for thing in held]
    del run, held
    gc.collect()
    assert len(left) == 5 and not [ref() for ref in left if ref() is not None]
