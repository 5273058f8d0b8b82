"""Adding teachers to a DMM file: its styles stay what they are, taught by the file itself. DMM (arXiv:2504.12364) §3.5.

The student starts as it was, with random rows for the new styles. Every step, the new teachers' batches come together
with some of random old styles, whose teacher is the earlier student, frozen. UNet, MLP and all rows are trained.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dmm_core.checkpoint import Checkpoint, open_checkpoint
from dmm_core.errors import BadInput
from dmm_core.fitting import differences, must_fit
from dmm_core.plan import Sources, open_teacher
from dmm_core.recipe import Recipe, TrainSpec
from dmm_core.student import TIME_BIAS


@dataclass(eq=False)
class StyleTeacher(Checkpoint):
    """One style of a DMM file as an ordinary checkpoint: ``time_embed.2.bias`` + s, all else as in the file.

    The styles of a file have all other tensors in common, and in memory once.
    """

    vector: Tensor | None = None  # s (d,)

    def changed(self, part: str, key: str, tensor: Tensor) -> Tensor:
        """See ``Checkpoint.changed``."""
        if self.vector is None or (part, key) != ("unet", TIME_BIAS):
            return tensor
        return tensor.float() + self.vector


def style_teacher(file: Checkpoint, style: str | None = None) -> StyleTeacher:
    """A style of a DMM file; None for the default one.

    Raises:
        BadInput: no DMM file, or no such style.
    """
    codebook = file.codebook()
    if codebook is None:
        raise BadInput("is no DMM file", file.path, "dmm distill makes one.")
    vector = codebook.default_style() if style is None else codebook.style({style: 1.0})
    like = {field.name: getattr(file, field.name) for field in fields(Checkpoint)}
    parts = {name: part for name, part in file.parts.items() if name != "codebook"}
    return StyleTeacher(**{**like, "dmm": None, "style_info": [], "parts": parts}, vector=vector.detach())


def style_teachers(file: Checkpoint) -> tuple[StyleTeacher, ...]:
    """All styles of a DMM file, in its order."""
    return tuple(style_teacher(file, name) for name in file.styles)


def open_extended(recipe: Recipe, base: Checkpoint | None, check_values: bool = True) -> Sources:
    """The files of a recipe with ``student``. Text encoder and VAE are the student's; ``base`` serves LoRA files.

    Raises:
        BadInput: as ``plan.open_sources``; a student that is no DMM file, or one for few steps; a new style with an
            old one's name.
    """
    earlier = open_checkpoint(recipe.student or "")
    mine = style_teacher(earlier)
    if earlier.few_step:
        raise BadInput("samples in few steps, and cannot be trained further", earlier.path,
                       "Take the file that it was made of.")  # fmt: skip
    if base is not None:
        must_fit(mine, base)
    added = tuple(open_teacher(teacher, base) for teacher in recipe.teachers)
    for spec, teacher in zip(recipe.teachers, added, strict=True):
        must_fit(mine, teacher)
        if spec.name in earlier.styles:
            raise BadInput(
                f"has a style {spec.name!r} already", earlier.path, f"Give {spec.path.name} a name of its own."
            )
    for checkpoint in (mine, *added) if check_values else ():
        checkpoint.check_finite()
    names = (*earlier.styles, *(teacher.name for teacher in recipe.teachers))
    teachers = (*style_teachers(earlier), *added)
    return Sources(mine, teachers, names, tuple(differences(mine, added)), earlier)


def teachers_of_step(spec: TrainSpec, step: int, total: int, old: int = 0) -> list[int]:
    """Numbers of the teachers that a step asks, the first ``old`` of ``total`` being styles the student had before.

    New teachers: all of them, or the next ``teachers_per_step`` in a circle; where rows are to be between two styles,
    in an order that changes from round to round, so that each comes beside each. Then ``regularize`` random old styles,
    which follow from seed and step alone; none comes again before all others have. Where there are no new teachers, the
    old styles take their place.
    """
    old = 0 if old == total else old
    new = total - old
    count = min(spec.teachers_per_step or new, new)
    turn = [old + i for i in (_shuffled if spec.mixed else _in_a_circle)(spec, step, new, count)]
    again = max(count, -(-old // 2)) if spec.regularize is None else spec.regularize
    rng = torch.Generator().manual_seed(hash((spec.seed, step, old)) & 0x7FFFFFFF)
    rounds = -(-again // old) if old else 0
    return turn + [style for _ in range(rounds) for style in torch.randperm(old, generator=rng).tolist()][:again]


def _in_a_circle(spec: TrainSpec, step: int, total: int, count: int) -> list[int]:
    return [(step * count + i) % total for i in range(count)]


def _shuffled(spec: TrainSpec, step: int, total: int, count: int) -> list[int]:
    """Rounds in which each comes; the last step of one takes those again that came first, where it has places left."""
    number, place = divmod(step, -(-total // count))
    rng = torch.Generator().manual_seed(hash((spec.seed, number, total)) & 0x7FFFFFFF)
    order = torch.randperm(total, generator=rng).tolist()
    return (order + order)[place * count : (place + 1) * count]
