"""The pictures and the page that go with a measurement: which subjects and mixes to show."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dmm_core.measure import SEEDS_A, Bench, Measured, mix_pictures
from dmm_core.report import Grids, MixStrip, StyleGrid, write_report
from dmm_core.sample import decode
from dmm_core.style import one_hot

TENTHS = tuple(i / 10 for i in range(11))
SUBJECTS = 10  # columns of styles.png
PAIRS = 3  # rows of mix.png


def present(out: Path, measured: Measured, gallery: Bench, file: Path, before: Bench | None = None) -> list[Path]:
    """Write styles.png, mix.png, fid.png, report.html and report.json.

    Args:
        gallery: the measured student and teachers, asked the prompts that become the columns of styles.png.
        before: the same with an earlier student.
    """
    names, vae = gallery.names, gallery.student.vae
    labels = [subject(prompt) for prompt in gallery.prompts]
    rows = min(PAIRS, len(labels)) if len(names) > 1 else 0
    gallery.expected = len(labels) * (2 * len(names) + 1) + rows * (len(TENTHS) + 1)
    teachers = {name: decode(vae, gallery.of_teacher(i, SEEDS_A)) for i, name in enumerate(names)}
    students = {name: decode(vae, gallery.of_student(one_hot(names, name))) for name in names}
    earlier = before.in_styles_of(names) if before else {}
    styles = StyleGrid(labels, teachers, students, decode(vae, gallery.of_average()), earlier)
    strips = []
    for row in range(rows):
        pair = (names[2 * row % len(names)], names[(2 * row + 1 + row // 2) % len(names)])
        pictures = mix_pictures(gallery, [pair], row, TENTHS)[0]
        strips.append(MixStrip(labels[row], *pair, pictures, average_of_pair(gallery, pair, row)))
    report = measured.report | {"file": file.name}
    grids = Grids(styles, strips, TENTHS, gallery.prompts[0], file.absolute())
    return write_report(out, report, grids, title=str(report.get("title", file.stem)))


def average_of_pair(bench: Bench, pair: tuple[str, str], row: int) -> np.ndarray:
    """The picture (H, W, 3) of the plain average of two teachers' weights: what a mix replaces."""
    from dmm_core.models import build_unet
    from dmm_core.run import average_tensors

    teachers = [bench.teachers.checkpoints[bench.names.index(name)] for name in pair]
    unet = build_unet(
        teachers[0].unet_config,
        average_tensors(teachers, None, teachers[0]),
        bench.average.dtype,
        teachers[0].path,
        styled=False,
    )
    latents = bench.sample(unet.to(bench.student.device), bench.context, SEEDS_A, rows=slice(row, row + 1))
    return decode(bench.student.vae, latents)[0]


def subject(prompt: str) -> str:
    """What a column is called: the prompt without its opening words."""
    return prompt.removeprefix("a picture of a ").strip() or prompt
