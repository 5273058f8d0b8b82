"""Economies of memory: each gives what the plain way gives, or says so; and what is done when memory runs out."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch

from dmm_core import resume
from dmm_core.checkpoint.writer import write_safetensors
from dmm_core.economy import ENOUGH_ROWS, Economy, is_out_of_memory
from dmm_core.errors import BadInput, RecipeError
from dmm_core.recipe import TrainSpec
from dmm_core.trial import candidates
from tests.unit.merges import after, built, furthest, recipe, tiny_teachers

MOVED = 1e-3  # by how much three steps at lr 1e-3 move weights, at least


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> list[Path]:
    return tiny_teachers(tmp_path_factory.mktemp("teachers"), 2)


@pytest.fixture(scope="module")
def plain(teachers, tmp_path_factory):
    """Three steps with score and feature loss, without any economy."""
    return after(built(tmp_path_factory.mktemp("plain") / "o.safetensors", teachers, feature=0.1, grad_clip=0), 3)


@pytest.mark.parametrize(
    "economy",
    [{"checkpointing": True}, {"micro": 1}, {"resident": 1}, {"fused_backward": True}, {"channels_last": True},
     {"checkpointing": True, "fused_backward": True, "resident": 1}],
    ids=lambda economy: " ".join(economy),
)  # fmt: skip
def test_same_result_to_rounding(tmp_path, teachers, plain, economy):
    start = built(tmp_path / "o.safetensors", teachers, feature=0.1, grad_clip=0, **economy)
    before = {key: value.clone() for key, value in start.student.learned().items()}
    learned = after(start, 3)
    assert furthest(learned, before) > MOVED
    # Adam divides by the gradient's size: where that is all rounding, a step may point the other way
    differing = [(learned[k] - plain[k]).abs().gt(1e-4).float().mean().item() for k in plain]
    assert sum(differing) / len(differing) < 1e-3, economy


def test_checkpointing_keeps_fewer_activations(tmp_path, teachers):
    kept = {}
    for checkpointing in (False, True):
        distillation, sizes = built(tmp_path / "o.safetensors", teachers, checkpointing=checkpointing), {}
        pack = lambda x, sizes=sizes: sizes.__setitem__(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes())  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(lambda x, pack=pack: (pack(x), x)[1], lambda x: x):
            distillation.step()
        own = {p.untyped_storage().data_ptr() for p in distillation.student.parameters()}
        kept[checkpointing] = sum(size for pointer, size in sizes.items() if pointer not in own)
    assert kept[True] < 0.7 * kept[False]


def test_fused_backward_holds_no_gradient(tmp_path, teachers):
    distillation = built(tmp_path / "o.safetensors", teachers, fused_backward=True)
    distillation.step()
    assert all(p.grad is None for p in distillation.learned) and len(distillation.optimizer.done) == len(
        distillation.learned
    )


def test_fused_backward_clips_each_gradient(tmp_path, teachers):
    """AdamW hides a gradient's scale; its first moment does not."""
    distillation = built(tmp_path / "o.safetensors", teachers, fused_backward=True, grad_clip=1e-4)
    distillation.step()
    moments = [s["exp_avg"] for o in distillation.optimizer.optimizers for s in o.state.values()]
    assert max(m.norm().item() for m in moments) == pytest.approx(0.1 * 1e-4, rel=1e-2)


# ---------------------------------------------------------------- bfloat16 weights


def test_bfloat16_training_lowers_the_loss(tmp_path, teachers):
    distillation = built(
        tmp_path / "o.safetensors", teachers, weights="bf16", precision="bf16", steps=8, ema=0.9, lr=3e-3
    )
    assert distillation.student.unet.dtype == torch.bfloat16 and distillation.student.codebook.dim
    losses = [result.loss for result in distillation.run()]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert all(average.dtype == torch.float32 for average in distillation.average)


# ---------------------------------------------------------------- exact resume of every economy


