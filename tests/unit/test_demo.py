"""How long the demo trains: by what the machine makes, and as it began where it goes on."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest

from dmm_core import shell, trial
from dmm_core.commands import demo as command
from dmm_core.commands import distill
from dmm_core.errors import BadInput
from dmm_core.recipe import dump_recipe, load_recipe
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


def begin(out, resume=False):
    args = argparse.Namespace(resume=resume, steps=40)
    return command.recipe_of(out, args, SimpleNamespace(note=lambda line: None))


def test_files_that_the_user_has_there_stay(tmp_path):
    (tmp_path / "prompts.txt").write_text("mine", encoding="utf-8")
    begin(tmp_path)
    assert (tmp_path / "prompts.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("text", ["title: mine", "- no recipe", "title: [", "others"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_recipe_that_is_not_the_demos_stays(tmp_path, text, resume):
    if text == "others":  # the demo's of another folder
        text = (begin(tmp_path / "other").out.parent / "mini-dmm.recipe.yaml").read_text(encoding="utf-8")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mini-dmm.recipe.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(BadInput, match="not a recipe of this folder's demo"):
        begin(out, resume)
    assert [path.name for path in out.iterdir()] == ["mini-dmm.recipe.yaml"]
    assert (out / "mini-dmm.recipe.yaml").read_text(encoding="utf-8") == text


def test_a_demo_of_an_earlier_version_goes_on(tmp_path):
    """Its prompts lie in prompts.txt; and the folder may be named in another way than when it began."""
    recipe = begin(tmp_path)
    (tmp_path / "mini-dmm.prompts.txt").rename(tmp_path / "prompts.txt")
    earlier = replace(recipe, data=replace(recipe.data, prompts=tmp_path / "prompts.txt"))
    dump_recipe(earlier, tmp_path / "mini-dmm.recipe.yaml")
    assert begin(tmp_path / "teachers" / "..", resume=True) == earlier
    assert not (tmp_path / "mini-dmm.prompts.txt").exists()


def test_a_stop_tells_a_line_that_goes_on(tmp_path, monkeypatch):
    told: list[str] = []

    def train(recipe, resume, report, again):
        told.append(again)
        raise KeyboardInterrupt

    monkeypatch.setattr(distill, "train", train)
    monkeypatch.chdir(tmp_path)
    args = argparse.Namespace(out="my demo", resume=False, steps=40)
    with pytest.raises(KeyboardInterrupt):
        command.run(args, SimpleNamespace(note=lambda line: None))
    assert shlex.split(told[0])[-4:] == ["demo", "--out", str(tmp_path / "my demo"), "--resume"]
    assert told[0].startswith(shell.command("demo", "--out"))
