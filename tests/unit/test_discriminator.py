"""The multi-class adversarial loss: its classes, whom each step moves, exact resume, memory."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from dmm_core.conditioning import Context
from dmm_core.diffusion import add_noise, predict_x0
from dmm_core.discriminator import encoder_parameters
from dmm_core.losses import timestep_weights
from dmm_core.plan import plan
from dmm_core.recipe import TrainSpec
from dmm_core.trial import weights_bytes
from tests.unit.merges import built, recipe, tiny_teachers


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> list[Path]:
    return tiny_teachers(tmp_path_factory.mktemp("teachers"), 3)


def rows(critic, count: int = 4):
    """t, noise, context and styles of some rows."""
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(count, 4, 8, 8, generator=g)
    return (
        torch.randint(1000, (count,), generator=g),
        noise,
        Context(torch.randn(count, 77, 64, generator=g)),
        torch.arange(count) % critic.module.styles,
    )


def test_body_is_the_encoder_half_of_a_stock_unet(tmp_path, teachers):
    """What reaches the head is what a whole UNet has after its mid block."""
    from dmm_core.losses import BlockFeatures

    run = built(tmp_path / "o.safetensors", teachers, adversarial=0.01)
    t, x, context, _ = rows(run.critic)
    whole, seen = run.teachers.unet(0), []
    with BlockFeatures(whole) as blocks, torch.no_grad():
        whole(x, t, context.tokens)
    body = run.critic.module
    body.head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        logits = body(x, t, context)
    assert logits.shape == (4, 6)
    assert torch.equal(seen[0], blocks.take()[2])  # down, down, mid; the base is the first teacher
    kept = sum(p.numel() for p in body.body.parameters())
    assert kept == encoder_parameters({k: v.shape for k, v in whole.state_dict().items()})
    assert kept < 0.8 * sum(p.numel() for p in whole.parameters())


def test_losses_are_cross_entropies_of_the_paper_s_classes(tmp_path, teachers):
    """Eq. 11 and Alg. 1 by hand: the student wants class i; the discriminator N + i for it and i for the teacher."""
    critic = built(tmp_path / "o.safetensors", teachers, adversarial=0.01).critic
    t, noise, context, style = rows(critic)
    mine, theirs = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        p = [critic.module(add_noise(x, noise, t), t, context).log_softmax(1) for x in (mine, theirs)]
    each = torch.arange(4)
    told = critic.learn(mine, theirs, t, noise, context, style, lambda x: x.sum())
    assert torch.allclose(told, -p[0][each, style + 3] - p[1][each, style], atol=1e-5)
    assert torch.allclose(critic.fool(mine, t, noise, context, style), -p[0][each, style], atol=1e-5)


def test_each_step_moves_its_own_side(tmp_path, teachers):
    critic = built(tmp_path / "o.safetensors", teachers, adversarial=0.01).critic
    t, noise, context, style = rows(critic)
    x0 = torch.randn_like(noise).requires_grad_()
    critic.fool(x0, t, noise, context, style).sum().backward()
    assert x0.grad.abs().max() > 0 and all(p.grad is None for p in critic.parameters)
    critic.learn(x0.detach(), noise, t, noise, context, style, lambda x: x.sum())
    assert all(p.grad is not None for p in critic.parameters)
    assert all(p.grad is None and not p.requires_grad for p in critic.module.body.parameters())


def test_the_student_s_gradient_is_that_of_the_whole_loss(tmp_path, teachers):
    """L_score, its timesteps weighed, + 0.5 L_adv through the trainer, against autograd on the formulas."""
    run = built(tmp_path / "o.safetensors", teachers, adversarial=0.5, grad_clip=0)
    state = run.rng.get_state()
    batches = [run.data.draw(i, 2, run.rng, True) for i in range(3)]
    loss = torch.tensor(0.0)
    for i, b in enumerate(batches):
        eps = run.student(b.x_t, b.t, run.context[b.prompt], torch.eye(3)[torch.full((2,), i)])
        wanted = run.teachers.predict(i, b.x_t, b.t, b.prompt)[0]
        t, noise = b.again
        logits = run.critic.module(add_noise(predict_x0(b.x_t, eps, b.t), noise, t), t, run.context[b.prompt])
        entropy = torch.nn.functional.cross_entropy(logits, torch.full((2,), i), reduction="sum")
        score = ((eps - wanted) ** 2).flatten(1).mean(1) * timestep_weights(0.5)[b.t]
        loss = loss + score.sum() + 0.5 * entropy
    parameters = run.learned
    wanted = torch.autograd.grad(loss / 6, parameters, allow_unused=True)
    run.rng.set_state(state)
    run.accumulate()
    for p, g in zip(parameters, wanted, strict=True):
        if g is not None:
            assert torch.allclose(p.grad, g, atol=1e-5 + 1e-4 * g.abs().max().item())


@pytest.mark.parametrize("body", ["head", "full"])
def test_it_learns_to_tell_student_from_teachers(tmp_path, teachers, body):
    run = built(tmp_path / "o.safetensors", teachers, adversarial=0.01, discriminator=body, adversarial_lr=3e-3)
    t, noise, context, style = rows(run.critic, 6)
    x0, losses = torch.randn(2, 6, 4, 8, 8, generator=torch.Generator().manual_seed(2)), []
    for _ in range(15):
        run.critic.optimizer.zero_grad()
        told = run.critic.learn(*x0, t // 4, noise, context, style, lambda loss: loss.mean())
        run.critic.step(run.scaler, run.ranks)
        losses.append(told.mean().item())
    assert losses[0] == pytest.approx(2 * math.log(6), rel=0.2), "at first it can only guess between 2N classes"
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("extra", [{}, {"discriminator": "full", "adversarial_lr": 1e-4, "teachers_per_step": 2}])
def test_resume_equals_uninterrupted(tmp_path, teachers, extra):
    """Law 6, with the discriminator's weights, moments and random draws."""
    straight = built(tmp_path / "o.safetensors", teachers, adversarial=0.1, **extra)
    straight.step()
    straight.save_state(tmp_path / "state.safetensors")
    straight.step(), straight.step()
    resumed = built(tmp_path / "o.safetensors", teachers, adversarial=0.1, **extra)
    resumed.load_state(tmp_path / "state.safetensors")
    resumed.step(), resumed.step()
    (tensors, strings), (expected, told) = resumed.state(), straight.state()
    assert strings == told and tensors.keys() == expected.keys()
    assert any(key.startswith("critic.classes") for key in tensors) and "critic_optimizer.0.exp_avg" in tensors
    assert any(key.startswith("critic.body") for key in tensors) is (extra != {})
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    "economy",
    [
        {"micro": 1},
        {"checkpointing": True},
        {"resident": 1},
        {"fused_backward": True},
        {"discriminator": "full", "checkpointing": True},
    ],
    ids=lambda economy: " ".join(economy),
)
def test_economies_work_with_it(tmp_path, teachers, economy):
    """Each gives the plain losses, to rounding, over two steps."""
    spec = {"adversarial": 0.1, "grad_clip": 0, "lr": 1e-5}
    kind = {key: value for key, value in economy.items() if key == "discriminator"}
    plain, sparing = (built(tmp_path / "o.safetensors", teachers, **spec, **more) for more in (kind, economy))
    for _ in range(2):
        a, b = plain.step(), sparing.step()
        for kind in ("score", "adversarial", "discriminator"):
            assert a.of(kind) == pytest.approx(b.of(kind), rel=2e-3), kind