@pytest.mark.parametrize(
    "economy",
    [{"fused_backward": True, "checkpointing": True}, {"student": "lora", "rank": 4, "ema": 0.9, "resident": 1},
     {"weights": "bf16", "precision": "bf16", "fused_backward": True, "ema": 0.9, "batch": 1}],
    ids=lambda economy: " ".join(economy),
)  # fmt: skip
def test_resume_is_exact(tmp_path, teachers, economy):
    straight = built(tmp_path / "o.safetensors", teachers, steps=2, **economy)
    straight.step()
    straight.save_state(tmp_path / "state.safetensors")
    straight.step()
    resumed = built(tmp_path / "o.safetensors", teachers, steps=2, **economy)
    resumed.load_state(tmp_path / "state.safetensors")
    resumed.step()
    (tensors, strings), (expected, told) = resumed.state(), straight.state()
    assert strings == told and tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)


def test_a_save_holds_no_second_state(tmp_path, teachers):
    """What is written is the run's own memory, of any layout: no copy of everything is made before; the same bytes."""
    run = built(tmp_path / "o.safetensors", teachers, channels_last=True, ema=0.9)
    run.step()
    tensors, strings = run.state()
    own = {x.data_ptr() for x in [*run.student.state_dict().values(), *run.average]}
    assert all(x.data_ptr() in own for key, x in tensors.items() if key.partition(".")[0] in ("student", "average"))
    assert any(not x.is_contiguous() for x in tensors.values()), "which the writer has to copy"
    run.save_state(tmp_path / "state.safetensors")
    write_safetensors(tmp_path / "whole", {key: x.cpu().contiguous() for key, x in tensors.items()}, strings)
    assert (tmp_path / "state.safetensors").read_bytes() == (tmp_path / "whole").read_bytes()


def test_loading_holds_no_second_state(tmp_path, teachers, monkeypatch):
    """Of the copies that are made of a file's tensors, the last one or two are there; so too between two stages."""
    run = built(tmp_path / "o.safetensors", teachers, ema=0.9)
    run.step()
    run.save_state(tmp_path / "state.safetensors")
    resume.save_student(run, tmp_path / "student.safetensors")
    copies, most, clone = [], [], torch.Tensor.clone

    def noted(tensor, **more):
        copy = clone(tensor, **more)
        copies.append(weakref.ref(copy))
        most.append(sum(kept() is not None for kept in copies))
        return copy

    again, third = (built(tmp_path / "o.safetensors", teachers, ema=0.9) for _ in range(2))
    monkeypatch.setattr(torch.Tensor, "clone", noted)
    again.load_state(tmp_path / "state.safetensors")
    assert len(copies) == len(run.state()[0]) and max(most) <= 2
    assert furthest(again.state()[0], run.state()[0]) == 0
    resume.load_student(third, tmp_path / "student.safetensors")
    assert max(most) <= 2 and furthest(third.student.learned(), run.student.learned()) == 0
    assert len(copies) == len(run.state()[0]) + len(run.student.learned()), "none is left mapped"


# ---------------------------------------------------------------- memory runs out


class NoMemory(torch.cuda.OutOfMemoryError):
    pass


def failing(distillation, monkeypatch, where: str, when: set[int]):
    """Let the n-th calls of a method run out of memory after they have done their work."""
    its = distillation.asking if where == "ask" else distillation
    method, calls = getattr(its, where), []

    def call(*arguments):
        calls.append(1)
        result = method(*arguments)
        if len(calls) in when:
            raise NoMemory("CUDA out of memory. Tried to allocate 2.00 GiB")
        return result

    monkeypatch.setattr(its, where, call)


@pytest.mark.parametrize("mixed", [0, 0.4])
@pytest.mark.parametrize("where", ["ask", "learn"])
def test_out_of_memory_goes_on_with_the_same_samples(tmp_path, teachers, monkeypatch, where, mixed):
    plain = built(tmp_path / "o.safetensors", teachers, batch=4, mixed=mixed, blockwise=mixed)
    steps = [plain.step() for _ in range(3)]
    broken = built(tmp_path / "o.safetensors", teachers, batch=4, mixed=mixed, blockwise=mixed)
    failing(broken, monkeypatch, where, {2 if where == "ask" else 1})
    results = [broken.step() for _ in range(3)]
    assert [len(result.warnings) for result in results] == [1, 0, 0]
    assert "4 rows" in results[0].warnings[0] and "same samples" in results[0].warnings[0]
    assert broken.economy.rows == 4 and torch.equal(plain.rng.get_state(), broken.rng.get_state())
    for one, two in zip(steps, results, strict=True):
        assert one.loss == pytest.approx(two.loss, rel=1e-4) and one.samples_seen == two.samples_seen


