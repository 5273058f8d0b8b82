"""Teachers that predict v, or by a schedule that ends in pure noise, beside ones that predict ε."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import dmm_core.sample
from dmm_core.checkpoint import open_checkpoint
from dmm_core.cli import main
from dmm_core.conditioning import Context
from dmm_core.diffusion import (
    SCHEDULER,
    add_noise,
    alphas_cumprod,
    predict_x0,
    to_epsilon,
    zero_snr_alphas_cumprod,
    zero_snr_times,
)
from dmm_core.errors import BadInput
from dmm_core.models import load_pipeline
from dmm_core.recipe import recipe_from_dict
from dmm_core.run import average_tensors, open_sources, start_tensors
from dmm_core.sample import sample, sample_latents
from dmm_core.teachers import Teachers
from tests.unit import tiny
from tests.unit.merges import SMALL, TRAIN, built


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """One UNet three times: said to predict ε, v, and v by a zero-terminal-SNR schedule; and another ε model."""
    folder = tmp_path_factory.mktemp("teachers")
    paths = {name: folder / f"{name}.safetensors" for name in ("eps", "v", "zero", "other")}
    tiny.write_tiny(paths["eps"], seed=0)
    tiny.write_tiny(paths["other"], seed=50)
    for name, marks in (("v", ["v_pred"]), ("zero", ["v_pred", "ztsnr"])):  # as such files are marked: empty tensors
        state = load_file(paths["eps"])
        save_file(state | {mark: torch.zeros(0) for mark in marks}, paths[name])
    return paths


def recipe(tmp_path: Path, teachers, **more):
    return recipe_from_dict(
        {"teachers": [str(t) for t in teachers], "out": str(tmp_path / "o.safetensors"), "data": SMALL, "train": TRAIN}
        | more
    )


def test_kinds_are_seen(files, tmp_path):
    kinds = {name: open_checkpoint(path) for name, path in files.items()}
    assert {n: (c.prediction_type, c.zero_snr) for n, c in kinds.items()} == {
        "eps": ("epsilon", False), "v": ("v_prediction", False), "zero": ("v_prediction", True),
        "other": ("epsilon", False),
    }  # fmt: skip
    from dmm_core.checkpoint import write_diffusers

    write_diffusers(tmp_path / "folder", **tiny.model(), prediction_type="v_prediction")
    config = tmp_path / "folder" / "scheduler" / "scheduler_config.json"
    config.parent.mkdir(exist_ok=True)
    config.write_text(json.dumps({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}), encoding="utf-8")
    folder = open_checkpoint(tmp_path / "folder")
    assert (folder.prediction_type, folder.zero_snr) == ("v_prediction", True)
    merged = tmp_path / "merged.safetensors"  # in one file the marks are tensors
    assert main(["merge", "--model", *[str(tmp_path / "folder")] * 2, "--out", str(merged)]) == 0
    for told in (open_checkpoint(merged), load_pipeline(merged)):
        assert (told.prediction_type, told.zero_snr) == ("v_prediction", True)


def test_epsilon_of_v():
    """v = √ᾱ ε − √(1−ᾱ) x0, so that of a true v the true ε and x0 come back."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, 4, 3, 3, generator=generator)
    t = torch.tensor([0, 10, 400, 900, 999])
    a = alphas_cumprod()[t].view(-1, 1, 1, 1)
    x_t, v = add_noise(x0, noise, t), a.sqrt() * noise - (1 - a).sqrt() * x0
    assert torch.allclose(to_epsilon(v, x_t, t, "v_prediction"), noise, atol=1e-5)
    assert torch.allclose(predict_x0(x_t, v, t, "v_prediction"), x0, atol=1e-5)
    assert to_epsilon(v, x_t, t, "epsilon") is v


def test_zero_snr_schedule_is_diffusers():
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(**SCHEDULER, rescale_betas_zero_snr=True).alphas_cumprod
    assert torch.allclose(zero_snr_alphas_cumprod().float(), theirs, atol=1e-5) and zero_snr_alphas_cumprod()[-1] == 0


def test_times_of_equal_noise():
    times, zero = zero_snr_times(), zero_snr_alphas_cumprod()
    assert (times.diff() > 0).all() and 0 <= times[0] < 1e-9 and 800 < times[-1] < 950
    low = times.floor().long()
    assert (zero[low] >= alphas_cumprod() * (1 - 1e-4)).all() and (zero[low + 1] <= alphas_cumprod() * (1 + 1e-4)).all()


