"""A recipe in stages, e.g. distil, then a fine-tune on pictures that the teachers make. DMM (arXiv:2504.12364) §3.4.

Each stage has data and settings of its own, and starts from the student that the one before left in the work folder.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from dmm_core.recipe import Recipe, work_folder

LEFT = ("state.safetensors", "state-[0-9]*.safetensors", "student-[0-9]*.safetensors", "latents.safetensors",
        "latents-[0-9]*.safetensors", "files.json", "losses.json", "job.json", "log.txt", "stop",
        "previews/step-*.jpg")  # fmt: skip
TORN = (".state*.tmp", ".student-*.tmp", ".latents*.tmp", ".losses.json.*.tmp", ".files.json.*.tmp", ".job.json.*.tmp",
        "previews/.step-*.tmp")  # fmt: skip


def stage_recipe(recipe: Recipe, number: int) -> Recipe:
    """The recipe of one stage (from 0), whose ``work`` folder is that of its data; stages of equal data share one."""
    if not recipe.stages:
        return recipe
    stage, folder = recipe.stages[number], work_folder(recipe)
    data = [(other.data, other.train.seed, other.train.regularize == 0) for other in recipe.stages]
    first = data.index(data[number])
    return replace(recipe, data=stage.data, train=stage.train, work=folder / f"stage-{first + 1}" if first else folder)


def stage_recipes(recipe: Recipe) -> list[Recipe]:
    """All of them; the recipe itself where it has no stages."""
    return [stage_recipe(recipe, number) for number in range(max(1, len(recipe.stages)))]


def student_file(recipe: Recipe, number: int) -> Path:
    """The student at the end of a stage (from 0)."""
    return work_folder(recipe) / f"student-{number + 1}.safetensors"


def finished(recipe: Recipe) -> int:
    """How many stages are done; the last one ends with the DMM file."""
    return next((n for n in range(len(recipe.stages)) if not student_file(recipe, n).exists()), 0)


def state_file(recipe: Recipe, number: int | None = None) -> Path:
    """Where an interrupted stage can be taken up; None: the stage that is not finished."""
    number = finished(recipe) if number is None else number
    return work_folder(recipe) / (f"state-{number + 1}.safetensors" if number else "state.safetensors")


def unfinished(recipe: Recipe) -> bool:
    """Whether an interrupted run lies in the work folder."""
    return bool(finished(recipe)) or state_file(recipe).exists()


def something_made(work: Path) -> bool:
    """Whether latents, a student or a state lie in a work folder."""
    return any(work.glob("*.safetensors"))


def total_steps(recipe: Recipe) -> int:
    """Of all stages together."""
    return sum(stage.train.steps for stage in stage_recipes(recipe))


def clear_work(folder: Path) -> None:
    """Remove what a merge leaves in its work folder, and the folder itself if it held nothing else.

    The recipe names the folder, and it may be one that the user keeps other things in.
    """
    for stage in folder.glob("stage-[0-9]*"):
        clear_work(stage)
    _remove(folder, LEFT + TORN)
    for place in (folder / "previews", folder):
        with suppress(OSError):  # not there, or not empty
            place.rmdir()


def clear_torn(folder: Path) -> None:
    """Remove what a process that was killed in the middle of a save has left half written."""
    _remove(folder, TORN)


def _remove(folder: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for path in folder.glob(pattern):
            with suppress(OSError):  # open elsewhere, on Windows: the next merge to this name tells
                path.unlink()
