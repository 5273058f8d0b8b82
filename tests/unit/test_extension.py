"""Adding teachers to a DMM file: old styles start bit-equal and stay near, new ones come after them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dmm_core.checkpoint import open_checkpoint
from dmm_core.cli import main
from dmm_core.data import LatentData, Pool
from dmm_core.errors import BadInput, RecipeError
from dmm_core.extension import StyleTeacher, style_teacher, teachers_of_step
from dmm_core.models import build_unet
from dmm_core.plan import latent_bytes
from dmm_core.recipe import TrainSpec, recipe_from_dict
from dmm_core.run import open_sources, prepare, ready
from dmm_core.stages import stage_recipes
from dmm_core.teachers import Teachers
from tests.unit import tiny
from tests.unit.merges import SMALL, TRAIN, furthest

OLD = ("ink", "néon")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("modèles 模型")
    tiny.write_tiny_dmm(folder / "earlier.safetensors", OLD)
    tiny.write_tiny(folder / "added.safetensors", seed=70)
    return folder


def recipe(folder: Path, out: Path, **train):
    data = {"student": str(folder / "earlier.safetensors"), "teachers": [str(folder / "added.safetensors")]}
    return recipe_from_dict(data | {"out": str(out), "data": SMALL, "train": TRAIN | train})


def built(folder: Path, out: Path, **train):
    made = recipe(folder, out, **train)
    pool = Pool(torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(3)), torch.arange(5) % 2)
    return ready(made, open_sources(made, check_values=False), LatentData(["a", "b"], [pool], 0.5))


def test_a_style_as_a_teacher_is_the_student_in_that_style(folder):
    """Bias + s in an ordinary UNet against class labels in the DMM file's."""
    file = open_checkpoint(folder / "earlier.safetensors")
    generator = torch.Generator().manual_seed(1)
    x, context = (torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 8), (77, 64)))
    t = torch.tensor([7, 900])
    styled = build_unet(file.unet_config, file.unet(), torch.float32, file.path, styled=True)
    outputs = []
    for name in OLD:
        teacher = style_teacher(file, name)
        assert isinstance(teacher, StyleTeacher) and teacher.dmm is None and "codebook" not in teacher.parts
        plain = build_unet(teacher.unet_config, teacher.unet(), torch.float32, teacher.path, styled=False)
        label = file.codebook().style({name: 1.0}).expand(2, -1)
        with torch.no_grad():
            outputs.append(plain(x, t, context).sample)
            assert torch.allclose(outputs[-1], styled(x, t, context, class_labels=label).sample, atol=1e-5)
    assert (outputs[0] - outputs[1]).abs().max() > 0.01


def test_old_styles_start_bit_equal(folder, tmp_path):
    """Rows, MLP and UNet are those of the file; the new row is random; names and order are kept."""
    run = built(folder, tmp_path / "o.safetensors")
    file = open_checkpoint(folder / "earlier.safetensors")
    mine, before = run.student.codebook, file.codebook()
    assert mine.names == (*OLD, "added")
    for name in OLD:
        assert torch.equal(mine.style({name: 1.0}), before.style({name: 1.0}))
    assert torch.equal(mine.model_embedding.weight[:2], before.model_embedding.weight)
    assert 0.5 < mine.model_embedding.weight[2].std() < 1.5
    assert all(torch.equal(tensor, run.student.unet.state_dict()[key]) for key, tensor in
               {k: v.float() for k, v in file.unet().items()}.items())  # fmt: skip
    first = run.step()
    assert first.score["added"] > 1e-3
    assert max(first.score[name] for name in first.score if name in OLD) < 1e-9


