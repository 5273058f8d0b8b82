"""Before work begins: can these files be merged, what will the merge take on this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dmm_core.checkpoint import Checkpoint, LoraGiven, open_checkpoint
from dmm_core.environment import importing
from dmm_core.errors import BadInput
from dmm_core.fitting import differences, must_fit, same_prediction
from dmm_core.lora_teacher import lora_teacher
from dmm_core.recipe import Recipe, TeacherSpec, work_folder
from dmm_core.room import asked, drawing, file_bytes, keeping, latent_bytes, most_bytes, prompt_count, saving_bytes
from dmm_core.speed import has_bf16

GIB = 2**30
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Sources:
    """The opened files of a recipe: what gives text encoder and VAE (``base``), and the teachers with their names."""

    base: Checkpoint
    teachers: tuple[Checkpoint, ...]
    names: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    earlier: Checkpoint | None = None  # the DMM file whose styles come first, each of them its own teacher

    @property
    def old(self) -> int:
        """How many styles the student had before."""
        return len(self.earlier.styles) if self.earlier else 0


@dataclass(frozen=True)
class Plan:
    """What ``dmm plan`` says. Sizes in bytes, times in seconds.

    None until a trial has measured it: ``seconds…``, ``peak_bytes`` (of the device; of the process on a CPU) and
    ``ram_bytes``. ``changes`` are the keys of ``train`` that must differ from the recipe for it to fit; ``fits`` is
    False where no change suffices.
    """

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
    peak_bytes: int | None = None
    ram_bytes: int | None = None
    fits: bool | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    discriminator_parameters: int = 0  # of its body

    def to_dict(self) -> dict:
        return asdict(self)


def choose_device(wanted: str = "auto") -> str:
    """ "auto" → cuda (ROCm calls itself that too), mps, or cpu; anything else is checked and returned.

    A ``cuda:N`` becomes the process's current device, to which streams, recordings and peaks of memory belong.
    """
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=wanted)
        if wanted.startswith("cuda:"):
            torch.cuda.set_device(wanted)
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
        return "bf16" if has_bf16(device) else "fp16"
    return "fp32"


def open_sources(recipe: Recipe, check_values: bool = True) -> Sources:
    """Open every file of the recipe and make sure that they can be merged, before anything big is loaded.

    Raises:
        BadInput: the first file that cannot be read, is no checkpoint, has NaN, or does not fit the others.
    """
    base = open_checkpoint(recipe.base) if recipe.base else None
    if recipe.student:
        from dmm_core.extension import open_extended

        return open_extended(recipe, base, check_values)
    teachers = tuple(open_teacher(teacher, base) for teacher in recipe.teachers)
    base = base or next((teacher for teacher in teachers if same_prediction(teacher)), teachers[0])
    for checkpoint in dict.fromkeys((base, *teachers)):
        must_fit(base, checkpoint)
        if check_values:
            checkpoint.check_finite()
    names = tuple(teacher.name for teacher in recipe.teachers)
    return Sources(base, teachers, names, tuple(differences(base, teachers)))


def open_teacher(spec: TeacherSpec, base: Checkpoint | None) -> Checkpoint:
    """A checkpoint, or a LoRA on top of the base.

    Raises:
        BadInput: neither of the two, a LoRA without a base, or a strength for what is no LoRA.
    """
    try:
        checkpoint = open_checkpoint(spec.path)
    except LoraGiven:
        if base is None:
            raise BadInput(
                "is a LoRA, which teaches on top of a base", spec.path, "Give a base, in the recipe or with --base."
            ) from None
        return lora_teacher(spec.path, base, spec.strength)
    if spec.strength != 1:
        raise BadInput(f"is no LoRA, but has strength {spec.strength:g}", spec.path, "Leave the strength out.")
    return checkpoint


def parameters(checkpoint: Checkpoint) -> int:
    """Number of the UNet's parameters, from shapes alone."""
    with importing():
        from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return sum(p.numel() for p in UNet2DConditionModel(**checkpoint.unet_config).parameters())


