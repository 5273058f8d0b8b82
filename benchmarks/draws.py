r"""How much a ratio depends on the seeds: of students, over several draws of them, and of all their pictures together.

A ratio of 96 pictures a style is in large part chance, which all students of the same seeds share. Over several draws
it averages out, and all of them together have a smaller reference: they tell students apart that one draw cannot.

    python benchmarks/draws.py a.safetensors b.safetensors --teacher ink.safetensors … --prompts held-out.txt \
        --draws 4 --out benchmarks/results/draws.jsonl

With ``--stretch`` each student is measured with its styles so many times as far apart, too (dmm_core/shrinkage.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rows

from dmm_core.data import read_prompts
from dmm_core.features import Extractor
from dmm_core.frechet import Gaussian, frechet
from dmm_core.likeness import unlikeness
from dmm_core.measure import SEEDS_A, SEEDS_B, commit, device_name
from dmm_core.models import Pipeline, load_pipeline
from dmm_core.sample import decode, sample
from dmm_core.style import one_hot

CFG_SCALE, STEPS = 2.0, 12
APART = 10_000  # between the seeds of two draws; the first draw has those of ``dmm evaluate``
ROWS = 24  # of one pass


class Draws:
    """Features of teachers' and students' pictures, ``draws`` times with each prompt."""

    def __init__(self, teachers: dict[str, Pipeline], prompts: Sequence[str], draws: int) -> None:
        self.prompts, self.draws, self.network = prompts, draws, Extractor.find()
        self.a, self.b = (
            {name: self.features(pipe, seeds) for name, pipe in teachers.items()} for seeds in (SEEDS_A, SEEDS_B)
        )

    def features(self, pipe: Pipeline, seeds: int, style: Tensor | None = None) -> np.ndarray:
        """(draws, prompts, d)."""
        return np.stack([self.drawn(pipe, seeds + APART * draw, style) for draw in range(self.draws)])

    def drawn(self, pipe: Pipeline, seeds: int, style: Tensor | None) -> np.ndarray:
        latents = [
            sample(pipe, some, seeds=range(seeds + first, seeds + first + len(some)), steps=STEPS, cfg_scale=CFG_SCALE,
                   style=style)
            for first in range(0, len(self.prompts), ROWS)
            if (some := self.prompts[first : first + ROWS])
        ]  # fmt: skip
        return self.network(decode(pipe.vae, torch.cat(latents)))

    def measure(self, pipe: Pipeline) -> dict[str, Any]:
        """A student's ratio a draw, their mean, that of all pictures together, and its distances a style there."""
        assert pipe.codebook is not None
        names = pipe.codebook.names
        mine = {n: self.features(pipe, SEEDS_A, pipe.codebook.style(one_hot(names, n))) for n in names}
        ratios = [self.ratio({n: m[draw] for n, m in mine.items()}, draw) for draw in range(self.draws)]
        return {"ratios": ratios, "mean": sum(ratios) / len(ratios), "together": self.ratio(mine, slice(None)),
                "distances": self.distances(mine, slice(None)), "reference": self.distances(self.a, slice(None)),
                "picture_by_picture": self.apart(mine)}  # fmt: skip

    def ratio(self, mine: dict[str, np.ndarray], draw: int | slice) -> float:
        theirs = {name: of_a[draw] for name, of_a in self.a.items()}
        return sum(self.distances(mine, draw).values()) / sum(self.distances(theirs, draw).values())

    def distances(self, sets: dict[str, np.ndarray], draw: int | slice) -> dict[str, float]:
        """Of each set from its teacher's pictures with the other seeds."""
        return {n: frechet(Gaussian.of(flat(sets[n])), Gaussian.of(flat(self.b[n][draw]))) for n in sets}

    def apart(self, mine: dict[str, np.ndarray]) -> Any:
        """Picture by picture, a mean over styles."""
        drawn, same, others = ([flat(sets[name]) for name in mine] for sets in (mine, self.a, self.b))
        return unlikeness(drawn, same, others)["mean"]


def flat(features: np.ndarray) -> np.ndarray:
    """Rows (n, d), of however many draws."""
    return features.reshape(-1, features.shape[-1])


def show(lines: Sequence[dict[str, Any]]) -> None:
    """A markdown table."""
    print("| student | ratio a draw | mean | all together | picture by picture |\n|---|---|---|---|---|")
    for line in lines:
        each = ", ".join(f"{ratio:.3f}" for ratio in line["ratios"])
        told = f"{line['mean']:.3f} | {line['together']:.3f} | {line['picture_by_picture']:.3f}"
        print(f"| {line['what']} | {each} | {told} |", flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path, nargs="*", help="DMM files of these teachers; none: show the table")
    parser.add_argument("--teacher", type=Path, nargs="+", default=[], help="files called as the styles")
    parser.add_argument("--prompts", type=Path, help="a picture each, style and draw")
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--label", nargs="+", default=[], help="what the table calls the students")
    parser.add_argument("--stretch", type=float, nargs="+", default=[1.0], help="style vectors' distance; 1: as it is")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not args.student:
        show(rows.read(args.out))
        return
    if args.prompts is None or not args.teacher:
        parser.error("expected --teacher and --prompts beside students")
    draws = Draws({path.stem: load_pipeline(path) for path in args.teacher}, read_prompts(args.prompts), args.draws)
    about = {"device": device_name(torch.device("cpu")), "torch": torch.__version__, "commit": commit(),
             "date": str(date.today())}  # fmt: skip
    for label, path in zip(args.label or [path.stem for path in args.student], args.student, strict=True):
        for factor in args.stretch:
            pipe = load_pipeline(path)
            assert pipe.codebook is not None
            pipe.codebook.stretch(factor)
            what = f"{label}, styles {factor:g} times as far apart" if factor != 1 else label
            line = {"what": what, **draws.measure(pipe), **about}
            rows.append(args.out, line)
            show([line])


if __name__ == "__main__":
    main()
