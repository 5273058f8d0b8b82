"""Small distillations of tiny teachers, for tests of the trainer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dmm_core.data import LatentData, Pool
from dmm_core.distill import Distillation
from dmm_core.recipe import Recipe, recipe_from_dict
from dmm_core.run import open_sources, ready
from tests.unit import tiny

SMALL = {"latents_per_teacher": 3, "steps": 1, "cfg_scale": 1.0, "size": 64}
TRAIN = {"steps": 4, "batch": 2, "warmup": 0, "lr": 1e-3, "precision": "fp32", "device": "cpu", "save_every": 1}


def tiny_teachers(folder: Path, count: int, family: str = "sd15") -> list[Path]:
    paths = [folder / f"teacher {i}.safetensors" for i in range(count)]
    for i, path in enumerate(paths):
        tiny.write_tiny(path, family=family, seed=50 * i, vocab=49408)
    return paths


def recipe(out: Path, teachers: list[Path], **train) -> Recipe:
    entries = [{"path": str(path), "name": f"style {i}"} for i, path in enumerate(teachers)]
    return recipe_from_dict({"teachers": entries, "out": str(out), "data": SMALL, "train": TRAIN | train})


def built(out: Path, teachers: list[Path], **train) -> Distillation:
    """A distillation on random latents, before its first step."""
    made = recipe(out, teachers, **train)
    pool = Pool(torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(3)), torch.arange(5) % 2)
    return ready(made, open_sources(made, check_values=False), LatentData(["a", "b"], [pool], 0.5))


def after(distillation: Distillation, steps: int) -> dict[str, Tensor]:
    """What the student has learned after some steps."""
    for _ in range(steps):
        distillation.step()
    return {key: value.clone() for key, value in distillation.student.learned().items()}


def furthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The greatest difference between two states."""
    assert a.keys() == b.keys()
    return max((a[key].float() - b[key].float()).abs().max().item() for key in a)
