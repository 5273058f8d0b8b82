"""Everything that the tab DMM can do, a method each. Bad input raises BadInput, whose text is what the page shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmm_core import environment, inputs, jobs
from dmm_core.asked import preview_seconds, recipe_for
from dmm_core.checkpoint import inspect_file, open_checkpoint
from dmm_core.errors import BadInput
from dmm_core.export import export
from dmm_core.files import write_atomically
from dmm_core.follow import View
from dmm_core.outputs import require_ours, require_style_file, settled
from dmm_core.presets import DEFAULT
from dmm_core.recipe import FREE, PLANNED, Recipe, recipe_from_dict, work_folder
from dmm_core.studio import tool
from dmm_core.studio.desk import Activity, Desk, Host, follow
from dmm_core.studio.folders import Folders

PICTURES = (  # of an evaluation, as dmm evaluate writes them
    ("styles.png", "Teachers above, the file's style below; last row: their plain average"),
    ("fid.png", "Distances between the pictures of each style and of each teacher: dark is near"),
    ("mix.png", "From one style to another"),
)
ANY_PLAN = (*FREE, *PLANNED)  # keys of train by which a merge is known again whatever its plan was


@dataclass(frozen=True)
class Wanted:
    """A merge, or with ``student`` an extension, as a page's fields say it; 0 leaves a number to the preset."""

    name: str
    checkpoints: Sequence[str] = ()
    loras: Sequence[str] = ()
    base: str = ""
    student: str = ""
    preset: str = DEFAULT
    prompts: str = ""
    steps: float | None = 0
    pictures: float | None = 0
    replace: bool = False


