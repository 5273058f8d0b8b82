"""torchrun: two real processes over gloo do what one does, whatever the number of teachers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from dmm_core.checkpoint import open_checkpoint
from dmm_core.cli import main
from dmm_core.ranks import Alone, Launched, launched
from dmm_core.recipe import dump_recipe
from tests.unit.merges import recipe, tiny_teachers

TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def launch(root, made, *more):
    dump_recipe(made, made.out.with_suffix(".yaml"))
    arguments = [*TWO, "-m", "dmm_core", "distill", str(made.out.with_suffix(".yaml")), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(arguments, capture_output=True, text=True, cwd=root, env=environment, timeout=500)


@pytest.mark.parametrize("extra", [{}, pytest.param({"teachers_per_step": 1}, marks=pytest.mark.slow)], ids=str)
def test_three_teachers_over_two_processes(tmp_path, root, capsys, extra):
    """Each step three teachers on two ranks; with one teacher a step, a rank has nothing to do."""
    teachers = tiny_teachers(tmp_path, 3)
    alone, together = (recipe(tmp_path / name / "o.safetensors", teachers, steps=3, **extra) for name in ("one", "two"))
    for made in (alone, together):
        made.out.parent.mkdir()
    dump_recipe(alone, alone.out.with_suffix(".yaml"))
    assert main(["distill", str(alone.out.with_suffix(".yaml")), "--json"]) == 0
    done = launch(root, together, "--json")
    assert done.returncode == 0, done.stderr
    said, paths = (capsys.readouterr().out, done.stdout), (alone.out, together.out)
    assert not any(path.with_name("o.work").exists() for path in paths)
    for (line,) in (told.strip().splitlines() for told in said):
        assert json.loads(line)["samples_seen"] == 3 * 2 * (1 if extra else 3)
    opened = map(open_checkpoint, paths)
    one, two = (checkpoint.unet() | dict(checkpoint.codebook().state_dict()) for checkpoint in opened)
    for key, tensor in one.items():
        assert torch.allclose(tensor.float(), two[key].float(), atol=2e-3), key
    differing = [one[key].float().sub(two[key].float()).abs().gt(3e-4).float().mean().item() for key in one]
    assert sum(differing) / len(differing) < 1e-3


def test_a_fault_is_told_once(tmp_path, root):
    teachers = tiny_teachers(tmp_path, 1)
    made = recipe(tmp_path / "o.safetensors", teachers)
    made.out.write_bytes(b"precious")
    done = launch(root, made)
    assert done.returncode != 0 and done.stdout == ""
    assert len([line for line in done.stderr.splitlines() if line.startswith("dmm: ")]) == 1
    assert made.out.read_bytes() == b"precious"


def test_alone_without_a_launcher(monkeypatch):
    for world in (None, "1"):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if world:
            monkeypatch.setenv("WORLD_SIZE", world)
        with launched() as ranks:
            assert type(ranks) is Alone and not ranks.stops(False, torch.device("cpu"))


@pytest.mark.slow
def test_a_stop_asked_of_one_is_a_stop_of_all(tmp_path, root):
    """Only the second process is asked to stop; both leave after the same step, and the first one has saved."""
    code = f"""
import os, sys
sys.path.insert(0, {str(root)!r})
from dmm_core.ranks import launched
from dmm_core.recipe import load_recipe
from dmm_core.run import prepare
with launched() as ranks:
    merge = prepare(load_recipe(sys.argv[1]), ranks=ranks)
    try:
        for _ in merge.steps(stop=lambda: ranks.rank == 1 and merge.distillation.step_count == 2):
            pass
    except KeyboardInterrupt:
        print("stopped", ranks.rank, merge.distillation.step_count, flush=True)
"""
    script = tmp_path / "stop.py"
    script.write_text(code, encoding="utf-8")
    made = recipe(tmp_path / "o.safetensors", tiny_teachers(tmp_path, 2), save_every=0)
    dump_recipe(made, tmp_path / "r.yaml")
    done = subprocess.run(
        [*TWO, str(script), str(tmp_path / "r.yaml")], capture_output=True, text=True, timeout=500,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")[:-1]) == ["stopped 0 2", "stopped 1 2"]
    assert (tmp_path / "o.work" / "state.safetensors").exists()


def test_launched_is_an_alone():
    """Callers know one interface."""
    names = [name for name in vars(Alone) if not name.startswith("_") and callable(getattr(Alone, name))]
    assert issubclass(Launched, Alone) and {"mine", "add_gradients", "add", "any", "stops", "wait"} <= set(names)


def test_fused_backward_in_a_group_is_refused(tmp_path):
    from dmm_core.errors import BadInput
    from tests.unit.merges import built

    distillation = built(tmp_path / "o.safetensors", tiny_teachers(tmp_path, 1), fused_backward=True)
    group = Alone()
    group.world = 2
    with pytest.raises(BadInput, match="one process"):
        next(distillation.run(group))