def test_a_step_asks_new_teachers_and_random_old_styles():
    spec = TrainSpec(teachers_per_step=2, seed=5)
    turns = [teachers_of_step(spec, step, total=8, old=5) for step in range(60)]
    assert [turn[:2] for turn in turns[:3]] == [[5, 6], [7, 5], [6, 7]]
    assert all(len(turn) == 5 and len({*turn[2:]}) == 3 and max(turn[2:]) < 5 for turn in turns), "half of them"
    assert {style for turn in turns for style in turn[2:]} == set(range(5))
    assert turns[7] == teachers_of_step(spec, 7, total=8, old=5), "it follows from seed and step alone"
    assert turns != [teachers_of_step(TrainSpec(teachers_per_step=2, seed=6), s, 8, 5) for s in range(60)]
    assert teachers_of_step(TrainSpec(regularize=0), 0, 8, 5) == [5, 6, 7]
    assert len(teachers_of_step(TrainSpec(), 0, 8, 2)) == 12, "as many as new ones"
    often = teachers_of_step(TrainSpec(regularize=7), 0, 8, 5)[3:]
    assert len(often) == 7 and {*often[:5]} == set(range(5)), "one comes again when all have come"
    assert teachers_of_step(TrainSpec(teachers_per_step=2), 1, 3) == [2, 0]


def test_regularisation_keeps_old_styles_nearer(folder, tmp_path):
    """After the same steps on the new teacher, with and without it: the paper's comparison at tiny scale."""
    drift = {}
    for regularize in (None, 0):
        run = built(folder, tmp_path / "o.safetensors", steps=12, batch=4, regularize=regularize, lr=5e-4)
        losses = [result.score["added"] for result in run.run()]
        assert losses[-1] < losses[0]
        batch = run.data.draw(0, 8, torch.Generator().manual_seed(9))
        error = 0.0
        for style in range(2):
            wanted = run.teachers.predict(style, batch.x_t, batch.t, batch.prompt)[0]
            weights = torch.eye(3)[torch.full((8,), style)]
            with torch.no_grad():
                mine = run.student(batch.x_t, batch.t, run.context[batch.prompt], weights)
            error += (mine - wanted).square().mean().item()
        drift[regularize] = error
    assert drift[None] < 0.7 * drift[0], drift


def test_old_styles_that_are_not_trained_draw_no_latents(folder, tmp_path):
    """Nor does the plan count them; a stage that trains them has latents of its own."""
    told = []
    made = recipe(folder, tmp_path / "o.safetensors", regularize=0, steps=2)
    merge = prepare(made, notify=lambda what, done, total: told.append((done, total)))
    sizes = [[len(pool.latents) for pool in entry] for entry in merge.distillation.data.pools]
    count = SMALL["latents_per_teacher"]
    assert sizes == [[], [], [count]] and told[-1] == (count, count)
    assert len(list(merge.steps())) == 2
    shown = {entry["name"]: "thumbnail" in entry for entry in merge.shown_styles()}
    assert shown == {"ink": False, "néon": False, "added": True}, "old ones keep what the earlier file has"
    merge.save()
    both = recipe_from_dict(made.to_dict() | {"stages": [
        {"name": "distil", "train": {"regularize": 0}}, {"name": "distil", "train": {"regularize": 1}}]})  # fmt: skip
    first, second = stage_recipes(both)
    assert first.work != second.work
    sources = open_sources(made, check_values=False)
    assert latent_bytes(second, sources) == 3 * latent_bytes(first, sources)


@pytest.mark.parametrize("extra", [{}, {"adversarial": 0.1, "resident": 1}])
def test_resume_equals_uninterrupted(folder, tmp_path, extra):
    """Law 6, with random old styles, another one a step."""
    straight = built(folder, tmp_path / "o.safetensors", **extra)
    straight.step()
    straight.save_state(tmp_path / "state.safetensors")
    straight.step(), straight.step()
    resumed = built(folder, tmp_path / "o.safetensors", **extra)
    resumed.load_state(tmp_path / "state.safetensors")
    resumed.step(), resumed.step()
    (tensors, strings), (expected, told) = resumed.state(), straight.state()
    assert strings == told and all(torch.equal(tensors[key], expected[key]) for key in expected)


