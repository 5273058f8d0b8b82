"""A short trial of a recipe in a process of its own: the memory that it took, the time that a step takes.

What a distillation needs is measured, not reckoned: a few real steps, with the real models, on random latents.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dmm_core import course
from dmm_core.checkpoint import open_checkpoint
from dmm_core.economy import STREAMS, MemoryTooSmall, Rows, is_out_of_memory, let_go
from dmm_core.errors import BadInput
from dmm_core.memory import available_ram, peak_resident_bytes
from dmm_core.optim import has_eight_bit
from dmm_core.recipe import Recipe, TrainSpec
from dmm_core.sizes import Size, largest, latent_sizes
from dmm_core.speed import has_bf16
from dmm_core.stages import stage_recipes

if TYPE_CHECKING:
    from dmm_core.distill import Distillation
    from dmm_core.teachers import Teachers

ROOM = 0.92  # share of the free memory that a plan may fill
SAMPLED = 16  # latents that are drawn together, as run.py does


@dataclass(frozen=True)
class Trial:
    """What a trial found, bytes and seconds. ``device`` is the peak of the accelerator's memory, 0 on a CPU.

    ``seconds_per_step`` is a mean over the whole stage, whose first part may do more in a step than the rest.
    """

    device: int
    ram: int
    seconds_per_step: float
    seconds_per_denoising: float  # one step of the sampler for up to 16 latents
    encoders: int = 1  # different text encoders among the teachers, each of which has embeddings of all prompts


def try_out(recipe: Recipe) -> Trial | None:
    """Run the recipe's first steps in a fresh process; None where its memory does not suffice. Nothing is written."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(recipe, theirs), daemon=True)
    child.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:  # it was ended by the system, most likely for its memory
        found = None
    child.join()
    if isinstance(found, BadInput):
        raise found
    if isinstance(found, str):
        raise RuntimeError(f"the trial of the recipe failed: {found}")
    return found


def _child(recipe: Recipe, answer: Any) -> None:
    import traceback

    try:
        answer.send(run_trial(recipe))
    except MemoryTooSmall:
        answer.send(None)
    except BadInput as error:
        answer.send(BadInput(error.what, error.path, error.hint))
    except Exception as error:
        answer.send(None if is_out_of_memory(error) else traceback.format_exc())


