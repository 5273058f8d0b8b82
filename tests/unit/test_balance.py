"""Teachers weighed alike: what a teacher weighs, and that economies, processes and resumes change nothing of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dmm_core.balance import KEEP, MOST, Balance
from dmm_core.recipe import TrainSpec
from tests.unit.merges import after, built, furthest, tiny_teachers

SPEC = TrainSpec(feature=0.1)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> list[Path]:
    return tiny_teachers(tmp_path_factory.mktemp("teachers"), 3)


def tally(*losses: float, rows: float = 2.0) -> torch.Tensor:
    """Of a step whose teachers have these losses, half from the feature maps; NaN for one that was not asked."""
    made = torch.zeros(len(losses), 5)
    for i, loss in enumerate(losses):
        if loss == loss:
            made[i] = torch.tensor([rows * loss / 2, rows * loss / 2 / SPEC.feature, 0, 0, rows])
    return made


def balance(styles: int, old: int = 0) -> Balance:
    return Balance(styles, old, torch.device("cpu"))


def test_a_loss_over_its_own_average_by_hand():
    made = balance(3)
    assert made.weights.tolist() == [1, 1, 1]
    losses = torch.tensor([1.0, 2.0, 3.0])
    made.update(tally(*losses.tolist()), SPEC)
    assert made.weights.tolist() == pytest.approx([2, 1, 2 / 3])
    assert (made.weights * losses).sum() == pytest.approx(6), "the sum stays, for the other losses beside it"
    for _ in range(9):
        made.update(tally(2, 2, 2), SPEC)
    assert made.averages.tolist() == pytest.approx([1.9, 2, 2.1]), "a mean at first"
    for _ in range(1000):
        made.update(tally(4, 2, 2), SPEC)
    assert made.weights.tolist() == pytest.approx([2 / 3, 4 / 3, 4 / 3], rel=1e-4)
    made.update(tally(5, 2, 2), SPEC)
    assert made.averages[0] == pytest.approx(KEEP * 4 + (1 - KEEP) * 5, rel=1e-4)


def test_who_was_not_asked_or_has_no_number_stays_as_it_was():
    made, nan = balance(3), float("nan")
    made.update(tally(4, nan, nan), SPEC)
    assert made.weights.tolist() == [1, 1, 1], "one alone is the mean"
    made.update(tally(nan, 2, nan), SPEC)
    assert made.weights.tolist() == pytest.approx([0.75, 1.5, 1])
    broken = tally(4, 2, 1)
    broken[0, 0] = float("inf")
    made.update(broken, SPEC)
    assert made.averages.tolist() == pytest.approx([4, 2, 1])


def test_nobody_weighs_everything_or_nothing():
    made = balance(3)
    made.update(tally(0.0, 1e-9, 30.0), SPEC)
    assert made.weights.tolist() == pytest.approx([1, MOST, 1 / 3])
    made = balance(2)
    made.update(tally(0.0, 0.0), SPEC)
    assert made.weights.tolist() == [1, 1]


def test_old_styles_stay_as_they_are():
    """Their loss begins at nothing: the student that is to follow them is the one that they come from."""
    made = balance(4, old=2)
    made.update(tally(1e-6, 1e-6, 1.0, 3.0), SPEC)
    assert made.weights.tolist() == pytest.approx([1, 1, 2, 2 / 3])
    alone = balance(2, old=2)
    alone.update(tally(1.0, 3.0), SPEC)
    assert alone.weights.tolist() == pytest.approx([2, 2 / 3]), "a student that learns of itself alone"


def test_the_gradient_is_that_of_the_logarithms(tmp_path, teachers):
    """Of the second step, whose averages are the first one's losses."""
    run = built(tmp_path / "o.safetensors", teachers, balance=True, snr_power=0.0, feature=0.1, grad_clip=0)
    losses = {name: run.spec.score * m["score"] + 0.1 * m["feature"] for name, m in run.step().means.items()}
    mean = sum(losses.values()) / len(losses)
    assert run.balance.weights.tolist() == pytest.approx([mean / loss for loss in losses.values()], rel=1e-5)
    assert run.balance.weights.std() > 0.01

    drawn = [run.data.draw(teacher, 4, torch.Generator().manual_seed(9)) for teacher in range(3)]
    targets = [run.asking.ask(given) for given in run.asking.bring(drawn)]

    def gradient(weights: torch.Tensor) -> torch.Tensor:
        run.balance.weights = weights
        run.optimizer.zero_grad()
        run.learn(targets, 3)
        return torch.cat([p.grad.flatten().clone() for p in run.learned if p.grad is not None])

    each = [gradient(row) for row in torch.eye(3)]
    weights = torch.tensor([mean / loss for loss in losses.values()])
    together = gradient(weights)
    by_hand = sum(w * g for w, g in zip(weights, each, strict=True))
    assert (together - by_hand).norm() < 1e-4 * by_hand.norm()
    assert (together - sum(each)).norm() > 0.01 * by_hand.norm()


@pytest.mark.parametrize("economy", [{"micro": 1}, {"rows": 1}], ids=str)
def test_economies_change_nothing_but_rounding(tmp_path, teachers, economy):
    economy = dict(economy)
    rows = economy.pop("rows", 0)
    spec = {"balance": True, "mixed": 0.4, "adversarial": 0.1, "feature": 0.01, "batch": 4, "lr": 1e-5}
    plain, sparing = (built(tmp_path / "o.safetensors", teachers, **spec, **more) for more in ({}, economy))
    if rows:
        sparing.economy.rows = rows
    after(plain, 3), after(sparing, 3)
    assert plain.balance.weights.tolist() == pytest.approx(sparing.balance.weights.tolist(), rel=1e-3)
    assert plain.balance.weights.std() > 0.01


def test_it_is_off_where_nobody_asks_for_it(tmp_path, teachers):
    off, on = (built(tmp_path / "o.safetensors", teachers, balance=balance) for balance in (False, True))
    one, other = after(off, 3), after(on, 3)
    assert off.balance.weights.tolist() == [1, 1, 1] and not any(k.startswith("balance") for k in off.state()[0])
    assert furthest(one, other) > 0


def test_resume_equals_uninterrupted(tmp_path, teachers):
    straight, resumed = (built(tmp_path / "o.safetensors", teachers, balance=True) for _ in range(2))
    after(straight, 2)
    straight.save_state(tmp_path / "state.safetensors")
    resumed.load_state(tmp_path / "state.safetensors")
    assert torch.equal(straight.balance.weights, resumed.balance.weights)
    after(straight, 2), after(resumed, 2)
    (tensors, strings), (expected, told) = resumed.state(), straight.state()
    assert strings == told and all(torch.equal(tensors[key], expected[key]) for key in expected)