def test_what_teachers_say_is_converted(files):
    """One UNet, three readings of it, each against the formula."""
    checkpoints = [open_checkpoint(files[name]) for name in ("eps", "v", "zero")]
    teachers = Teachers(checkpoints, prediction_type="epsilon")
    teachers.embed(["a", ""])
    x, t, prompt = (
        torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
        torch.tensor([3, 500, 990]),
        [0] * 3,
    )
    prompt = torch.tensor(prompt)
    unet = teachers.unet(0)
    raw = lambda at: unet(x, at, teachers.context(0, prompt).tokens).sample  # noqa: E731
    a = alphas_cumprod()[t].view(-1, 1, 1, 1)
    with torch.no_grad():
        wanted = [
            raw(t),
            a.sqrt() * raw(t) + (1 - a).sqrt() * x,
            a.sqrt() * raw(zero_snr_times()[t]) + (1 - a).sqrt() * x,
        ]
    for i in range(3):
        assert torch.allclose(teachers.predict(i, x, t, prompt)[0], wanted[i], atol=1e-5)
    own = Teachers(checkpoints[1:2])  # a v student of v teachers: nothing to convert
    own.embed(["a", ""])
    with torch.no_grad():
        assert torch.allclose(own.predict(0, x, t, prompt)[0], raw(t), atol=1e-5)


def test_a_merge_of_all_kinds(files, tmp_path):
    """Training runs, and the teachers of another kind are told of and left out of the weight average."""
    made = recipe(tmp_path, [files["zero"], files["v"], files["eps"], files["other"]])
    sources = open_sources(made)
    assert sources.base.path.name == "eps.safetensors"
    assert sum("converted" in line for line in sources.warnings) == 2
    assert any("zero-terminal-SNR" in line and "zero.safetensors" in line for line in sources.warnings)
    start, plain = start_tensors(made, sources), average_tensors([sources.teachers[i] for i in (2, 3)])
    assert all(torch.equal(start[key], plain[key]) for key in plain)
    run = built(tmp_path / "o.safetensors", [files[name] for name in ("v", "eps", "zero")], adversarial=0.1)
    assert run.teachers.prediction_type == "epsilon" and set(run.step().score) == {"style 0", "style 1", "style 2"}
    from dmm_core.run import prepare

    pools = prepare(made).distillation.data.pools
    assert len(pools) == 4 and all(torch.isfinite(pool.latents).all() for (pool,) in pools)
    assert not torch.equal(pools[0][0].latents, pools[1][0].latents)  # each samples by its own schedule


def test_a_v_student_of_v_teachers(files, tmp_path):
    run = built(tmp_path / "o.safetensors", [files["v"]], adversarial=0.1, lr=1e-9)
    assert run.teachers.prediction_type == "v_prediction" and run.step().score["style 0"] < 1e-9


def test_what_cannot_be_converted_is_refused_by_name(files, tmp_path):
    with pytest.raises(
        BadInput, match=r"eps\.safetensors: its prediction type is epsilon where v\.safetensors is v_pred"
    ):
        open_sources(recipe(tmp_path, [files["eps"]], base=str(files["v"])))
    with pytest.raises(BadInput, match=r"zero\.safetensors: is a zero-terminal-SNR model.*epsilon model as base"):
        open_sources(recipe(tmp_path, [files["zero"]]))


def test_a_picture_of_a_zero_snr_checkpoint_has_its_schedule(files, monkeypatch):
    asked = []
    monkeypatch.setattr(dmm_core.sample, "sample_latents", lambda *_, **how: asked.append(how) or torch.zeros(1))
    for name in ("v", "zero"):
        sample(load_pipeline(files[name]), ["a"], seeds=[0])
    assert [how["zero_snr"] for how in asked] == [False, True]


def test_sampling_by_a_zero_snr_schedule_starts_from_pure_noise():
    class Seen:
        device, conv_in = torch.device("cpu"), torch.nn.Conv2d(4, 4, 3)

        def __call__(self, x, t, context, **more):
            return SimpleNamespace(sample=-x / 2)

    noise, context = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)), Context(torch.zeros(1, 77, 8))
    both = [sample_latents(Seen(), context, noise, steps=3, prediction_type="v_prediction", zero_snr=z) for z in (0, 1)]
    assert all(torch.isfinite(x).all() for x in both) and not torch.allclose(*both)
