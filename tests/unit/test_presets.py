"""Presets: each is a sound recipe, what the recipe says itself wins, and hosts can list them without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dmm_core.errors import RecipeError
from dmm_core.presets import PRESETS, with_preset
from dmm_core.recipe import dump_recipe, load_recipe, recipe_from_dict


def plain(count: int = 2, **more) -> dict:
    return {"teachers": [f"t{i}.safetensors" for i in range(count)], "out": "o.safetensors", **more}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("count", [1, 2, 3, 8, 40])
def test_each_makes_a_recipe(name, count):
    recipe = recipe_from_dict(plain(count, preset=name), check_files=False)
    train = recipe.train
    rows = train.batch * min(train.teachers_per_step or count, count)
    assert 12 <= rows <= 26, "a step costs about the same, however many teachers there are"
    assert train.save_every < train.steps and recipe.data.kind == "teachers"
    assert PRESETS[name].title and PRESETS[name].does.endswith(".")


def test_they_differ_in_what_they_cost():
    steps = [recipe_from_dict(plain(preset=name), check_files=False).train.steps for name in PRESETS][:3]
    assert list(PRESETS)[:3] == ["preview", "good", "best"] and steps == sorted(set(steps))


def test_explicit_keys_win(tmp_path):
    data = plain(preset="best", train={"steps": 7, "batch": 3}, data={"steps": 2})
    recipe = recipe_from_dict(data, check_files=False)
    assert (recipe.train.steps, recipe.train.batch, recipe.data.steps) == (7, 3, 2)
    assert recipe.train.ema == 0.9995 and recipe.data.latents_per_teacher == 2048, "the rest is the preset's"
    assert data["train"] == {"steps": 7, "batch": 3}, "the mapping that was given is left alone"
    for name in ("t0.safetensors", "t1.safetensors"):
        (tmp_path / name).touch()
    recipe = recipe_from_dict(data, tmp_path)
    dump_recipe(recipe, tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml") == recipe, "a dumped recipe says everything itself"


@pytest.mark.parametrize("name", PRESETS)
def test_what_measured_best_is_in_all_of_them(name):
    """docs/results.md, "Few samples"."""
    made = recipe_from_dict(plain(preset=name), check_files=False)
    assert (made.train.start, made.train.snr_power) == ("average", 0.5)
    assert (made.train.feature, made.train.adversarial) == (0.001, 0.01)
    assert (made.data.foreign, made.train.mixed, made.train.blockwise) == (0.3, 0.25, 4)
    assert made.train.unshrink


@pytest.mark.parametrize("name", PRESETS)
def test_few_steps_leave_out_what_has_no_meaning_there(name):
    def what(part):
        keys = ("snr_power", "feature", "adversarial", "mixed", "blockwise", "unshrink")
        return *(getattr(part.train, key) for key in keys), part.data.foreign

    alone = {**plain(0, preset=name), "student": "s.safetensors", "train": {"few_step": 4.0}}
    made = recipe_from_dict(alone, check_files=False)
    assert made.train.few_step == 4.0 and not any(what(made))
    stage = recipe_from_dict(plain(preset=name, stages=["distil", "few_step"]), check_files=False).stages[1]
    assert stage.train.few_step and not any(what(stage))
    with pytest.raises(RecipeError, match="expected 0 with few_step"):
        recipe_from_dict({**alone, "train": {"few_step": 4.0, "adversarial": 0.1}}, check_files=False)


def test_an_update_inside_the_backward_pass_leaves_out_the_layers_own(tmp_path):
    made = recipe_from_dict(plain(preset="good", train={"fused_backward": True}), check_files=False)
    assert (made.train.blockwise, made.train.mixed) == (0, 0.25)
    with pytest.raises(RecipeError, match="expected 0 with fused_backward, got 1"):
        recipe_from_dict(plain(train={"fused_backward": True, "blockwise": 1}), check_files=False)


def test_without_one_nothing_changes():
    assert with_preset({"teachers": []}, "recipe") == {"teachers": []}
    assert with_preset([1], "recipe") == [1]


def test_faults_are_told():
    with pytest.raises(RecipeError, match=r"there is no 'bst'.*preview, good, best"):
        recipe_from_dict(plain(preset="bst"), source="r.yaml", check_files=False)
    with pytest.raises(RecipeError, match="train: expected a mapping"):
        recipe_from_dict(plain(preset="good", train=3), check_files=False)


def test_listed_without_torch():
    code = "import sys, dmm_core.presets, dmm_core.recipe; print({'torch', 'yaml', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