class Studio:
    """Folders, host and desk of one page or webui."""

    def __init__(self, folders: Folders, host: Host | None = None) -> None:
        self.folders = folders
        self.host = host or Host()
        self.desk = Desk(self.host)
        self.plans: dict[str, dict[str, Any]] = {}  # recipe → what a trial found
        self._ready = False

    # ---------------------------------------------------------------- training

    def ready(self) -> bool:
        """Whether there is an environment to train in; once it is there it is not looked for again."""
        if not self._ready:
            try:
                self.host.training()
            except BadInput:
                return False
            self._ready = True
        return True

    def install(self) -> Activity:
        """Make the environment for training: ``install.py --train`` as a child, its lines shown."""

        def work(activity: Activity) -> str:
            try:
                environment.install(activity.say, activity.cancelled.is_set)
            except BadInput:
                if activity.cancelled.is_set():
                    raise tool.Stopped from None
                raise
            return "Ready to train."

        return self.desk.begin("Installs what training needs", work, needs_gpu=False)

    def recipe(self, wanted: Wanted) -> Recipe:
        """Raises BadInput: a name that is none, too few checkpoints, or an impossible value."""
        find = self.folders
        teachers = [find.checkpoint(name) for name in wanted.checkpoints or ()]
        teachers += [find.lora(name) for name in wanted.loras or ()]
        base = find.checkpoint(wanted.base) if wanted.base else None
        if wanted.loras and base is None and not wanted.student:
            raise BadInput("a LoRA teaches on top of a base", hint="Choose the base.")
        student = find.checkpoint(wanted.student) if wanted.student else None
        if not wanted.name.strip():
            raise BadInput("the new file has no name yet", hint="Give one, such as my-styles.")
        find.new_checkpoint(wanted.name)
        data: dict[str, Any] = {"preset": wanted.preset}
        for section, key, value in (("train", "steps", wanted.steps), ("data", "latents_per_teacher", wanted.pictures)):
            if value:
                data[section] = {key: int(value)}
        return recipe_for(
            wanted.name, find.place(self.host.device()), teachers, data,
            prompts=wanted.prompts, base=base, student=student, source="merge",
        )  # fmt: skip

    def plan(self, wanted: Wanted) -> Activity:
        """Check the files and try a few steps; what makes it fit goes into the merge."""
        recipe = self.recipe(wanted)
        training = self.host.training()

        def work(activity: Activity) -> str:
            path = self._written(recipe)
            activity.say("Opens the files, and tries a few steps.")
            plan = tool.run(training, ["plan", str(path)], activity.say, activity.cancelled.is_set)
            activity.plan = self.plans[_key(recipe)] = plan
            return "It can be merged." if plan.get("fits") is not False else "It does not fit this device."

        return self.desk.begin(f"Plans {recipe.out.stem}", work)

    def merge(self, wanted: Wanted) -> Activity:
        """Begin a merge or an extension, or take it up where it was stopped. The plan comes first.

        What a plan has changed counts as this merge's own, also once the program has forgotten the plan.
        """
        asked = self.recipe(wanted)
        plan = self.plans.get(_key(asked))
        recipe = _with_train(asked, plan.get("changes") or {}) if plan else _as_begun(asked)
        if settled(recipe, wanted.replace, FREE if plan else ANY_PLAN) and not wanted.replace:
            raise BadInput(f"{recipe.out.name} is this very merge, finished already", hint="There is nothing to do.")
        if not wanted.replace and not jobs.same_merge(recipe, work_folder(recipe)):
            raise BadInput(
                f"an unfinished merge {recipe.out.stem} with other settings is there",
                hint="Resume under Unfinished merges takes it up. Or choose another name, or turn replace on, and "
                "what it learnt is lost.",
            )
        return self._start(recipe, wanted.replace, plan)

    def unfinished(self) -> list[str]:
        """Names of merges that were stopped, and can be resumed."""
        found = [path.parent for path in self.folders.own.rglob("job.json") if path.parent.suffix == ".work"]
        return sorted(work.relative_to(self.folders.own).with_suffix("").as_posix() for work in found)

    def resume(self, name: str | None) -> Activity:
        """Go on with a merge that was stopped. Raises BadInput: there is none of that name, or its files are gone."""
        if not name or name not in self.unfinished():
            raise BadInput(f"there is no unfinished merge {name!r}" if name else "no unfinished merge is chosen")
        path = self.folders.own / f"{name}.work" / "job.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise BadInput("cannot be read", path, "Start the merge anew.") from None
        recipe = recipe_from_dict(data, path.parent, f"{name} (unfinished)")
        teachers = (teacher.path for teacher in recipe.teachers)
        others = (recipe.base, recipe.student, recipe.work, recipe.data.prompts)
        for used in (*teachers, recipe.out, *(other for other in others if other is not None)):
            self.folders.require_known(used)
        inputs.require_same(recipe)  # replace is for the output alone: with another teacher it would begin anew
        return self._start(recipe, replace=require_ours(recipe.out) is not None)

    def _start(self, recipe: Recipe, replace: bool, found: dict[str, Any] | None = None) -> Activity:
        """``found``: what a plan has said of it."""
        training = self.host.training()
        resumes = (recipe.work or Path()) / "job.json"
        title = f"{'Extends' if recipe.student else 'Merges'} {recipe.out.stem}"

        def work(activity: Activity) -> str:
            activity.plan = found
            if found is None and not resumes.exists():
                activity.say("Opens and checks the files.")
                told = ["plan", str(self._written(recipe)), "--quick"]
                activity.plan = tool.run(training, told, activity.say, activity.cancelled.is_set)
            activity.view = View()
            with jobs.start(recipe, replace, preview_seconds(recipe), training) as job:
                last = follow(job, activity, "Resume it")
            if activity.view.picture:
                activity.pictures = [(activity.view.caption, activity.view.picture)]
            return last

        return self.desk.begin(title, work)

    def _written(self, recipe: Recipe) -> Path:
        path = self.folders.own / "plan.json"
        write_atomically(path, json.dumps(recipe.to_dict(), indent=1).encode())
        return path

    # ---------------------------------------------------------------- files

    def inspect(self, name: str | None, check_values: bool = False) -> dict[str, Any]:
        """What a checkpoint, DMM file, LoRA or style file holds."""
        return inspect_file(self.folders.model(name), check_values)

    def export(
        self, student: str | None, mix: Mapping[str, float], name: str, bake: bool, normalise: bool = True
    ) -> str:
        """Write a style file into the LoRA folder, or a checkpoint of one mix; returns what was made, in words."""
        source = self.folders.checkpoint(student)
        if not name.strip():
            raise BadInput("the new file has no name yet", hint="Give one, such as my-mix.")
        out = self.folders.new_checkpoint(name) if bake else self.folders.new_lora(name)
        if bake and out.exists():
            raise BadInput("is there already", out, "Choose another name.")
        if not bake:
            require_style_file(out)
        used = export(open_checkpoint(source), mix, out, out.stem, bake, normalise)
        self.host.wrote()
        told = " + ".join(f"{weight:.3g} {style}" for style, weight in used.items())
        return f"Written: {out} ({told}; {out.stat().st_size:,} bytes)."

    def teachers_of(self, student: str | None) -> tuple[list[str], str]:
        """Those of the listed files that a DMM file names as its teachers, in its order, and as their base ("": none).

        LoRA files need a base; without one among them there is none.
        """
        file = open_checkpoint(self.folders.checkpoint(student))
        checkpoints, loras = ({Path(name).name: name for name in reversed(names)}
                              for names in (self.folders.list_checkpoints(), self.folders.list_loras()))  # fmt: skip
        wanted = [Path(str(style.get("teacher") or "")).name for style in file.style_info]
        found = [(checkpoints.get(name) or loras[name]) for name in wanted if name in {**loras, **checkpoints}]
        needs_base = any(name in loras and name not in checkpoints for name in wanted)
        return found, checkpoints.get(_base_of(file.metadata), "") if needs_base else ""

    def evaluate(
        self, student: str | None, teachers: Sequence[str], images: float, steps: float, base: str | None = None
    ) -> Activity:
        """Draw and measure a DMM file beside its teachers; the pictures stay in the activity and on the disk.

        ``base``: what LoRA files among the teachers are put on, with the strengths that they were learned at.
        """
        file = self.folders.checkpoint(student)
        beside = [str(self.folders.model(name)) for name in teachers or ()]
        under = ["--base", str(self.folders.checkpoint(base))] if base else []
        styles = open_checkpoint(file).styles
        if not styles:
            raise BadInput(f"{file.name} is an ordinary checkpoint without styles", hint="Choose a DMM file.")
        if len(beside) != len(styles):
            raise BadInput(
                f"{file.name} has {len(styles)} styles ({', '.join(styles)}), {len(beside)} teachers are chosen",
                hint="Choose them in this order.",
            )
        if images < 4 or steps < 1:
            raise BadInput("at least 4 pictures and 1 step are needed")
        training, out = self.host.training(), self.folders.report(str(student))
        told = ["evaluate", str(file), "--images", str(int(images)), "--steps", str(int(steps)), "--out", str(out)]
        told += [*under, "--device", self.host.device() or "auto", "--teacher", *beside]

        def work(activity: Activity) -> str:
            from dmm_core.commands.evaluate import headline

            activity.say("Loads the models.")
            report = tool.run(training, told, activity.say, activity.cancelled.is_set)
            activity.pictures = [
                (caption, (out / name).read_bytes()) for name, caption in PICTURES if (out / name).exists()
            ]
            return ". ".join([*headline(report), f"The whole report: {out / 'report.html'}"])

        return self.desk.begin(f"Evaluates {file.stem}", work)


def _base_of(metadata: Mapping[str, str]) -> str:
    """The file name of the base in a file's ``dmm.recipe``; "" where it says none."""
    try:
        return Path(json.loads(metadata.get("dmm.recipe", ""))["base"]).name
    except (ValueError, KeyError, TypeError):
        return ""


def _key(recipe: Recipe) -> str:
    return json.dumps(recipe.to_dict(), sort_keys=True)


def _with_train(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    data = recipe.to_dict()
    return recipe_from_dict({**data, "train": {**data["train"], **changes}}, source="merge")


def _as_begun(recipe: Recipe) -> Recipe:
    """With the changes of the plan that the unfinished merge of this name follows, if they are all that differs."""
    begun = jobs.begun(work_folder(recipe))
    plain = json.loads(json.dumps(recipe.to_dict()))
    if begun is None or jobs.essence(begun, ANY_PLAN) != jobs.essence(plain, ANY_PLAN):
        return recipe
    return _with_train(recipe, {key: begun["train"][key] for key in PLANNED if key in begun["train"]})
