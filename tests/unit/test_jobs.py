"""Jobs with real child processes on tiny models: to the end, stopped, killed, refused, crashed."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dmm_core import environment, inputs, jobs
from dmm_core.environment import Training
from dmm_core.errors import BadInput
from dmm_core.jobs import Job, JobFailed
from dmm_core.locks import Busy, Lock
from dmm_core.recipe import recipe_from_dict
from dmm_core.run import prepare
from tests.unit import tiny

HERE = Training(Path(sys.executable))
STEPS = 14
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("teachers ü")
    return [tiny.write_tiny(folder / f"style {seed}.safetensors", seed=seed) for seed in (0, 50)]


@pytest.fixture(autouse=True)
def _own_locks(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DMM_LOCKS", str(tmp_path_factory.mktemp("locks")))


def recipe(out: Path, teachers: list[Path], data: dict | None = None, **train):
    small = {"latents_per_teacher": 3, "steps": 1, "cfg_scale": 1.0, "size": 64}
    spec = {"steps": STEPS, "batch": 2, "warmup": 0, "lr": 1e-3, "precision": "fp32", "device": "cpu", "save_every": 3}
    return recipe_from_dict(
        {"teachers": list(map(str, teachers)), "out": str(out), "data": small | (data or {}), "train": spec | train}
    )


def tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(str(path), "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def follow(job: Job, until: str = "", step: int = 0) -> list[jobs.Event]:
    """Events up to the first of a kind (at or after a step), or all."""
    seen = []
    for event in job.events():
        seen.append(event)
        if event.kind == until and event.about.get("step", step) >= step:
            break
    return seen


@pytest.fixture(scope="module")
def whole(tmp_path_factory, teachers) -> tuple[Path, list[jobs.Event]]:
    """An uninterrupted job, and what it told."""
    out = tmp_path_factory.mktemp("whole") / "out.safetensors"
    with jobs.start(recipe(out, teachers), preview_seconds=0.01, training=HERE) as job:
        return out, follow(job)


def test_runs_to_its_end_and_tells(whole, teachers):
    from PIL import Image

    out, events = whole
    kinds = [event.kind for event in events]
    assert kinds[0] == "started" and kinds[-1] == "done" and {"stage", "progress", "preview", "saved"} <= set(kinds)
    last = [event.about for event in events if event.kind == "progress"][-1]
    assert (last["step"], last["total"], last["seconds_left"]) == (STEPS, STEPS, 0)
    assert set(last["losses"]) == {"style 0", "style 50"} and min(last["losses"].values()) > 0
    previews = [event for event in events if event.kind == "preview"]
    assert len(previews) >= 2 and previews[-1].about["step"] == STEPS
    first, final = (Image.open(io.BytesIO(event.picture)) for event in (previews[0], previews[-1]))
    assert first.size == final.size and first.tobytes() != final.tobytes()
    assert events[-1].about["out"] == str(out) and out.exists()
    assert not out.with_name("out.work").exists()


def test_stopped_killed_and_started_again_equals_uninterrupted(tmp_path, teachers, whole):
    made = recipe(tmp_path / "out.safetensors", teachers)
    with jobs.start(made, preview_seconds=0, training=HERE) as job:
        follow(job, "progress", 1)
        job.stop()
        seen = follow(job)
    assert job.last.kind == "stopped" and job.last.about["resumable"] and 1 <= job.last.about["step"] < STEPS, seen[-3:]
    assert job.process.returncode == 130 and not made.out.exists()
    with jobs.start(made, preview_seconds=0, training=HERE) as job:
        events = follow(job, "saved")
        assert events[0].about["resumed"]
        assert next(e for e in events if e.kind == "progress").about["step"] == seen[-1].about["step"]
        job.process.send_signal(KILL)
        with pytest.raises(JobFailed) as told:
            follow(job)
        assert "broke off" in str(told.value) and "goes on from its last save" in str(told.value)
        assert "\n" not in str(told.value)
    with jobs.start(made, preview_seconds=0.01, training=HERE) as job:  # other previews change nothing
        assert follow(job)[0].about["resumed"]
    a, b = tensors(whole[0]), tensors(made.out)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_pictures_that_cannot_be_written_do_not_end_the_training(tmp_path, teachers):
    """Nor does what the losses' lines are kept in: a full disk, a file that somebody holds open on Windows."""
    made = recipe(tmp_path / "out.safetensors", teachers, steps=4, save_every=2)
    work = tmp_path / "out.work"
    (work / "losses.json" / "in the way").mkdir(parents=True)
    (work / "previews").write_bytes(b"")
    with jobs.start(made, preview_seconds=0.01, training=HERE) as job:
        seen = follow(job)
    assert seen[-1].kind == "done" and made.out.exists()
    warnings = [event.about["line"] for event in seen if event.kind == "warning"]
    assert sum(line.startswith("there are no previews: ") for line in warnings) == 1, warnings


