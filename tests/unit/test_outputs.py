"""What lies at an output already: this very merge, another one, or somebody's file."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from dmm_core import outputs
from dmm_core.asked import Place, recipe_for
from dmm_core.checkpoint import open_checkpoint
from dmm_core.errors import BadInput
from dmm_core.outputs import settled
from dmm_core.recipe import FREE, PLANNED, Recipe
from dmm_core.student import Student
from tests.unit import tiny


@pytest.fixture
def place(tmp_path) -> Place:
    """Checkpoints v1/a and v1/b, and v2/a, another one that is as old."""
    root = tmp_path / "check points"
    for seed, name in ((0, "v1/a"), (50, "v1/b"), (90, "v2/a")):
        path = root / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.utime(tiny.write_tiny(path, seed=seed), (10**9, 10**9))
    return Place(root, tmp_path / "own")


def asked(place: Place, *names: str, **train) -> Recipe:
    teachers = [place.checkpoints / f"{name}.safetensors" for name in names]
    return recipe_for("out", place, teachers, {"preset": "mini", "train": train})


def make(recipe: Recipe) -> None:
    base = open_checkpoint(recipe.teachers[0].path)
    info = [
        {"name": t.name, "teacher": t.path.name, "sha256": open_checkpoint(t.path).sha256()} for t in recipe.teachers
    ]
    student = Student.start(base, base.unet(), tuple(t.name for t in recipe.teachers), None, 0)
    student.save(recipe.out, base, style_info=info, title="x", recipe=recipe.to_dict(names_only=True))


def test_the_same_files_are_the_same_merge(place):
    one = asked(place, "v1/a", "v1/b")
    assert not settled(one, False)
    make(one)
    assert settled(one, False) and settled(one, True)
    other = place.checkpoints / "elsewhere"
    shutil.copytree(place.checkpoints / "v1", other)  # with their times
    assert settled(asked(place, "elsewhere/a", "v1/b"), False), "the files count, not where they lie"


def test_another_file_of_the_same_name_is_another_merge(place):
    make(asked(place, "v1/a", "v1/b"))
    other = asked(place, "v2/a", "v1/b")
    with pytest.raises(BadInput, match="is a merge with other settings"):
        settled(other, False)
    assert not settled(other, True)


def test_files_are_read_once_and_only_where_all_else_is_equal(place, monkeypatch):
    make(asked(place, "v1/a", "v1/b"))
    read: list[Path] = []
    real = outputs.sha256
    monkeypatch.setattr(outputs, "sha256", lambda path: read.append(path) or real(path))
    assert not settled(asked(place, "v1/a", "v1/b", lr=0.5), True) and read == []
    for _ in range(2):
        assert settled(asked(place, "v1/a", "v1/b"), False)
    assert [path.name for path in read] == ["a.safetensors", "b.safetensors"]


def test_keys_that_are_free_do_not_count(place):
    make(asked(place, "v1/a", "v1/b", student="lora"))
    assert settled(asked(place, "v1/a", "v1/b"), False, (*FREE, *PLANNED))
    with pytest.raises(BadInput, match="other settings"):
        settled(asked(place, "v1/a", "v1/b"), False)


def test_somebody_s_file_is_left_alone(place):
    one = asked(place, "v1/a", "v1/b")
    shutil.copy(one.teachers[0].path, one.out)
    with pytest.raises(BadInput, match="exists and is not a merge"):
        settled(one, True)
