"""From a recipe to a DMM file: open, check, make data, train, save. What the commands (and later the hosts) drive."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dmm_core import inputs
from dmm_core.checkpoint import Checkpoint
from dmm_core.checkpoint.metadata import FEW_STEP, FEW_STEP_HINT
from dmm_core.conditioning import encode_prompts
from dmm_core.data import LatentData
from dmm_core.discriminator import discriminator_of
from dmm_core.distill import Distillation, require_wide
from dmm_core.economy import MemoryTooSmall, is_out_of_memory, let_go
from dmm_core.errors import BadInput, RecipeError, one_line
from dmm_core.fitting import same_prediction
from dmm_core.latents import Notify, make_data, silent
from dmm_core.measure import Bench
from dmm_core.merge import weighted_average
from dmm_core.models import Pipeline, build_text_encoders, build_unet, build_vae
from dmm_core.optim import require_library
from dmm_core.plan import DTYPES, Sources, choose_device, choose_precision, open_sources
from dmm_core.ranks import Alone, companions
from dmm_core.recipe import Recipe, dump_recipe, load_recipe, work_folder
from dmm_core.report.thumbnails import of_latents
from dmm_core.result import StepResult
from dmm_core.resume import check_student, load_student, save_student
from dmm_core.shrinkage import unshrink
from dmm_core.sizes import latent_sizes, squarest
from dmm_core.speed import quicken, wants_channels_last
from dmm_core.stages import (
    clear_torn,
    clear_work,
    finished,
    stage_recipe,
    stage_recipes,
    state_file,
    student_file,
    total_steps,
    unfinished,
)
from dmm_core.student import Student
from dmm_core.teachers import Teachers


@dataclass
class Merge:
    """A distillation that is ready to run, with all that its output needs."""

    recipe: Recipe
    sources: Sources
    distillation: Distillation
    seconds: float = 0.0
    ranks: Alone = field(default_factory=Alone)  # the group that this process was launched in
    notify: Notify = silent
    stage: int = 0
    warnings: list[str] = field(default_factory=list)  # what ``finish`` and ``save`` had to leave out
    share: float | None = None  # of the teachers' differences, where ``finish`` has moved the styles apart by it

    @property
    def work(self) -> Path:
        """Folder for the resumable state and the cached latents."""
        return work_folder(self.recipe)

    @property
    def state_file(self) -> Path:
        return state_file(self.recipe, self.stage)

    @property
    def total_steps(self) -> int:
        return total_steps(self.recipe)

    def steps(self, stop: Callable[[], bool] = lambda: False) -> Iterator[StepResult]:
        """Train to the end of the recipe, saving every ``save_every`` steps; ``stop`` saves, then KeyboardInterrupt.

        Where several processes were launched, the first one saves.
        """
        yield from self.steps_of_stage(stop)
        while self.begin_next_stage():
            yield from self.steps_of_stage(stop)

    def steps_of_stage(self, stop: Callable[[], bool]) -> Iterator[StepResult]:
        spec = self.distillation.spec
        every = spec.save_every
        alone = self.ranks.world == 1
        with companions(self.recipe, self.recipe.train.processes) if alone else nullcontext(self.ranks) as ranks:
            for result in self.distillation.run(ranks):
                yield result
                stopped = ranks.stops(stop(), self.distillation.device)
                step = self.distillation.step_count
                done = step >= spec.steps  # saved too: what comes after may be interrupted
                if ranks.rank == 0 and (stopped or (every and (done or step % every == 0))):
                    self.distillation.save_state(self.state_file)
                if stopped:
                    raise KeyboardInterrupt

    def finish(self) -> None:
        """What comes once after a stage's last step: the moving average of the weights, and ``unshrink``.

        For want of memory the styles stay as they are, which ``warnings`` tells: the merge is worth more.
        """
        run = self.distillation
        run.use_average()
        if not run.spec.unshrink or len(run.teachers) < 2:
            return
        try:
            self.share = unshrink(run, stage_recipe(self.recipe, self.stage).data.cfg_scale)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.warnings.append("the styles were not moved apart (train.unshrink): the memory is too small")

    def begin_next_stage(self) -> bool:
        """Leave this stage's student in the work folder and go on with it; False where there is no further stage."""
        if self.stage + 1 >= len(self.recipe.stages):
            return False
        teachers = self.distillation.teachers
        self.finish()
        if self.ranks.rank == 0:
            save_student(self.distillation, student_file(self.recipe, self.stage))
            self.state_file.unlink(missing_ok=True)
        self.ranks.wait()
        self.stage += 1
        del self.distillation  # the device has room for one student with its gradients and moments, not for two
        let_go(teachers.device)
        self.distillation = build(self.recipe, self.stage, self.sources, teachers, self.notify, self.ranks)
        return True

    @property
    def steps_done(self) -> int:
        """Over all stages; between two of them there is no distillation to ask."""
        run = getattr(self, "distillation", None)
        return run.steps_done if run else sum(stage.train.steps for stage in self.recipe.stages[: self.stage])

    def timed_steps(self, stop: Callable[[], bool] = lambda: False) -> Iterator[StepResult]:
        """``steps``, with the time they take added to ``seconds``."""
        began = time.monotonic()
        try:
            yield from self.steps(stop)
        finally:
            self.seconds += time.monotonic() - began

    def save(self, report: dict | None = None) -> Path:
        """Write the DMM file and, beside it, the recipe as YAML; the work folder goes. ``finish`` comes before.

        What had to be left out is in ``warnings``.
        """
        recipe, out = self.recipe, Path(self.recipe.out)
        self.distillation.student.save(
            out, self.sources.base, style_info=self.shown_styles(), title=recipe.title or out.stem, report=report,
            recipe=recipe.to_dict(names_only=True) if recipe.include_recipe else None,
            extra_metadata={FEW_STEP: f"{scale:g}", "modelspec.usage_hint": FEW_STEP_HINT}
            if (scale := self.distillation.spec.few_step) else None,
        )  # fmt: skip
        self.keep_recipe(out.with_name(out.stem + ".recipe.yaml"))
        clear_work(self.work)
        return out

    def keep_recipe(self, path: Path) -> None:
        """Write the recipe, unless it says the same there already: in the user's words, perhaps, and with comments."""
        if path.exists():
            with suppress(RecipeError):
                if load_recipe(path, check_files=False) == self.recipe:
                    return
        dump_recipe(self.recipe, path)

    def style_info(self) -> list[dict[str, str]]:
        """Name, teacher file and its hash for every style, as the DMM file's metadata has them."""
        old = self.sources.earlier.style_info if self.sources.earlier else []
        new = list(zip(self.sources.names, self.sources.teachers, strict=True))[len(old) :]
        return [*old, *({"name": name, "teacher": t.path.name, "sha256": t.sha256()} for name, t in new)]

    def shown_styles(self) -> list[dict[str, str]]:
        """``style_info`` with a thumbnail for each teacher that drew latents of its own, where there is a VAE.

        A failure, of memory above all, leaves the pictures out: the file is worth more.
        """
        info, entries = self.style_info(), self.distillation.data.pools
        theirs = stage_recipe(self.recipe, self.stage).data.kind != "images"  # which are the user's own, and private
        if not theirs or len(entries) != len(info) or self.sources.base.vae_config is None:
            return info
        try:
            shown = self.thumbnails()
        except (RuntimeError, MemoryError, BadInput) as error:
            self.warnings.append(f"the file has no pictures of its styles: {one_line(error)}")
            return info
        return [{"thumbnail": shown[i], **entry} if i in shown else entry for i, entry in enumerate(info)]

    def thumbnails(self) -> dict[int, str]:
        """A data URI for the number of each teacher that drew latents of its own."""
        entries = self.distillation.data.pools
        vae = build_vae(self.sources.base, torch.float32).to(self.distillation.teachers.device)
        drew = [number for number, entry in enumerate(entries) if entry]
        sizes = [(pool.latents.shape[-2], pool.latents.shape[-1]) for pool in entries[drew[0]]]
        pools = [entries[number][sizes.index(squarest(sizes))] for number in drew]
        pictures = of_latents(vae, [pool.latents for pool in pools], [pool.prompt for pool in pools])
        return dict(zip(drew, pictures, strict=True))


