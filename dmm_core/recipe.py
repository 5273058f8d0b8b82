"""A recipe: all that is needed to make, or make again, one merge. YAML or JSON in, frozen dataclasses out.

Whatever can be wrong with a recipe alone is found here, before anything loads.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from dmm_core.errors import RecipeError
from dmm_core.files import write_atomically
from dmm_core.presets import with_exceptions, with_preset, with_stages
from dmm_core.recipe_checks import check_values
from dmm_core.recipe_files import check_paths, read_file
from dmm_core.schema import Pattern, Range, Reader, plain

Count = Annotated[int, Range(1)]
CountOrNone = Annotated[int, Range(0)]  # 0 = not at all
Seed = Annotated[int, Range(0, 2**63 - 1)]  # as torch takes them
Share = Annotated[float, Range(0, 1)]
BelowOne = Annotated[float, Range(0, 1, high_open=True)]
Positive = Annotated[float, Range(0, low_open=True)]
NotNegative = Annotated[float, Range(0)]
Device = Annotated[str, Pattern(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", "auto, cpu, mps, cuda or cuda:N")]


# Keys of train that may change between two sittings: roundings follow at most, and mostly not even those.
FREE = ("save_every", "device", "resident", "processes", "checkpointing", "channels_last", "compile",
        "cuda_graphs")  # fmt: skip
PLANNED = ("resident", "micro", "checkpointing", "optimizer", "weights", "student")  # what a plan changes (trial.py)


@dataclass(frozen=True)
class TeacherSpec:
    """One checkpoint to learn from, or a LoRA file, which is put on the recipe's base with ``strength``.

    ``weight`` is its share of the average that the student may start from.
    """

    shorthand: ClassVar[str] = "path"
    path: Path
    name: str = ""  # of its style; "" becomes the file's stem
    weight: Positive = 1.0
    strength: float = 1.0


@dataclass(frozen=True)
class DataSpec:
    """Where latents and prompts come from.

    "teachers": latents sampled from the teachers themselves; "images": a folder with captions; "cache": a file of
    latents made earlier. ``size`` is in pixels, None lets the model decide. Several sizes of about the same area come
    of ``aspect``, the longer side's greatest ratio to the shorter one (1: squares alone), or are given as ``sizes``;
    every step trains on one of them. ``foreign`` is the share of the noisier rows that are of any teacher's pictures.
    """

    kind: Literal["teachers", "images", "cache"] = "teachers"
    path: Path | None = None
    prompts: Path | None = None
    latents_per_teacher: Count = 512
    steps: Count = 20
    cfg_scale: NotNegative = 5.0
    prompt_drop: Share = 0.1
    foreign: Share = 0.0
    size: Annotated[int, Range(8)] | None = None
    sizes: tuple[Annotated[str, Pattern(r"[1-9]\d*x[1-9]\d*", "WIDTHxHEIGHT, e.g. 512x768")], ...] = ()
    aspect: Annotated[float, Range(1, 4)] = 1.0


@dataclass(frozen=True)
class TrainSpec:
    """How the student learns. Losses and learning rates: DMM (arXiv:2504.12364) §3.4.

    ``batch`` counts rows per teacher and optimizer step, ``micro`` the teachers whose rows pass the student together,
    ``resident`` the teachers that stay loaded (None: all, for these two and ``teachers_per_step``; 0: on CUDA none,
    their blocks come one after the other). ``style_lr`` is the codebook's (None: ``lr``). ``score`` and ``feature``
    weigh the losses, ``snr_power`` the timesteps of the score loss (0: all alike as in the paper, 1: as x̂0 would; the
    default made the better pictures, docs/results.md).
    ``processes`` share each step's teachers, for CPUs. 0 turns off: ``warmup`` and ``save_every`` (steps), ``ema``
    (decay), ``grad_clip`` (norm), ``feature``, ``adversarial`` (the paper takes 0.01; ``adversarial_lr`` is its
    discriminator's, None: ``lr``, and ``discriminator`` what of it learns).
    ``mixed`` is the share of rows between two styles (none where a step asks one teacher alone) in the first 60 % of
    the steps, which learn a mix of what both teachers say: so that sliders go evenly. ``blockwise`` weighs a loss of
    each layer by itself, on what went into the teacher's, in the first 30 % of the steps (dmm_core/blockwise.py).
    ``unshrink`` moves the styles apart after the last step, by what they lack of the teachers' differences
    (dmm_core/shrinkage.py).
    ``few_step`` trains for sampling in 4 to 8 steps, with the guidance of this scale made part of the student (0: off).
    ``regularize``, when styles are added: batches of old styles a step (None: as many as of new ones, and half of
    the old styles at least; 0: none).

    Memory: ``student`` lora trains changes of low ``rank`` beside a frozen UNet, at 10 times ``lr``; ``weights`` bf16
    are rounded at random; ``optimizer`` adamw8bit needs bitsandbytes; ``fused_backward`` updates each weight as soon as
    its gradient is there (``grad_clip`` is then each gradient's own); ``checkpointing`` computes activations twice
    instead of keeping them. Speed: ``channels_last`` (None: where it is faster), ``compile`` (by torch; begins slowly),
    ``cuda_graphs`` of the teachers, and of the student where there is memory twice over (None: on CUDA, unless
    ``checkpointing`` tells that memory is short).
    """

    start: Literal["average", "base"] = "average"
    steps: Count = 10_000
    batch: Count = 4
    teachers_per_step: Count | None = None
    micro: Count | None = None
    resident: CountOrNone | None = None
    lr: Positive = 1e-5
    style_lr: Positive | None = None
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: CountOrNone = 100
    score: Positive = 1.0
    snr_power: Share = 0.5
    feature: NotNegative = 0.0
    adversarial: NotNegative = 0.0
    mixed: Share = 0.0
    blockwise: NotNegative = 0.0
    unshrink: bool = False
    adversarial_lr: Positive | None = None
    discriminator: Literal["head", "full"] = "head"
    regularize: CountOrNone | None = None
    few_step: NotNegative = 0.0
    weight_decay: NotNegative = 0.01
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    grad_clip: NotNegative = 1.0
    ema: BelowOne = 0.0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: Device = "auto"
    processes: Count = 1
    seed: Seed = 0
    save_every: CountOrNone = 500
    student: Literal["full", "lora"] = "full"
    rank: Count = 64
    weights: Literal["fp32", "bf16"] = "fp32"
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    fused_backward: bool = False
    checkpointing: bool = False
    channels_last: bool | None = None
    compile: bool = False
    cuda_graphs: bool | None = None


@dataclass(frozen=True)
class StageSpec:
    """A part of the training, with data and settings of its own; what is left out is as in the recipe itself.

    "synthesised" is a fine-tune on pictures that the teachers make, with a tenth of steps and lr if it does not say;
    "few_step" makes a student for 4 to 8 sampling steps, with half of the steps and the guidance of the data.
    """

    shorthand: ClassVar[str] = "name"
    name: Literal["distil", "synthesised", "few_step"]
    data: DataSpec
    train: TrainSpec


@dataclass(frozen=True)
class EvaluateSpec:
    """What an evaluation asks for. Nothing is measured by a merge itself, so that ``images_per_style`` stays 0;
    ``dmm extend --report`` takes the prompts.
    """

    images_per_style: CountOrNone = 0
    prompts: Path | None = None
    steps: Count = 25
    cfg_scale: NotNegative = 7.0
    negative: str = ""
    seed: CountOrNone = 0


@dataclass(frozen=True)
class Recipe:
    """A whole merge. ``base`` gives text encoder and VAE (None: the first teacher does).

    With ``student``, a DMM file, the teachers are added to its styles, and ``base`` is what LoRA files are put on;
    without any teacher, ``train.few_step`` has it learn of itself.
    ``stages`` are trained one after the other, each from the last one's student; without any, there is one.
    ``preset`` fills what is left out (``dmm_core/presets.py``); ``work`` is the folder for what a resume needs (None:
    beside the output).
    """

    teachers: tuple[TeacherSpec, ...]
    out: Path
    base: Path | None = None
    student: Path | None = None
    title: str | None = None
    default_style: dict[str, float] | None = None
    include_recipe: bool = True
    preset: str | None = None
    work: Path | None = None
    data: DataSpec = field(default_factory=DataSpec)
    train: TrainSpec = field(default_factory=TrainSpec)
    evaluate: EvaluateSpec = field(default_factory=EvaluateSpec)
    stages: tuple[StageSpec, ...] = ()

    def to_dict(self, names_only: bool = False) -> dict[str, Any]:
        """What ``recipe_from_dict`` reads back, of JSON's types; ``names_only`` leaves the folders out of paths."""
        return plain(self, (lambda path: path.name) if names_only else (lambda path: path.as_posix()))


def load_recipe(path: str | Path, check_files: bool = True) -> Recipe:
    """The recipe in a YAML or JSON file; relative paths start from the file's folder.

    Raises:
        RecipeError: what is wrong, with the file, the key (``train.lr``), what was expected and what is there.
    """
    path = Path(path)
    return recipe_from_dict(read_file(path), path.absolute().parent, path, check_files)


def recipe_from_dict(
    data: Any, folder: str | Path = ".", source: str | Path = "recipe", check_files: bool = True
) -> Recipe:
    """A checked recipe of a plain mapping.

    Args:
        folder: what relative paths start from.
        source: what errors name.
        check_files: whether inputs must be there and the output writable; False for a recipe out of a file's metadata.

    Raises:
        RecipeError: as ``load_recipe``.
    """
    filled = with_stages(with_preset(with_exceptions(data), source))
    recipe: Recipe = Reader(source, Path(folder).absolute()).read(Recipe, filled)
    named = (replace(t, name=(t.name or t.path.stem).strip()) for t in recipe.teachers)
    recipe = replace(recipe, teachers=tuple(named))
    if recipe.stages:
        recipe = replace(recipe, data=recipe.stages[0].data, train=recipe.stages[0].train)
    parts = [replace(recipe, data=stage.data, train=stage.train) for stage in recipe.stages]
    for part in parts or [recipe]:
        check_values(part, source)
    for key in ("start", "student", "rank", "weights", "precision", "device", "processes", "channels_last", "compile"):
        if len(values := {getattr(stage.train, key) for stage in recipe.stages}) > 1:
            raise RecipeError(f"stages: expected one train.{key} for all of them, got {values}", source)
    if check_files:
        _check_files(recipe, source)
    return recipe


def work_folder(recipe: Recipe) -> Path:
    """Where unfinished work of this recipe lies: as it says itself, or beside the output."""
    return recipe.work or recipe.out.with_name(recipe.out.stem + ".work")


def dump_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write a recipe as YAML (UTF-8, atomically, paths in full): loading it gives an equal recipe."""
    import yaml

    text = yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True, width=120)
    write_atomically(Path(path), text.encode("utf-8"))


def _check_files(recipe: Recipe, source: str | Path) -> None:
    inputs: dict[str, Path | None] = {f"teachers[{i}].path": teacher.path for i, teacher in enumerate(recipe.teachers)}
    inputs |= {"student": recipe.student, "base": recipe.base, "evaluate.prompts": recipe.evaluate.prompts}
    for i, data in enumerate((recipe.data, *(stage.data for stage in recipe.stages))):
        part = f"stages[{i - 1}].data" if i else "data"
        inputs |= {f"{part}.path": data.path, f"{part}.prompts": data.prompts}
    check_paths(inputs, recipe.out, source, work_folder(recipe))
