"""What the tab DMM does, without a page: real files, real child processes on tiny models."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from dmm_core import environment, inputs, jobs
from dmm_core.checkpoint import open_checkpoint
from dmm_core.cli import Reporter, build_parser, jsonable
from dmm_core.environment import NotInstalled, Training
from dmm_core.errors import BadInput
from dmm_core.recipe import PLANNED, TrainSpec
from dmm_core.student import Student
from dmm_core.studio import tool
from dmm_core.studio.desk import Host
from dmm_core.studio.folders import Folders
from dmm_core.studio.studio import Studio, Wanted, _key, _with_train
from tests.unit import tiny
from tests.unit.studios import make_folders
from tests.unit.test_lora_teacher import write_lora


class Recording(Host):
    """A host that counts what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def free(self) -> None:
        self.calls.append("free")

    def give_back(self) -> None:
        self.calls.append("give back")

    def wrote(self) -> None:
        self.calls.append("wrote")

    def device(self) -> str:
        return "cpu"

    def training(self) -> Training:
        return Training(Path(sys.executable))


@pytest.fixture(autouse=True)
def _own_locks(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DMM_LOCKS", str(tmp_path_factory.mktemp("locks")))


@pytest.fixture
def folders(tmp_path) -> Folders:
    return make_folders(tmp_path)


@pytest.fixture
def studio(folders) -> Studio:
    return Studio(folders, Recording())


@pytest.fixture
def planned_here(monkeypatch):
    """Plans in this process: another one would load diffusers anew, which takes seconds."""

    def run(training, arguments, say, stop):
        args = build_parser().parse_args([*arguments, "--json"])
        return jsonable(args.run(args, Reporter(True)))

    monkeypatch.setattr(tool, "run", run)


def wanted(name: str = "mixed", **more) -> Wanted:
    small = {"checkpoints": ["a.safetensors", "sub/b.safetensors"], "preset": "mini", "steps": 3, "pictures": 2}
    return Wanted(**{"name": name, **small, **more})


def wait_for(activity, reached, seconds: float = 600) -> None:
    until = time.monotonic() + seconds
    while activity.running and not reached():
        assert time.monotonic() < until, (activity.state, activity.line, activity.lines[-3:])
        time.sleep(0.05)


# ---------------------------------------------------------------- merges


@pytest.mark.slow  # tests/hosts/ui does the same from a click; a minute of one core
def test_merge_cancel_resume(studio, folders):
    host, long = studio.host, wanted(steps=400)
    activity = studio.merge(long)
    with pytest.raises(BadInput, match="still going on: Merges mixed"):
        studio.merge(wanted("another"))
    wait_for(activity, lambda: activity.view is not None and activity.view.step >= 2 and activity.view.picture)
    assert activity.running, activity.line
    assert activity.plan["mergeable"] and activity.plan["styles"] == ["a", "b"]
    assert set(activity.view.losses) == {"a", "b"} and activity.view.picture.startswith(b"\xff\xd8")
    assert studio.desk.cancel()
    studio.desk.wait(600)
    assert activity.state == "stopped" and "of 400. Resume it to go on from there." in activity.line
    assert studio.unfinished() == ["mixed"] and folders.list_students() == []
    assert host.calls == ["free", "give back", "wrote"]
    again = studio.resume("mixed")
    wait_for(again, lambda: again.view is not None and again.view.training)
    assert again.view.resumed and again.view.step >= activity.view.step, again.line
    studio.desk.close()
    assert again.state == "stopped" and not studio.desk.cancel()


def test_merge_extend_and_what_lies_there(studio, folders, planned_here):
    activity = studio.merge(wanted(prompts="a cat\na dog"))
    studio.desk.wait(600)
    assert activity.state == "done" and activity.line == "Done: mixed.safetensors.", activity.line
    assert folders.list_students() == ["mixed.safetensors"] and studio.unfinished() == []
    assert studio.teachers_of("mixed.safetensors") == (["a.safetensors", "sub/b.safetensors"], "")
    with pytest.raises(BadInput, match="finished already"):
        studio.merge(wanted(prompts="a cat\na dog"))
    with pytest.raises(BadInput, match="is a merge with other settings"):
        studio.merge(wanted())
    with pytest.raises(BadInput, match="exists and is not a merge"):
        studio.merge(wanted("c", replace=True))
    with pytest.raises(BadInput, match=r"2 styles \(a, b\), 1 teachers are chosen"):
        studio.evaluate("mixed.safetensors", ["a.safetensors"], 4, 1)
    write_lora(folders.loras[0] / "l.safetensors")
    added = {"checkpoints": ["c.safetensors"], "loras": ["l.safetensors"], "base": "a.safetensors"}
    more = studio.merge(wanted("more", student="mixed.safetensors", **added))
    studio.desk.wait(600)
    assert more.state == "done", more.line
    assert open_checkpoint(folders.checkpoint("more.safetensors")).styles == ("a", "b", "c", "l")
    teachers = ["a.safetensors", "sub/b.safetensors", "c.safetensors", "l.safetensors"]
    assert studio.teachers_of("more.safetensors") == (teachers, "a.safetensors")


PLAN = {"student": "lora", "rank": 64, "micro": 1, "resident": 1}


@pytest.fixture
def started(monkeypatch):
    """Recipes that were started, and whether to replace; no child is."""
    calls = []

    def start(recipe, replace, *more):
        calls.append((recipe, replace))
        raise BadInput("not here")

    monkeypatch.setattr(jobs, "start", start)
    return calls


def planned(studio, asked: Wanted, **changes):
    """The recipe as a plan has changed it; this studio knows of the plan."""
    recipe = studio.recipe(asked)
    studio.plans[_key(recipe)] = {"changes": changes}
    return _with_train(recipe, changes)


def leave_unfinished(recipe) -> Path:
    recipe.work.mkdir(parents=True)
    (recipe.work / "job.json").write_text(json.dumps(recipe.to_dict()), encoding="utf-8")
    (recipe.work / "state.safetensors").write_bytes(b"x")
    return recipe.work


@pytest.mark.parametrize("replace", [False, True])
def test_a_planned_merge_is_taken_up_after_a_restart(studio, folders, started, planned_here, replace):
    """The plan is forgotten, and its changes are no other settings: nothing is refused, and nothing thrown away."""
    made = planned(studio, wanted(), **PLAN)
    leave_unfinished(made)
    again = Studio(folders, Recording())
    again.merge(wanted(replace=replace))
    again.desk.wait(60)
    ((recipe, told),) = started
    assert recipe.train == made.train and told is replace
    assert jobs.same_merge(recipe, recipe.work), "so that jobs.start resumes it"


def test_a_plan_of_now_counts_before_the_unfinished_one(studio, started, planned_here):
    """Else what did not fit would be taken up for ever."""
    leave_unfinished(studio.recipe(wanted()))
    planned(studio, wanted(), **PLAN)
    with pytest.raises(BadInput, match="unfinished merge mixed with other settings"):
        studio.merge(wanted())
    studio.merge(wanted(replace=True))
    studio.desk.wait(60)
    assert [recipe.train.student for recipe, _ in started] == ["lora"]


def test_other_settings_are_told_of_resume_before_replace(studio, started):
    work = leave_unfinished(studio.recipe(wanted()))
    with pytest.raises(BadInput, match=r"Resume under Unfinished merges takes it up\. .*replace") as told:
        studio.merge(wanted(steps=4))
    assert "\n" not in str(told.value) and (work / "state.safetensors").exists() and not started


def test_resume_goes_on_as_it_began_whatever_was_planned_since(studio, started, planned_here):
    leave_unfinished(studio.recipe(wanted()))
    planned(studio, wanted(), **PLAN)
    studio.resume("mixed")
    studio.desk.wait(60)
    assert [recipe.train.student for recipe, _ in started] == ["full"]


def test_resume_beside_a_finished_file_keeps_what_was_learnt(studio, folders, planned_here, monkeypatch):
    """The output may be overwritten, but a teacher that has changed since must not make it begin anew."""
    recipe = studio.recipe(wanted())
    work = leave_unfinished(recipe)
    inputs.note(recipe)
    mine = recipe.teachers[0].path
    tiny.write_tiny_dmm(recipe.out)
    other = open_checkpoint(folders.checkpoint("c.safetensors")).path
    shutil.copy(other, mine)
    with pytest.raises(BadInput, match=r"a\.safetensors: is not the file .* Put that one back to go on"):
        studio.resume("mixed")
    assert (work / "state.safetensors").exists()


def test_a_planned_merge_is_finished_with_and_without_its_plan(studio, folders, started, planned_here):
    made = planned(studio, wanted(), **PLAN)
    info = [{"name": t.name, "sha256": open_checkpoint(t.path).sha256()} for t in made.teachers]
    base = open_checkpoint(made.teachers[0].path)
    names = tuple(teacher.name for teacher in made.teachers)
    student = Student.start(base, base.unet(), names, None, 0)
    student.save(made.out, base, style_info=info, title="x", recipe=made.to_dict(names_only=True))
    for one in (studio, Studio(folders, Recording())):
        with pytest.raises(BadInput, match="is this very merge, finished already"):
            one.merge(wanted())
        one.merge(wanted(replace=True))
        one.desk.wait(60)
    assert [replace for _, replace in started] == [True, True], "asked for, it is made anew"
    planned(studio, wanted(), student="full")
    with pytest.raises(BadInput, match="is a merge with other settings"):
        studio.merge(wanted())


def test_plans_change_no_more_than_their_list(monkeypatch):
    from dmm_core import trial

    monkeypatch.setattr(trial, "has_eight_bit", lambda: True)
    monkeypatch.setattr(trial, "has_bf16", lambda device: True)
    assert set(trial.candidates(TrainSpec(), 2, "cuda")[-1]) == set(PLANNED)


@pytest.mark.slow
def test_evaluate_with_a_lora_among_the_teachers(studio, folders, planned_here):
    write_lora(folders.loras[0] / "l.safetensors")
    merged = studio.merge(wanted("mixed", loras=["l.safetensors"], base="a.safetensors"))
    studio.desk.wait(600)
    assert merged.state == "done", merged.line
    teachers = ["a.safetensors", "sub/b.safetensors", "l.safetensors"]
    evaluated = studio.evaluate("mixed.safetensors", teachers, 4, 1, "a.safetensors")
    studio.desk.wait(600)
    assert evaluated.state == "done" and len(evaluated.pictures) == 3, evaluated.line


@pytest.mark.parametrize(("change", "told"), [
    ({"name": " "}, "has no name yet"),
    ({"name": "../x"}, "is not a file's name"),
    ({"name": "a:b"}, "has the character ':'"),
    ({"checkpoints": ["a.safetensors"]}, "at least two checkpoints"),
    ({"checkpoints": []}, "at least two checkpoints"),
    ({"checkpoints": ["a.safetensors", "../x"]}, "leads out"),
    ({"loras": ["x.safetensors"]}, "there is no LoRA"),
    ({"preset": "quick"}, "there is no 'quick'"),
    ({"steps": -5}, "train.steps"),
    ({"student": "gone.safetensors"}, "there is no checkpoint"),
])  # fmt: skip
def test_bad_merges_are_a_sentence(studio, change, told):
    with pytest.raises(BadInput, match=told) as error:
        studio.merge(wanted(**change))
    assert "\n" not in str(error.value) and studio.desk.activity is None and studio.host.calls == []


def test_deleted_between_choice_and_start(studio, folders):
    path = folders.checkpoint("sub/b.safetensors")
    path.unlink()
    with pytest.raises(BadInput, match=r"there is no checkpoint .sub/b\.safetensors."):
        studio.merge(wanted())


def test_files_that_do_not_fit_end_in_a_sentence(studio, folders, planned_here):
    path = folders.checkpoint("sub/b.safetensors")
    path.write_bytes(path.read_bytes()[:5000])
    activity = studio.merge(wanted())
    studio.desk.wait(600)
    assert activity.state == "failed" and "b.safetensors" in activity.line and "Traceback" not in activity.line
    assert studio.host.calls == ["free", "give back", "wrote"]


def test_resume_stays_inside(studio, folders, tmp_path):
    recipe = studio.recipe(wanted("evil")).to_dict()
    for key, value in (("out", str(tmp_path / "elsewhere.safetensors")), ("base", str(tmp_path / "x.safetensors"))):
        shutil.copy(folders.checkpoint("a.safetensors"), tmp_path / "x.safetensors")
        work = folders.own / "evil.work"
        work.mkdir(exist_ok=True)
        (work / "job.json").write_text(json.dumps({**recipe, key: value}), encoding="utf-8")
        with pytest.raises(BadInput, match="lies outside of the model folders"):
            studio.resume("evil")
    for name in ("../evil", "", None, "unknown"):
        with pytest.raises(BadInput, match="no unfinished merge"):
            studio.resume(name)


# ---------------------------------------------------------------- commands as children


def test_a_command_answers_refuses_and_stops(folders, tmp_path):
    here, said = Training(Path(sys.executable)), []
    found = tool.run(here, ["inspect", str(folders.checkpoint("a.safetensors"))], said.append, lambda: False)
    assert found["kind"] == "checkpoint" and found["parameters"]["all"] > 0
    with pytest.raises(BadInput, match=r"gone\.safetensors: there is no such file"):
        tool.run(here, ["inspect", str(tmp_path / "gone.safetensors")], said.append, lambda: False)
    began = time.monotonic()
    with pytest.raises(tool.Stopped):
        tool.run(here, ["inspect", str(folders.checkpoint("a.safetensors"))], said.append, lambda: True)
    assert time.monotonic() - began < 60
    with pytest.raises(BadInput, match="cannot be started"):
        tool.run(Training(tmp_path / "no python"), ["inspect", "x"], said.append, lambda: False)


# ---------------------------------------------------------------- training's environment


def test_no_environment_yet(folders, monkeypatch, tmp_path):
    """``install.py`` of a clone that cannot install, then of one that can: its lines are shown."""
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.delenv(environment.VARIABLE, raising=False)
    script = tmp_path / "install.py"
    script.write_text("import sys; sys.exit(3 if '--where' in sys.argv else print('no network') or 1)", "utf-8")
    studio = Studio(folders)
    assert not studio.ready()
    with pytest.raises(NotInstalled):
        studio.merge(wanted())
    activity = studio.install()
    studio.desk.wait(30)
    assert activity.state == "failed" and "no network" in activity.line
    where = f"print({{'python': {sys.executable!r}, 'paths': []}}.__repr__().replace(chr(39), chr(34)))"
    script.write_text(f"import sys\n{where} if '--where' in sys.argv else print('made it')", "utf-8")
    activity = studio.install()
    studio.desk.wait(30)
    assert activity.state == "done" and "made it" in activity.lines and studio.ready()


# ---------------------------------------------------------------- files


@pytest.fixture
def student(folders) -> str:
    return tiny.write_tiny_dmm(folders.checkpoints[0] / "student.safetensors").name


def test_export_a_style_file_and_a_checkpoint(studio, folders, student):
    """The file holds what the codebook says; baked, the stock bias has gained it."""
    from safetensors import safe_open

    source = open_checkpoint(folders.checkpoint(student))
    names, book = source.styles, source.codebook()
    mix = {names[0]: 3.0, names[1]: 1.0}
    told = studio.export(student, mix, "styles/mine", bake=False)
    path = folders.loras[0] / "styles" / "mine.safetensors"
    assert f"0.75 {names[0]} + 0.25 {names[1]}" in told and str(path) in told
    with safe_open(str(path), "pt") as file:
        vector = file.get_tensor("lora_unet_time_embed_2.diff_b")
    assert torch.allclose(vector.float(), book.style({names[0]: 0.75, names[1]: 0.25}).float(), atol=1e-3)
    studio.export(student, {names[2]: 1.0}, "styles/mine", bake=False)  # ours: written anew
    studio.export(student, mix, "baked", bake=True)
    baked = open_checkpoint(folders.checkpoint("baked.safetensors"))
    key = "time_embedding.linear_2.bias"
    assert torch.allclose(dict(baked.unet())[key].float() - dict(source.unet())[key].float(), vector.float(), atol=5e-3)
    assert studio.host.calls == ["wrote"] * 3
    assert studio.inspect("styles/mine.safetensors")["kind"] == "style"


def test_bad_exports_are_a_sentence(studio, folders, student):
    names = open_checkpoint(folders.checkpoint(student)).styles
    one = {names[0]: 1.0}
    shutil.copy(folders.checkpoint("a.safetensors"), folders.loras[0] / "lora.safetensors")
    for told, given in {
        "sum": (student, {names[0]: 1.0, names[1]: -1.0}, "x", False),
        "no style": (student, {"nobody": 1.0}, "x", False),
        "is an ordinary checkpoint": ("a.safetensors", one, "x", False),
        "has no name yet": (student, one, "", False),
        "is not a file's name": (student, one, "../x", False),
        "exists and is not a style file": (student, one, "lora", False),
        "is there already": (student, one, "a", True),
        "no checkpoint is chosen": (None, one, "x", False),
    }.items():
        with pytest.raises(BadInput, match=told) as error:
            studio.export(*given)
        assert "\n" not in str(error.value)
    assert folders.list_loras() == ["lora.safetensors"]
    assert studio.export(student, {names[0]: 1.0, names[1]: -1.0}, "x", False, normalise=False)


def test_inspect(studio):
    found = studio.inspect("a.safetensors", check_values=True)
    assert found["kind"] == "checkpoint" and found["non_finite"] == []
    with pytest.raises(BadInput, match="leads out"):
        studio.inspect("../a.safetensors")


def test_lora_needs_a_base(studio, folders):
    shutil.copy(folders.checkpoint("a.safetensors"), folders.loras[0] / "l.safetensors")
    with pytest.raises(BadInput, match="on top of a base"):
        studio.merge(wanted(loras=["l.safetensors"]))
