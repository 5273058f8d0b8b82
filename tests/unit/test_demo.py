"""How long the demo trains: by what the machine makes, and as it began where it goes on."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

from dmm_core import trial
from dmm_core.commands import demo as command
from dmm_core.recipe import load_recipe
from dmm_core.stages import state_file
from mini_family import demo


def test_held_out_subjects_are_in_no_prompt_to_learn_from():
    prompts, held = demo.training_prompts(), set(demo.held_out_prompts())
    assert held and not held & set(prompts)
    assert len(prompts) == len(set(prompts)) > demo.INVENTED and prompts[0] in demo.shown_prompts()


def test_a_fast_machine_makes_more_steps_within_bounds():
    counts = [demo.steps_that_fit(seconds) for seconds in (0.01, 0.25, 0.3, 1.0, 60.0)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == demo.MOST and counts[-1] == demo.FEWEST
    assert all(count % 100 == 0 for count in counts)


def test_resuming_takes_the_steps_it_began_with(tmp_path, monkeypatch):
    """However fast the machine seems the second time."""
    told: list[str] = []
    report = SimpleNamespace(note=told.append)

    def begin(resume: bool, steps: int | None, seconds: float) -> int:
        monkeypatch.setattr(trial, "run_trial", lambda recipe, steps: SimpleNamespace(seconds_per_step=seconds))
        return command.recipe_of(tmp_path, argparse.Namespace(resume=resume, steps=steps), report).train.steps

    assert begin(False, None, 0.01) == demo.MOST
    assert begin(True, None, 60.0) == demo.MOST and len(told) == 1
    assert begin(False, 40, 60.0) == 40 and len(told) == 1
    assert begin(True, None, 60.0) == 40
    recipe = load_recipe(tmp_path / "mini-dmm.recipe.yaml")
    state_file(recipe).parent.mkdir()
    state_file(recipe).touch()
    begin(False, 50, 60.0)  # the merge then refuses to lose what is there
    assert begin(True, None, 60.0) == 40
