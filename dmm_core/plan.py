"""Before work begins: can these files be merged, what will the merge take on this machine."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dmm_core.checkpoint import Checkpoint, open_checkpoint
from dmm_core.errors import BadInput
from dmm_core.recipe import Recipe

GIB = 2**30


@dataclass(frozen=True)
class Sources:
    """The opened files of a recipe: what gives text encoder and VAE (``base``), and the teachers with their names."""

    base: Checkpoint
    teachers: tuple[Checkpoint, ...]
    names: tuple[str, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What ``dmm plan`` says. Sizes in bytes, times in seconds; ``seconds`` is None until steps were measured."""

    mergeable: bool
    styles: list[str]
    family: str
    unet_parameters: int
    device: str
    precision: str
    memory_bytes: int
    disk_bytes: int
    steps: int
    samples: int
    seconds_per_step: float | None = None
    seconds: float | None = None
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict:
        return asdict(self)


def choose_device(wanted: str = "auto") -> str:
    """ "auto" → cuda (ROCm calls itself that too), mps, or cpu; anything else is checked and returned."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(
            f"device {wanted!r} does not work here ({str(error).splitlines()[0]})", hint="Use auto."
        ) from error
    return wanted


def choose_precision(wanted: str, device: str, weights: str = "fp32") -> str:
    """ "auto" → bf16 where the GPU or the student's weights have it, else fp16 on a GPU, fp32 on CPU and MPS."""
    if wanted != "auto":
        return wanted
    if weights == "bf16":
        return "bf16"
    if device.startswith("cuda"):
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "fp32"


def open_sources(recipe: Recipe, check_values: bool = True) -> Sources:
    """Open every file of the recipe and make sure that they can be merged, before anything big is loaded.

    Raises:
        BadInput: the first file that cannot be read, is no checkpoint, has NaN, or does not fit the others.
    """
    teachers = tuple(open_checkpoint(teacher.path) for teacher in recipe.teachers)
    base = open_checkpoint(recipe.base) if recipe.base else teachers[0]
    for checkpoint in dict.fromkeys((base, *teachers)):
        must_fit(base, checkpoint)
        if check_values:
            checkpoint.check_finite()
    names = tuple(teacher.name for teacher in recipe.teachers)
    return Sources(base, teachers, names, tuple(differences(base, teachers)))


def must_fit(base: Checkpoint, other: Checkpoint) -> None:
    """Raise BadInput unless both have one architecture, prediction type and prompt width."""
    for what, mine, theirs in (
        ("family", base.family, other.family),
        ("prediction type", base.prediction_type, other.prediction_type),
        ("UNet shape", _architecture(base), _architecture(other)),
    ):
        if mine != theirs:
            told = (
                f"{theirs} where {base.path.name} is {mine}"
                if isinstance(mine, str)
                else f"another one than {base.path.name}"
            )
            raise BadInput(f"its {what} is {told}", other.path, "Only models of one architecture can be merged.")
    if other.dmm is not None:
        raise BadInput(
            "is a DMM file already, not a teacher", other.path, "Export one of its styles with dmm mix --bake."
        )
    if not other.text_configs:
        raise BadInput("holds no text encoder", other.path, "Use the full checkpoint.")


def _architecture(checkpoint: Checkpoint) -> dict[str, Any]:
    """The UNet's configuration less the picture size it is meant for, which is no matter of shapes."""
    return {key: value for key, value in checkpoint.unet_config.items() if key != "sample_size"}


def differences(base: Checkpoint, teachers: Sequence[Checkpoint]) -> list[str]:
    """What can be merged and may surprise: another VAE than the base's."""
    if base.vae_config is None:
        return [f"{base.path.name} holds no VAE; the DMM file will have none."]
    mine = base.vae()
    return [
        f"{teacher.path.name} has another VAE than {base.path.name}, whose VAE the student keeps."
        for teacher in teachers
        if teacher.vae_config and teacher is not base and not _same(mine, teacher.vae())
    ]


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key].float(), b[key].float()) for key in a)


def parameters(checkpoint: Checkpoint) -> int:
    """Number of the UNet's parameters, from shapes alone."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return sum(p.numel() for p in UNet2DConditionModel(**checkpoint.unet_config).parameters())


def plan(recipe: Recipe, seconds_per_step: float | None = None) -> Plan:
    """Preflight without work. Memory: fp32 student, gradient, two Adam moments and resident teachers; no activations.

    Raises:
        BadInput: as ``open_sources``; or too little room on the disk.
    """
    sources = open_sources(recipe)
    device = choose_device(recipe.train.device)
    precision = choose_precision(recipe.train.precision, device, recipe.train.weights)
    count = parameters(sources.base)
    resident = min(recipe.train.resident or len(sources.teachers), len(sources.teachers))
    memory = count * (16 + (4 if recipe.train.ema else 0)) + count * resident * (4 if precision == "fp32" else 2)
    size = sum(
        f.stat().st_size for f in ([sources.base.path] if sources.base.path.is_file() else sources.base.path.rglob("*"))
    )
    disk = size + count * (12 + (4 if recipe.train.ema else 0))
    folder = existing_parent(recipe.out)
    if shutil.disk_usage(folder).free < disk:
        raise BadInput(
            f"needs {disk / GIB:.1f} GiB of room, and the disk has less", folder, "Free some, or choose another place."
        )
    per_step = recipe.train.batch * min(recipe.train.teachers_per_step or len(sources.teachers), len(sources.teachers))
    return Plan(
        True, list(sources.names), sources.base.family, count, device, precision, memory, disk, recipe.train.steps,
        recipe.train.steps * per_step, seconds_per_step,
        seconds_per_step * recipe.train.steps if seconds_per_step else None, list(sources.warnings),
    )  # fmt: skip


def existing_parent(path: str | Path) -> Path:
    """The nearest folder above that is there."""
    folder = Path(path).absolute().parent
    while not folder.is_dir():
        folder = folder.parent
    return folder
