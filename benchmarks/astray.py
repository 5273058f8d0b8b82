r"""Where pictures go into a wrong style: the teacher draws the first steps, the student the others.

Counts the pictures that are nearer to what another style's teacher draws of the same prompt and seed, over several
sets of seeds, and draws those of the first set again, with the teacher for the first 0, 1, 2 … steps. As soon as the
student's part no longer leads away, its steps before were at fault.

    python benchmarks/astray.py lora.safetensors --base base.safetensors --teacher ink-lora.safetensors … \
        --prompts held-out.txt --sets 2 --follow
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dmm_core.checkpoint import Checkpoint, open_checkpoint
from dmm_core.conditioning import Context, predict
from dmm_core.data import read_prompts
from dmm_core.features import Extractor
from dmm_core.likeness import astray
from dmm_core.lora_teacher import lora_teacher
from dmm_core.measure import SEEDS_A, Bench
from dmm_core.models import load_pipeline
from dmm_core.sample import decode, initial_noise, scheduler_of
from dmm_core.style import one_hot
from dmm_core.teachers import Teachers

Ask = Callable[[Tensor, Tensor], Tensor]  # x_t (2B, …) and t → ε, the empty prompt's in the second half


def sides(bench: Bench, index: int, rows: Tensor) -> tuple[Ask, Ask]:
    """Teacher and student of a style, asked these prompts (B,) and the empty one."""
    numbers = torch.cat([rows, torch.full_like(rows, len(bench.prompts))])
    style = bench.codebook.style(one_hot(bench.names, bench.names[index])).expand(len(numbers), -1)

    def asking(unet: Any, context: Context, style: Tensor | None) -> Ask:
        return lambda x, t: predict(unet, x, t, context, style).float()

    teacher = asking(bench.teachers.unet(index), bench.teachers.context(index, numbers), None)
    return teacher, asking(bench.student.unet, bench.context[numbers], style)


@torch.no_grad()
def shared(bench: Bench, index: int, rows: Tensor, first: int) -> Tensor:
    """Latents (B, 4, h, w) of set 0 whose first steps the teacher has made."""
    scheduler = scheduler_of(bench.steps, "epsilon", False, False)
    x = initial_noise([SEEDS_A + int(row) for row in rows], bench.size)
    teacher, student = sides(bench, index, rows)
    for step, t in enumerate(scheduler.timesteps):
        cond, uncond = (teacher if step < first else student)(torch.cat([x, x]), t).chunk(2)
        x = scheduler.step(uncond + bench.cfg_scale * (cond - uncond), t, x, return_dict=False)[0]
    return x


def follow(bench: Bench, lost: list[list[int]], reference: list[np.ndarray], network: Extractor) -> None:
    """Print how far the lost pictures are from their teachers', by the number of the teacher's steps."""
    times = scheduler_of(bench.steps, "epsilon", False, False).timesteps.tolist()
    print("| style, picture | " + " | ".join(f"t ≤ {t}" for t in times) + " |\n" + "|---" * (len(times) + 1) + "|")
    for index, rows in enumerate(map(torch.tensor, lost)):
        if not len(rows):
            continue
        apart = []
        for first in range(len(times)):
            drawn = network(decode(bench.student.vae, shared(bench, index, rows, first)))
            apart.append(((drawn - reference[index][rows]) ** 2).sum(1))
        for row, distances in zip(rows.tolist(), np.array(apart).T, strict=True):
            name = f"{bench.names[index]} {row}: {bench.prompts[row]}"
            print(f"| {name} | " + " | ".join(f"{d:.1f}" for d in distances) + " |", flush=True)


def teachers_of(args: argparse.Namespace) -> list[Checkpoint]:
    if not args.base:
        return [open_checkpoint(path) for path in args.teacher]
    base = open_checkpoint(args.base)
    return [lora_teacher(path, base) for path in args.teacher]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path)
    parser.add_argument("--teacher", type=Path, nargs="+", required=True)
    parser.add_argument("--base", type=Path, help="where teachers are LoRA files")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--images", type=int, default=96, help="a style and set")
    parser.add_argument("--sets", type=int, default=1, help="of seeds; the first one is what dmm evaluate draws")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--cfg", type=float, default=2.0)
    parser.add_argument("--follow", action="store_true", help="draw the lost ones again (epsilon models alone)")
    args = parser.parse_args()
    prompts = read_prompts(args.prompts)
    prompts = [prompts[i % len(prompts)] for i in range(args.images)]
    teachers = Teachers(teachers_of(args), torch.device("cpu"), torch.float32)
    bench = Bench(load_pipeline(args.student), teachers, None, prompts, (8, 8), args.steps, args.cfg)
    network, found = Extractor.find(), []
    for number in range(args.sets):
        seeds = SEEDS_A + number * 7 * SEEDS_A  # none of them is dmm evaluate's other one
        pictures = [
            [bench.of_teacher(i, seeds), bench.of_student(one_hot(bench.names, name), seeds)]
            for i, name in enumerate(bench.names)
        ]
        reference, drawn = ([network(decode(bench.student.vae, pair[i])) for pair in pictures] for i in (0, 1))
        lost = astray(drawn, reference)
        named = dict(zip(bench.names, lost, strict=True))
        print(f"set {number}: {sum(map(len, lost))} of {len(lost) * len(prompts)}", named, flush=True)
        found.append((lost, reference))
    if args.follow:
        follow(bench, *found[0], network)


if __name__ == "__main__":
    main()
