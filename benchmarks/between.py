r"""How evenly the way from one style to another goes: of students, and of what rows between two styles are taught.

Beside the students, the teachers themselves draw by a mix of what they predict: in proportion to the weights, and to
their roots, which ``train.mixed`` teaches (dmm_core/between.py). All along the way, in tenths, the Fréchet distance to
both teachers' own pictures is measured.

    python benchmarks/between.py a.safetensors b.safetensors --teacher ink.safetensors … --prompts held-out.txt \
        --images 48 --mix ink neon --mix clay blueprint --out benchmarks/results/between.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rows

from dmm_core.between import blended
from dmm_core.data import read_prompts
from dmm_core.features import Extractor
from dmm_core.frechet import Gaussian, frechet
from dmm_core.measure import SEEDS_A, SEEDS_B, commit, device_name
from dmm_core.mixing import TENTHS, curve, shares
from dmm_core.models import Pipeline, load_pipeline
from dmm_core.sample import decode, sample
from dmm_core.style import lerp, one_hot

CFG_SCALE, STEPS = 2.0, 12
Draw = Callable[[str, str, float], Tensor]  # latents of a mix: first style, second style, weight of the second


class Together(torch.nn.Module):
    """Two teachers as one UNet, which says a mix of what both say."""

    def __init__(self, first: Any, second: Any, mix: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.mix = first, second, mix
        self.conv_in, self.device, self.config = first.conv_in, first.device, first.config

    def forward(self, *given: Any, **named: Any) -> Any:
        """As ``UNet2DConditionModel``'s."""
        return SimpleNamespace(sample=self.mix(*(unet(*given, **named).sample for unet in (self.first, self.second))))


def in_proportion(weight: float, first: Tensor, second: Tensor) -> Tensor:
    """A mix of two predictions by the weights."""
    return torch.lerp(first, second, weight)


def by_roots(weight: float, first: Tensor, second: Tensor) -> Tensor:
    """The mix that a student is taught."""
    return blended(first, second, torch.full((len(first),), weight))


class Ways:
    """Draws and measures ways between the styles of these teachers."""

    def __init__(self, teachers: dict[str, Pipeline], prompts: list[str]) -> None:
        self.teachers, self.prompts = teachers, prompts
        self.network = Extractor.find()
        self.goals = {name: self.features(pipe, self.drawn(pipe, seeds=SEEDS_B)) for name, pipe in teachers.items()}

    def drawn(self, pipe: Pipeline, style: Tensor | None = None, seeds: int = SEEDS_A) -> Tensor:
        numbers = range(seeds, seeds + len(self.prompts))
        return sample(pipe, self.prompts, seeds=numbers, steps=STEPS, cfg_scale=CFG_SCALE, style=style)

    def features(self, pipe: Pipeline, latents: Tensor) -> Gaussian:
        return Gaussian.of(self.network(decode(pipe.vae, latents)))

    def of_student(self, pipe: Pipeline, first: str, second: str, weight: float) -> Tensor:
        assert pipe.codebook is not None
        names = pipe.codebook.names
        mix = lerp(one_hot(names, first), one_hot(names, second), weight)
        return self.drawn(pipe, pipe.codebook.style(mix))

    def of_teachers(self, mix: Callable[..., Tensor], first: str, second: str, weight: float) -> Tensor:
        one, other = self.teachers[first], self.teachers[second]
        unet = Together(one.unet, other.unet, partial(mix, weight))
        return self.drawn(Pipeline(unet, one.text_encoders, one.vae, one.family, one.prediction_type, None, one.path))

    def along(self, draw: Draw, first: str, second: str) -> dict[str, Any]:
        """What ``curve`` gives, and the share of the way that each tenth takes."""
        pipe = self.teachers[first]
        sets = [self.features(pipe, draw(first, second, weight)) for weight in TENTHS]
        found = curve(*([frechet(s, self.goals[name]) for s in sets] for name in (first, second)))
        tenths = [round(share, 3) for share in shares(found["to_first"], found["to_second"])]
        return {"first": first, "second": second, "tenths": tenths, **found}


def show(lines: list[dict[str, Any]]) -> None:
    """A markdown table."""
    print("| | from, to | largest tenth | each tenth's share of the way, % | against |\n|---|---|---|---|---|")
    for line in lines:
        tenths = " ".join(f"{100 * share:.0f}" for share in line["tenths"])
        against = "–" if line["monotone"] else f"{line['against']:.1%}"
        print(
            f"| {line['what']} | {line['first']}, {line['second']} | {line['largest']:.0%} | {tenths} | {against} |",
            flush=True,
        )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path, nargs="*", help="DMM files of these teachers")
    parser.add_argument("--teacher", type=Path, nargs="+", default=[], help="files called as the styles")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--images", type=int, default=48, help="a weight; the first prompts'")
    parser.add_argument("--mix", nargs=2, action="append", default=[], metavar=("FIRST", "SECOND"))
    parser.add_argument("--label", nargs="+", default=[], help="what the table calls the students")
    parser.add_argument("--students-only", action="store_true", help="leave the teachers' own mixes out")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not args.teacher:
        show(rows.read(args.out))
        return
    if args.prompts is None:
        parser.error("--prompts: expected a file of prompts")
    ways = Ways({path.stem: load_pipeline(path) for path in args.teacher}, read_prompts(args.prompts)[: args.images])
    draws: dict[str, Draw] = {}
    if not args.students_only:
        draws |= {"teachers, in proportion to the weights": partial(ways.of_teachers, in_proportion),
                  "teachers, by the weights' roots": partial(ways.of_teachers, by_roots)}  # fmt: skip
    labels = args.label or [path.stem for path in args.student]
    for label, path in zip(labels, args.student, strict=True):
        draws[label] = partial(ways.of_student, load_pipeline(path))
    about = {"images": args.images, "device": device_name(torch.device("cpu")), "torch": torch.__version__,
             "commit": commit(), "date": str(date.today())}  # fmt: skip
    for what, draw in draws.items():
        for first, second in args.mix:
            line = {"what": what, **ways.along(draw, first, second), **about}
            rows.append(args.out, line)
            show([line])


if __name__ == "__main__":
    main()