def run_trial(recipe: Recipe, steps: int = 3) -> Trial:
    """As ``run.prepare`` and the first steps, with random latents of the largest size and one prompt.

    ``steps`` of the stage's first part are made, whose first does not count, and half as many of each later one.
    """
    from dmm_core.data import LatentData, Pool
    from dmm_core.run import load_teachers, open_sources, ready

    sources = open_sources(recipe, check_values=False)
    size = largest(latent_sizes(recipe.data, sources.base))
    teachers = load_teachers(recipe, sources)
    teachers.embed(["a picture", ""])
    first = torch.tensor([0])
    encoders = {tuple(teachers.context(i, first).tokens.flatten().tolist()) for i in range(len(teachers))}
    denoising = seconds_per_denoising(recipe, teachers, size) if recipe.data.kind == "teachers" else 0.0
    for index in range(min(teachers.resident, len(teachers))):  # all that stay, whomever the first steps ask
        teachers.unet(index)
    pool = Pool(torch.randn(8, 4, *size), torch.zeros(8, dtype=torch.long))
    run = ready(recipe, sources, LatentData(["a picture"], [pool], recipe.data.prompt_drop), teachers)
    seconds = 0.0
    for first, share in course.phases(recipe.train):
        run.step_count = first
        seconds += share * (min(step_times(run, max(2, steps // 2))) if first else min(step_times(run, steps)[1:]))
    device = torch.cuda.max_memory_reserved() if run.device.type == "cuda" else 0
    return Trial(device, peak_resident_bytes() or 0, seconds, denoising, len(encoders))


def step_times(run: Distillation, steps: int) -> list[float]:
    """Seconds of each of the next steps, and of two more where the student's passes are recorded in the third."""
    times: list[float] = []
    while len(times) < steps + 2 * run.passes.recorded:
        began = time.monotonic()
        result = run.step()
        if run.economy.steps_down:
            raise torch.cuda.OutOfMemoryError("out of memory")
        assert math.isfinite(result.loss)  # reading it waits for the device
        times.append(time.monotonic() - began)
    return times


def seconds_per_denoising(recipe: Recipe, teachers: Teachers, size: Size) -> float:
    """Of one step of the sampler for up to 16 latents, drawn as ``latents.teacher_latents`` does.

    The first step is not timed: it reads a checkpoint, finds its kernels and how many rows the memory has room for.
    Since drawing makes do with what memory there is, its peak is not counted.
    """
    from dmm_core.sample import initial_noise, sample_latents

    count = min(SAMPLED, recipe.data.latents_per_teacher)
    unet, together = teachers.unet_alone(0), Rows(teachers.device, "draw even one picture to learn from")

    def draw(rows: range) -> Tensor:
        prompts, nothing = torch.zeros(len(rows), dtype=torch.long), torch.tensor([1])
        return sample_latents(
            unet, teachers.context(0, prompts), initial_noise(rows, size), steps=1, cfg_scale=recipe.data.cfg_scale,
            negative=teachers.context(0, nothing), **teachers.sampling(0),
        ).cpu()  # fmt: skip

    list(together.of(draw, [range(count)]))
    times: list[float] = []
    while not times or (len(times) < 3 and sum(times) < 1):  # small models' times vary, and cost little
        began = time.monotonic()
        list(together.of(draw, [range(count)]))
        times.append(time.monotonic() - began)
    let_go(teachers.device)
    if teachers.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return min(times)


# ---------------------------------------------------------------- what fits


@dataclass(frozen=True)
class Fit:
    """A recipe that fits, what was changed in it for that (keys of ``train``), and the trial of each stage."""

    recipe: Recipe
    changes: dict[str, Any]
    trials: tuple[Trial, ...]

    @property
    def device(self) -> int:
        """Peak of the accelerator's memory over all stages, bytes."""
        return max(trial.device for trial in self.trials)

    @property
    def ram(self) -> int:
        """Peak of the host's memory over all stages, bytes."""
        return max(trial.ram for trial in self.trials)


def fit(
    recipe: Recipe, device: str, parameters: int, budget: int | None = None, note: Any = None, encoder: int = 0
) -> Fit | None:
    """The recipe, or the least sparing change of it whose stages' trials stay within ``budget``; None if none does.

    Args:
        parameters, encoder: of the UNet and its encoder half, to leave out what cannot fit without trying it.
        budget: bytes; None takes what the device has free now.
        note: told what is tried, in a line.
    """
    room = budget if budget is not None else free_memory(device)
    together = any(stage.train.fused_backward for stage in recipe.stages)
    spec = replace(recipe.train, fused_backward=recipe.train.fused_backward or together)
    teachers, unets = taking_part(recipe)
    for changes in candidates(spec, teachers, device):
        stages = tuple(replace(stage, train=replace(stage.train, **changes)) for stage in recipe.stages)
        sparing = replace(recipe, train=replace(recipe.train, **changes), stages=stages)
        specs = [stage.train for stage in stage_recipes(sparing)]
        least = max(weights_bytes(spec, parameters, device, unets, encoder) for spec in specs)
        if room is not None and least > room:
            continue
        if note is not None:
            note("trying " + (", ".join(f"{key}: {value}" for key, value in changes.items()) or "the recipe as it is"))
        if trials := try_stages(sparing, room):
            return Fit(sparing, changes, trials)
    return None


def taking_part(recipe: Recipe) -> tuple[int, int]:
    """How many teachers train the student, and how many UNets these are at least.

    They are the recipe's, and the styles of the file it extends, which are one UNet, unless no stage asks them.
    """
    old = 0
    if recipe.student and (not recipe.teachers or any(s.train.regularize != 0 for s in stage_recipes(recipe))):
        old = len(open_checkpoint(recipe.student).styles)
    return len(recipe.teachers) + old, len({teacher.path for teacher in recipe.teachers}) + (old > 0)


def try_stages(recipe: Recipe, room: int | None) -> tuple[Trial, ...] | None:
    """The trial of each stage, made once for those that need the same; None as soon as one does not fit."""
    known: dict[Any, Trial] = {}
    for stage in stage_recipes(recipe):
        if (needs := needs_of(stage)) in known:
            continue
        trial = try_out(stage)
        if trial is None or (room is not None and (trial.device or trial.ram) > room):
            return None
        known[needs] = trial
    return tuple(known[needs_of(stage)] for stage in stage_recipes(recipe))


def needs_of(recipe: Recipe) -> tuple[Any, ...]:
    """What of a stage its memory and time depend on."""
    data, spec = recipe.data, recipe.train
    alike = replace(
        spec, steps=1, lr=1.0, style_lr=None, adversarial_lr=None, schedule="constant", warmup=0, seed=0, save_every=0,
        score=1.0, snr_power=0.0, feature=float(spec.feature > 0), blockwise=float(spec.blockwise > 0),
        adversarial=float(spec.adversarial > 0),
        weight_decay=0.0, betas=(0.9, 0.999), grad_clip=float(spec.grad_clip > 0), ema=0.5 * (spec.ema > 0),
    )  # fmt: skip
    drawn = (min(SAMPLED, data.latents_per_teacher), data.cfg_scale != 1) if data.kind == "teachers" else ()
    return data.kind, data.size, data.sizes, data.aspect, drawn, alike


def candidates(spec: TrainSpec, teachers: int, device: str) -> list[dict[str, Any]]:
    """Changes from none to the most sparing; those that cost quality come last."""
    ladder: list[dict[str, Any]] = [{}]

    def add(**more: Any) -> None:
        step = {**ladder[-1], **{key: value for key, value in more.items() if getattr(spec, key) != value}}
        if step != ladder[-1]:
            ladder.append(step)

    if teachers > 1:
        if spec.resident != 0:
            add(resident=1)
        if not spec.fused_backward:
            add(micro=1)
    add(checkpointing=True)
    if has_eight_bit():
        add(optimizer="adamw8bit")
    if device.startswith("cuda") and has_bf16(device) and spec.precision in ("auto", "bf16"):
        add(weights="bf16")
    if device.startswith(STREAMS):
        add(resident=0)
    add(student="lora")
    return ladder


def weights_bytes(spec: TrainSpec, parameters: int, device: str, unets: int, encoder: int = 0) -> int:
    """Memory for weights, gradients, moments and those of the ``unets`` teachers that stay: a lower bound.

    Activations are not counted. ``encoder``: parameters of a UNet's encoder half, which the discriminator has if there
    is one.
    """
    weight = 2 if spec.weights == "bf16" else 4
    teacher = 2 if device.startswith("cuda") or weight == 2 else 4
    student = weight
    if spec.student == "full":
        gradient = 0 if spec.fused_backward else weight
        student += gradient + (2 if spec.optimizer == "adamw8bit" else 8) + (4 if spec.ema else 0)
    critic = 0 if not spec.adversarial else 16 if spec.discriminator == "full" else teacher
    stay = unets if spec.resident is None else min(spec.resident, unets)
    return parameters * (student + teacher * stay) + encoder * critic


def free_memory(device: str) -> int | None:
    """Bytes that a plan may fill on a device; None where that cannot be found out."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0] * ROOM)
    if device == "mps":
        return int(torch.mps.recommended_max_memory() * ROOM)
    room = available_ram()
    return None if room is None else int(room * ROOM)
