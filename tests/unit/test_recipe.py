"""Recipes: what is read, and how each fault is told."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from dmm_core.errors import RecipeError
from dmm_core.recipe import Recipe, dump_recipe, load_recipe, recipe_from_dict

GOOD = """
# a comment
base: base.safetensors
teachers:
  - ink.safetensors
  - {path: néon 2.safetensors, name: neon, weight: 2}
out: out/made.safetensors
default_style: {ink: 1, neon: 3}
data: {kind: teachers, latents_per_teacher: 96, prompt_drop: 0}
train: {steps: 1e4, lr: 1e-5, style_lr: 3.0e-4, betas: [0.9, 0.99], teachers_per_step: 1, ema: 0.99}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "my recipes ü"
    folder.mkdir()
    for name in ("base", "ink", "néon 2"):
        (folder / f"{name}.safetensors").write_bytes(b"x")
    return folder


def written(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def minimal(**more) -> dict:
    return {"teachers": ["ink.safetensors", "base.safetensors"], "out": "made.safetensors", **more}


def test_reads_yaml_relative_to_its_folder(folder):
    recipe = load_recipe(written(folder, GOOD))
    assert [t.name for t in recipe.teachers] == ["ink", "neon"]
    assert recipe.teachers[1].path == folder / "néon 2.safetensors" and recipe.teachers[1].weight == 2.0
    assert recipe.out == folder / "out" / "made.safetensors" and recipe.base == folder / "base.safetensors"
    assert recipe.train.steps == 10_000 and recipe.train.lr == 1e-5 and recipe.train.betas == (0.9, 0.99)
    assert recipe.data.prompt_drop == 0.0 and recipe.default_style == {"ink": 1.0, "neon": 3.0}


def test_defaults_follow_the_paper(folder):
    recipe = recipe_from_dict(minimal(), folder)
    assert (recipe.train.lr, recipe.data.prompt_drop, recipe.train.start) == (1e-5, 0.1, "average")
    assert recipe.base is None and recipe.include_recipe and recipe.evaluate.images_per_style == 0


def test_json_and_yaml_agree(folder):
    data = minimal(train={"lr": 0.001})
    as_json = load_recipe(written(folder, json.dumps(data), "recipe.json"))
    assert as_json == load_recipe(written(folder, json.dumps(data), "recipe.yaml")) == recipe_from_dict(data, folder)


def test_dump_and_load_give_the_same(folder, tmp_path):
    recipe = load_recipe(written(folder, GOOD))
    dump_recipe(recipe, tmp_path / "elsewhere" / "copy.yaml")
    assert load_recipe(tmp_path / "elsewhere" / "copy.yaml") == recipe
    assert recipe_from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_names_only_tells_no_folder(folder):
    recipe = load_recipe(written(folder, GOOD))
    told = recipe.to_dict(names_only=True)
    assert "ü" not in json.dumps(told, ensure_ascii=False) and told["teachers"][1]["path"] == "néon 2.safetensors"
    again = recipe_from_dict(told, check_files=False)
    assert [t.name for t in again.teachers] == ["ink", "neon"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have names of text alone")
@pytest.mark.parametrize("key", ["teachers[1].path", "base", "out"])
def test_a_name_that_is_no_text_is_refused_before_anything_is_learnt(folder, key):
    """It could not be written into the file's metadata, at the very end."""
    bad = os.fsdecode(b"caf\xe9.safetensors")
    shutil.copy(folder / "base.safetensors", folder / bad)
    data = minimal() | ({key: bad} if key in ("base", "out") else {})
    if key.startswith("teachers"):
        data["teachers"] = [data["teachers"][0], bad]
    with pytest.raises(RecipeError) as told:
        recipe_from_dict(data, folder)
    line = str(told.value).encode().decode()  # can be shown
    assert key in line and "no text" in line and "\n" not in line


def test_frozen(folder):
    recipe: Recipe = recipe_from_dict(minimal(), folder)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.title = "other"  # type: ignore[misc]


FAULTS = [
    ({"trian": {}}, ["unknown key trian", "Did you mean train?"]),
    ({"train": {"learning": 1}}, ["unknown key train.learning", "The keys there are", "lr"]),
    ({"train": {"lr": -1}}, ["train.lr", "greater than 0", "got -1"]),
    ({"train": {"lr": "fast"}}, ["train.lr", "a number", "'fast'"]),
    ({"train": {"lr": float("nan")}}, ["train.lr", "a number", "nan"]),
    ({"train": {"steps": 1.5}}, ["train.steps", "a whole number", "1.5"]),
    ({"evaluate": {"images_per_style": 96}}, ["evaluate.images_per_style", "got 96", "dmm evaluate"]),
    ({"train": {"steps": 10**400}}, ["train.steps", "a whole number", "1000"]),
    ({"work": "ink.safetensors/x"}, ["work", "cannot be written", "is not a folder"]),
    ({"base": "~nobody is called so"}, ["base: there is no", "~nobody"]),
    ({"train": {"steps": True}}, ["train.steps", "a whole number", "True"]),
    ({"train": {"steps": None}}, ["train.steps", "got nothing"]),
    ({"train": {"ema": 1}}, ["train.ema", "less than 1"]),
    ({"train": {"betas": [0.9]}}, ["train.betas", "a list of 2"]),
    ({"train": {"betas": [0.9, 2]}}, ["train.betas[1]", "less than 1"]),
    ({"train": {"schedule": "cosin"}}, ["train.schedule", "one of cosine, constant", "Did you mean cosine?"]),
    ({"train": {"precision": "int8"}}, ["train.precision", "auto, fp32, bf16, fp16", "'int8'"]),
    ({"train": {"device": "gpu"}}, ["train.device", "cuda", "'gpu'"]),
    ({"train": {"start": "base"}}, ["base is missing"]),
    ({"train": {"resident": 3}}, ["train.resident", "2 teachers"]),
    ({"train": 3}, ["train", "a mapping", "3"]),
    ({"data": {"prompt_drop": 1.5}}, ["data.prompt_drop", "at least 0 and at most 1", "1.5"]),
    ({"data": {"kind": "images"}}, ["data.path is missing"]),
    ({"data": {"kind": "web"}}, ["data.kind", "teachers, images, cache"]),
    ({"data": {"size": 100}}, ["data.size", "multiple of 8"]),
    ({"teachers": []}, ["teachers", "at least one"]),
    ({"teachers": "ink.safetensors"}, ["teachers", "a list"]),
    ({"teachers": [{"name": "a"}]}, ["teachers[0].path is missing"]),
    ({"teachers": [{"path": "ink.safetensors", "name": True}]}, ["teachers[0].name", "quotes"]),
    ({"teachers": ["ink.safetensors", "ink.safetensors"]}, ["teachers[1].name", "'ink'", "twice"]),
    ({"teachers": ["inc.safetensors"]}, ["teachers[0].path", "inc.safetensors", "Did you mean ink.safetensors?"]),
    ({"teachers": ["ink.safetensors"], "out": "ink.safetensors"}, ["out", "would be lost"]),
    ({"out": "made.ckpt"}, ["out", ".safetensors", "made.ckpt"]),
    ({"out": "base.safetensors/x/made.safetensors"}, ["out", "not a folder"]),
    ({"default_style": {"oil": 1}}, ["default_style", "'oil'", "ink, base"]),
    ({"default_style": {"ink": 1, "base": -1}}, ["default_style", "sum to 0"]),
    ({"default_style": {"ink": "much"}}, ["default_style.ink", "a number"]),
]


@pytest.mark.parametrize(("change", "told"), FAULTS)
def test_faults_name_file_key_and_values(folder, change, told):
    with pytest.raises(RecipeError) as caught:
        recipe_from_dict(minimal(**change), folder, source="my.yaml")
    line = str(caught.value)
    assert line.startswith("my.yaml: ") and "\n" not in line
    for part in told:
        assert part in line, line


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.yaml", "teachers: [a\nout: b", "line"),
        ("a.yaml", "out: a.safetensors\nout: b.safetensors", "out is there twice"),
        ("a.yaml", 'out: "C:\\models\\x.safetensors"', "single"),
        ("a.yaml", "", "expected a mapping, got nothing"),
        ("a.json", "{,}", "line 1 is not valid JSON"),
        ("a.json", '{"out": "a", "out": "b"}', "out is there twice"),
        ("a.yaml", "!!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_broken_text_is_told_in_one_line(folder, name, text, told):
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(folder, text, name))
    assert name in str(caught.value) and told in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_no_recipes(folder):
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    for name, told in (("binary.yaml", "not UTF-8"), ("gone.yaml", "cannot be read")):
        with pytest.raises(RecipeError, match=told):
            load_recipe(folder / name)