def test_off_by_default_and_then_nothing_is_drawn(tmp_path, teachers):
    off, on = (built(tmp_path / "o.safetensors", teachers, **more) for more in ({}, {"adversarial": 0.01}))
    assert TrainSpec().adversarial == 0 and off.critic is None and off.step().of("adversarial") == {}
    off.step(), on.step()
    assert not torch.equal(off.rng.get_state(), on.rng.get_state())


def test_bfloat16_autocast(tmp_path, teachers):
    run = built(tmp_path / "o.safetensors", teachers, adversarial=0.1, precision="bf16", discriminator="full", batch=1)
    assert math.isfinite(run.step().loss) and run.critic.module.body.dtype == torch.float32
    narrow = built(tmp_path / "o.safetensors", teachers, adversarial=0.1, precision="bf16", weights="bf16", batch=1)
    assert math.isfinite(narrow.step().loss) and narrow.critic.module.body.dtype == torch.bfloat16


def test_memory_runs_out_in_the_discriminator(tmp_path, teachers, monkeypatch):
    """The step is made again on the same samples; no half of a discriminator's gradient stays."""
    plain, broken = (built(tmp_path / "o.safetensors", teachers, adversarial=0.1, batch=4) for _ in range(2))
    learn, calls = broken.critic.learn, []

    def fail_once(*arguments):
        result = learn(*arguments)
        calls.append(1)
        if len(calls) == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(broken.critic, "learn", fail_once)
    a, b = plain.step(), broken.step()
    assert len(b.warnings) == 1 and a.of("discriminator") == pytest.approx(b.of("discriminator"), rel=1e-4)
    for mine, theirs in zip(plain.critic.parameters, broken.critic.parameters, strict=True):
        assert torch.allclose(mine, theirs, atol=2e-4)


def test_the_plan_counts_it(tmp_path, teachers):
    made = recipe(tmp_path / "o.safetensors", teachers, adversarial=0.01, discriminator="full")
    plain = plan(recipe(tmp_path / "o.safetensors", teachers))
    told = plan(made)
    assert plain.discriminator_parameters == 0 < told.discriminator_parameters < told.unet_parameters
    assert told.memory_bytes - plain.memory_bytes == 16 * told.discriminator_parameters
    assert weights_bytes(TrainSpec(adversarial=0.1), 10, "cuda", 1, 6) == 10 * (16 + 2) + 6 * 2


def test_heads_start_alike_for_one_seed(tmp_path, teachers):
    a, b, c = (built(tmp_path / "o.safetensors", teachers, adversarial=0.1, seed=s).critic.module for s in (0, 0, 1))
    assert torch.equal(a.head[0].weight, b.head[0].weight) and not torch.equal(a.head[0].weight, c.head[0].weight)
