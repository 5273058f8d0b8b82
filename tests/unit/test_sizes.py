"""Training in several sizes: which, what they are made of, one a step, exact resume, SDXL's sizes, the planner."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from dmm_core import trial
from dmm_core.checkpoint import open_checkpoint
from dmm_core.cli import main
from dmm_core.data import LatentData, Pool, encode_images, load_cache
from dmm_core.errors import BadInput, RecipeError
from dmm_core.models import load_pipeline
from dmm_core.plan import latent_bytes, open_sources, plan
from dmm_core.recipe import dump_recipe, recipe_from_dict
from dmm_core.run import prepare, ready
from dmm_core.sizes import buckets, latent_sizes, nearest, squarest
from dmm_core.trial import Trial, fit, run_trial
from tests.unit.merges import SMALL, TRAIN, furthest, tiny_teachers

SIZES = ["64x64", "48x80", "80x48"]
LATENTS = [(8, 8), (10, 6), (6, 10)]
SEED = 2  # of five steps that have all sizes, before and after a resume


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> list[Path]:
    return tiny_teachers(tmp_path_factory.mktemp("teachers"), 2)


def recipe(out: Path, teachers: list[Path], data=None, **train):
    data = {k: v for k, v in SMALL.items() if k != "size"} | {"sizes": SIZES, "latents_per_teacher": 7} | (data or {})
    spec = {"teachers": [str(path) for path in teachers], "out": str(out), "data": data, "train": TRAIN | train}
    return recipe_from_dict(spec)


# ---------------------------------------------------------------- which sizes


def kohyas(side: int, low: int, high: int) -> set[tuple[int, int]]:
    """What sd-scripts' make_bucket_resolutions documents: every width in steps of 64, the height the area allows."""
    made = {(side, side)}
    for width in range(low, high + 1, 64):
        height = min(high, side * side // width // 64 * 64)
        if height >= low:
            made |= {(width, height), (height, width)}
    return made


@pytest.mark.parametrize(
    ("side", "aspect", "low", "high"), [(512, 4.0, 256, 1024), (1024, 4.0, 512, 2048), (512, 2.0, 256, 1024)]
)
def test_buckets_are_those_of_sd_scripts(side, aspect, low, high):
    mine = set(buckets(side, aspect))
    assert mine == {s for s in kohyas(side, low, high) if max(s) <= aspect * min(s)}
    assert all(h * w <= side * side for h, w in mine) and {(w, h) for h, w in mine} == mine


def test_buckets_by_hand():
    assert buckets(512, 1) == [(512, 512)] and buckets(600, 1) == [(600, 600)]
    assert buckets(512, 1.7) == [(640, 384), (576, 448), (512, 512), (448, 576), (384, 640)]
    assert buckets(64, 2) == [(80, 48), (64, 64), (48, 80)], "in finer steps for small models"
    assert (768, 1344) in buckets(1024, 1.75) and (896, 1152) in buckets(1024, 1.75), "SDXL's own"


def test_nearest_shape():
    sizes = [(640, 384), (512, 512), (384, 640)]
    assert [nearest(size, sizes) for size in ((1000, 300), (1000, 900), (70, 100), (30, 31))] == [0, 1, 2, 1]
    assert squarest(sizes) == (512, 512) and squarest(sizes[:1]) == (640, 384)


@pytest.mark.parametrize(
    ("data", "told"),
    [({"sizes": ["64"]}, r"data.sizes\[0\]: expected WIDTHxHEIGHT"), ({"sizes": ["64x65"]}, "multiples of 8"),
     ({"sizes": ["64x64"], "size": 64}, "neither size nor aspect"), ({"aspect": 0.5, "sizes": []}, "data.aspect"),
     ({"kind": "cache", "path": "teacher 0.safetensors"}, "nothing with kind cache")],
)  # fmt: skip
def test_impossible_sizes(tmp_path, teachers, data, told):
    with pytest.raises(RecipeError, match=told):
        recipe(tmp_path / "o.safetensors", teachers, {"path": str(teachers[0])} | data if "kind" in data else data)


def test_sizes_of_a_recipe(tmp_path, teachers):
    made = recipe(tmp_path / "o.safetensors", teachers)
    base = open_checkpoint(teachers[0])
    assert latent_sizes(made.data, base) == LATENTS, "width first in recipes, height first in tensors"
    by_aspect = recipe(tmp_path / "o.safetensors", teachers, {"sizes": [], "aspect": 2, "size": 64})
    assert sorted(latent_sizes(by_aspect.data, base)) == sorted(LATENTS)
    few = recipe(tmp_path / "o.safetensors", teachers, {"latents_per_teacher": 2})
    with pytest.raises(BadInput, match="at least one for each of the 3 sizes, got 2"):
        latent_sizes(few.data, base)
    dump_recipe(made, tmp_path / "r.yaml")
    assert json.loads(json.dumps(made.to_dict()))["data"]["sizes"] == SIZES


# ---------------------------------------------------------------- what they are made of


def test_teachers_draw_every_size(tmp_path, teachers):
    merge = prepare(recipe(tmp_path / "o.safetensors", teachers))
    pools = merge.distillation.data.pools
    assert [[tuple(pool.latents.shape) for pool in entry] for entry in pools] == [
        [(3, 4, 8, 8), (2, 4, 10, 6), (2, 4, 6, 10)]
    ] * 2
    numbers = [sorted(n for pool in entry for n in pool.prompt.tolist()) for entry in pools]
    assert numbers[0] == numbers[1] == list(range(7)), "every prompt once"
    prompts, again = load_cache(merge.work / "latents.safetensors")
    assert len(prompts) == 7 and torch.equal(again[1][2].latents, pools[1][2].latents)
    square = prepare(recipe(tmp_path / "s.safetensors", teachers, {"sizes": ["64x64"]}))
    assert torch.equal(square.distillation.data.pools[0][0].latents[[0, 3, 6]], pools[0][0].latents), (
        "the square ones are those that a square recipe has"
    )


def test_pictures_go_where_they_lose_least(tmp_path, teachers):
    pipe = load_pipeline(teachers[0])
    for name, size in (("wide", (200, 100)), ("wider", (300, 100)), ("tall", (90, 160)), ("square", (70, 64))):
        Image.new("RGB", size, (9, 99, 200)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name, encoding="utf-8")
    prompts, pools = encode_images(pipe.vae, tmp_path, LATENTS)
    told = {tuple(pool.latents.shape[-2:]): [prompts[i] for i in pool.prompt] for pool in pools}
    assert told == {(8, 8): ["square"], (10, 6): ["tall"], (6, 10): ["wide", "wider"]}
    _, only = encode_images(pipe.vae, tmp_path, [(8, 8), (2, 40)])
    assert [tuple(pool.latents.shape) for pool in only] == [(4, 4, 8, 8)], "an empty size is left out"


def test_other_settings_do_not_take_up_these_latents(tmp_path, teachers):
    prepare(recipe(tmp_path / "o.safetensors", teachers))
    with pytest.raises(BadInput, match=r"latents.safetensors: holds latents made with other settings"):
        prepare(recipe(tmp_path / "o.safetensors", teachers, {"sizes": SIZES[:2]}))
    prepare(recipe(tmp_path / "o.safetensors", teachers, {"prompt_drop": 0.5}, lr=1e-5))


# ---------------------------------------------------------------- training


def random_data() -> LatentData:
    rng = torch.Generator().manual_seed(3)
    pools = [tuple(Pool(torch.randn(n, 4, *size, generator=rng), torch.arange(n) % 2)
                   for n, size in zip((6, 2, 2), LATENTS, strict=True)) for _ in range(2)]  # fmt: skip
    return LatentData(["a", "b"], pools, 0.5)


def built(out: Path, teachers: list[Path], **train):
    made = recipe(out, teachers, **train)
    return ready(made, open_sources(made, check_values=False), random_data())


def test_a_step_has_one_size_as_often_as_it_is_there():
    data, rng = random_data(), torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor([data.choose(rng) for _ in range(2000)]), minlength=3) / 2000
    torch.testing.assert_close(counts, torch.tensor([0.6, 0.2, 0.2]), atol=0.04, rtol=0)
    alone, before = LatentData(["a"], [Pool(torch.zeros(1, 4, 8, 8), torch.tensor([0]))]), rng.get_state()
    assert alone.choose(rng) == 0 and torch.equal(rng.get_state(), before), "one size takes nothing from the stream"
    with pytest.raises(BadInput, match="different sizes"):
        LatentData(
            ["a"], [Pool(torch.zeros(1, 4, 8, 8), torch.zeros(1)), Pool(torch.zeros(1, 4, 8, 9), torch.zeros(1))]
        )


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_steps_of_several_sizes_learn_and_resume_exactly(tmp_path, teachers, family):
    """Law 6, with every size taking part; SDXL hears the size of each batch."""
    if family == "sdxl":
        teachers = tiny_teachers(tmp_path, 2, "sdxl")
    seen: list[tuple] = []

    def watched(**train):
        run = built(
            tmp_path / "o.safetensors", teachers, feature=0.01, adversarial=0.1 * (family == "sd15"), seed=SEED, **train
        )
        told = lambda module, args, kwargs: seen.append((  # noqa: E731
            tuple(args[0].shape[-2:]), (kwargs.get("added_cond_kwargs") or {}).get("time_ids")))  # fmt: skip
        run.student.unet.register_forward_pre_hook(told, with_kwargs=True)
        return run

    whole = watched()
    losses = [whole.step().loss for _ in range(5)]
    sizes = [size for size, _ in seen]
    assert set(sizes) == set(LATENTS) and len(sizes) == 5, "all teachers' rows of a step pass together, in one size"
    for (h, w), ids in seen:
        assert (ids is None) == (family == "sd15")
        assert ids is None or ids.tolist() == [[8.0 * h, 8.0 * w, 0, 0, 8.0 * h, 8.0 * w]] * len(ids)
    first = watched()
    for _ in range(2):
        first.step()
    first.save_state(tmp_path / "state.safetensors")
    second = watched()
    second.load_state(tmp_path / "state.safetensors")
    again = [second.step().loss for _ in range(3)]
    assert again == losses[2:]
    assert furthest(whole.student.learned(), second.student.learned()) == 0


