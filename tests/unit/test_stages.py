"""Stages of a recipe: what each takes over, data made once, exact resume at any point, the command."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from dmm_core.checkpoint import open_checkpoint
from dmm_core.cli import main
from dmm_core.errors import BadInput, RecipeError
from dmm_core.jobs import essence
from dmm_core.plan import plan
from dmm_core.recipe import dump_recipe, load_recipe, recipe_from_dict
from dmm_core.run import prepare
from dmm_core.stages import stage_recipe, stage_recipes, total_steps, unfinished
from tests.unit import tiny
from tests.unit.merges import SMALL, TRAIN, furthest, tiny_teachers


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> list[Path]:
    return tiny_teachers(tmp_path_factory.mktemp("teachers"), 2)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(3):
        Image.new("RGB", (64, 64), (80 * i, 40, 200)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}", encoding="utf-8")
    return folder


def recipe(out: Path, teachers: list[Path], stages, data=None, **train):
    spec = {"teachers": [str(path) for path in teachers], "out": str(out), "data": data or SMALL, "stages": stages}
    return recipe_from_dict(spec | {"train": TRAIN | {"steps": 3, "save_every": 0} | train})


def test_synthesised_is_a_tenth_of_the_steps_on_teachers_pictures(tmp_path, teachers, pictures):
    images = {"kind": "images", "path": str(pictures), "size": 64}
    made = recipe(tmp_path / "o.safetensors", teachers, ["distil", "synthesised"], images, steps=100, style_lr=2e-3)
    first, second = stage_recipes(made)
    assert (first.data.kind, first.train.steps) == ("images", 100)
    assert (second.data.kind, second.data.path, second.data.size, second.train.steps) == ("teachers", None, 64, 10)
    rates = [rate / 10 for rate in (first.train.lr, first.train.style_lr)]
    assert [second.train.lr, second.train.style_lr] == pytest.approx(rates)
    assert first.work != second.work and total_steps(made) == 110
    own = {"name": "synthesised", "data": {"latents_per_teacher": 9}, "train": {"steps": 7, "lr": 1e-5}}
    second = stage_recipe(recipe(tmp_path / "o.safetensors", teachers, ["distil", own]), 1)
    assert (second.data.latents_per_teacher, second.train.steps, second.train.lr) == (9, 7, 1e-5)


def test_a_recipe_with_stages_reads_back(tmp_path, teachers):
    made = recipe(tmp_path / "o.safetensors", teachers, ["distil", {"name": "synthesised", "train": {"steps": 2}}])
    dump_recipe(made, tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml") == made
    earlier = json.loads(json.dumps(made.to_dict()))
    for part in (earlier, *earlier["stages"]):
        del part["train"]["unshrink"], part["data"]["foreign"]  # it knew neither
    assert essence(earlier) == essence(json.loads(json.dumps(made.to_dict())))
    other = recipe(tmp_path / "o.safetensors", teachers, ["distil"])
    assert essence(json.loads(json.dumps(made.to_dict()))) != essence(json.loads(json.dumps(other.to_dict())))


@pytest.mark.parametrize(
    ("stages", "told"),
    [(["distill"], "Did you mean distil"), ([{"name": "distil", "train": {"steps": 0}}], r"stages\[0\].train.steps"),
     (["distil", {"name": "distil", "train": {"student": "lora"}}], "one train.student"), ("distil", "stages"),
     (["distil", {"name": "distil", "train": {"channels_last": True}}], "one train.channels_last"),
     (["distil", {"name": "synthesised", "train": {"steps": float("nan")}}], r"stages\[1\].train.steps"),
     ([{"train": {}}], "name")],
)  # fmt: skip
def test_impossible_stages(tmp_path, teachers, stages, told):
    with pytest.raises(RecipeError, match=told):
        recipe(tmp_path / "o.safetensors", teachers, stages)


def test_a_stage_starts_from_the_student_before(tmp_path, teachers):
    """Weights and samples go on; optimizer and schedule begin anew; equal data are made once."""
    made = recipe(
        tmp_path / "o.safetensors", teachers, ["distil", {"name": "synthesised", "train": {"steps": 2}}], ema=0.5
    )
    told: list[str] = []
    merge = prepare(made, notify=lambda what, done, total: told.append(what))
    seen = []
    for result in merge.steps():
        seen.append((result.step, result.samples_seen, result.lr))
        if result.step == 3:
            merge.distillation.use_average()  # as the stage's end does
            end = {key: value.clone() for key, value in merge.distillation.student.learned().items()}
        if result.step == 4:
            assert merge.stage == 1 and merge.distillation.step_count == 1
            moved = {key: value.clone() for key, value in merge.distillation.student.learned().items()}
    assert [row[:2] for row in seen] == [(1, 4), (2, 8), (3, 12), (4, 16), (5, 20)]
    assert seen[3][2] == pytest.approx(seen[0][2] / 10)
    assert 0 < furthest(end, moved) < 3e-4  # one step at lr 1e-4 away
    assert len(told) == 2 and not (merge.work / "stage-2").exists()  # two teachers drew, once
    assert merge.save().exists() and not merge.work.exists()


def test_each_stage_has_its_own_places_for_teachers(tmp_path, teachers):
    stages = ["distil", {"name": "distil", "train": {"resident": 1}}, "distil"]
    merge = prepare(recipe(tmp_path / "o.safetensors", teachers, stages, steps=1))
    places = [merge.distillation.teachers.resident for _ in merge.steps()]
    assert places == [2, 1, 2]


def test_data_of_its_own_is_made_when_its_turn_comes(tmp_path, teachers, pictures):
    images = {"kind": "images", "path": str(pictures), "latents_per_teacher": 3, "steps": 1, "cfg_scale": 1, "size": 64}
    merge = prepare(recipe(tmp_path / "o.safetensors", teachers, ["distil", "synthesised"], images))
    assert not (merge.work / "stage-2").exists() and len(merge.distillation.data.pools) == 1
    list(merge.steps())
    assert (merge.work / "stage-2" / "latents.safetensors").exists() and len(merge.distillation.data.pools) == 2


@pytest.mark.parametrize("stop_at", [2, 3, 4])
def test_resume_equals_uninterrupted(tmp_path, teachers, stop_at):
    """Law 6: stopped within the first stage, at its last step, and within the second."""
    stages = ["distil", {"name": "synthesised", "train": {"steps": 3, "lr": 5e-4}}]
    straight = prepare(recipe(tmp_path / "straight.safetensors", teachers, stages, ema=0.9))
    list(straight.steps())
    made = recipe(tmp_path / "broken.safetensors", teachers, stages, ema=0.9)
    first = prepare(made)
    with pytest.raises(KeyboardInterrupt):
        for _ in first.steps(stop=lambda: first.distillation.steps_done == stop_at):
            pass
    assert unfinished(made)
    with pytest.raises(BadInput, match="interrupted run"):
        prepare(made)
    second = prepare(made, resume=True)
    assert second.distillation.steps_done == stop_at
    list(second.steps())
    (tensors, strings), (expected, told) = second.distillation.state(), straight.distillation.state()
    assert strings == told and all(torch.equal(tensors[key], expected[key]) for key in expected)


def test_broken_off_between_two_stages(tmp_path, teachers):
    """The first stage's student is there, a state of the second is not: the second begins, and nothing is lost."""
    stages = ["distil", {"name": "synthesised", "train": {"steps": 2}}]
    merge = prepare(recipe(tmp_path / "o.safetensors", teachers, stages))
    steps = merge.steps()
    while merge.stage == 0:
        next(steps)
    whole = [merge.distillation.steps_done, *(result.step for result in steps)]
    again = prepare(merge.recipe, resume=True)
    assert (again.stage, again.distillation.steps_done) == (1, 3)
    assert [result.step for result in again.steps()] == whole == [4, 5]
    assert furthest(merge.distillation.student.learned(), again.distillation.student.learned()) == 0