def test_second_job_on_the_device_is_refused_in_one_line(tmp_path, teachers):
    with jobs.start(recipe(tmp_path / "a.safetensors", teachers, steps=9999), 0, training=HERE) as first:
        follow(first, "progress", 1)
        second = jobs.start(recipe(tmp_path / "b.safetensors", teachers), training=HERE)
        with pytest.raises(JobFailed, match=r"cpu is busy \(process \d+, merging .*a\.safetensors\)"):
            follow(second)
        with pytest.raises(JobFailed, match="is being made"):
            jobs.start(recipe(tmp_path / "a.safetensors", teachers, lr=0.5), replace=True, training=HERE)
        assert first.finish(60), "stops in order"
    assert first.last.kind == "stopped"


def test_a_crash_is_told_with_the_log_s_last_words(tmp_path, teachers):
    broken = tmp_path / "sitecustomize.py"  # breaks the child off in the middle of its work, with words
    broken.write_text(
        "import os, sys\nimport dmm_core.child as c\n"
        "def _merge(*a):\n    print('segmentation fault in a driver', file=sys.stderr, flush=True); os._exit(3)\n"
        "c._merge = _merge\n",
        encoding="utf-8",
    )
    root = Path(jobs.__file__).parents[1]
    child = tmp_path / "child.py"
    child.write_text(
        f"import sys\nsys.path[:0] = [{str(root)!r}, {str(tmp_path)!r}]\nimport sitecustomize\n"
        "from importlib import reload; reload(sitecustomize)\nfrom dmm_core.cli import main\n"
        "sys.exit(main(['distill', sys.argv[1], '--events']))\n",
        encoding="utf-8",
    )
    made = recipe(tmp_path / "out.safetensors", teachers)
    work = tmp_path / "out.work"
    work.mkdir()
    (work / "recipe.json").write_text(json.dumps(made.to_dict()), encoding="utf-8")
    job = Job(work, jobs._spawn([sys.executable, str(child), str(work / "recipe.json")], work / "log.txt"))
    with pytest.raises(JobFailed, match=r"broke off \(exit code 3\), last words: segmentation fault in a driver"):
        follow(job)


@pytest.mark.parametrize("case", ["nan", "gone", "no python"])
def test_bad_input_is_one_line(tmp_path, teachers, case):
    made, training = recipe(tmp_path / "out.safetensors", teachers), HERE
    if case == "no python":
        training = Training(tmp_path / "no python")
        with pytest.raises(JobFailed, match="no python: cannot be started"):
            jobs.start(made, training=training)
        return
    other = tmp_path / "other.safetensors"
    other.write_bytes(teachers[0].read_bytes()[:5000] if case == "nan" else teachers[0].read_bytes())
    made = recipe(tmp_path / "out.safetensors", [teachers[0], other])
    if case == "gone":
        other.unlink()
    with jobs.start(made, training=training) as job, pytest.raises(JobFailed, match="other") as told:
        follow(job)
    assert "\n" not in str(told.value) and not made.out.exists()


def test_other_settings_do_not_take_up_what_lies_there(tmp_path, teachers):
    made = recipe(tmp_path / "out.safetensors", teachers)
    work = tmp_path / "out.work"
    work.mkdir()
    assert jobs.same_merge(made, work), "nothing lies there"
    (work / "latents.safetensors").touch()
    assert not jobs.same_merge(made, work), "nobody knows whose it is"
    (work / "job.json").write_text(json.dumps(made.to_dict()), encoding="utf-8")
    assert jobs.same_merge(recipe(made.out, teachers, save_every=7, resident=1), work)
    for other in (
        recipe(made.out, teachers, lr=0.5),
        recipe(made.out, teachers[::-1]),
        recipe(made.out, teachers, data={"steps": 2}),
    ):
        assert not jobs.same_merge(other, work)
        with pytest.raises(BadInput, match="other settings"):
            jobs.start(other, training=HERE)


def test_a_file_replaced_by_another_of_its_name_is_not_taken_up(tmp_path, teachers):
    """Between stop and resume: what its first version drew and taught is not mixed with the second's."""
    mine = [Path(shutil.copy2(path, tmp_path)) for path in teachers]
    was = mine[1].read_bytes()
    made = recipe(tmp_path / "out.safetensors", mine, steps=99999)
    with jobs.start(made, 0, training=HERE) as job:
        follow(job, "progress", step=2)
        job.stop()
        saved = follow(job)[-1].about["step"]
    mine[1].write_bytes(was[:-4096] + bytes(4096))
    with pytest.raises(BadInput, match=rf"{mine[1].name}: is not the file of this name") as told:
        jobs.start(made, training=HERE)
    assert "\n" not in str(told.value)
    with pytest.raises(BadInput, match=mine[1].name):
        prepare(made, resume=True)
    mine[1].write_bytes(was)  # at another time, but the same
    assert inputs.changed(made) is None
    with jobs.start(made, 0, training=HERE) as job:
        assert follow(job, "progress")[-1].about["step"] == saved >= 2
        job.stop()
    mine[1].write_bytes(was[:-4096] + bytes(4096))
    with jobs.start(made, replace=True, training=HERE) as job:
        assert follow(job, "progress")[-1].about["step"] == 0