def test_a_merge_of_several_sizes_and_a_picture_that_is_not_square(tmp_path, teachers):
    merge = prepare(recipe(tmp_path / "o.safetensors", teachers, steps=2))
    for _ in merge.steps():
        pass
    path = merge.save()
    assert all("thumbnail" in entry for entry in open_checkpoint(path).style_info)
    out = tmp_path / "tall.png"
    line = ["generate", str(path), "--prompt", "a cat", "--size", "48x80", "--steps", "1", "--out", str(out)]
    assert main(line) == 0
    assert Image.open(out).size == (48, 80)


# ---------------------------------------------------------------- the planner


def test_the_trial_takes_the_largest_size(tmp_path, teachers, monkeypatch):
    made = recipe(tmp_path / "o.safetensors", teachers, {"sizes": ["64x64", "80x96", "48x80"]})
    asked = []
    from dmm_core import data

    plain = data.LatentData

    def noted(prompts, pools, drop):
        asked.append(pools[0].latents.shape)
        return plain(prompts, pools, drop)

    monkeypatch.setattr(data, "LatentData", noted)
    assert run_trial(made, steps=2).seconds_per_step > 0
    assert asked == [(8, 4, 12, 10)]
    sources = open_sources(made, check_values=False)
    assert latent_bytes(made, sources) == pytest.approx(7 * 2 * 4 * 2 * (64 + 120 + 60) / 3, abs=1)


