"""Commands from end to end on tiny models: a merge, its mixes, its pictures; and bad input, one line each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmm_core.checkpoint import open_checkpoint
from dmm_core.cli import main
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
    assert "there already" in refused(capsys, "distill", path)
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
