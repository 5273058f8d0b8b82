"""The planner: what a recipe takes is measured, what does not fit is changed, the predicted peak is the real one."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from dmm_core import trial
from dmm_core.cli import main
from dmm_core.memory import available_ram, peak_resident_bytes, resident_bytes
from dmm_core.recipe import TrainSpec, dump_recipe, load_recipe
from dmm_core.trial import Trial, candidates, fit, weights_bytes
from tests.unit.merges import recipe, tiny_teachers


def test_weights_by_hand():
    """Bytes a parameter: weight, gradient, two moments, teachers."""
    assert weights_bytes(TrainSpec(), 10, "cpu", 3) == 10 * (4 + 4 + 8 + 3 * 4)
    assert weights_bytes(TrainSpec(ema=0.9, fused_backward=True), 10, "cuda", 2) == 10 * (4 + 8 + 4 + 2 * 2)
    assert weights_bytes(TrainSpec(weights="bf16", optimizer="adamw8bit"), 10, "cuda", 1) == 10 * (2 + 2 + 2 + 2)
    assert weights_bytes(TrainSpec(student="lora", weights="bf16"), 10, "cuda", 1) == 10 * (2 + 2)


def test_candidates_go_from_nothing_to_low_rank():
    ladder = candidates(TrainSpec(), 4, "cpu")
    assert ladder[0] == {} and ladder[1] == {"resident": 1} and ladder[2] == {"resident": 1, "micro": 1}
    assert ladder[-1]["student"] == "lora" and ladder[-1]["checkpointing"] is True
    assert all(before.items() <= after.items() for before, after in itertools.pairwise(ladder))
    assert "micro" not in str(candidates(TrainSpec(fused_backward=True), 4, "cpu"))
    assert candidates(TrainSpec(checkpointing=True, student="lora"), 1, "cpu")[0] == {}


def test_blocks_pass_over_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(trial, "has_bf16", lambda device: False)
    assert not any(change.get("resident") == 0 for change in candidates(TrainSpec(), 4, "cpu"))
    assert candidates(TrainSpec(), 4, "cuda")[-2]["resident"] == 0
    assert not any("resident" in change for change in candidates(TrainSpec(resident=0), 4, "cuda"))
    assert weights_bytes(TrainSpec(resident=0), 10, "cuda", 4) == 10 * (4 + 4 + 8)


def test_the_least_sparing_change_that_fits_is_taken(tmp_path, monkeypatch):
    made = recipe(tmp_path / "o.safetensors", tiny_teachers(tmp_path, 2))
    needs = {"checkpointing": 500, "resident": 700, "": 900}
    tried = []

    def measured(sparing):
        tried.append(sparing.train)
        spec = sparing.train
        key = "checkpointing" if spec.checkpointing else "resident" if spec.resident == 1 else ""
        return None if key == "resident" else Trial(needs[key], 1, 1.0, 1.0)  # None: no memory for it at all

    monkeypatch.setattr(trial, "try_out", measured)
    assert fit(made, "cpu", 1, 1000).changes == {}
    found = fit(made, "cpu", 1, 600)
    assert found.changes == {"resident": 1, "micro": 1, "checkpointing": True} and found.recipe.train.checkpointing
    assert fit(made, "cpu", 1, 100) is None
    tried.clear()
    assert fit(made, "cpu", 1000, 600) is None and not tried, "what weights alone exceed is not tried"


def test_memory_of_this_process():
    assert 10_000_000 < (resident_bytes() or 10**8) <= (peak_resident_bytes() or 10**9)
    assert (available_ram() or 10**9) > 1_000_000


def test_plan_says_what_makes_it_fit(tmp_path, capsys):
    """A real trial; a device of 1 KB fits nothing."""
    made = recipe(tmp_path / "o.safetensors", tiny_teachers(tmp_path, 2))
    dump_recipe(made, tmp_path / "r.yaml")
    assert main(["plan", str(tmp_path / "r.yaml"), "--json", "--write", str(tmp_path / "fit.yaml")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] and told["changes"] == {} and load_recipe(tmp_path / "fit.yaml").train == made.train
    assert told["peak_bytes"] == told["ram_bytes"] > 100e6 and told["seconds"] > told["seconds_per_step"] > 0
    assert any("text encoder" in warning for warning in told["warnings"])
    assert main(["plan", str(tmp_path / "r.yaml"), "--memory", "0.000001"]) == 0
    assert "does not fit" in capsys.readouterr().out
    assert main(["plan", str(tmp_path / "r.yaml"), "--quick", "--json"]) == 0
    quick = json.loads(capsys.readouterr().out)
    assert quick["fits"] is None and quick["peak_bytes"] is None and quick["memory_bytes"] > 0


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "wait4"), reason="needs the peak memory of a child")
@pytest.mark.parametrize(
    "change", [{}, {"resident": 1, "micro": 1, "checkpointing": True}], ids=["as it is", "sparing"]
)
def test_predicted_peak_is_the_real_one(tmp_path, root, change):
    """Mini family on a CPU, the whole command: within 10 %."""
    from dmm_core.recipe import recipe_from_dict
    from mini_family import demo, family

    base, *teachers = family.unpack(tmp_path / "teachers")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(demo.training_prompts()) + "\n", encoding="utf-8")
    data = demo.recipe_of(tmp_path, teachers, base, prompts, 4)
    data["data"] |= {"latents_per_teacher": 32, "steps": 1}
    made = recipe_from_dict(data)
    made = replace(made, train=replace(made.train, processes=1, **change))
    dump_recipe(made, tmp_path / "r.yaml")
    command = [sys.executable, "-m", "dmm_core"]
    planned = subprocess.run([*command, "plan", str(tmp_path / "r.yaml"), "--json"], cwd=root, capture_output=True)
    assert planned.returncode == 0, planned.stderr
    predicted = json.loads(planned.stdout)["peak_bytes"]
    child = subprocess.Popen([*command, "distill", str(tmp_path / "r.yaml")], cwd=root, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    real = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"predicted {predicted / 1e6:.0f} MB, real {real / 1e6:.0f} MB, {100 * (predicted / real - 1):+.1f} %")
    assert abs(predicted / real - 1) < 0.10