def prepare(recipe: Recipe, resume: bool = False, notify: Notify = silent, ranks: Alone | None = None) -> Merge:
    """Open and check everything, make or load the data, build the student, and take up a saved state.

    Of the ``ranks`` of a launched group the first one makes the data, and the others read it.

    Raises:
        BadInput: anything about the recipe's files; a state to resume that is not there, or one that would be lost.
    """
    state = state_file(recipe)
    if resume and not unfinished(recipe):
        raise BadInput("there is no saved state to resume", state, "Start without --resume.")
    if not resume and unfinished(recipe):
        raise BadInput("an interrupted run lies here", state, "Go on with --resume, or delete it.")
    sources = open_sources(recipe)
    require_means(recipe, sources)
    teachers = load_teachers(recipe, sources)
    stage, ranks = finished(recipe), ranks or Alone()
    if ranks.rank == 0:
        clear_torn(state.parent)
        inputs.require_same(recipe)
        inputs.note(recipe)
    distillation = build(recipe, stage, sources, teachers, notify, ranks)
    if state.exists():
        distillation.load_state(state)
    return Merge(recipe, sources, distillation, ranks=ranks, notify=notify, stage=stage)


def require_means(recipe: Recipe, sources: Sources) -> None:
    """What would only be found missing after the teachers have drawn, which takes long.

    Raises:
        BadInput: a default style that there is none of, no library for 8-bit moments, or float16 where it cannot be.
    """
    for name in recipe.default_style or ():
        if name not in sources.names:
            told = f"The styles are: {', '.join(sources.names)}."
            raise RecipeError(f"default_style: there is no style {name!r}", hint=told)
    for stage in stage_recipes(recipe):
        spec = stage.train
        require_library(spec)
        require_wide(choose_precision(spec.precision, choose_device(spec.device), spec.weights), spec)


