"""Memory runs out outside the steps: while teachers draw, in the last pictures, in an evaluation, in a trial."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import dmm_core.sample
from dmm_core import child, latents, measure, optim, plan, teachers, trial
from dmm_core.checkpoint import open_checkpoint
from dmm_core.cli import main
from dmm_core.commands import evaluate
from dmm_core.economy import MemoryTooSmall, Rows
from dmm_core.errors import BadInput
from dmm_core.recipe import dump_recipe, recipe_from_dict
from dmm_core.run import open_sources, prepare
from dmm_core.teachers import Teachers
from tests.unit import tiny
from tests.unit.merges import SMALL, TRAIN, tiny_teachers

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    return tiny_teachers(tmp_path_factory.mktemp("teachers"), 2)


def recipe(out: Path, files: list[Path], count: int = 10):
    return recipe_from_dict({
        "teachers": [str(path) for path in files], "out": str(out), "train": TRAIN | {"steps": 2},
        "data": SMALL | {"latents_per_teacher": count},
    })  # fmt: skip


def small_card(function, rows: int, where: int = 1):
    """The function on a device whose memory suffices for so many rows of the argument at this place."""

    def call(*arguments, **more):
        if len(arguments[where]) > rows:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return function(*arguments, **more)

    return call


def no_memory(*arguments, **more):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB")


# ---------------------------------------------------------------- chunks that are halved


@pytest.mark.parametrize("kind", ["range", "tensor"])
def test_chunks_are_halved_and_give_every_row_what_it_gets(kind):
    tried = []

    def work(rows):
        tried.append(len(rows))
        if len(rows) > 3:
            raise RuntimeError("MPS backend out of memory")
        return torch.as_tensor([2 * int(row) for row in rows])

    rows = Rows(CPU, "do it")
    chunks = [range(9), range(9, 14)] if kind == "range" else list(torch.arange(14).split([9, 5]))
    made = list(rows.of(work, chunks))
    assert [part.tolist() for part in made] == [[2 * i for i in range(9)], [2 * i for i in range(9, 14)]]
    assert tried[:3] == [9, 4, 2] and max(tried[3:]) == rows.most == 2, "what did not fit is not tried again"


def test_one_row_too_many_and_other_errors():
    with pytest.raises(MemoryTooSmall, match=r"too small to fold a page\. Close other programs.*\. Use thin paper\."):
        list(Rows(CPU, "fold a page", "Use thin paper.").of(no_memory, [range(3)]))
    with pytest.raises(RuntimeError, match="a bug"):
        list(Rows(CPU, "x").of(lambda rows: (_ for _ in ()).throw(RuntimeError("a bug")), [range(3)]))


# ---------------------------------------------------------------- teachers draw


def test_teachers_draw_the_same_with_less_memory(tmp_path, files, monkeypatch):
    """10 rows are too many, 5 as well: by two. The first step tells it, once."""
    plain = prepare(recipe(tmp_path / "a.safetensors", files))
    monkeypatch.setattr(latents, "sample_latents", small_card(latents.sample_latents, 4, where=2))
    sparing = prepare(recipe(tmp_path / "b.safetensors", files))
    for (a,), (b,) in zip(plain.distillation.data.pools, sparing.distillation.data.pools, strict=True):
        torch.testing.assert_close(a.latents, b.latents, rtol=1e-2, atol=1e-2)  # stored in float16
        assert torch.equal(a.prompt, b.prompt)
    told = [result.warnings for result in sparing.steps()]
    assert len(told) == 2 and len(told[0]) == 1 and not told[1], told
    assert "memory ran out while teachers drew" in told[0][0] and "2 at a time" in told[0][0]
    assert not any(result.warnings for result in plain.steps())


def test_memory_for_not_one_row_is_one_line(tmp_path, files, monkeypatch, capsys):
    dump_recipe(recipe(tmp_path / "o.safetensors", files), tmp_path / "r.yaml")
    monkeypatch.setattr(latents, "sample_latents", no_memory)
    assert main(["distill", str(tmp_path / "r.yaml")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "too small to draw even one picture" in line and "data.size" in line and "batch" not in line


def test_memory_for_no_student_is_one_line(tmp_path, files, monkeypatch, capsys):
    """Moments are made before the first step, where nothing can be given up yet; the latents stay."""
    dump_recipe(recipe(tmp_path / "o.safetensors", files), tmp_path / "r.yaml")
    monkeypatch.setattr(optim, "adam_state", no_memory)
    assert main(["distill", str(tmp_path / "r.yaml")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "too small for a student" in line and "train.student: lora" in line
    assert (tmp_path / "o.work" / "latents.safetensors").exists()


@pytest.mark.parametrize(("resident", "most"), [(None, 2), (2, 2), (1, 1)])
def test_one_teacher_at_a_time_draws_on_a_gpu(tmp_path, files, monkeypatch, resident, most):
    """On another device than a CPU; what training keeps there afterwards is what the recipe says."""
    files = [*files, tiny.write_tiny(tmp_path / "third.safetensors", seed=9, vocab=49408)] if resident == 2 else files
    there: list[int] = []
    monkeypatch.setattr(teachers, "ALL_STAY", ())
    made = recipe(tmp_path / "o.safetensors", files, 2)
    several = Teachers([open_checkpoint(path) for path in files], resident=resident)
    draw = latents.sample_latents
    seen = lambda *a, **k: there.append(len(several._unets)) or draw(*a, **k)  # noqa: E731
    monkeypatch.setattr(latents, "sample_latents", seen)
    alone = latents.teacher_latents(made, open_sources(made), several, ["a", "b"])
    assert there == [1] * len(files) and several.resident == (resident or len(files))
    both = Teachers([open_checkpoint(path) for path in files])
    monkeypatch.setattr(teachers, "ALL_STAY", ("cpu",))
    for (a,), (b,) in zip(alone, latents.teacher_latents(made, open_sources(made), both, ["a", "b"]), strict=True):
        assert torch.equal(a.latents, b.latents)
    for index in range(len(files)):
        state = several.checkpoints[index].unet()
        assert all(torch.equal(p.half(), state[key].half()) for key, p in several.unet(index).state_dict().items())
    assert len(several._unets) == most


# ---------------------------------------------------------------- a trial


def test_a_trial_draws_with_less_memory_too(tmp_path, files, monkeypatch):
    """What drawing makes do with is no reason against a recipe."""
    monkeypatch.setattr(dmm_core.sample, "sample_latents", small_card(dmm_core.sample.sample_latents, 4, where=2))
    found = trial.run_trial(recipe(tmp_path / "o.safetensors", files), steps=2)
    assert found.seconds_per_denoising > 0 and found.seconds_per_step > 0
    sent: list = []
    monkeypatch.setattr(dmm_core.sample, "sample_latents", no_memory)
    trial._child(recipe(tmp_path / "o.safetensors", files), SimpleNamespace(send=sent.append))
    assert sent == [None], "does not fit, which is no error of the recipe"


# ---------------------------------------------------------------- the last pictures


@pytest.mark.parametrize("where", ["decode", "build_vae"])
def test_the_file_is_written_without_its_pictures(tmp_path, files, monkeypatch, capsys, where):
    monkeypatch.setattr(*((dmm_core.sample, "decode") if where == "decode" else (dmm_core.run, where)), no_memory)
    dump_recipe(recipe(tmp_path / "o.safetensors", files, 2), tmp_path / "r.yaml")
    assert main(["distill", str(tmp_path / "r.yaml")]) == 0
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "no pictures of its styles" in text]
    assert line.startswith("note: ") and "memory is not enough" in line and "train.batch" not in line
    info = open_checkpoint(tmp_path / "o.safetensors").style_info
    assert len(info) == 2 and not any("thumbnail" in entry for entry in info)
    assert not (tmp_path / "o.work").exists()


def test_a_job_tells_that_its_pictures_are_left_out(tmp_path, files, monkeypatch):
    monkeypatch.setattr(dmm_core.sample, "decode", no_memory)
    told: list[tuple[str, dict]] = []

    class Events:
        gone = False

        def __call__(self, kind, **about):
            told.append((kind, about))

    child._merge(recipe(tmp_path / "o.safetensors", files, 2), 0, Events())  # type: ignore[arg-type]
    assert told[-1][0] == "done" and (tmp_path / "o.safetensors").exists()
    assert any(kind == "warning" and "no pictures of its styles" in about["line"] for kind, about in told)


def test_what_an_error_says_is_not_told_with_our_names_for_it():
    assert child.one_line(BadInput("holds no VAE", "a.safetensors")) == "a.safetensors: holds no VAE"


# ---------------------------------------------------------------- an evaluation


def test_pictures_are_decoded_fewer_at_a_time(tmp_path, monkeypatch):
    from dmm_core.models import load_pipeline

    vae = load_pipeline(tiny.write_tiny(tmp_path / "a.safetensors")).vae
    z = torch.randn(7, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = dmm_core.sample.decode(vae, z)
    monkeypatch.setattr(vae, "decode", small_card(vae.decode, 2, where=0))
    sparing = dmm_core.sample.decode(vae, z)
    assert plain.shape == sparing.shape == (7, 64, 64, 3) and np.abs(plain.astype(int) - sparing).max() <= 1
    monkeypatch.setattr(vae, "decode", no_memory)
    with pytest.raises(MemoryTooSmall, match="decode even one picture"):
        dmm_core.sample.decode(vae, z)


def test_pictures_of_a_command_are_drawn_fewer_at_a_time(tmp_path, monkeypatch, capsys):
    """The same pictures; and one line where memory is not enough for one. On a GPU the UNet has its precision."""
    file = tiny.write_tiny_dmm(tmp_path / "dmm.safetensors")
    line = ["generate", str(file), "--prompt", "a", "b", "c", "--steps", "2", "--style", "ink=1", "--out"]
    assert main([*line, str(tmp_path / "all.png")]) == 0
    plain = dmm_core.sample.sample_latents
    monkeypatch.setattr(dmm_core.sample, "sample_latents", small_card(plain, rows=1))
    assert main([*line, str(tmp_path / "few.png")]) == 0
    for end in (".png", "-1.png", "-2.png"):
        all_at_once, one = (np.asarray(Image.open(tmp_path / f"{name}{end}")).astype(int) for name in ("all", "few"))
        assert abs(all_at_once - one).max() <= 1 and all_at_once.std() > 1
    types = []
    monkeypatch.setattr(
        dmm_core.sample, "sample_latents", lambda unet, *r, **m: types.append(unet.dtype) or plain(unet, *r, **m)
    )
    monkeypatch.setattr(plan, "choose_precision", lambda wanted, device: "bf16")
    assert main([*line, str(tmp_path / "half.png")]) == 0 and types == [torch.bfloat16]
    monkeypatch.setattr(dmm_core.sample, "sample_latents", no_memory)
    capsys.readouterr()
    assert main([*line, str(tmp_path / "none.png")]) == 2
    said = capsys.readouterr()
    assert "memory is too small to draw even one picture" in said.err and "Traceback" not in said.err
    assert not (tmp_path / "none.png").exists()


def test_what_devices_hold(monkeypatch):
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(plan, "has_bf16", lambda device, supported=supported: supported)
        assert evaluate.sparing("cuda") == evaluate.sparing("cuda:1") == (dtype, 1)
    assert evaluate.sparing("mps") == (torch.float32, 1)
    assert evaluate.sparing("cpu") == (torch.float32, None)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A DMM file, its teachers, and the command that measures them."""
    folder = tmp_path_factory.mktemp("measured")
    file = tiny.write_tiny_dmm(folder / "dmm.safetensors", ("ink", "néon"))
    made = [str(tiny.write_tiny(folder / f"{i}.safetensors", seed=40 * i)) for i in range(2)]
    return ["evaluate", str(file), "--teacher", *made, "--images", "6", "--steps", "1", "--cfg", "1", "--json"]