def plan(recipe: Recipe, found: Any = None, tried: bool = False) -> Plan:
    """Preflight without work. ``memory_bytes``: weights, gradients, moments, resident teachers; no activations.

    Args:
        found: what ``trial.fit`` found, for memory and time.
        tried: whether it has looked.

    Raises:
        BadInput: as ``open_sources``; or too little room on the disk.
    """
    from dmm_core.discriminator import encoder_parameters
    from dmm_core.extension import teachers_of_step
    from dmm_core.stages import stage_recipes
    from dmm_core.trial import weights_bytes

    sources = open_sources(recipe)
    stages = stage_recipes(found.recipe if found else recipe)
    spec = stages[0].train
    device = choose_device(spec.device)
    precision = choose_precision(spec.precision, device, spec.weights)
    count, total = parameters(sources.base), len(sources.teachers)
    different = len({teacher.path for teacher in sources.teachers})  # old styles share the earlier student's weights
    body = encoder_parameters(sources.base.shapes("unet")) if any(part.train.adversarial for part in stages) else 0
    memory = max(weights_bytes(part.train, count, device, different, body) for part in stages)
    drawn = sum(latent_bytes(stage, sources) for stage in keeping(stages))
    disk = drawn + most_bytes(stages, sources, count, body)
    require_room(recipe, disk, file_bytes(sources.base.path))
    rows = [part.train.batch * len(teachers_of_step(part.train, 0, total, sources.old)) for part in stages]
    samples = sum(part.train.steps * count for part, count in zip(stages, rows, strict=True))
    steps = sum(part.train.steps for part in stages)
    told = Plan(
        True, list(sources.names), sources.base.family, count, device, precision, memory, disk, steps, samples,
        warnings=list(sources.warnings), fits=bool(found) if tried else None, discriminator_parameters=body,
    )  # fmt: skip
    return with_trials(told, found, recipe, stages, sources) if found else told


def with_trials(told: Plan, found: Any, recipe: Recipe, stages: Sequence[Recipe], sources: Sources) -> Plan:
    """A plan with the memory and the time that the stages' trials took.

    Memory that no trial held is added: all prompts' embeddings (the student's in float32, those of each different text
    encoder of the teachers), latents twice, and what a save has on the host at once.
    """
    width, narrow = int(sources.base.unet_config["cross_attention_dim"]), 4 if told.precision == "fp32" else 2
    embeddings = 77 * width * (4 + narrow * max(trial.encoders for trial in found.trials))
    drawn = sum(latent_bytes(stage, sources) for stage in keeping(stages))
    prompts = max(prompt_count(stage) for stage in stages) + 1
    ram = found.ram + prompts * embeddings + 2 * drawn + saving_bytes(sources.base)
    timed = list(zip(stages, found.trials, strict=True))
    chunks = {part.work: -(-part.data.latents_per_teacher // 16) * part.data.steps for part in drawing(stages)}
    denoising = {part.work: trial.seconds_per_denoising * asked(part, sources) for part, trial in timed}
    training = sum(part.train.steps * trial.seconds_per_step for part, trial in timed)
    return replace(
        told, seconds_per_step=training / told.steps, seconds=training + sum(chunks[w] * denoising[w] for w in chunks),
        peak_bytes=found.device or ram, ram_bytes=ram, changes=found.changes,
    )  # fmt: skip


def require_room(recipe: Recipe, disk: int, result: int) -> None:
    """Raises BadInput where a disk lacks room: ``disk`` bytes for ``work``, or ``result`` for ``out`` elsewhere."""
    work, out = existing_parent(work_folder(recipe) / "state"), existing_parent(recipe.out)
    needed = {work: disk}
    if device_of(work) != device_of(out):
        needed[out] = result
    for folder, size in needed.items():
        if shutil.disk_usage(folder).free < size:
            told = f"needs {size / GIB:.1f} GiB of room, and the disk has less"
            raise BadInput(told, folder, "Free some, or choose another place.")


def device_of(folder: Path) -> int:
    return os.stat(folder).st_dev


def existing_parent(path: str | Path) -> Path:
    """The nearest folder above that is there."""
    folder = Path(path).absolute().parent
    while not folder.is_dir():
        folder = folder.parent
    return folder
