"""From one style to another in tenths: how far each mix lies from both teachers, beside averages of their weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from dmm_core.features import Extractor
from dmm_core.fitting import same_prediction
from dmm_core.frechet import Gaussian, frechet
from dmm_core.measure import SEEDS_A, Bench, Compared
from dmm_core.merge import weighted_average
from dmm_core.models import build_unet
from dmm_core.sample import decode
from dmm_core.style import lerp, one_hot

TENTHS = tuple(i / 10 for i in range(11))


def mixing_table(
    bench: Bench,
    compared: Compared,
    pair: tuple[str, str],
    amounts: Sequence[float] = TENTHS,
    extractor: Extractor | None = None,
) -> dict[str, Any]:
    """Fréchet distances to both styles' teachers at each weight of the second style.

    Args:
        compared: what ``draw_compared`` gave for this bench; mixes are drawn with the other seeds.

    Returns:
        ``first``, ``second``, ``amounts``, and under ``student`` and ``average`` (of the two teachers' weights, None
        where they predict different things) what ``curve`` gives.
    """  # fmt: skip
    network, vae = extractor or Extractor.find(), bench.student.vae
    goals = [Gaussian.of(network(compared.teachers_b[name])) for name in pair]

    def along(draw: Callable[[float], torch.Tensor]) -> dict[str, Any]:
        sets = [Gaussian.of(network(decode(vae, draw(amount)))) for amount in amounts]
        return curve([frechet(s, goals[0]) for s in sets], [frechet(s, goals[1]) for s in sets])

    first, second = (bench.teachers.checkpoints[bench.names.index(name)] for name in pair)

    def averaged(amount: float) -> torch.Tensor:
        tensors = weighted_average([first.unet, second.unet], [1 - amount, amount])
        unet = build_unet(first.unet_config, tensors, bench.average.dtype, first.path, styled=False)
        return bench.sample(unet.to(bench.student.device), bench.context, SEEDS_A)

    ends = one_hot(bench.names, pair[0]), one_hot(bench.names, pair[1])
    alike = same_prediction(first, second)
    return {
        "first": pair[0], "second": pair[1], "amounts": list(amounts),
        "student": along(lambda amount: bench.of_student(lerp(*ends, amount))),
        "average": along(averaged) if alike else None,
    }  # fmt: skip


def expected(bench: Bench, pairs: Sequence[tuple[str, str]]) -> int:
    """How many pictures the tables of these pairs take."""
    of = [[bench.teachers.checkpoints[bench.names.index(name)] for name in pair] for pair in pairs]
    return len(bench.prompts) * len(TENTHS) * sum(1 + same_prediction(*pair) for pair in of)


def curve(to_first: Sequence[float], to_second: Sequence[float]) -> dict[str, Any]:
    """Distances along the way and how it goes.

    ``monotone``: each step leads away from the first and towards the second. ``against``: the way that steps in the
    wrong direction make up, as a share of all ways; 0 where it is monotone. ``largest``: the share of the whole way
    that the largest step takes, a mean of both distances; as little as one by the number of steps where all are alike.
    """
    steps = _steps(to_first, to_second).ravel()
    return {
        "to_first": list(map(float, to_first)), "to_second": list(map(float, to_second)),
        "monotone": bool((steps >= 0).all()),
        "against": float(0.0 - steps.clip(max=0).sum() / max(np.abs(steps).sum(), 1e-12)),
        "largest": max(shares(to_first, to_second)),
    }  # fmt: skip


def shares(to_first: Sequence[float], to_second: Sequence[float]) -> list[float]:
    """The share of the whole way that each step takes, a mean of both distances; they sum to 1."""
    steps = _steps(to_first, to_second)
    return (steps / np.abs(steps.sum(1, keepdims=True)).clip(1e-12)).mean(0).tolist()


def _steps(to_first: Sequence[float], to_second: Sequence[float]) -> np.ndarray:
    """How far each step leads away from the first, and towards the second: (2, steps)."""
    return np.stack([np.diff(to_first), -np.diff(to_second)])