def figures(line: list[str], out: Path, capsys) -> dict:
    capsys.readouterr()
    assert main([*line, "--out", str(out)]) == 0
    return json.loads(capsys.readouterr().out)


def test_an_evaluation_with_less_memory_measures_the_same(tmp_path, measured, monkeypatch, capsys):
    plain = figures(measured, tmp_path / "plain", capsys)
    monkeypatch.setattr(measure, "sample_latents", small_card(measure.sample_latents, 2, where=2))
    monkeypatch.setattr(measure, "predict", small_card(measure.predict, 2))
    sparing = figures(measured, tmp_path / "sparing", capsys)
    assert sparing["ratio"] == pytest.approx(plain["ratio"], rel=1e-3)
    assert sparing["gap_closed"]["mean"] == pytest.approx(plain["gap_closed"]["mean"], rel=1e-3)
    monkeypatch.setattr(measure, "sample_latents", no_memory)
    assert main([*measured, "--out", str(tmp_path / "none")]) == 2
    assert "--device cpu" in capsys.readouterr().err


def test_an_evaluation_as_on_a_gpu(tmp_path, measured, monkeypatch, capsys):
    """One teacher there at a time and all UNets in bfloat16, the VAE not; mixes and averages of weights as well."""
    there, types = [], set()
    more = ["--beside", measured[3], "--mix", "ink", "néon"]
    plain = figures([*measured, *more], tmp_path / "plain", capsys)
    monkeypatch.setattr(evaluate, "sparing", lambda device: (torch.bfloat16, 1))
    draw, unet = measure.sample_latents, Teachers.unet

    def drawn(which, *arguments, **options):
        types.add(which.dtype)
        return draw(which, *arguments, **options)

    def held(self, index):
        made = unet(self, index)
        there.append(len(self._unets))
        return made

    monkeypatch.setattr(measure, "sample_latents", drawn)
    monkeypatch.setattr(Teachers, "unet", held)
    sparing = figures([*measured, *more], tmp_path / "sparing", capsys)
    assert types == {torch.bfloat16} and set(there) == {1}
    assert sparing["precision"] == "bfloat16" and "precision" not in plain
    assert sparing["ratio"] == pytest.approx(plain["ratio"], rel=0.1)
    assert sparing["gap_closed"]["mean"] == pytest.approx(plain["gap_closed"]["mean"], rel=0.1, abs=0.02)