def test_styles_of_a_file_share_their_weights(folder):
    file = open_checkpoint(folder / "earlier.safetensors")
    added = open_checkpoint(folder / "added.safetensors")
    teachers = Teachers([style_teacher(file, name) for name in OLD] + [added])
    x, prompts = torch.randn(1, 4, 8, 8), torch.tensor([0])
    teachers.embed(["a", ""])
    predict = lambda pool, i: pool.predict(i, x, torch.tensor([500]), prompts)[0]  # noqa: E731
    apart = [predict(teachers, i) for i in range(3)]
    first, second = (dict(teachers.unet(i).named_parameters()) for i in range(2))
    shared = [key for key in first if first[key].data_ptr() == second[key].data_ptr()]
    assert len(shared) == len(first) - 1
    teachers.keep(1)  # one place on the device from now on: nothing shared may be overwritten
    assert all(torch.equal(predict(teachers, i), apart[i]) for i in (2, 0, 1, 2))


@pytest.mark.slow
def test_processes_share_an_extension(folder, tmp_path):
    found = []
    for processes in (1, 2):
        merge = prepare(recipe(folder, tmp_path / f"{processes}.safetensors", processes=processes, steps=2, lr=1e-4))
        list(merge.steps())
        found.append({key: value.clone() for key, value in merge.distillation.student.learned().items()})
    assert furthest(*found) < 3e-4