def test_plan_tries_every_stage_once(tmp_path, teachers, monkeypatch):
    """The second stage needs more than the first, the third what the first needs; times are added up."""
    stages = ["distil", {"name": "synthesised", "train": {"steps": 2, "batch": 5, "lr": 1e-4}},
              {"name": "distil", "train": {"steps": 3, "lr": 1e-6}}]  # fmt: skip
    spec = {"teachers": [str(path) for path in teachers], "out": str(tmp_path / "o.safetensors"), "data": SMALL}
    made = recipe_from_dict(spec | {"train": TRAIN, "stages": stages})
    tried = []

    def measured(stage):
        tried.append(stage.train.batch)
        return Trial(100 * stage.train.batch - 50 * stage.train.checkpointing, 1, float(stage.train.batch), 0.0)

    monkeypatch.setattr(trial, "try_out", measured)
    found = fit(made, "cpu", 1, 1000)
    assert tried == [2, 5] and [t.device for t in found.trials] == [200, 500, 200] and found.changes == {}
    told = plan(made, found, tried=True)
    assert told.peak_bytes == 500 and told.steps == 9 and told.seconds == 4 * 2 + 2 * 5 + 3 * 2
    sparing = fit(made, "cpu", 1, 460)
    assert sparing.changes["checkpointing"] is True and sparing.device == 450
    assert all(stage.train.checkpointing for stage in sparing.recipe.stages)
    assert fit(made, "cpu", 1, 400) is None
