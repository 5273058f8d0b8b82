"""Pictures of a training under way: every style as its teacher draws it and, below, as the student does by now."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dmm_core.files import write_atomically
from dmm_core.models import build_vae
from dmm_core.report.draw import INK, MUTED, PAPER, place, shorten, write
from dmm_core.run import Merge, latent_size
from dmm_core.sample import decode, initial_noise, sample_latents

STEPS = 8  # of the sampler: enough to see the style
KEPT = 2  # files; whoever shows the last but one may still be reading it
SIDE, GAP, LEFT, TOP, TEXT = 128, 6, 76, 26, 13  # pixels


class Preview:
    """Draws with the run's prompts and modules, and with random numbers of its own: training takes no notice."""

    def __init__(self, merge: Merge) -> None:
        self.merge = merge
        self.folder = merge.work / "previews"
        self.size = latent_size(merge.sources.base, merge.recipe.data.size)
        prompts = merge.distillation.data.prompts
        few = 2 if len(merge.sources.names) <= 4 else 1
        self.prompts = sorted({0, (len(prompts) - 1) // 2})[:few]
        self.of_teachers: list[np.ndarray] = []

    def draw(self) -> tuple[Path, str]:
        """The picture's file and a caption of one line."""
        run = self.merge.distillation
        vae = build_vae(self.merge.sources.base, torch.float32).to(run.device)
        names = self.merge.sources.names
        if not self.of_teachers:
            self.of_teachers = [decode(vae, self._teacher(i), chunk=1) for i in range(len(names))]
        students = [decode(vae, self._student(i), chunk=1) for i in range(len(names))]
        del vae
        if run.device.type == "cuda":
            torch.cuda.empty_cache()  # what the VAE took is the training's again
        path = self.folder / f"step-{run.step_count:07d}.jpg"
        data = io.BytesIO()
        grid(names, self.of_teachers, students).save(data, "JPEG", quality=88)
        write_atomically(path, data.getvalue())
        for old in sorted(self.folder.glob("step-*.jpg"))[:-KEPT]:
            old.unlink(missing_ok=True)
        shown = " | ".join(run.data.prompts[i] for i in self.prompts)
        return path, f"step {run.step_count}: teachers above, student below ({shown})"

    def _teacher(self, index: int) -> Tensor:
        teachers = self.merge.distillation.teachers
        return self._sample(teachers.unet(index), lambda rows: teachers.context(index, rows), None)

    def _student(self, index: int) -> Tensor:
        run = self.merge.distillation
        weights = torch.nn.functional.one_hot(torch.tensor([index]), len(run.student.codebook)).float()
        with torch.no_grad():
            style = run.student.codebook(weights.to(run.device))
        return self._sample(run.student.unet, lambda rows: run.context[rows].to(run.device), style)

    def _sample(self, unet: Any, context: Any, style: Tensor | None) -> Tensor:
        run, spec = self.merge.distillation, self.merge.recipe.data
        with run.autocast():
            return sample_latents(
                unet, context(torch.tensor(self.prompts)), initial_noise(range(len(self.prompts)), self.size),
                steps=STEPS, cfg_scale=spec.cfg_scale, negative=context(torch.tensor([len(run.data.prompts) - 1])),
                style=style, prediction_type=self.merge.sources.base.prediction_type,
            )  # fmt: skip


def grid(names: tuple[str, ...], teachers: list[np.ndarray], students: list[np.ndarray]) -> Image.Image:
    """A column a style, and for every prompt a row of teachers (B, H, W, 3) above a row of the student."""
    rows = 2 * len(teachers[0])
    size = (LEFT + len(names) * (SIDE + GAP), TOP + rows * (SIDE + GAP) + (rows // 2 - 1) * GAP)
    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    for k, name in enumerate(names):
        x = LEFT + k * (SIDE + GAP)
        write(draw, (x + SIDE / 2, TOP / 2), shorten(name, TEXT, SIDE), TEXT, INK, "mm")
        for row in range(rows):
            y = TOP + row * (SIDE + GAP) + row // 2 * GAP
            place(canvas, (students if row % 2 else teachers)[k][row // 2], (x, y), SIDE)
            if k == 0:
                write(draw, (LEFT - 10, y + SIDE / 2), "student" if row % 2 else "teacher", TEXT, MUTED, "rm")
    return canvas