def test_the_command_from_end_to_end(folder, tmp_path, capsys):
    """File, metadata of both, the recipe inside, and a report of old and new styles, before and after."""
    out, pages = tmp_path / "more styles.safetensors", tmp_path / "report"
    made = recipe(folder, out, steps=2)
    from dmm_core.recipe import dump_recipe

    dump_recipe(made, tmp_path / "r.yaml")
    arguments = [
        "extend",
        str(tmp_path / "r.yaml"),
        "--report",
        str(pages),
        "--images",
        "4",
        "--sampler-steps",
        "1",
        "--json",
    ]
    assert main(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["styles"] == [*OLD, "added"] and told["samples_seen"] == 2 * 2 * 2
    file = open_checkpoint(out)
    assert file.styles == (*OLD, "added")
    new = file.style_info[2]
    assert (
        new["teacher"] == "added.safetensors"
        and new["sha256"] == open_checkpoint(folder / "added.safetensors").sha256()
    )
    before = open_checkpoint(folder / "earlier.safetensors").style_info
    assert [{k: v for k, v in s.items() if k != "thumbnail"} for s in file.style_info[:2]] == before
    assert json.loads(file.metadata["dmm.recipe"])["student"] == "earlier.safetensors"
    rows = told["report"]["per_style"]
    assert [row["style"] for row in rows] == [*OLD, "added"]
    for row in rows[:2]:  # the earlier student drew with the seeds of the reference: it is its own teacher
        assert row["before"] == pytest.approx(row["reference"], rel=1e-3, abs=1e-6)
    assert rows[2]["before"] > 0
    page = (pages / "report.html").read_text(encoding="utf-8")
    assert told["report"]["merged"][2] == {k: v for k, v in new.items() if k != "thumbnail"}
    assert "<td>added.safetensors</td>" in page
    assert "student before" in page and page.count("<span>before</span>") == 3


def test_arguments_make_the_same_recipe(folder, tmp_path):
    import argparse

    from dmm_core.commands import extend

    parser = argparse.ArgumentParser()
    extend.add_arguments(parser)
    student, teacher, out = folder / "earlier.safetensors", folder / "added.safetensors", tmp_path / "o.safetensors"
    line = [str(student), "--teacher", str(teacher), "--out", str(out), "--steps", "7", "--preset", "mini"]
    made = extend.recipe_of(parser.parse_args(line))
    assert (made.student, made.teachers[0].name, made.train.steps) == (student, "added", 7)
    assert made.train.batch == 12, "24 rows of the preset, half of them old styles'"
    assert recipe_from_dict(made.to_dict()) == made


def test_the_plan_counts_old_styles_rows_and_one_earlier_student(folder, tmp_path):
    from dmm_core.plan import plan
    from dmm_core.trial import weights_bytes

    made = recipe(folder, tmp_path / "o.safetensors")
    told = plan(made)
    assert told.styles == [*OLD, "added"] and told.samples == 4 * 2 * (1 + 1)
    assert told.memory_bytes == weights_bytes(made.train, told.unet_parameters, "cpu", unets=2)


def test_what_cannot_be_extended(folder, tmp_path, capsys):
    earlier, added, out = (str(folder / f"{n}.safetensors") for n in ("earlier", "added", "out"))

    def refused(*arguments):
        assert main(["extend", *arguments]) == 2
        return capsys.readouterr().err

    assert "no DMM file" in refused(added, "--teacher", added, "--out", out)
    assert "is also student" in refused(earlier, "--teacher", added, "--out", earlier)
    assert "what to add is missing" in refused(earlier, "--out", out)
    named = tmp_path / "ink.safetensors"
    named.write_bytes(Path(added).read_bytes())
    assert "has a style 'ink' already" in refused(earlier, "--teacher", str(named), "--out", out)
    xl = tiny.write_tiny(tmp_path / "xl.safetensors", family="sdxl")
    assert "family is sdxl" in refused(earlier, "--teacher", str(xl), "--out", out)
    with pytest.raises(RecipeError, match=r"train\.start"):
        recipe_from_dict(
            {"student": earlier, "base": added, "teachers": [added], "out": out, "train": {"start": "base"}}
        )
    other = recipe_from_dict({"student": earlier, "teachers": [added], "out": out, "default_style": {"nobody": 1.0}})
    with pytest.raises(BadInput, match="no style 'nobody'"):
        ready(other, open_sources(other), LatentData(["a"], [Pool(torch.zeros(1, 4, 8, 8), torch.tensor([0]))]))


def test_what_the_report_needs_is_checked_before_training(folder, tmp_path, capsys):
    out, pages = tmp_path / "o.safetensors", tmp_path / "report"
    earlier, added = (str(folder / f"{name}.safetensors") for name in ("earlier", "added"))
    blank, file = tmp_path / "blank.txt", tmp_path / "file"
    for path in (blank, file):
        path.write_text("\n", encoding="utf-8")
    line = ["extend", earlier, "--teacher", added, "--out", str(out), "--preset", "mini"]
    for arguments, told in (
        (["--images", "3"], "--images 3: expected at least 4"),
        (["--sampler-steps", "0"], "--sampler-steps 0: expected at least 1"),
        (["--old-teacher", str(file), added], "file: "),
        (["--old-teacher", added], "has 2 styles (ink, néon), got 1 old teachers"),
        (["--test-prompts", str(tmp_path / "gone.txt")], "gone.txt: cannot be read as a list of prompts"),
        (["--test-prompts", str(blank)], "blank.txt: holds no prompt"),
        (["--report", str(file)], f"{file}: "),
    ):
        assert main([*line, "--report", str(pages), *arguments]) == 2
        error = capsys.readouterr().err
        assert told in error and len(error.splitlines()) == 1, error
    assert not out.exists() and not out.with_name("o.work").exists() and not pages.exists()


def test_steps_of_nought_are_not_left_out(folder, tmp_path, capsys):
    earlier, added = (str(folder / f"{name}.safetensors") for name in ("earlier", "added"))
    out = tmp_path / "o.safetensors"
    assert main(["extend", earlier, "--teacher", added, "--out", str(out), "--steps", "0"]) == 2
    assert "train.steps" in capsys.readouterr().err
    made = tmp_path / "r.yaml"
    made.write_text(json.dumps({"student": earlier, "teachers": [added], "out": earlier}), encoding="utf-8")
    assert main(["extend", str(made), "--steps", "0"]) == 2
    assert "give a recipe or --steps, not both" in capsys.readouterr().err