def build(
    recipe: Recipe, number: int, sources: Sources, teachers: Teachers, notify: Notify, ranks: Alone
) -> Distillation:
    """A stage of the recipe before its first step, with the student that the stage before has left."""
    stage = stage_recipe(recipe, number)
    if number:
        check_student(student_file(recipe, number - 1), sources.names, sources.teachers)
    if ranks.rank:
        ranks.wait()
    told: list[str] = []
    prompts, pools = make_data(stage, sources, teachers, notify, told.append)
    if not ranks.rank:
        ranks.wait()
    places = stage.train.resident
    teachers.keep(len(teachers) if places is None else places)
    data = LatentData(prompts, pools, stage.data.prompt_drop, stage.data.foreign)
    try:
        made = ready(stage, sources, data, teachers)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        hint = "Use train.student: lora, train.weights: bf16 or train.resident: 1; dmm plan finds what fits."
        raise MemoryTooSmall("the device's memory is too small for a student and its teachers", hint=hint) from error
    made.warnings += told
    if number:
        load_student(made, student_file(recipe, number - 1))
        made.steps_before = sum(earlier.train.steps for earlier in recipe.stages[:number])
    return made


def load_teachers(recipe: Recipe, sources: Sources) -> Teachers:
    spec, device = recipe.train, choose_device(recipe.train.device)
    dtype = DTYPES[choose_precision(spec.precision, device, spec.weights)]
    last = wants_channels_last(spec.channels_last, torch.device(device))
    return Teachers(sources.teachers, device, dtype, spec.resident, last, spec.compile, sources.base.prediction_type)


def ready(recipe: Recipe, sources: Sources, data: LatentData, teachers: Teachers | None = None) -> Distillation:
    """Student, teachers and data as the recipe wants them, before the first step."""
    teachers = teachers or load_teachers(recipe, sources)
    teachers.embed(data.prompts)
    encoders = build_text_encoders(sources.base, torch.float32).to(teachers.device)
    context = encode_prompts(encoders, data.prompts, to=("cpu",))
    del encoders  # their place on the device is the student's
    spec, codebook = recipe.train, sources.earlier.codebook() if sources.earlier else None
    default = recipe.default_style or (codebook.default if codebook and not recipe.teachers else None)
    student = Student.start(
        sources.base, start_tensors(recipe, sources), sources.names, default, spec.seed,
        DTYPES[spec.weights], spec.rank if spec.student == "lora" else None,
        codebook,
    ).to(teachers.device)  # fmt: skip
    quicken(student.unet, teachers.channels_last, spec.compile)
    precision = choose_precision(spec.precision, teachers.device.type, spec.weights)
    discriminator = discriminator_of(spec, sources.base, len(sources.names), teachers) if spec.adversarial else None
    return Distillation(student, teachers, data, context, spec, precision, discriminator, sources.old)


def start_tensors(recipe: Recipe, sources: Sources) -> dict[str, Tensor]:
    """The student's first UNet: its own of before, the weighted average of the teachers, or the base."""
    if sources.earlier:
        return {key: tensor.float() for key, tensor in sources.earlier.unet().items()}
    if recipe.train.start == "base":
        return {key: tensor.float() for key, tensor in sources.base.unet().items()}
    return average_tensors(sources.teachers, [teacher.weight for teacher in recipe.teachers], sources.base)


def average_tensors(
    teachers: Sequence[Checkpoint], weights: Sequence[float] | None = None, like: Checkpoint | None = None
) -> dict[str, Tensor]:
    """The teachers' weight average, which is also what the student is measured against.

    ``like``: whose kind of prediction those have that take part; where none has it, its own tensors.
    """
    part = [i for i, teacher in enumerate(teachers) if like is None or same_prediction(like, teacher)]
    if like is not None and not part:
        return {key: tensor.float() for key, tensor in like.unet().items()}
    return weighted_average([teachers[i].unet for i in part], weights and [weights[i] for i in part])


# ---------------------------------------------------------------- what is measured afterwards


def bench_of(merge: Merge, prompts: Sequence[str], steps: int, cfg_scale: float, notify: Notify = silent) -> Bench:
    """The trained student beside its teachers and their weight average, asked prompts that training did not use."""
    sources, distillation = merge.sources, merge.distillation
    base, device = sources.base, distillation.device
    encoders, vae = build_text_encoders(base, torch.float32).to(device), build_vae(base, torch.float32).to(device)
    student, path = distillation.student.eval(), Path(merge.recipe.out)
    about = base.family, base.prediction_type, student.codebook, path, distillation.spec.few_step
    pipe = Pipeline(student.unet, encoders, vae, *about)
    average = build_unet(
        base.unet_config, average_tensors(sources.teachers, None, base), torch.float32, path, styled=False
    )
    size = squarest(latent_sizes(merge.recipe.data, base))
    return Bench(pipe, distillation.teachers, average.to(device), prompts, size, steps, cfg_scale, notify)
