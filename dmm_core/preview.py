"""Pictures of a training under way: every style as its teacher and, below, the student draws it; the losses."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dmm_core.files import write_atomically
from dmm_core.models import build_vae
from dmm_core.report.draw import LINE, MUTED, PAPER, place, shorten, write
from dmm_core.run import Merge
from dmm_core.sample import decode, initial_noise, sample_latents
from dmm_core.sizes import latent_sizes, squarest

STEPS = 8  # of the sampler: enough to see the style
FEW = 4  # of a student that is made for few
KEPT = 2  # files; whoever shows the last but one may still be reading it
SIDE, GAP, LEFT, TOP, CHART, TEXT, SMALL = 128, 6, 76, 26, 84, 14, 11  # pixels
COLOURS = ("#1f6feb", "#d9480f", "#2b8a3e", "#9c36b5", "#c2255c", "#0b7285", "#846200", "#495057")  # of the styles
Pictures = Sequence[np.ndarray]
Points = Sequence[tuple[int, Mapping[str, float]]]


class Preview:
    """Draws with the run's prompts and modules, and with random numbers of its own: training takes no notice."""

    def __init__(self, merge: Merge) -> None:
        self.merge, self.stage = merge, merge.stage
        self.folder = merge.work / "previews"
        self.size = squarest(latent_sizes(merge.recipe.data, merge.sources.base))
        prompts = merge.distillation.data.prompts
        few = 2 if len(merge.sources.names) <= 2 else 1
        self.prompts = sorted({0, (len(prompts) - 1) // 2})[:few]
        self.of_teachers: list[np.ndarray] = []

    def draw(self, points: Points) -> tuple[Path, str]:
        """The picture's file and a caption of one line; ``points`` are (step, loss of each style)."""
        run = self.merge.distillation
        vae = build_vae(self.merge.sources.base, torch.float32).to(run.device)
        names = self.merge.sources.names
        if not self.of_teachers:
            self.of_teachers = [decode(vae, self._teacher(i), chunk=1) for i in range(len(names))]
        students = [decode(vae, self._student(i), chunk=1) for i in range(len(names))]
        del vae
        if run.device.type == "cuda":
            torch.cuda.empty_cache()  # what the VAE took is the training's again
        path = self.folder / f"step-{run.steps_done:07d}.jpg"
        data = io.BytesIO()
        grid(names, self.of_teachers, students, points).save(data, "JPEG", quality=88)
        write_atomically(path, data.getvalue())
        for old in sorted(self.folder.glob("step-*.jpg"))[:-KEPT]:
            with suppress(OSError):  # Windows, while somebody looks at it
                old.unlink()
        shown = " | ".join(run.data.prompts[i] for i in self.prompts)
        return path, f"step {run.steps_done}: teachers above, student below ({shown})"

    def _teacher(self, index: int) -> Tensor:
        teachers = self.merge.distillation.teachers
        return self._sample(
            teachers.unet(index), lambda rows: teachers.context(index, rows), None, teachers.sampling(index)
        )

    def _student(self, index: int) -> Tensor:
        run = self.merge.distillation
        weights = torch.nn.functional.one_hot(torch.tensor([index]), len(run.student.codebook)).float()
        with torch.no_grad():
            style = run.student.codebook(weights.to(run.device))
        kind: dict[str, Any] = {"prediction_type": self.merge.sources.base.prediction_type}
        if run.spec.few_step:  # it has the guidance in it
            kind |= {"few_step": True, "steps": FEW, "cfg_scale": 1.0}
        return self._sample(run.student.unet, lambda rows: run.context[rows].to(run.device), style, kind)

    def _sample(self, unet: Any, context: Any, style: Tensor | None, kind: Mapping[str, Any]) -> Tensor:
        run, spec = self.merge.distillation, self.merge.recipe.data
        empty = context(torch.tensor([len(run.data.prompts) - 1]))
        how = {"steps": STEPS, "cfg_scale": run.spec.few_step or spec.cfg_scale, "negative": empty, **kind}
        noise = initial_noise(range(len(self.prompts)), self.size)
        with run.passes.autocast():
            return sample_latents(unet, context(torch.tensor(self.prompts)), noise, style=style, **how)


def grid(names: Sequence[str], teachers: Pictures, students: Pictures, points: Points = ()) -> Image.Image:
    """The teachers' pictures (B, H, W, 3) a style above the student's, B columns each; below, the losses as lines."""
    each = len(teachers[0])
    columns = len(names) * each
    foot = TOP + 2 * (SIDE + GAP)
    canvas = Image.new("RGB", (LEFT + columns * (SIDE + GAP), foot + CHART + GAP), PAPER)
    draw = ImageDraw.Draw(canvas)
    for row, who in enumerate(("teacher", "student")):
        write(draw, (LEFT - 10, TOP + row * (SIDE + GAP) + SIDE / 2), who, TEXT, MUTED, "rm")
    for k, name in enumerate(names):
        x, width = LEFT + k * each * (SIDE + GAP), each * (SIDE + GAP) - GAP
        write(draw, (x + width / 2, TOP / 2), shorten(name, TEXT, width), TEXT, COLOURS[k % len(COLOURS)], "mm")
        for row, pictures in enumerate((teachers, students)):
            for i, picture in enumerate(pictures[k]):
                place(canvas, picture, (x + i * (SIDE + GAP), TOP + row * (SIDE + GAP)), SIDE)
    write(draw, (LEFT - 10, foot + CHART / 2), "loss", TEXT, MUTED, "rm")
    draw_losses(draw, names, points, (LEFT, foot, canvas.width - GAP, foot + CHART))
    return canvas


def draw_losses(draw: Any, names: Sequence[str], points: Points, box: tuple[int, int, int, int]) -> None:
    """A line a style in its colour: steps to the right, losses upwards on a logarithmic scale with its range."""
    left, top, right, bottom = box
    draw.rectangle(box, outline=LINE)
    values = [max(loss, 1e-9) for _, losses in points for loss in losses.values()]
    if len(points) < 2 or not values:
        write(draw, ((left + right) / 2, (top + bottom) / 2), "lines from the next picture on", SMALL, MUTED, "mm")
        return
    low, high = math.log(min(values)), math.log(max(values))
    first, last = points[0][0], points[-1][0]
    for k, name in enumerate(names):
        line = [
            (
                left + 2 + (right - left - 4) * (step - first) / (last - first),
                bottom - 3 - (bottom - top - 6) * (math.log(max(losses[name], 1e-9)) - low) / ((high - low) or 1),
            )
            for step, losses in points
            if name in losses
        ]
        if len(line) > 1:
            draw.line(line, fill=COLOURS[k % len(COLOURS)], width=2)
    write(draw, (right - 4, top + 9), f"{math.exp(high):.2g}", SMALL, MUTED, "rm")
    write(draw, (left + 4, bottom - 9), f"{math.exp(low):.2g}", SMALL, MUTED, "lm")
