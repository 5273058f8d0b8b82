"""What the planner counts: the disk at its fullest, embeddings and pictures in memory, a sampler's step, all styles."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from dmm_core import files, sample, trial
from dmm_core import plan as plans
from dmm_core.errors import BadInput
from dmm_core.plan import open_sources, plan
from dmm_core.recipe import Recipe, recipe_from_dict
from dmm_core.room import latent_bytes, prompt_count, saving_bytes
from dmm_core.run import prepare
from dmm_core.teachers import Teachers
from dmm_core.trial import Fit, Trial, fit, run_trial, weights_bytes
from tests.unit import tiny
from tests.unit.merges import SMALL, TRAIN, recipe, tiny_teachers


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> list[Path]:
    return tiny_teachers(tmp_path_factory.mktemp("teachers"), 2)


# ---------------------------------------------------------------- disk and memory


@pytest.mark.parametrize(
    "more", [{}, {"stages": ["distil", {"name": "synthesised", "train": {"steps": 2}}]},
             {"train": TRAIN | {"student": "lora"}}],
    ids=["whole", "two stages", "low rank"],
)  # fmt: skip
def test_the_disk_holds_the_old_state_beside_the_new_one(tmp_path, teachers, monkeypatch, more):
    """All that lies there just before each file takes its place; small parts such as headers are not counted."""
    paths = [str(path) for path in teachers]
    out = tmp_path / "made" / "o.safetensors"
    made = recipe_from_dict({"teachers": paths, "out": str(out), "data": SMALL, "train": TRAIN} | more)
    told, most, put = plan(made).disk_bytes, [], os.replace

    def noted(source, target):
        most.append(sum(file.stat().st_size for file in out.parent.rglob("*") if file.is_file()))
        put(source, target)

    monkeypatch.setattr(files.os, "replace", noted)
    merge = prepare(made)
    list(merge.steps())
    merge.save()
    assert max(most) == pytest.approx(told, rel=0.02)


def test_another_disk_for_the_work_needs_room_too(tmp_path, teachers, monkeypatch):
    """States and latents go to ``work``, which hosts put elsewhere; the result alone to ``out``."""
    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir()
    work.mkdir()
    made = recipe_from_dict({"teachers": [str(path) for path in teachers], "out": str(out / "o.safetensors"),
                             "work": str(work / "o.work"), "data": SMALL, "train": TRAIN})  # fmt: skip
    disk, size = plan(made).disk_bytes, teachers[0].stat().st_size
    monkeypatch.setattr(plans, "device_of", lambda folder: folder.name)
    for full, free, enough in ((work, disk - 1, False), (work, disk, True), (out, size - 1, False), (out, size, True)):
        room = {full: free}
        usage = lambda path: SimpleNamespace(free=room.get(Path(path), 2**50))  # noqa: B023, E731
        monkeypatch.setattr(plans.shutil, "disk_usage", usage)
        if enough:
            plan(made)
        else:
            with pytest.raises(BadInput, match=rf"{full.name}: needs .* GiB of room"):
                plan(made)


def with_pictures(folder: Path, teachers: list[Path]) -> Recipe:
    """Five pictures, three captions."""
    for i, caption in enumerate(["a cat", "a dog", "a cat", "a cat", "a cow"]):
        Image.new("RGB", (64, 64)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption, encoding="utf-8")
    made = recipe(folder / "o.safetensors", teachers)
    return replace(made, data=replace(made.data, kind="images", path=folder, latents_per_teacher=512))


def test_pictures_and_captions_are_counted(tmp_path, teachers):
    made = with_pictures(tmp_path, teachers)
    assert prompt_count(made) == 3
    assert latent_bytes(made, open_sources(made, check_values=False)) == 5 * 4 * 8 * 8 * 2
    prepare(made)
    cache = replace(made.data, kind="cache", path=tmp_path / "o.work" / "latents.safetensors")
    assert prompt_count(replace(made, data=cache)) == 3


def test_memory_that_no_trial_held(tmp_path, teachers):
    """Embeddings of 3 captions and of none, for the student and each text encoder; latents twice; a save."""
    made = with_pictures(tmp_path, teachers)
    sources = open_sources(made, check_values=False)
    largest = max(tensor.numel() for tensor in sources.base.unet().values())
    for encoders in (1, 2):
        told = plan(made, Fit(made, {}, (Trial(0, 1000, 1.0, 1.0, encoders),)), tried=True)
        embeddings = (3 + 1) * 77 * 64 * 4 * (1 + encoders)
        assert told.ram_bytes == 1000 + embeddings + 2 * 5 * 4 * 8 * 8 * 2 + saving_bytes(sources.base)
    assert 4 * largest <= saving_bytes(sources.base) <= 4 * 4 * largest


def test_the_trial_counts_text_encoders(tmp_path, teachers):
    twin = tmp_path / "twin.safetensors"
    twin.write_bytes(teachers[0].read_bytes())
    assert [run_trial(recipe(tmp_path / "o.safetensors", [teachers[0], other]), steps=2).encoders
            for other in (teachers[1], twin)] == [2, 1]  # fmt: skip


# ---------------------------------------------------------------- time


@pytest.mark.parametrize("resident", [None, 1])
def test_bringing_a_teacher_is_no_step_of_the_sampler(tmp_path, teachers, monkeypatch, resident):
    """By a clock that stands still but for 100 s that a teacher takes to come, and 5 s a step of the sampler."""
    now = 0.0

    def slow(function, seconds):
        def call(*args, **more):
            nonlocal now
            now += seconds
            return function(*args, **more)

        return call

    monkeypatch.setattr(trial, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(Teachers, "_bring", slow(Teachers._bring, 100.0))
    monkeypatch.setattr(sample, "sample_latents", slow(sample.sample_latents, 5.0))
    assert run_trial(recipe(tmp_path / "o.safetensors", teachers, resident=resident)).seconds_per_denoising == 5


# ---------------------------------------------------------------- what is offered


def extending(folder: Path, teachers: list[Path], **train) -> Recipe:
    """Of a file with two styles."""
    student = tiny.write_tiny_dmm(folder / "earlier.safetensors", ("ink", "néon"))
    spec = {"student": str(student), "teachers": [str(path) for path in teachers], "data": SMALL}
    return recipe_from_dict(spec | {"out": str(folder / "o.safetensors"), "train": TRAIN | train})


@pytest.mark.parametrize(
    ("added", "train", "economies"),
    [(1, {}, True), (0, {"few_step": 3.0}, True), (1, {"regularize": 0}, False)],
    ids=["extended", "for few steps", "old styles not asked"],
)
def test_old_styles_take_part(tmp_path, teachers, monkeypatch, added, train, economies):
    """One new teacher beside two styles of a file, or these alone: one at a time is tried before it is given up."""
    made = extending(tmp_path, teachers[:added], **train)
    monkeypatch.setattr(trial, "try_out", lambda stage: Trial(100 if stage.train.micro == 1 else 900, 1, 1.0, 1.0))
    found = fit(made, "cpu", 1, 500)
    assert found.changes == {"resident": 1, "micro": 1} if economies else found is None


def test_more_places_than_teachers_take_no_more_room(tmp_path, teachers, monkeypatch):
    """Two styles of one file are one UNet, and none where they are not asked."""
    monkeypatch.setattr(trial, "try_out", lambda stage: Trial(1, 1, 1.0, 1.0))
    for unets, train in ((2, {"resident": 8}), (1, {"regularize": 0})):
        made = extending(tmp_path, teachers[:1], **train)
        assert fit(made, "cpu", 1000, weights_bytes(made.train, 1000, "cpu", unets)).changes == {}