def test_two_processes_do_what_one_does(tmp_path, teachers):
    """As in test_distill.py, with the adversarial loss and a second stage; the discriminator too."""
    three = [*teachers, tmp_path / "third.safetensors"]
    tiny.write_tiny(three[-1], seed=99, vocab=49408)
    losses, students, critics = [], [], []
    for processes in (1, 2):
        stages = ["distil", {"name": "synthesised", "train": {"steps": 1}}]
        made = recipe(
            tmp_path / f"{processes}.safetensors", three, stages, processes=processes, lr=1e-4, adversarial=0.1
        )
        merge = prepare(made)
        steps = list(merge.steps())
        losses += [[told for step in steps for told in (step.score, step.of("discriminator"))]]
        run = merge.distillation
        students += [{key: value.clone() for key, value in run.student.learned().items()}]
        critics += [{key: value.clone() for key, value in run.critic.module.learned().items()}]
    assert len(losses[0]) == 2 * (3 + 1)
    for one, two in zip(*losses, strict=True):
        assert one == pytest.approx(two, rel=1e-3)
    assert furthest(*students) < 1e-4 and furthest(*critics) < 1e-4, "four steps may move a weight by 4e-4"


def test_the_commands(tmp_path, teachers, capsys):
    made = recipe(tmp_path / "o.safetensors", teachers, ["distil", {"name": "synthesised", "train": {"batch": 1}}])
    dump_recipe(made, tmp_path / "r.yaml")
    told = plan(made)
    assert (told.steps, told.samples) == (4, 3 * 4 + 1 * 2)
    assert main(["distill", str(tmp_path / "r.yaml"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["steps"], answer["samples_seen"]) == (4, 14)
    inside = json.loads(open_checkpoint(made.out).metadata["dmm.recipe"])
    assert [stage["name"] for stage in inside["stages"]] == ["distil", "synthesised"]


def test_work_folder_keeps_what_is_not_the_merges(tmp_path, teachers):
    """A recipe may name any folder for its work: only what the merge put there goes."""
    work = tmp_path / "mine"
    (work / "stage-2").mkdir(parents=True)
    (work / "notes.txt").write_text("mine")
    (work / "stage-2" / "other.safetensors").touch()
    (work / ".state.safetensors.0123456789ab.tmp").touch()  # of a process that was killed while it saved
    stages = ["distil", {"name": "synthesised", "train": {"steps": 1}, "data": {"cfg_scale": 1.5}}]
    merge = prepare(replace(recipe(tmp_path / "o.safetensors", teachers, stages, steps=1), work=work))
    assert not list(work.glob(".*.tmp"))
    list(merge.steps())
    assert (work / "stage-2" / "latents.safetensors").exists() and merge.save().exists()
    assert sorted(p.name for p in work.rglob("*")) == ["notes.txt", "other.safetensors", "stage-2"]


def test_work_folder_of_its_own(tmp_path, teachers):
    spec = {"teachers": [str(t) for t in teachers], "data": SMALL, "train": TRAIN}
    with pytest.raises(RecipeError, match="work: out lies in it"):
        recipe_from_dict(spec | {"out": str(tmp_path / "a" / "o.safetensors"), "work": str(tmp_path)})
    with pytest.raises(RecipeError, match=r"work: teachers\[0\].path lies in it"):
        recipe_from_dict(spec | {"out": str(tmp_path / "o.safetensors"), "work": str(Path(teachers[0]).parent)})


def test_a_stage_is_gone_before_the_next_one_comes(tmp_path, teachers):
    """Student, gradients and moments of one stage are what a device has room for, not those of two."""
    made = recipe(tmp_path / "o.safetensors", teachers, ["distil", {"name": "synthesised", "data": {"cfg_scale": 1.5}}])
    held: list[weakref.ref] = []
    drawn: list[tuple[int, bool]] = []
    merge = prepare(made, notify=lambda *_: drawn.append((merge.steps_done, held[0]() is None)) if held else None)
    for _ in merge.steps_of_stage(lambda: False):
        held = held or [weakref.ref(merge.distillation)]
    assert merge.begin_next_stage()
    assert drawn and set(drawn) == {(merge.distillation.steps_done, True)}


def test_a_student_of_other_teachers_is_not_gone_on_with(tmp_path, teachers):
    """Interrupted while the second stage draws; then the recipe names another teacher."""
    stages = ["distil", {"name": "synthesised", "data": {"cfg_scale": 1.5}}]

    def break_off(what, done, total):
        if (tmp_path / "o.work" / "student-1.safetensors").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(prepare(recipe(tmp_path / "o.safetensors", teachers, stages), notify=break_off).steps())
    other = tiny.write_tiny(tmp_path / "other.safetensors", seed=77)
    with pytest.raises(BadInput, match="other teachers"):
        prepare(recipe(tmp_path / "o.safetensors", [teachers[0], other], stages), resume=True)
    assert prepare(recipe(tmp_path / "o.safetensors", teachers, stages), resume=True).stage == 1


def test_a_state_without_a_gradient_scaler_is_taken_up_in_float16(tmp_path, teachers):
    """On another device, say: ``precision: auto`` may choose another one there."""
    merge = prepare(recipe(tmp_path / "o.safetensors", teachers, ["distil"]))
    next(iter(merge.steps()))
    merge.distillation.save_state(tmp_path / "state.safetensors")
    merge.distillation.scaler = torch.amp.GradScaler("cpu", enabled=True)
    merge.distillation.load_state(tmp_path / "state.safetensors")
    assert merge.distillation.step_count == 1
