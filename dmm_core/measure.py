"""Measure a student beside its teachers and their weight average: pictures for the matrices, and the score gap."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dmm_core import __version__
from dmm_core.conditioning import Context, encode_prompts, predict
from dmm_core.diffusion import TIMESTEPS, add_noise
from dmm_core.economy import Rows
from dmm_core.evaluate import evaluate_pictures, score_gap, to_report
from dmm_core.features import appeal
from dmm_core.models import Pipeline
from dmm_core.sample import decode, initial_noise, sample_latents
from dmm_core.style import lerp, one_hot
from dmm_core.teachers import Teachers

Notify = Callable[[str, int, int], None]
SEEDS_A, SEEDS_B = 1_000_000, 2_000_000  # the two draws that the reference matrix compares


@dataclass
class Bench:
    """A student (pipeline with a codebook), its teachers and their weight average, asked the same prompts.

    Args:
        average: the teachers' averaged UNet, without a style input.
        size: height and width of latents.
        others: further UNets without a style input to be set beside, by name.
    """

    student: Pipeline
    teachers: Teachers
    average: Any
    prompts: Sequence[str]
    size: tuple[int, int]
    steps: int = 12
    cfg_scale: float = 1.0
    notify: Notify = field(default=lambda what, done, total: None)
    what: str = "draws pictures to compare"
    few: int = 4  # steps of a student for few steps, which draws without guidance
    others: Mapping[str, Any] = field(default_factory=dict)
    expected: int = 0  # pictures that ``notify`` counts up to; 0: those of ``draw_compared`` and ``measure``

    def __post_init__(self) -> None:
        assert self.student.codebook is not None
        self.codebook = self.student.codebook
        self.names = self.codebook.names
        self.teachers.embed([*self.prompts, ""])
        self.context = encode_prompts(self.student.text_encoders, [*self.prompts, ""])
        self.together = Rows(self.student.device, "draw even one picture", "Or use --device cpu.")
        self.done = 0
        self.expected = self.expected or len(self.prompts) * (3 * len(self.names) + 1 + len(self.others))

    def sample(
        self,
        unet: Any,
        context: Context,
        seeds: int,
        style: Tensor | None = None,
        rows: slice = slice(None),
        sampling: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Latents of the prompts; ``context`` holds the empty prompt's embedding last.

        ``sampling``: of another kind of model than the student, see ``Teachers.sampling``.
        """
        kind = {"steps": self.steps, "cfg_scale": self.cfg_scale, "prediction_type": self.student.prediction_type}
        kind |= sampling or {}
        prompts, empty = context[:-1][rows], context[-1:]
        noise = initial_noise([seeds + i for i in range(len(self.prompts))], self.size)[rows]

        def draw(rows: range) -> Tensor:
            part = slice(rows.start, rows.stop)
            return sample_latents(
                unet, prompts[part].to(unet.device), noise[part], negative=empty.to(unet.device), style=style, **kind,
            )  # fmt: skip

        parts = []
        for latents in self.together.of(draw, _chunks(len(prompts), 24)):
            parts.append(latents)
            self.done += len(latents)
            self.notify(self.what, self.done, self.expected)
        return torch.cat(parts)

    def of_teacher(self, index: int, seeds: int, rows: slice = slice(None)) -> Tensor:
        context = self.teachers.context(index, torch.arange(len(self.prompts) + 1)).to(torch.float32)
        return self.sample(self.teachers.unet(index), context, seeds, None, rows, self.teachers.sampling(index))

    def of_student(self, mix: Mapping[str, float], seeds: int = SEEDS_A, rows: slice = slice(None)) -> Tensor:
        few = {"few_step": True, "steps": self.few, "cfg_scale": 1.0} if self.student.few_step else None
        return self.sample(self.student.unet, self.context, seeds, self.codebook.style(mix), rows, few)

    def in_styles_of(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Pictures of the student in styles of another; what it does not have, it draws in its default style."""
        unknown = set(names) - set(self.names)
        self.expected = self.done + len(self.prompts) * (len(self.names) + bool(unknown))
        made = {name: decode(self.student.vae, self.of_student(one_hot(self.names, name))) for name in self.names}
        if unknown:
            default = decode(self.student.vae, self.of_student(self.codebook.default))
            made |= dict.fromkeys(unknown, default)
        return {name: made[name] for name in names}

    def of_average(self) -> Tensor:
        return self.sample(self.average, self.context, SEEDS_A)

    def of_others(self) -> dict[str, np.ndarray]:
        """Pictures of ``others``."""
        drawn = {name: self.sample(unet, self.context, SEEDS_A) for name, unet in self.others.items()}
        return {name: decode(self.student.vae, latents) for name, latents in drawn.items()}


def probe_gap(bench: Bench, latents: Mapping[str, Tensor], seed: int = 0, repeats: int = 1) -> dict[str, Any]:
    """The score gap closed: 1 − mse(student_i, teacher_i) / mse(average, teacher_i), on held-out x_t, t, prompt.

    Timesteps are spread evenly over all of them, the same for every style. ``latents``: clean ones a style, a row a
    prompt of the bench.
    """
    student_mse: dict[str, float] = {}
    plain_mse: dict[str, dict[str, float]] = {"": {}, **{other: {} for other in bench.others}}
    for index, name in enumerate(bench.names):
        rng = torch.Generator().manual_seed(seed)
        x0 = latents[name].repeat(repeats, 1, 1, 1)
        count = len(x0)
        prompt = torch.arange(len(bench.prompts)).repeat(repeats)
        t = ((torch.randperm(count, generator=rng) + torch.rand(count, generator=rng)) / count * TIMESTEPS).long()
        noise = torch.randn(x0.shape, generator=rng).to(x0.device)
        x_t, t = add_noise(x0, noise, t.to(x0.device)), t.to(x0.device)
        own, unet = bench.teachers.context(index, prompt), bench.teachers.unet(index)
        wanted = _in_chunks(bench, partial(bench.teachers.told, index, partial(predict, unet)), x_t, t, own)
        context = bench.context[prompt]
        style = bench.codebook(bench.codebook.weights(one_hot(bench.names, name)))
        labels = style.expand(count, -1)
        mine = _in_chunks(bench, partial(predict, bench.student.unet), x_t, t, context, labels)
        student_mse[name] = F.mse_loss(mine, wanted).item()
        for other, unet in {"": bench.average, **bench.others}.items():
            plain = _in_chunks(bench, partial(predict, unet), x_t, t, context)
            plain_mse[other][name] = F.mse_loss(plain, wanted).item()
    average_mse = plain_mse.pop("")
    gap = score_gap(student_mse, average_mse) | {"student_mse": student_mse, "average_mse": average_mse}
    return gap | {"others": {other: score_gap(mse, average_mse)["mean"] for other, mse in plain_mse.items()}}


def _in_chunks(bench: Bench, ask: Callable[..., Tensor], x_t: Tensor, *more: Any) -> Tensor:
    """What ``ask`` says of rows of all arguments, asked of few at a time."""

    def said(rows: range) -> Tensor:
        return ask(*(each[rows.start : rows.stop] for each in (x_t, *more))).float()

    return torch.cat(list(bench.together.of(said, _chunks(len(x_t), 24))))


def _chunks(count: int, size: int) -> list[range]:
    return [range(k, min(k + size, count)) for k in range(0, count, size)]


@dataclass
class Measured:
    """The report: what becomes report.json."""

    report: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Compared:
    """What students of the same teachers are compared with: pictures (n, H, W, 3), and the clean latents of set B."""

    latents_b: Mapping[str, Tensor]
    teachers_b: Mapping[str, np.ndarray]
    teachers_a: Mapping[str, np.ndarray]
    average: np.ndarray


def draw_compared(bench: Bench) -> Compared:
    """The teachers' pictures with both draws of seeds, and the weight average's: no student takes part."""
    vae = bench.student.vae
    latents_b = {name: bench.of_teacher(i, SEEDS_B) for i, name in enumerate(bench.names)}
    latents_a = {name: bench.of_teacher(i, SEEDS_A) for i, name in enumerate(bench.names)}
    b, a = ({name: decode(vae, z) for name, z in latents.items()} for latents in (latents_b, latents_a))
    return Compared(latents_b, b, a, decode(vae, bench.of_average()))


def measure(
    bench: Bench,
    began: float,
    samples_seen: int | None = None,
    compared: Compared | None = None,
    before: Bench | None = None,
    networks: Sequence[appeal.Network] = (),
    **more: Any,
) -> Measured:
    """Sample all sets, compare them, and close the report. ``began`` is what ``time.monotonic()`` gave at the start.

    The training data never held the latents of the bench's prompts: they are drawn here, with other seeds. ``compared``
    is what ``draw_compared`` gave for the same bench, where several students are measured against the same teachers.
    ``before``: the same bench with an earlier student in the student's place. ``networks``: of further scores, by which
    an equal mix of all styles is set beside the weight average.
    """
    compared = compared or draw_compared(bench)
    of_student = {name: bench.of_student(one_hot(bench.names, name)) for name in bench.names}
    student = {name: decode(bench.student.vae, z) for name, z in of_student.items()}
    evaluation = evaluate_pictures(
        student, compared.teachers_b, compared.teachers_a, dict.fromkeys(bench.names, compared.average),
        before=before.in_styles_of(bench.names) if before else None, others=bench.of_others(),
    )  # fmt: skip
    if networks:
        mix = decode(bench.student.vae, bench.of_student(dict.fromkeys(bench.names, 1.0)))
        sets = {"equal mix": [mix], "weight average": [compared.average], "each style": list(student.values())}
        more["appeal"] = appeal.table(networks, sets | {"teachers": list(compared.teachers_a.values())}, bench.prompts)
    few = bool(bench.student.few_step)
    gap = None if few else probe_gap(bench, compared.latents_b)  # of few steps: it predicts with its guidance in it
    of_others = gap.pop("others") if gap else {}
    report = to_report(
        evaluation, gap=gap, seconds=round(time.monotonic() - began, 1),
        samples_seen=samples_seen, device=device_name(bench.student.device), commit=commit(),
        sampler={"name": "DPM-Solver++ 2M", "steps": bench.steps, "cfg_scale": bench.cfg_scale}
        | ({"student": f"Euler in {bench.few} steps without guidance"} if few else {}),
        **more,
    )  # fmt: skip
    for baseline in report["baselines"]:
        baseline["gap_closed"] = of_others.get(baseline["name"])
    if bench.average.dtype != torch.float32:
        report["precision"] = str(bench.average.dtype).removeprefix("torch.")
    return Measured(report)


def mix_pictures(
    bench: Bench, pairs: Sequence[tuple[str, str]], row: int, amounts: Sequence[float]
) -> list[np.ndarray]:
    """For each pair of styles one strip (len(amounts), H, W, 3), from the first to the second; one prompt, one seed."""
    strips = []
    for first, second in pairs:
        mixes = [lerp(one_hot(bench.names, first), one_hot(bench.names, second), amount) for amount in amounts]
        latents = torch.cat([bench.of_student(mix, rows=slice(row, row + 1)) for mix in mixes])
        strips.append(decode(bench.student.vae, latents))
    return strips


def device_name(device: torch.device) -> str:
    """What the figures were measured on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def commit() -> str:
    """The commit of this checkout, or the version where there is none."""
    try:
        told = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return f"v{__version__}"
    return told.stdout.strip() if told.returncode == 0 else f"v{__version__}"
