"""Rows between two styles: which they are, what they learn, and that economies and processes change nothing of it."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dmm_core.between import blended, put_between, rows_between, weights_of
from dmm_core.data import Batch, Between
from dmm_core.errors import RecipeError
from dmm_core.extension import teachers_of_step
from dmm_core.ranks import Alone
from dmm_core.recipe import TrainSpec, recipe_from_dict
from tests.unit.merges import after, built, tiny_teachers


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> list[Path]:
    return tiny_teachers(tmp_path_factory.mktemp("teachers"), 3)


def batches_of(turn: list[int], rows: int) -> list[Batch]:
    x, numbers = torch.zeros(rows, 4, 8, 8), torch.arange(rows)
    return [Batch(teacher, x, numbers, x, numbers) for teacher in turn]


@pytest.mark.parametrize(("batch", "teachers", "share"), [(6, 4, 0.25), (4, 4, 0.25), (8, 2, 0.25), (1, 16, 0.25),
                                                          (2, 8, 0.1), (4, 3, 1.0)])  # fmt: skip
def test_the_share_of_rows_is_about_what_was_asked(batch, teachers, share):
    spec, rng, count = TrainSpec(batch=batch, mixed=share), torch.Generator().manual_seed(0), 0
    for step in range(60):
        made = put_between(batches_of(list(range(teachers)), batch), spec, step, rng)
        assert made[0].between is None, "its teacher would come twice"
        for before, b in itertools.pairwise(made):
            assert b.between is None or (b.between.teacher == before.teacher and 0 < len(b.between) <= batch)
            count += len(b.between or ())
    possible = batch * (teachers - 1)
    assert count / 60 == pytest.approx(min(share * batch * teachers, possible), rel=0.3)


@pytest.mark.parametrize(("batch", "share"), [(6, 0.25), (2, 0.1)])
def test_only_in_the_first_part_of_a_merge(batch, share):
    spec, rng = TrainSpec(batch=batch, mixed=share, steps=100), torch.Generator()
    having = [any(b.between for b in put_between(batches_of([0, 1, 2, 3], batch), spec, step, rng))
              for step in range(100)]  # fmt: skip
    assert any(having[50:60]) and not any(having[60:])


def test_none_where_nothing_can_be_mixed():
    rng = torch.Generator()
    before = rng.get_state()
    assert rows_between(TrainSpec(), 4, 0) == 0
    for spec, turn in ((TrainSpec(), [0, 1, 2]), (TrainSpec(mixed=0.5), [0]), (TrainSpec(mixed=0.5), [1, 1])):
        assert all(b.between is None for b in put_between(batches_of(turn, 4), spec, 0, rng))
    assert torch.equal(rng.get_state(), before), "a merge without them goes as it went"


@pytest.mark.parametrize("count", [None, 2, 3])
def test_every_teacher_comes_beside_every_other(count):
    spec, met, seen = TrainSpec(mixed=0.5, teachers_per_step=count), Counter(), Counter()
    turns = [teachers_of_step(spec, step, 4) for step in range(240)]
    for turn in turns:
        assert len(set(turn)) == len(turn) == (count or 4)
        met.update(itertools.pairwise(turn))
        seen.update(turn)
    assert len(met) == 12 and max(seen.values()) < 1.2 * min(seen.values())
    assert turns == [teachers_of_step(spec, step, 4) for step in range(240)], "it follows from seed and step alone"


def test_what_a_row_learns_by_hand():
    weight = torch.tensor([0.0, 0.5, 0.9, 1.0])
    mine, theirs = torch.zeros(5, 4, 8, 8), torch.ones(4, 4, 8, 8)
    made = blended(mine, theirs, weight)[:, 0, 0, 0]
    assert torch.allclose(made, torch.tensor([0, 0.5, 0.75, 1, 0])), "√0.9 is three times √0.1; the last row is pure"
    styles = weights_of(torch.eye(3)[[1] * 5], torch.eye(3)[0], weight)
    assert torch.allclose(styles[2], torch.tensor([0.9, 0.1, 0])) and torch.equal(styles[4], torch.eye(3)[1])
    assert torch.allclose(styles.sum(1), torch.ones(5))


def test_pieces_of_a_batch_keep_their_rows():
    whole = replace(batches_of([2], 5)[0], between=Between(0, torch.tensor([0.1, 0.2, 0.3])))
    parts = whole.split(2)
    assert [len(part.between or ()) for part in parts] == [2, 1, 0]
    assert parts[1].between.weight.tolist() == pytest.approx([0.3]) and parts[1].between.teacher == 0


class Second(Alone):
    """The second of two processes, which gets the middle one of three batches."""

    rank, world = 1, 2


@pytest.mark.parametrize("ranks", [Alone, Second])
def test_targets_are_mixes_of_what_both_teachers_say(tmp_path, teachers, ranks):
    """Of ε and of the blocks' outputs; a process that has not the other teacher's batch asks it all the same."""
    run = built(tmp_path / "o.safetensors", teachers, batch=4, mixed=0.5, feature=0.1)
    run.ranks = ranks()
    drawn = [run.data.draw(teacher, 4, run.rng) for teacher in run.turn(0)]
    batches = put_between(drawn, run.spec, 0, run.rng)
    mine = run.ranks.mine(batches)
    targets = [run.asking.ask(given) for given in run.asking.bring(mine)]
    assert sum(target.given.batch.between is not None for target in targets) == len(targets) - (ranks is Alone)
    for target, batch in zip(targets, mine, strict=True):
        said, features, _ = run.teachers.predict(batch.teacher, batch.x_t, batch.t, batch.prompt, features=True)
        styles = torch.eye(3)[batch.teacher].expand(4, -1)
        if between := batch.between:
            others, more, _ = run.teachers.predict(between.teacher, batch.x_t, batch.t, batch.prompt, features=True)
            m = len(between)
            said = blended(said, others[:m], between.weight)
            features = [blended(a, b[:m], between.weight) for a, b in zip(features, more, strict=True)]
            styles = weights_of(styles, torch.eye(3)[between.teacher], between.weight)
        assert torch.equal(target.styles, styles)
        for got, wanted in zip([target.said, *target.features], [said, *features], strict=True):
            assert torch.allclose(got, wanted, atol=2e-5)


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The share of weights that moved differently."""
    return torch.cat([(one[key] - other[key]).abs().flatten() > 5e-6 for key in one]).float().mean().item()


