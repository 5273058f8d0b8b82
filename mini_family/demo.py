"""The embedded default: what ``dmm demo`` merges, and how."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dmm_core.presets import DATA, TRAIN
from mini_family.names import caption, invented, subjects

TITLE = "mini family"  # of the recipe, by which the demo knows its own
CFG_SCALE = 2.0
SAMPLER_STEPS = 12
SHOWN = ("cat face", "crown", "umbrella", "red apple", "guitar", "house", "skull", "trophy", "panda", "rocket")
INVENTED = 700  # prompts beside those of the trained subjects
REPEATS = 3  # pictures a held-out subject and style
FEWEST, MOST = 600, 2000  # steps of the merge
SECONDS = 430  # that all of it should take, where they suffice for the fewest steps
DRAWING, MEASURING = 0.13, 280  # what else takes time, in steps' time: for each step, and in all


def recipe_of(folder: Path, teachers: list[Path], base: Path, prompts: Path, steps: int) -> dict[str, Any]:
    """The demo's recipe as plain data: average start, all of the paper's losses, latents drawn by the teachers."""
    latents = max(1, min(1000, steps // 2))  # of fewer, a long training learns these pictures by heart
    return {
        "title": TITLE,
        "base": str(base),
        "teachers": [{"path": str(path), "name": path.stem} for path in teachers],
        "out": str(folder / "mini-dmm.safetensors"),
        "data": {
            "prompts": str(prompts), "latents_per_teacher": latents, "steps": 8, "cfg_scale": 2.0, "size": 64,
            **DATA,
        },
        "train": {
            "steps": steps, "batch": 6, "lr": 3e-4, "style_lr": 1e-3, "warmup": 30, "weight_decay": 0.0,
            "betas": [0.9, 0.99], **TRAIN, "precision": "fp32", "save_every": 200, "device": "cpu",
            "processes": min(len(teachers), os.cpu_count() or 1),
        },
    }  # fmt: skip


def steps_that_fit(seconds_per_step: float) -> int:
    """Steps of the merge on a machine where one takes so long."""
    steps = (SECONDS / seconds_per_step - MEASURING) / (1 + DRAWING)
    return max(FEWEST, min(MOST, 100 * int(steps / 100)))


def training_prompts(more: int = INVENTED) -> list[str]:
    """Of the trained subjects, and of names that mean nothing; the first is what a style's picture shows."""
    shown = {name.replace(" ", "-") for name in SHOWN}
    trained = sorted(subjects(held=False), key=lambda name: name not in shown)
    return [caption(name) for name in (*trained, *invented(more))]


def held_out_prompts() -> list[str]:
    """Prompts for the comparison: every subject that no training ever saw, ``REPEATS`` times."""
    return [caption(name) for name in subjects(held=True)] * REPEATS


def shown_prompts() -> list[str]:
    """Prompts for the pictures; the seeds are not those of the training data."""
    return [f"a picture of a {name}" for name in SHOWN]