def test_the_child_leaves_when_its_host_is_gone(tmp_path, teachers):
    """The host is killed: the child finds nobody reading, saves, and ends by itself."""
    made = recipe(tmp_path / "out.safetensors", teachers, steps=99999, save_every=0)
    code = (
        "import sys, json; from pathlib import Path; from dmm_core import jobs, recipe, environment\n"
        f"made = recipe.recipe_from_dict(json.loads({json.dumps(json.dumps(made.to_dict()))}))\n"
        "job = jobs.start(made, 0, training=environment.Training(Path(sys.executable)))\n"
        "for event in job.events():\n"
        "    if event.kind == 'progress' and event.about['step'] > 1: print(job.process.pid, flush=True)\n"
    )
    host = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(jobs.__file__).parents[1])
    child = int(host.stdout.readline())
    host.kill()
    host.wait()
    until = time.monotonic() + 60
    while time.monotonic() < until and alive(child):
        time.sleep(0.1)
    assert not alive(child)
    assert (tmp_path / "out.work" / "state.safetensors").exists()


def alive(process: int) -> bool:
    if sys.platform == "win32":
        told = subprocess.run(["tasklist", "/FI", f"PID eq {process}"], capture_output=True, text=True).stdout
        return str(process) in told
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")
    return not (stat.exists() and stat.read_text(encoding="utf-8").split()[2] == "Z")  # ended, not yet collected


def test_a_dead_owner_s_lock_is_free(tmp_path):
    code = "from dmm_core.locks import Lock; Lock('gpu', 'merging x').__enter__(); print(1, flush=True); input()"
    owner = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(jobs.__file__).parents[1]
    )
    owner.stdout.readline()
    with pytest.raises(Busy, match=f"process {owner.pid}, merging x"), Lock("gpu"):
        pass
    owner.kill()
    owner.wait()
    for _ in range(2):  # free, and free again
        with Lock("gpu", "mine"), pytest.raises(Busy, match="mine"), Lock("gpu"):
            pass


def test_which_python_trains(tmp_path, monkeypatch):
    monkeypatch.setenv(environment.VARIABLE, sys.executable)
    assert environment.training_python() == HERE
    monkeypatch.setenv(environment.VARIABLE, str(tmp_path / "gone"))
    with pytest.raises(BadInput, match="gone: DMM_TRAIN_PYTHON names a file that is not there"):
        environment.training_python()
    monkeypatch.delenv(environment.VARIABLE)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert environment.training_python() == HERE, "an installed package, without an install.py"
    script = tmp_path / "install.py"
    script.write_text("import sys; sys.exit(3)", encoding="utf-8")
    with pytest.raises(environment.NotInstalled, match=r"install\.py --train"):
        environment.training_python()
    script.write_text("""print('{"python": "/há/python", "paths": ["/p"]}')""", encoding="utf-8")
    assert environment.training_python() == Training(Path("/há/python"), (Path("/p"),))


def test_installing_tells_its_lines_and_can_be_stopped(tmp_path, monkeypatch):
    monkeypatch.delenv(environment.VARIABLE, raising=False)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    script = tmp_path / "install.py"
    script.write_text(
        "import sys, time, pathlib\nmade = pathlib.Path(__file__).with_name('made')\n"
        "if '--where' in sys.argv:\n"
        '    print(\'{"python": "p", "paths": []}\'); sys.exit(not made.exists())\n'
        "print('install.py: installing', flush=True)\n"
        "if pathlib.Path(__file__).with_name('slow').exists(): time.sleep(99)\n"
        "if pathlib.Path(__file__).with_name('bad').exists(): sys.exit('install.py: no network')\n"
        "made.touch()\n",
        encoding="utf-8",
    )
    lines: list[str] = []
    (tmp_path / "slow").touch()
    began = time.monotonic()
    with pytest.raises(BadInput, match="could not be installed: installing"):
        environment.install(lines.append, lambda: bool(lines))
    assert time.monotonic() - began < 60 and lines == ["installing"]
    (tmp_path / "slow").unlink()
    (tmp_path / "bad").touch()
    with pytest.raises(BadInput, match="could not be installed: no network"):
        environment.install(lines.append)
    (tmp_path / "bad").unlink()
    assert environment.install(lines.append) == Training(Path("p"))


def test_hosts_need_the_standard_library_alone():
    code = "import sys, dmm_core.jobs; print({'torch', 'numpy', 'yaml', 'PIL', 'safetensors'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(jobs.__file__).parents[1]
    )
    assert done.stdout.strip() == "set()", done.stderr