def test_stepped_down_run_resumes_exactly(tmp_path, teachers, monkeypatch):
    straight = built(tmp_path / "o.safetensors", teachers, batch=4)
    failing(straight, monkeypatch, "learn", {1, 2, 4})
    straight.step()
    straight.save_state(tmp_path / "state.safetensors")
    straight.step()
    resumed = built(tmp_path / "o.safetensors", teachers, batch=4)
    resumed.load_state(tmp_path / "state.safetensors")
    assert (resumed.economy.rows, resumed.economy.checkpointing) == (4, True)
    assert resumed.student.unet.is_gradient_checkpointing
    resumed.economy.resident = resumed.teachers.resident = 1  # what the uninterrupted run fell to in this step
    resumed.step()
    a, b = straight.state()[0], resumed.state()[0]
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_fused_step_that_breaks_half_way_updates_every_weight_once(tmp_path, teachers):
    distillation = built(tmp_path / "o.safetensors", teachers, fused_backward=True)
    broken = distillation.optimizer.parameters[40]
    hooked = []

    def fail(p):
        hooked.append(1)
        if len(hooked) == 1:
            raise NoMemory("out of memory")

    broken.register_post_accumulate_grad_hook(fail)
    result = distillation.step()
    assert len(result.warnings) == 1 and "checkpointing" in result.warnings[0] and len(hooked) == 2
    counts = {int(s["step"]) for o in distillation.optimizer.optimizers for s in o.state.values()}
    assert counts == {1}


def test_other_errors_are_not_swallowed(tmp_path, teachers, monkeypatch):
    distillation = built(tmp_path / "o.safetensors", teachers)
    monkeypatch.setattr(distillation.asking, "ask", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        distillation.step()


def test_what_is_given_up_and_in_which_order():
    economy, told = Economy(rows=24, checkpointing=False, resident=4), []
    with pytest.raises(BadInput, match="memory is too small"):
        while True:
            told.append(economy.give_up_something())
    assert [text.split("going on with ")[1].split(", on")[0] for text in told] == [
        "12 rows at a time", "6 rows at a time", "4 rows at a time", "gradient checkpointing",
        "2 teachers on the device", "1 teachers on the device", "2 rows at a time", "1 rows at a time",
    ]  # fmt: skip
    assert told and ENOUGH_ROWS == 4
    with pytest.raises(BadInput):
        Economy(rows=24, checkpointing=True, resident=1, splits=False).give_up_something()


@pytest.mark.parametrize(
    ("error", "is_one"),
    [(torch.cuda.OutOfMemoryError("x"), True), (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), True),
     (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
     (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True), (RuntimeError("shape mismatch"), False),
     (ValueError("out of memory"), False)],
)  # fmt: skip
def test_signs_of_lacking_memory(error, is_one):
    assert is_out_of_memory(error) is is_one


# ---------------------------------------------------------------- what cannot go together


@pytest.mark.parametrize(
    ("train", "told"),
    [({"fused_backward": True, "micro": 1}, "train.micro"), ({"fused_backward": True, "processes": 2}, "processes"),
     ({"fused_backward": True, "precision": "fp16"}, "train.precision"),
     ({"weights": "bf16", "precision": "fp32"}, "train.precision")],
)  # fmt: skip
def test_impossible_recipes(tmp_path, teachers, train, told):
    with pytest.raises(RecipeError, match=told):
        recipe(tmp_path / "o.safetensors", teachers, **train)


@pytest.mark.parametrize("old", [False, True], ids=["none", "too old"])
def test_eight_bit_without_a_library_is_one_line(tmp_path, teachers, monkeypatch, old):
    import importlib.util
    import sys
    from types import ModuleType

    find, absent = importlib.util.find_spec, "bitsandbytes"
    found = importlib.util.spec_from_loader(absent, None) if old else None  # one without operators
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: found if name == absent else find(name, *a))
    monkeypatch.setitem(sys.modules, absent, ModuleType(absent))
    assert "adamw8bit" not in str(candidates(TrainSpec(), 2, "cpu"))
    with pytest.raises(BadInput, match=r"adamw8bit needs bitsandbytes.*pip install -U bitsandbytes"):
        built(tmp_path / "o.safetensors", teachers, optimizer="adamw8bit")
