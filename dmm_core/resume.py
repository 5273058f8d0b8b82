"""The saved state of a distillation: everything that decides its next step, so that a resume is exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dmm_core.checkpoint.writer import write_safetensors
from dmm_core.errors import BadInput
from dmm_core.recipe import FREE

if TYPE_CHECKING:
    from dmm_core.distill import Distillation


def state(run: Distillation) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the CPU, and strings. A low-rank student's frozen UNet is not among them: it is made again."""
    tensors: dict[str, Tensor] = {f"student.{k}": v for k, v in run.student.learned().items()}
    tensors |= {f"average.{i}": v for i, v in enumerate(run.average)}
    tensors |= {f"optimizer.{k}": v for k, v in run.optimizer.state().items()}
    tensors |= run.critic.state() if run.critic else {}
    tensors["rng"] = run.rng.get_state()
    about = {"step": run.step_count, "samples_seen": run.samples_seen, "scaler": run.scaler.state_dict()}
    if run.economy.steps_down:
        about["economy"] = vars(run.economy)
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    return tensors, {"dmm.resume": json.dumps(about), "dmm.run": identity(run)}


def identity(run: Distillation) -> str:
    """What must not change between sittings, as JSON."""
    names = [str(checkpoint.path.name) for checkpoint in run.teachers.checkpoints]
    spec = {k: v for k, v in vars(run.spec).items() if k not in FREE}
    return json.dumps(
        {"styles": run.student.codebook.names, "teachers": names, "train": spec}, sort_keys=True, default=list
    )


def save(run: Distillation, path: Path) -> None:
    write_safetensors(path, *state(run))


@torch.no_grad()
def load(run: Distillation, path: Path) -> None:
    """Continue where ``save`` was called.

    Raises:
        BadInput: not a saved state, or one of another recipe.
    """
    try:
        with safe_open(str(path), "pt") as file:
            strings = file.metadata() or {}
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - not a dict
        about, whose = json.loads(strings["dmm.resume"]), strings["dmm.run"]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise BadInput("is no saved state of a distillation", path, "Start again without --resume.") from error
    if whose != identity(run):
        raise BadInput("belongs to another recipe", path, "Resume with the recipe it was made with, or start again.")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = value
    try:
        run.student.load_state_dict({**run.student.state_dict(), **parts["student"]})
        for i, mine in enumerate(run.average):
            mine.copy_(parts["average"][str(i)])
        run.optimizer.load_state(parts["optimizer"])
        if run.critic:
            run.critic.load_state(parts["critic"], parts["critic_optimizer"])
    except KeyError as error:  # 8-bit moments of another library have other names
        raise BadInput(f"has no {error.args[0]}", path, "Resume where it was made: with the same libraries.") from error
    run.rng.set_state(tensors["rng"])
    run.scaler.load_state_dict(about["scaler"])
    run.step_count, run.samples_seen = about["step"], about["samples_seen"]
    for name, value in about.get("economy", {}).items():
        setattr(run.economy, name, value)
    run.be_sparing()


def save_student(run: Distillation, path: Path) -> None:
    """The student alone, for the next stage; and how many samples it has seen."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in run.student.learned().items()}
    write_safetensors(path, tensors, {"samples_seen": str(run.samples_seen)})


@torch.no_grad()
def load_student(run: Distillation, path: Path) -> None:
    """Start a stage from what ``save_student`` wrote, the moving average too.

    Raises:
        BadInput: not such a file.
    """
    try:
        with safe_open(str(path), "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            seen = int((file.metadata() or {})["samples_seen"])
        run.student.load_state_dict({**run.student.state_dict(), **tensors})
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise BadInput("is no student of this recipe's stage before", path, "Delete the work folder.") from error
    run.samples_seen = seen
    for mine, parameter in zip(run.average, run.learned, strict=bool(run.average)):
        mine.copy_(parameter)
