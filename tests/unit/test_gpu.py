"""What only a GPU can show, on tiny teachers: ``pytest -m gpu tests/unit`` where there is one."""

from __future__ import annotations

import pytest
import torch

from dmm_core import at_once, fused
from dmm_core.checkpoint import open_checkpoint
from dmm_core.conditioning import Context
from dmm_core.distill import Distillation
from dmm_core.shrinkage import share_of_differences
from dmm_core.speed import Recorded
from dmm_core.teachers import Teachers
from tests.unit.merges import after, built, tiny_teachers

pytestmark = pytest.mark.gpu
ORDER = (0, 1, 2, 0, 1, 2)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return tiny_teachers(tmp_path_factory.mktemp("teachers"), 3)


@pytest.mark.parametrize("resident", [0, 1, 2, 3])
@pytest.mark.parametrize("features", [False, True])
def test_recorded_teachers_say_the_same_while_they_rotate(paths, resident, features):
    """Two sizes of latents, other inputs each time, weights that change under the recording."""
    checkpoints = [open_checkpoint(path) for path in paths]
    generator = torch.Generator().manual_seed(0)
    told = []
    for record in (False, True):
        teachers = Teachers(checkpoints, "cuda", resident=resident, channels_last=True)
        teachers.keep(resident, record)
        teachers._embeddings = dict.fromkeys(
            range(3), Context(torch.randn(3, 77, 64, generator=generator.manual_seed(1)))
        )
        teachers.expect(ORDER)
        answers = []
        for number, index in enumerate(ORDER):
            x = torch.randn(2, 4, 8, 8 + 8 * (number % 2), generator=generator)
            eps, maps, _ = teachers.predict(
                index, x.cuda(), torch.tensor([10, 700]).cuda(), torch.tensor([0, 2]), features
            )
            answers += [eps, *maps]
        told.append(answers)
    assert len(told[0]) == len(told[1]) and len(told[0]) > 6 * features
    for a, b in zip(*told, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_a_recording_is_made_once_a_shape(monkeypatch):
    calls = []
    recorded = Recorded(lambda x: calls.append(1) or [x * 2, x + 1], torch.cuda.graph_pool_handle())
    for value in (1.0, 2.0, 3.0):
        twice, more = recorded(torch.full((4,), value, device="cuda"))
        assert (twice == 2 * value).all() and (more == value + 1).all()
    assert len(calls) == Recorded.WARM + 1
    recorded(torch.ones(5, device="cuda"))
    assert len(calls) == 2 * (Recorded.WARM + 1)


@pytest.mark.parametrize(
    "more",
    [{}, {"weights": "bf16"}, {"weights": "bf16", "fused_backward": True}, {"student": "lora"},
     {"micro": 1, "resident": 1}, {"micro": 1, "resident": 0}, {"checkpointing": True}, {"ema": 0.9, "feature": 0.1},
     {"adversarial": 0.01}, {"mixed": 0.3, "adversarial": 0.01}, {"precision": "bf16"}, {"precision": "fp16"},
     {"blockwise": 1.0}, {"blockwise": 1.0, "weights": "bf16"},
     {"blockwise": 1.0, "weights": "bf16", "student": "lora"},
     {"mixed": 0.3, "feature": 0.1, "blockwise": 1.0, "resident": 0, "micro": 1}, {"few_step": 3.0}],
)  # fmt: skip
def test_training_learns_and_never_waits_for_the_device(tmp_path, paths, more):
    run: Distillation = built(
        tmp_path / "o.safetensors", paths, **{"device": "cuda", "precision": "auto", "lr": 3e-4} | more
    )
    first = [run.step().loss for _ in range(3)]  # libraries settle, kernels are recorded
    torch.cuda.set_sync_debug_mode("error" if more.get("precision") != "fp16" else "default")  # its scaler must wait
    try:
        results = [run.step() for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    last = [result.loss for result in results[-3:]]
    assert all(map(torch.isfinite, map(torch.tensor, last))) and (sum(last) < sum(first) or "adversarial" in more)


def test_steps_are_the_cpus(tmp_path, paths):
    """float32 on both, the same samples. Adam's first steps have every weight's sign alone: few of them may differ."""
    begun = after(built(tmp_path / "o.safetensors", paths, device="cpu"), 0)
    moved = []
    for device in ("cpu", "cuda"):
        learned = after(built(tmp_path / "o.safetensors", paths, device=device, lr=1e-4), 3)
        moved.append(torch.cat([(learned[key].cpu() - begun[key]).flatten() for key in begun]))
    assert (moved[0] - moved[1]).norm() < 0.1 * moved[0].norm()


@pytest.mark.parametrize("more", [{}, {"resident": 1}, {"resident": 0}, {"precision": "bf16"}, {"weights": "bf16"}])
def test_the_share_of_the_differences_is_the_cpus(tmp_path, paths, more):
    there = {"device": "cuda", "precision": "auto" if "weights" in more else "fp32"}
    shares = [
        share_of_differences(after_steps(built(tmp_path / "o.safetensors", paths, lr=1e-4, batch=8, **where)), 2.0)
        for where in ({"device": "cpu"}, there | more)
    ]
    assert shares[1] == pytest.approx(shares[0], abs=0.05)


def after_steps(run: Distillation) -> Distillation:
    after(run, 3)
    return run


def test_a_resumed_run_goes_on_as_the_first(tmp_path, paths):
    bf16 = {"device": "cuda", "weights": "bf16", "precision": "auto"}
    run = built(tmp_path / "o.safetensors", paths, **bf16)
    run.step()
    run.save_state(tmp_path / "state.safetensors")
    again = built(tmp_path / "o.safetensors", paths, **bf16)
    again.load_state(tmp_path / "state.safetensors")
    assert again.step().loss == pytest.approx(run.step().loss, rel=1e-2)


@pytest.mark.parametrize(
    "more", [{}, {"micro": 1}, {"weights": "bf16", "precision": "auto"}, {"feature": 0.1}, {"student": "lora"}],
)  # fmt: skip
def test_recorded_steps_of_the_student_are_the_eager_ones(tmp_path, paths, more):
    told = []
    for record in (False, True):
        run = built(tmp_path / "o.safetensors", paths, device="cuda", cuda_graphs=record, lr=1e-4, **more)
        losses = [run.step().loss for _ in range(6)]
        assert sum(len(recorded.recordings) for recorded in run.passes.recordings.values()) == (record > 0)
        told.append(torch.tensor(losses))
    torch.testing.assert_close(*told, rtol=2e-2 if "weights" in more else 1e-3, atol=0)


def test_what_a_recorded_step_saves_goes_on_elsewhere(tmp_path, paths):
    recorded = built(tmp_path / "o.safetensors", paths, device="cuda", cuda_graphs=True)
    for _ in range(5):
        recorded.step()
    recorded.save_state(tmp_path / "state.safetensors")
    eager = built(tmp_path / "o.safetensors", paths, device="cuda", cuda_graphs=True)
    eager.load_state(tmp_path / "state.safetensors")
    for _ in range(4):
        assert eager.step().loss == pytest.approx(recorded.step().loss, rel=1e-3)


def test_the_kernels_work_here():
    """Without them training goes on, slower; here they are expected."""
    assert at_once.works(torch.device("cuda")) and fused.works(torch.device("cuda"))