@pytest.mark.parametrize("economy", [{"micro": 1}, {"resident": 1}, {"resident": 1, "micro": 2}, {"rows": 1},
                                     {"rows": 3}], ids=str)  # fmt: skip
def test_economies_change_nothing_but_rounding(tmp_path, teachers, economy):
    economy = dict(economy)
    rows = economy.pop("rows", 0)
    spec = {"batch": 4, "mixed": 0.4, "adversarial": 0.1, "feature": 0.01, "lr": 1e-5, "grad_clip": 0}
    plain, sparing = (built(tmp_path / "o.safetensors", teachers, **spec, **more) for more in ({}, economy))
    if rows:
        sparing.economy.rows = rows
    one, other = after(plain, 2), after(sparing, 2)
    assert apart(one, other) < 0.01, "Adam's first steps have every weight's sign alone: few of them may differ"
    for kind in ("score", "feature", "adversarial", "discriminator"):
        assert plain.step().of(kind) == pytest.approx(sparing.step().of(kind), rel=2e-3), kind


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_no_teacher_comes_to_the_device_twice_in_a_step(tmp_path, teachers, micro):
    run = built(tmp_path / "o.safetensors", teachers, resident=1, mixed=0.5, batch=4, micro=micro)
    run.step()
    asked = []
    predict = run.teachers.predict
    run.teachers.predict = lambda teacher, x, *more, **named: (
        asked.append((teacher, len(x))) or predict(teacher, x, *more, **named)
    )
    turn = run.turn(1)
    run.step()
    assert [teacher for teacher, _ in asked] == turn
    assert [rows for _, rows in asked] == [7, 7, 4], "own rows and those on the way to its style"


def test_the_discriminator_judges_pure_rows_alone(tmp_path, teachers):
    run, judged = built(tmp_path / "o.safetensors", teachers, batch=4, mixed=0.5, adversarial=0.1), []
    fool, learn = run.critic.fool, run.critic.learn
    run.critic.fool = lambda x0, *more: judged.append(len(x0)) or fool(x0, *more)
    run.critic.learn = lambda x0, *more: judged.append(len(x0)) or learn(x0, *more)
    run.step()
    assert judged == [12 - 2 * 3] * 2
    judged.clear()
    run.economy.rows = 1
    run.step()
    assert judged == [1] * 12


def test_a_student_learns_the_way(tmp_path, teachers):
    """Trained on rows between alone but for a batch, the loss of such rows falls."""
    run = built(tmp_path / "o.safetensors", teachers, mixed=0.6, batch=4, lr=2e-3, steps=60)
    drawn = [run.data.draw(teacher, 4, torch.Generator().manual_seed(9)) for teacher in (0, 1, 2)]
    held = put_between(drawn, run.spec, 0, torch.Generator().manual_seed(9))
    targets = [run.asking.ask(given) for given in run.asking.bring(held)][1:]

    @torch.no_grad()
    def error() -> float:
        said = [run.student(t.given.batch.x_t, t.given.batch.t, t.given.ours, t.styles) for t in targets]
        return sum((a - t.said).square()[: len(t.given.weight)].mean().item()
                   for a, t in zip(said, targets, strict=True))  # fmt: skip

    before = error()
    list(run.run())
    assert error() < 0.6 * before


def test_resume_equals_uninterrupted(tmp_path, teachers):
    spec = {"mixed": 0.4, "adversarial": 0.1, "teachers_per_step": 2}
    straight, resumed = (built(tmp_path / "o.safetensors", teachers, **spec) for _ in range(2))
    straight.step()
    straight.save_state(tmp_path / "state.safetensors")
    straight.step(), straight.step()
    resumed.load_state(tmp_path / "state.safetensors")
    resumed.step(), resumed.step()
    (tensors, strings), (expected, told) = resumed.state(), straight.state()
    assert strings == told and all(torch.equal(tensors[key], expected[key]) for key in expected)


def test_not_with_few_steps():
    given = {"teachers": ["a.safetensors"], "out": "b.safetensors", "train": {"few_step": 3.0, "mixed": 0.2}}
    with pytest.raises(RecipeError, match=r"train\.mixed: expected 0 with few_step, got 0\.2"):
        recipe_from_dict(given, check_files=False)
