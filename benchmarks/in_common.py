r"""What students' errors in ε have in common over all pictures of a style, beside how large they are.

Errors that differ from picture to picture and pixel to pixel cancel while a picture is sampled; one that is the same in
all of them adds up, and shifts the colours of a whole style. Teachers draw the latents, which are noised anew.

    python benchmarks/in_common.py a.safetensors b.safetensors --teacher ink.safetensors … --prompts held-out.txt
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dmm_core.conditioning import Context, encode_prompts, predict
from dmm_core.data import read_prompts
from dmm_core.diffusion import add_noise
from dmm_core.models import Pipeline, load_pipeline
from dmm_core.sample import sample
from dmm_core.style import one_hot

TIMES = (990, 900, 800, 700, 550, 400, 200, 60)
CFG_SCALE, STEPS = 2.0, 12


def guided(pipe: Pipeline, x_t: Tensor, t: Tensor, both: tuple[Context, Context], style: Tensor | None) -> Tensor:
    """ε (B, 4, h, w) with guidance."""
    cond, uncond = (predict(pipe.unet, x_t, t, context, style) for context in both)
    return uncond + CFG_SCALE * (cond - uncond)


def parts(error: Tensor) -> tuple[float, float]:
    """Mean square of errors (B, C, h, w); and of their mean a channel, less what chance makes of so many pictures."""
    mean = error.mean((2, 3))
    return error.square().mean().item(), (mean.mean(0).square() - mean.var(0) / len(mean)).mean().item()


@torch.no_grad()
def errors(teacher: Path, students: Sequence[Pipeline], prompts: Sequence[str]) -> Iterator[list[tuple[float, float]]]:
    """``parts`` of each student at each of TIMES, in the style that is called as its teacher's file."""
    pipe = load_pipeline(teacher)
    latents = sample(pipe, prompts, seeds=range(len(prompts)), steps=STEPS, cfg_scale=CFG_SCALE)
    both = encode_prompts(pipe.text_encoders, prompts), encode_prompts(pipe.text_encoders, [""]).expand(len(prompts))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    for time in TIMES:
        t = torch.full((len(prompts),), time)
        x_t = add_noise(latents, noise, t)
        wanted = guided(pipe, x_t, t, both, None)
        told = []
        for student in students:
            assert student.codebook is not None
            style = student.codebook.style(one_hot(student.codebook.names, teacher.stem)).expand(len(prompts), -1)
            told.append(parts(guided(student, x_t, t, both, style) - wanted))
        yield told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path, nargs="+", help="DMM files of these teachers, all with one text encoder")
    parser.add_argument("--teacher", type=Path, nargs="+", required=True, help="files called as the styles")
    parser.add_argument("--prompts", type=Path, required=True)
    args = parser.parse_args()
    students = [load_pipeline(path) for path in args.student]
    prompts = read_prompts(args.prompts)
    found = [list(errors(teacher, students, prompts)) for teacher in args.teacher]
    print("| student | squared error | " + " | ".join(f"t = {time}" for time in TIMES) + " |")
    print("|---" * (len(TIMES) + 2) + "|")
    for i, path in enumerate(args.student):
        for part, what in enumerate(("all", "in common")):
            means = [statistics.mean(of[k][i][part] for of in found) for k in range(len(TIMES))]
            print(f"| {path.stem} | {what} | " + " | ".join(f"{mean:.1e}" for mean in means) + " |")


if __name__ == "__main__":
    main()
