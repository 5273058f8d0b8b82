"""Shrinkage: what a student makes of its teachers' differences, against students of which it is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dmm_core.run
from dmm_core.checkpoint import open_checkpoint
from dmm_core.distill import Distillation
from dmm_core.errors import RecipeError
from dmm_core.export import export
from dmm_core.recipe import recipe_from_dict
from dmm_core.run import prepare
from dmm_core.shrinkage import ROWS, draw, share_of_differences, unshrink
from dmm_core.style import one_hot
from tests.unit import tiny
from tests.unit.merges import SMALL, TRAIN, built, tiny_teachers

NAMES = ("ink", "neon")


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> tuple[Path, list[Path]]:
    return of_family(tmp_path_factory.mktemp("merged"), "sd15")


def of_family(folder: Path, family: str) -> tuple[Path, list[Path]]:
    """A DMM file, and two of its styles as checkpoints of their own."""
    file = tiny.write_tiny_dmm(folder / "dmm.safetensors", NAMES, family=family)
    baked = [folder / f"{name}.safetensors" for name in NAMES]
    for name, path in zip(NAMES, baked, strict=True):
        export(open_checkpoint(file), {name: 1.0}, path, name, bake=True)
    return file, baked


def known(out: Path, merged: tuple[Path, list[Path]]) -> Distillation:
    """The DMM file as the student of its own styles: it says what they say."""
    file, baked = merged
    run, checkpoint = built(out, baked, batch=24), open_checkpoint(file)
    codebook = checkpoint.codebook()
    assert codebook is not None
    run.student.unet.load_state_dict({key: tensor.float() for key, tensor in checkpoint.unet().items()})
    run.student.codebook.load_state_dict(codebook.state_dict())
    return run


def vectors(run: Distillation) -> torch.Tensor:
    codebook = run.student.codebook
    return torch.stack([codebook.style(one_hot(codebook.names, name)) for name in codebook.names]).detach()


@pytest.mark.parametrize(("family", "cfg_scale"), [("sd15", 1.0), ("sdxl", 3.0)])
def test_a_student_that_says_what_its_teachers_say_has_all_of_it(tmp_path, family, cfg_scale):
    run = known(tmp_path / "o.safetensors", of_family(tmp_path, family))
    before = vectors(run)
    share = unshrink(run, cfg_scale)
    assert share == pytest.approx(1, abs=2e-3)  # the files are float16
    torch.testing.assert_close(vectors(run), before, rtol=5e-3, atol=5e-3)
    with torch.no_grad():
        for parameter in run.student.codebook.parameters():
            parameter.zero_()
    assert abs(share_of_differences(run, cfg_scale)) < 0.2, "all styles alike: nothing of it"


@pytest.mark.parametrize("left", [0.95, 0.85])
def test_what_is_missing_is_put_back(tmp_path, merged, left):
    run = known(tmp_path / "o.safetensors", merged)
    whole = vectors(run)
    run.student.codebook.stretch(left)
    drawn_in = (vectors(run) - whole).norm()
    share = unshrink(run, 1.0)
    assert share == pytest.approx(left, abs=0.06), "what a UNet says is not linear in the style"
    assert (vectors(run) - whole).norm() < 0.5 * drawn_in
    assert abs(1 - share_of_differences(run, 1.0)) < 0.5 * (1 - share)


def test_more_than_all_is_left_alone(tmp_path, merged):
    run = known(tmp_path / "o.safetensors", merged)
    run.student.codebook.stretch(1.2)
    before = vectors(run)
    assert unshrink(run, 1.0) > 1
    assert torch.equal(vectors(run), before)


def test_a_student_that_has_hardly_begun_is_moved_little(tmp_path, merged):
    run = known(tmp_path / "o.safetensors", merged)
    run.student.codebook.stretch(0.2)
    before = vectors(run)
    assert unshrink(run, 1.0) < 0.4
    apart = [(v - v.mean(0)).norm().item() for v in (before, vectors(run))]
    assert apart[1] == pytest.approx(2 * apart[0], rel=1e-4)


def test_samples_are_the_teachers_own_with_their_prompts(tmp_path, merged):
    run = known(tmp_path / "o.safetensors", merged)
    batches = draw(run)
    rows = [sum(len(batch.t) for batch in batches if batch.teacher == k) for k in range(len(NAMES))]
    assert len(set(rows)) == 1 and ROWS <= sum(rows) < ROWS + 2 * len(rows) * run.spec.batch
    assert all((batch.prompt < len(run.data.prompts) - 1).all() for batch in batches)
    again = draw(run)
    assert all(torch.equal(one.x_t, two.x_t) for one, two in zip(batches, again, strict=True))


# ---------------------------------------------------------------- in a merge


def recipe(out: Path, teachers: list[Path], **train):
    return recipe_from_dict({
        "teachers": [str(path) for path in teachers], "out": str(out), "data": SMALL | {"cfg_scale": 2.0},
        "train": TRAIN | {"batch": 8, "save_every": 2, "unshrink": True} | train,
    })  # fmt: skip


def finished(merge):
    list(merge.steps())
    merge.finish()
    return open_checkpoint(merge.save()).codebook()


def test_a_merge_does_it_once_after_its_last_step(tmp_path):
    teachers = tiny_teachers(tmp_path, 2)
    merge = prepare(recipe(tmp_path / "o.safetensors", teachers))
    plain = prepare(recipe(tmp_path / "plain.safetensors", teachers, unshrink=False))
    moved, as_it_was = finished(merge), finished(plain)
    assert 0 < merge.share < 1 and plain.share is None, "four steps learn little"
    apart = [b.style({"teacher 0": 1.0}) - b.style({"teacher 1": 1.0}) for b in (moved, as_it_was)]
    torch.testing.assert_close(apart[0], apart[1] / max(0.5, merge.share), rtol=1e-4, atol=1e-6)


def test_broken_off_before_it_was_saved(tmp_path):
    """The state is that of the last step: it is not done twice."""
    teachers = tiny_teachers(tmp_path, 2)
    first = prepare(recipe(tmp_path / "o.safetensors", teachers))
    list(first.steps())
    first.finish()
    again = prepare(first.recipe, resume=True)
    list(again.steps())
    again.finish()
    assert again.share == first.share
    one, two = (merge.distillation.student.codebook.state_dict() for merge in (first, again))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_merge_of_before_goes_on_with_it(tmp_path):
    teachers = tiny_teachers(tmp_path, 2)
    first = prepare(recipe(tmp_path / "o.safetensors", teachers, unshrink=False))
    with pytest.raises(KeyboardInterrupt):
        list(first.steps(stop=lambda: True))
    again = prepare(recipe(tmp_path / "o.safetensors", teachers), resume=True)
    assert finished(again) is not None and again.share is not None


def test_a_stage_ends_with_it_too(tmp_path):
    teachers = tiny_teachers(tmp_path, 2)
    made = recipe(tmp_path / "o.safetensors", teachers)
    spec = made.to_dict() | {"stages": ["distil", {"name": "few_step", "train": {"steps": 1}}]}
    merge = prepare(recipe_from_dict(spec))
    seen = [(merge.stage, merge.share) for _ in merge.steps()]
    assert seen[0] == (0, None) and seen[-1][0] == 1 and seen[-1][1] is not None
    share = merge.share
    merge.finish()
    assert merge.share == share, "few steps are of another kind"


def test_one_teacher_has_no_difference(tmp_path):
    merge = prepare(recipe(tmp_path / "o.safetensors", tiny_teachers(tmp_path, 1)))
    finished(merge)
    assert merge.share is None


def test_a_memory_too_small_costs_nothing_else(tmp_path, monkeypatch):
    def no_memory(*arguments):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB")

    monkeypatch.setattr(dmm_core.run, "unshrink", no_memory)
    merge = prepare(recipe(tmp_path / "o.safetensors", tiny_teachers(tmp_path, 2)))
    assert finished(merge) is not None and merge.share is None
    assert ["moved apart" in line for line in merge.warnings] == [True]


def test_styles_that_are_to_stay(tmp_path):
    spec = {"teachers": ["a.safetensors"], "student": "s.safetensors", "out": "o.safetensors", "preset": "good"}
    assert not recipe_from_dict(spec, check_files=False).train.unshrink
    with pytest.raises(RecipeError, match=r"train.unshrink: expected false with student.* old styles"):
        recipe_from_dict(spec | {"train": {"unshrink": True}}, check_files=False)
    with pytest.raises(RecipeError, match=r"train.unshrink: expected false with few_step"):
        recipe_from_dict({**spec, "train": {"unshrink": True, "few_step": 4.0}}, check_files=False)
