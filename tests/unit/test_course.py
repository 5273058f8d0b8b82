"""The parts of a stage, and what a step's time is over all of them."""

from __future__ import annotations

import pytest

from dmm_core import course, trial
from dmm_core.recipe import TrainSpec
from tests.unit.merges import recipe, tiny_teachers


@pytest.mark.parametrize(("more", "expected"), [
    ({}, [(0, 1.0)]),
    ({"mixed": 0.2}, [(0, 0.6), (6, 0.4)]),
    ({"mixed": 0.2, "blockwise": 4.0}, [(0, 0.3), (3, 0.3), (6, 0.4)]),
    ({"blockwise": 4.0, "steps": 1}, [(0, 1.0)]),
    ({"blockwise": 4.0, "steps": 2}, [(0, 0.5), (1, 0.5)]),
])  # fmt: skip
def test_phases(more, expected):
    spec = TrainSpec(**({"steps": 10} | more))
    assert course.phases(spec) == [(first, pytest.approx(share)) for first, share in expected]


def test_what_ends_early_counts_for_as_much_of_the_time(tmp_path, monkeypatch):
    """A step that imitates layers takes 11 seconds here, one with rows between styles 2, another 1."""
    made = recipe(tmp_path / "o.safetensors", tiny_teachers(tmp_path, 2), steps=100, blockwise=1.0, mixed=0.5, batch=4)
    kinds, now = [], [0.0]
    monkeypatch.setattr(trial.time, "monotonic", lambda: now[0])
    real = trial.step_times

    def step_times(run, steps):
        step = run.step

        def timed():
            kinds.append(
                (course.has("blockwise", run.spec, run.step_count), course.has("mixed", run.spec, run.step_count))
            )
            now[0] += 9 * kinds[-1][0] + kinds[-1][1] + 1
            return step()

        run.step = timed
        try:
            return real(run, steps)
        finally:
            del run.step

    monkeypatch.setattr(trial, "step_times", step_times)
    assert trial.run_trial(made, steps=3).seconds_per_step == pytest.approx(0.3 * 11 + 0.3 * 2 + 0.4 * 1)
    assert kinds == [(True, True)] * 3 + [(False, True)] * 2 + [(False, False)] * 2
