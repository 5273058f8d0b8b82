"""The saved state of a distillation: everything that decides its next step, so that a resume is exact."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dmm_core.checkpoint import Checkpoint, NonFinite
from dmm_core.checkpoint.writer import write_safetensors
from dmm_core.errors import BadInput
from dmm_core.recipe import FREE, TrainSpec

if TYPE_CHECKING:
    from dmm_core.distill import Distillation
    from dmm_core.student import Student


class Stored(Mapping[str, Tensor]):
    """The tensors of an open safetensors file whose names begin with ``prefix``, each read when it is asked for.

    Copies, which the caller lets go one after the other: Windows replaces no file that a tensor still maps.
    """

    def __init__(self, file: Any, prefix: str = "") -> None:
        self.file, self.prefix = file, prefix
        self.names = {key.removeprefix(prefix) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(self.prefix + name)
        return self.file.get_tensor(self.prefix + name).clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def state(run: Distillation) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The run's own tensors, wherever they are, and strings.

    A low-rank student's frozen UNet is not among them: it is made again.
    """
    tensors: dict[str, Tensor] = {f"student.{k}": v for k, v in run.student.learned().items()}
    tensors |= {f"average.{i}": v for i, v in enumerate(run.average)}
    tensors |= {f"optimizer.{k}": v for k, v in run.optimizer.state().items()}
    tensors |= run.critic.state() if run.critic else {}
    tensors["rng"] = run.rng.get_state()
    about = {"step": run.step_count, "samples_seen": run.samples_seen, "scaler": run.scaler.state_dict()}
    if run.economy.steps_down:
        about["economy"] = vars(run.economy)
    tensors = {key: value.detach() for key, value in tensors.items()}
    return tensors, {"dmm.resume": json.dumps(about), "dmm.run": identity(run)}


def identity(run: Distillation) -> str:
    """What must not change between sittings, as JSON."""
    told = taught(run.student.codebook.names, run.teachers.checkpoints)
    return json.dumps({**told, "train": binding(run.spec)}, sort_keys=True, default=list)


def binding(spec: TrainSpec) -> dict[str, Any]:
    """The settings that must not change: those that decide a step, which ``unshrink`` comes after."""
    return {key: value for key, value in vars(spec).items() if key not in (*FREE, "unshrink")}


def as_of_today(whose: str) -> str:
    """An ``identity``, with the defaults of settings that there were none of when it was written: they do nothing."""
    told = json.loads(whose)
    told["train"] = {**binding(TrainSpec()), **told["train"]}
    return json.dumps(told, sort_keys=True, default=list)


def taught(styles: Sequence[str], teachers: Sequence[Checkpoint]) -> dict[str, list[str]]:
    """What all stages of a recipe have in common: the styles, and whom each was learned from."""
    return {"styles": list(styles), "teachers": [teacher.path.name for teacher in teachers]}


def save(run: Distillation, path: Path) -> None:
    """Write the state; its tensors come to the CPU one after the other, as the writer asks for them.

    Raises:
        BadInput: what was learnt is no numbers any more; the state that was saved before stays.
    """
    try:
        write_safetensors(path, *state(run))
    except NonFinite as error:
        told = f"the training diverged before step {run.step_count}: {error.key} is NaN or infinite"
        raise BadInput(told, hint="Begin anew with a lower train.lr.") from error


@torch.no_grad()
def load(run: Distillation, path: Path) -> None:
    """Continue where ``save`` was called.

    Raises:
        BadInput: not a saved state, or one of another recipe.
    """
    with ExitStack() as stack:
        try:
            file = stack.enter_context(safe_open(str(path), "pt"))
            strings = file.metadata() or {}
            about, whose = json.loads(strings["dmm.resume"]), as_of_today(strings["dmm.run"])
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise BadInput("is no saved state of a distillation", path, "Start again without --resume.") from error
        if whose != identity(run):
            told = "Resume with the recipe it was made with, or start again."
            raise BadInput("belongs to another recipe", path, told)
        try:
            put_back(run, file)
        except KeyError as error:  # 8-bit moments of another library have other names
            told = "Resume where it was made: with the same libraries."
            raise BadInput(f"has no {error.args[0]}", path, told) from error
    if about["scaler"]:  # none where the sitting before computed in another precision than float16
        run.scaler.load_state_dict(about["scaler"])
    run.step_count, run.samples_seen = about["step"], about["samples_seen"]
    for name, value in about.get("economy", {}).items():
        setattr(run.economy, name, value)
    run.be_sparing()


def put_back(run: Distillation, file: Any) -> None:
    """Copy every tensor of an open state into its place, one after the other; KeyError where one is missing."""
    fill(run.student, Stored(file, "student."))
    average = Stored(file, "average.")
    for i, mine in enumerate(run.average):
        mine.copy_(average[str(i)])
    run.optimizer.load_state(Stored(file, "optimizer."))
    if run.critic:
        run.critic.load_state(Stored(file, "critic."), Stored(file, "critic_optimizer."))
    run.rng.set_state(Stored(file)["rng"])


def fill(student: Student, stored: Mapping[str, Tensor]) -> None:
    """Copy what a student has learned into it. KeyError: a tensor is missing; RuntimeError: one of another shape."""
    for key, mine in student.learned().items():
        theirs = stored[key]
        if mine.shape != theirs.shape:  # which copy_ might spread
            raise RuntimeError(f"{key}: expected {tuple(mine.shape)}, got {tuple(theirs.shape)}")
        mine.copy_(theirs)


def save_student(run: Distillation, path: Path) -> None:
    """The student alone, for the next stage; and how many samples it has seen."""
    about = {
        "samples_seen": str(run.samples_seen),
        "dmm.run": json.dumps(taught(run.student.codebook.names, run.teachers.checkpoints)),
    }
    write_safetensors(path, run.student.learned(), about)


def check_student(path: Path, styles: Sequence[str], teachers: Sequence[Checkpoint]) -> None:
    """Raises BadInput for a student of other teachers, before anything is drawn for its next stage."""
    try:
        with safe_open(str(path), "pt") as file:
            whose = json.loads((file.metadata() or {})["dmm.run"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise BadInput("is no student of a stage before", path, "Delete the work folder.") from error
    if whose != taught(styles, teachers):
        told = "Go on with the recipe as it was, or delete the work folder."
        raise BadInput("learned from other teachers than the recipe's", path, told)


@torch.no_grad()
def load_student(run: Distillation, path: Path) -> None:
    """Start a stage from what ``save_student`` wrote, the moving average too.

    Raises:
        BadInput: not such a file.
    """
    try:
        with safe_open(str(path), "pt") as file:
            seen = int((file.metadata() or {})["samples_seen"])
            fill(run.student, Stored(file))
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise BadInput("is no student of this recipe's stage before", path, "Delete the work folder.") from error
    run.samples_seen = seen
    for mine, parameter in zip(run.average, run.learned, strict=bool(run.average)):
        mine.copy_(parameter)
