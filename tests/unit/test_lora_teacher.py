"""LoRA files as teachers: base + LoRA, however its weights are read; merged beside a checkpoint; what is refused."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmm_core.checkpoint import open_checkpoint
from dmm_core.cli import main
from dmm_core.errors import BadInput
from dmm_core.lora_teacher import lora_teacher
from dmm_core.plan import open_sources
from dmm_core.recipe import recipe_from_dict
from dmm_core.residency import HostStore
from tests.unit import tiny
from tests.unit.merges import SMALL, TRAIN, tiny_teachers

TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FC1 = "text_model.encoder.layers.0.mlp.fc1"


def write_lora(path: Path, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, out, into in (("lora_unet_" + TO_Q, 64, 64), ("lora_te_" + FC1, 128, 64)):
        name = name.replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, into, generator=generator) * 0.3
        tensors[f"{name}.lora_up.weight"] = torch.randn(out, 4, generator=generator) * 0.3
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("löra teachers")
    tiny_teachers(folder, 2)
    write_lora(folder / "ink lora.safetensors")
    return folder


def recipe(folder: Path, out: Path, base: bool = True, **teacher):
    teachers = [str(folder / "teacher 1.safetensors"), {"path": str(folder / "ink lora.safetensors")} | teacher]
    data = {"teachers": teachers, "out": str(out), "data": SMALL, "train": TRAIN}
    return recipe_from_dict(data | ({"base": str(folder / "teacher 0.safetensors")} if base else {}))


def test_weights_are_the_base_s_and_the_lora_s(folder):
    base = open_checkpoint(folder / "teacher 0.safetensors")
    teacher = lora_teacher(folder / "ink lora.safetensors", base, 0.5)
    lora = load_file(folder / "ink lora.safetensors")
    for part, key, state, plain in (
        ("lora_unet_" + TO_Q, TO_Q, teacher.unet(), base.unet()),
        ("lora_te_" + FC1, FC1, teacher.text_encoder(0), base.text_encoder(0)),
    ):
        name = part.replace(".", "_")
        delta = 0.5 * 2.0 / 4 * lora[f"{name}.lora_up.weight"] @ lora[f"{name}.lora_down.weight"]
        expected = plain[key + ".weight"].float() + delta
        assert torch.allclose(state[key + ".weight"].float(), expected, atol=2e-3), "float16 holds about 1e-3"
        assert delta.abs().max() > 0.05
        others = [k for k in plain if k != key + ".weight"]
        assert all(torch.equal(state[k], plain[k]) for k in others)
    assert teacher.sha256() != base.sha256() and teacher.path.name == "ink lora.safetensors"


def test_host_memory_holds_what_the_lora_changes_and_shares_the_rest(folder):
    base = open_checkpoint(folder / "teacher 0.safetensors")
    teacher = lora_teacher(folder / "ink lora.safetensors", base)
    store = HostStore(torch.float16)
    alone, both = store.tensors(base), store.tensors(teacher)
    wanted = teacher.unet()
    assert all(torch.equal(both[key], wanted[key]) for key in wanted)
    assert [key for key in both if both[key] is not alone[key]] == [TO_Q + ".weight"]


def test_a_lora_and_a_checkpoint_are_merged(folder, tmp_path, capsys):
    made = recipe(folder, tmp_path / "m.safetensors", strength=0.8)
    sources = open_sources(made)
    assert sources.names == ("teacher 1", "ink lora")
    from dmm_core.run import prepare

    merge = prepare(made)
    losses = [result.loss for result in merge.timed_steps()]
    assert len(losses) == TRAIN["steps"] and all(math.isfinite(loss) for loss in losses)
    path = merge.save()
    checkpoint = open_checkpoint(path)
    assert checkpoint.styles == ("teacher 1", "ink lora")
    assert checkpoint.style_info[1]["teacher"] == "ink lora.safetensors"
    assert checkpoint.style_info[1]["sha256"] == sources.teachers[1].sha256()


@pytest.mark.slow
def test_evaluate_takes_loras(folder, tmp_path, capsys):
    """With the strength of the file's recipe, or another one; each of another weight, so of another distance."""
    from dmm_core.commands import evaluate
    from dmm_core.run import prepare

    merge = prepare(recipe(folder, tmp_path / "m.safetensors", strength=0.5))
    for _ in merge.steps():
        pass
    file, lora = merge.save(), folder / "ink lora.safetensors"
    line = [str(file), "--base", str(folder / "teacher 0.safetensors"), "--teacher"]
    line += [str(folder / "teacher 1.safetensors"), str(lora)]
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    told = [evaluate.opened_teachers(parser.parse_args([*line[:-1], text]))[1] for text in (str(lora), f"{lora}=0.9")]
    assert [teacher.strength for teacher in told] == [0.5, 0.9]
    size = ["--images", "4", "--steps", "1", "--cfg", "1", "--out", str(tmp_path / "report"), "--json"]
    assert main(["evaluate", *line, *size]) == 0
    assert json.loads(capsys.readouterr().out)["styles"] == ["teacher 1", "ink lora"]
    assert main(["evaluate", line[0], *line[3:], *size]) == 2
    assert "ink lora.safetensors: is a LoRA, which teaches on top of a base" in capsys.readouterr().err


def test_what_is_refused(folder, tmp_path):
    out = tmp_path / "m.safetensors"
    with pytest.raises(BadInput, match=r"ink lora.*on top of a base.*Give a base"):
        open_sources(recipe(folder, out, base=False))
    plain = {"path": str(folder / "teacher 0.safetensors"), "strength": 0.5}
    data = {"teachers": [str(folder / "teacher 1.safetensors"), plain], "out": str(out)}
    with pytest.raises(BadInput, match=r"teacher 0.*is no LoRA, but has strength 0.5"):
        open_sources(recipe_from_dict(data))
    tiny.write_tiny(tmp_path / "xl.safetensors", family="sdxl", vocab=200)
    with pytest.raises(BadInput, match="ink lora"):
        lora_teacher(folder / "ink lora.safetensors", open_checkpoint(tmp_path / "xl.safetensors"))
    broken = load_file(folder / "ink lora.safetensors")
    next(iter(broken.values())).view(-1)[0] = float("nan")
    save_file(broken, tmp_path / "nan.safetensors")
    arguments = ["--teacher", str(folder / "teacher 1.safetensors"), str(tmp_path / "nan.safetensors")]
    arguments += ["--base", str(folder / "teacher 0.safetensors"), "--out", str(out)]
    assert main(["distill", *arguments]) == 2
    assert not out.exists()
