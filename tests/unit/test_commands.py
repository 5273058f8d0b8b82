"""Commands from end to end on tiny models: a merge, its mixes, its pictures; and bad input, one line each."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmm_core.checkpoint import open_checkpoint, write_dmm
from dmm_core.cli import Reporter, main
from tests.unit import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("modèles et 模型")
    for name, seed in (("one", 0), ("two", 40)):
        tiny.write_tiny(folder / f"{name}.safetensors", seed=seed)
    tiny.write_tiny(folder / "xl.safetensors", family="sdxl")
    nan = load_file(folder / "one.safetensors")
    nan["model.diffusion_model.out.2.bias"][0] = float("nan")
    save_file(nan, folder / "nan.safetensors")
    whole = (folder / "one.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "old.ckpt").write_bytes(b"PK\x03\x04 whatever")
    return folder


def recipe(folder: Path, teachers: list[str], out: str = "out.safetensors") -> Path:
    path = folder / "recipe.yaml"
    listed = "".join(f"  - {name}\n" for name in teachers)
    train = "train: {steps: 3, batch: 2, warmup: 0, lr: 1e-4, precision: fp32, device: cpu}\n"
    data = "data: {latents_per_teacher: 3, steps: 1, cfg_scale: 1.0, size: 64}\n"
    path.write_text(f"teachers:\n{listed}out: {out}\n{data}{train}", encoding="utf-8")
    return path


def refused(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    told = capsys.readouterr()
    lines = told.err.strip().splitlines()
    assert told.out == "" and lines[-1].startswith("dmm: "), told
    assert len([line for line in lines if line.startswith("dmm: ")]) == 1
    return lines[-1]


@pytest.mark.parametrize(
    ("second", "words"),
    [("nan.safetensors", "out.2.bias"), ("cut.safetensors", "cut off"), ("old.ckpt", "pickle"),
     ("xl.safetensors", "family is sdxl where one.safetensors is sd15")],
)  # fmt: skip
def test_teachers_that_cannot_be_merged(folder, capsys, second, words):
    before = sorted(folder.iterdir())
    path = recipe(folder, ["one.safetensors", second], "never.safetensors")
    for command in ("distill", "plan"):
        line = refused(capsys, command, path)
        assert words in line and second in line
    assert sorted({*folder.iterdir(), path}) == sorted({*before, path}), "nothing may be written"


def test_merge_mix_generate_evaluate(folder, capsys, tmp_path):
    out = folder / "out.safetensors"
    path = recipe(folder, ["one.safetensors", "two.safetensors"])
    assert main(["plan", str(path), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["mergeable"] and plan["seconds"] > 0 and plan["samples"] == 12
    assert main(["distill", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples_seen"] == 12
    checkpoint = open_checkpoint(out)
    assert checkpoint.dmm == "ours" and checkpoint.styles == ("one", "two")
    made = json.loads(checkpoint.metadata["dmm.recipe"])
    assert [Path(t["path"]).name for t in made["teachers"]] == ["one.safetensors", "two.safetensors"]
    assert str(folder) not in checkpoint.metadata["dmm.recipe"], (
        "a shared file must not tell where its maker's files lie"
    )
    assert "Give --force to overwrite it, or change out in the recipe." in refused(capsys, "distill", path)
    picture = tmp_path / "p.png"
    assert (
        main(
            [
                "generate",
                str(out),
                "--prompt",
                "a cat",
                "--style",
                "one=0.5",
                "two=0.5",
                "--steps",
                "2",
                "--out",
                str(picture),
            ]
        )
        == 0
    )
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "no style 'three'" in refused(capsys, "generate", out, "--prompt", "a", "--style", "three=1")
    assert "no DMM file" in refused(capsys, "generate", folder / "one.safetensors", "--prompt", "a", "--style", "one=1")
    pages = tmp_path / "evaluation"
    teachers = [str(folder / "one.safetensors"), str(folder / "two.safetensors")]
    capsys.readouterr()
    arguments = [
        "evaluate",
        str(out),
        "--teacher",
        *teachers,
        "--images",
        "6",
        "--steps",
        "1",
        "--out",
        str(pages),
        "--json",
    ]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    keys = {"styles", "extractor", "images_per_style", "matrix", "reference", "fid_t", "fid_t_reference", "ratio",
            "ratio_error", "gap_closed", "weight_average", "seconds", "samples_seen", "device", "commit"}  # fmt: skip
    assert keys <= set(report) and report["styles"] == ["one", "two"] and report["images_per_style"] == 6
    assert {"report.html", "report.json", "styles.png", "mix.png", "fid.png"} <= {p.name for p in pages.iterdir()}
    assert "has 2 styles" in refused(capsys, "evaluate", out, "--teacher", teachers[0])


def test_bake_then_use_as_an_ordinary_checkpoint(folder, capsys, tmp_path):
    dmm = tmp_path / "dmm.safetensors"
    tiny.write_tiny_dmm(dmm)
    baked = tmp_path / "baked.safetensors"
    assert main(["mix", str(dmm), "--style", "ink=1", "--bake", "--out", str(baked)]) == 0
    checkpoint = open_checkpoint(baked)
    assert checkpoint.dmm is None and not any(key.startswith("dmm.") for key in checkpoint.metadata)
    checkpoint.check_finite()


def test_mini_family_unpacks_to_ordinary_checkpoints(tmp_path):
    from mini_family import family

    base, *teachers = family.unpack(tmp_path, (*family.TEACHERS, *family.LATER))
    first = open_checkpoint(base).unet()
    assert [path.stem for path in teachers] == [*family.TEACHERS, *family.LATER]
    for path in teachers:
        checkpoint = open_checkpoint(path)
        checkpoint.check_finite()
        assert checkpoint.family == "sd15" and checkpoint.vae_config["kind"] == "taesd" and checkpoint.text_configs
        assert any(not torch.equal(tensor, first[key]) for key, tensor in checkpoint.unet().items())


def test_int8_deltas_are_within_half_a_step():
    from mini_family.family import quantize, restore

    delta = torch.randn(400, 5, 3) * torch.logspace(-9, 0, 400).view(-1, 1, 1)
    delta[7] = 0
    values, scale = quantize(delta)
    assert ((restore(values, scale) - delta).abs() <= 0.501 * scale.view(-1, 1, 1)).all()


# ---------------------------------------------------------------- what is refused before work begins


def test_a_recipe_or_options_not_both(folder, capsys):
    path = recipe(folder, ["one.safetensors", "two.safetensors"], "never.safetensors")
    one = folder / "one.safetensors"
    for option, value in (("--out", "x.safetensors"), ("--base", one), ("--prompts", "p.txt"), ("--steps", 0),
                          ("--guidance", 5)):  # fmt: skip
        assert f"give a recipe or {option}, not both" in refused(capsys, "distill", path, option, value)
    arguments = ["--teacher", one, folder / "two.safetensors", "--out", folder / "never.safetensors"]
    assert "train.steps" in refused(capsys, "distill", *arguments, "--steps", 0)
    assert "--guidance is of --few-step" in refused(capsys, "distill", *arguments, "--guidance", 5)
    assert not (folder / "never.safetensors").exists()


def test_what_is_there_already_says_how_to_go_on(folder, capsys, tmp_path):
    there = tmp_path / "there.safetensors"
    there.write_bytes(b"kept")
    models = [folder / "one.safetensors", folder / "two.safetensors"]
    for command, option in (("distill", "--teacher"), ("merge", "--model")):
        line = refused(capsys, command, option, *models, "--out", there)
        assert "is there already. Give --force to overwrite it, or another name with --out." in line
    path = tmp_path / "merge.yaml"
    path.write_text(json.dumps({"models": [str(model) for model in models], "out": str(there)}), encoding="utf-8")
    assert "Give --force to overwrite it, or change out in the recipe." in refused(capsys, "merge", path)
    assert there.read_bytes() == b"kept"


def test_training_outlives_the_reader_of_its_notes(folder, monkeypatch):
    """As ``2>&1 | tee log`` at Ctrl-C: what was learnt is saved, and the exit code says that it was stopped."""
    path = recipe(folder, ["one.safetensors", "two.safetensors"], "piped.safetensors")
    work = folder / "piped.work"
    work.mkdir()
    (work / "stop").touch()
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        assert main(["distill", str(path)]) == 130
        monkeypatch.undo()
    assert not (work / "stop").exists()
    assert main(["distill", str(path), "--resume", "--json"]) == 0
    assert open_checkpoint(folder / "piped.safetensors").styles == ("one", "two")


def test_a_file_where_a_folder_should_be_is_a_line(folder, capsys, tmp_path):
    file, dmm = tmp_path / "file", tmp_path / "dmm.safetensors"
    file.write_bytes(b"kept")
    tiny.write_tiny_dmm(dmm, ("ink",))
    path = recipe(folder, ["one.safetensors", "two.safetensors"], "never.safetensors")
    for arguments in (
        ["mix", dmm, "--style", "ink", "--out", file / "x.safetensors"],
        ["demo", "--out", file],
        ["generate", dmm, "--prompt", "a cat", "--out", file / "p.png"],
        ["evaluate", dmm, "--teacher", folder / "one.safetensors", "--images", 4, "--steps", 1, "--out", file],
        ["plan", path, "--write", file / "x.yaml"],
    ):
        assert str(file) in refused(capsys, *arguments), arguments
    assert file.read_bytes() == b"kept"


def test_generate_is_refused_before_it_draws(folder, capsys, tmp_path):
    one = folder / "one.safetensors"
    for option, value, told in (
        ("--out", tmp_path / "p.psd", "expected a picture's name"),  # which PIL reads, but cannot write
        ("--out", tmp_path / "p.h5", "expected a picture's name"),
        ("--out", tmp_path, "is a folder"),
        ("--steps", 0, "expected 1 to 1000"),
        ("--steps", 1001, "expected 1 to 1000"),
        ("--seed", -1, "expected 0 to"),
        ("--seed", 2**63 - 1, "expected 0 to"),
        ("--cfg", "nan", "expected a number"),
    ):
        given = ["--out", tmp_path / "p.png"] if option != "--out" else []
        assert told in refused(capsys, "generate", one, "--prompt", "a cat", *given, option, value)
    assert list(tmp_path.iterdir()) == []


def test_plan_is_refused_before_its_trial(folder, capsys, tmp_path):
    path = recipe(folder, ["one.safetensors", "two.safetensors"], "never.safetensors")
    there = tmp_path / "there.yaml"
    there.write_text("kept", encoding="utf-8")
    for arguments, told in (
        (["--quick", "--write", tmp_path / "new.yaml"], "give --write or --quick, not both"),
        (["--write", there], "is there already. Give --force to overwrite it"),
        (["--write", tmp_path / "new.safetensors"], "must end in .yaml or .yml"),
        (["--write", tmp_path], "must end in .yaml"),
        *((["--memory", memory], "--memory") for memory in ("0", "-1", "nan", "inf", "1e300")),
    ):
        assert told in refused(capsys, "plan", path, *arguments)
    assert there.read_text(encoding="utf-8") == "kept" and list(tmp_path.iterdir()) == [there]


def test_evaluate_is_refused_before_it_draws(folder, capsys, tmp_path, monkeypatch):
    dmm, one = tmp_path / "dmm.safetensors", folder / "one.safetensors"
    tiny.write_tiny_dmm(dmm, ("ink",))
    line = ["evaluate", dmm, "--teacher", one, "--out", tmp_path / "report"]
    for option, value, told in (
        ("--images", 3, "expected at least 4"),
        ("--steps", 0, "expected at least 1"),
        ("--few-steps", 0, "expected at least 1"),
        ("--cfg", "inf", "expected a number"),
    ):
        assert told in refused(capsys, *line, option, value)
    monkeypatch.setenv("DMM_INCEPTION", str(one))
    assert "is not the FID Inception" in refused(capsys, *line)
    assert not (tmp_path / "report").exists()


def test_figures_are_told_before_the_gallery_is_drawn(folder, capsys, tmp_path):
    """Here of a file of one style, against whose only teacher the weight average has no error."""
    dmm, pages = tmp_path / "dmm.safetensors", tmp_path / "report"
    tiny.write_tiny_dmm(dmm, ("ink",))
    line = ["evaluate", str(dmm), "--teacher", str(folder / "one.safetensors"), "--images", "4", "--steps", "1"]
    (pages / "styles.png").mkdir(parents=True)  # where a picture cannot be written in the end
    assert main([*line, "--out", str(pages)]) == 2
    told = capsys.readouterr()
    assert "ratio to the teachers' own distance" in told.out and "gap" not in told.out
    assert told.err.splitlines()[-1].startswith(f"dmm: {pages / 'styles.png'}: ")


def test_teachers_are_put_in_the_files_order(folder, tmp_path):
    from dmm_core.commands import evaluate

    def written(name: str, styles: tuple[str, ...]) -> Path:
        info = [{"name": style, "teacher": f"{style}.safetensors"} for style in styles]
        return write_dmm(
            tmp_path / name, **tiny.model(), codebook=tiny.codebook(styles), resolution=64, style_info=info
        )

    earlier, file = written("earlier.safetensors", ("one",)), written("later.safetensors", ("one", "two", "three"))
    for name in ("three", "other"):
        (tmp_path / f"{name}.safetensors").write_bytes((folder / "two.safetensors").read_bytes())
    one, two = (folder / f"{name}.safetensors" for name in ("one", "two"))
    three, other = (tmp_path / f"{name}.safetensors" for name in ("three", "other"))
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)

    def opened(*teachers: Path, more: tuple = ()) -> tuple[list[str], list[str]]:
        said = io.StringIO()
        args = parser.parse_args([str(file), "--teacher", *map(str, teachers), *map(str, more)])
        found = evaluate.opened_teachers(args, Reporter(err=said))
        assert [t.path for t in evaluate.opened_teachers(args)] == [t.path for t in found]
        return [teacher.path.stem for teacher in found], said.getvalue().splitlines()

    names, sorted_so = ["one", "two", "three"], "note: teachers put in the file's order: "
    listed = [f"{name}.safetensors" for name in names]
    assert opened(one, two, three) == (names, [])
    assert opened(three, one, two) == (names, [sorted_so + ", ".join(listed)])
    assert opened(one, other, three) == (
        ["one", "other", "three"],
        ["note: other.safetensors is not the file that style two was learned from (two.safetensors)"],
    )
    assert opened(three, two, more=("--before", earlier)) == (names[1:], [sorted_so + ", ".join(listed[1:])])
    assert opened(two, one)[0] == ["two", "one"], "too few are refused later, as they are"
