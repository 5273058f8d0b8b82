"""Named sets of values for a recipe: ``preset: good`` fills what a recipe leaves out. Needs no torch.

A step takes ``ROWS`` rows shared by the teachers, so that the time hardly depends on how many there are. The times are
for SD1.5 at 512 pixels on a card of the RTX 4090's class, estimated from the passes that a row costs; ``dmm plan``
measures them on the machine at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmm_core.errors import RecipeError
from dmm_core.schema import is_number

ROWS = 16  # of one optimizer step, over all its teachers
# The paper's λ (§3.4), what measured best, and rows on the way from style to style, for sliders that go evenly.
TRAIN = {"snr_power": 0.5, "feature": 0.001, "adversarial": 0.01, "mixed": 0.25, "blockwise": 4.0, "unshrink": True}
DATA = {"foreign": 0.3}  # keeps pictures out of a wrong style; with few steps only beside the adversarial loss
ALONE = {**dict.fromkeys(TRAIN, 0.0), "unshrink": False}  # of ``few_step``, which has a loss of its own
OWN = dict.fromkeys(DATA, 0.0)
OLD = 4  # styles of a step where a student learns of itself; how many it has is not known yet


@dataclass(frozen=True)
class Preset:
    """``title`` and ``does`` are what users read; ``values`` has the recipe's keys, all but ``train.batch``."""

    name: str
    title: str
    does: str
    values: Mapping[str, Mapping[str, Any]]

    def fill(self, teachers: int) -> dict[str, dict[str, Any]]:
        """The recipe's keys for this many teachers."""
        made = {section: dict(values) for section, values in self.values.items()}
        rows = made["train"].pop("rows", ROWS)
        made["train"]["batch"] = max(1, round(rows / max(1, teachers)))
        if teachers > rows:
            made["train"]["teachers_per_step"] = rows
        return made


DEFAULT = "good"  # of whoever does not write a recipe
PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "preview", "Preview, about 10 minutes",
            "400 steps on 96 pictures a teacher: the styles can be told apart, details are still blurred.",
            {"data": {"latents_per_teacher": 96, "steps": 12, **DATA},
             "train": {"steps": 400, "lr": 2e-5, "style_lr": 1e-3, "warmup": 20, "save_every": 100, **TRAIN}},
        ),
        Preset(
            "good", "Good, about 2 hours",
            "8,000 steps on 768 pictures a teacher.",
            {"data": {"latents_per_teacher": 768, "steps": 20, **DATA},
             "train": {"steps": 8000, "lr": 1e-5, "style_lr": 5e-4, "warmup": 100, "save_every": 500, **TRAIN}},
        ),
        Preset(
            "best", "Best, overnight",
            "32,000 steps on 2,048 pictures a teacher, and a moving average of the weights.",
            {"data": {"latents_per_teacher": 2048, "steps": 25, **DATA},
             "train": {"steps": 32000, "lr": 1e-5, "style_lr": 5e-4, "warmup": 200, "save_every": 1000, "ema": 0.9995,
                       **TRAIN}},
        ),
        Preset(
            "mini", "Mini, for the small models that come with this project",
            "400 steps at a learning rate that only such small models bear; minutes on a CPU. Not for full models.",
            {"data": {"latents_per_teacher": 200, "steps": 8, "cfg_scale": 2.0, **DATA},
             "train": {"rows": 24, "steps": 400, "lr": 5e-4, "style_lr": 1e-3, "warmup": 30, "weight_decay": 0.0,
                       "betas": [0.9, 0.99], "save_every": 50, **TRAIN}},
        ),
    )
}  # fmt: skip


def with_exceptions(data: Any) -> Any:
    """A recipe's plain mapping that leaves out what has no meaning where it trains for few steps, or what does not go
    together with ``fused_backward``, or with styles that are to stay as they are.
    """
    if not isinstance(data, Mapping):
        return data
    train, of = ({} if (part := data.get(key)) is None else part for key in ("train", "data"))
    if not (isinstance(train, Mapping) and isinstance(of, Mapping)):
        return data
    if train.get("few_step"):
        return {**data, "train": {**ALONE, **train}, "data": {**OWN, **of}}
    off = {"blockwise": 0.0} if train.get("fused_backward") else {}
    off |= {"unshrink": False} if data.get("student") else {}
    return {**data, "train": {**off, **train}} if off else data


def with_preset(data: Any, source: str | Path) -> Any:
    """A recipe's plain mapping with its preset's values where it says nothing itself; explicit keys win.

    Raises:
        RecipeError: there is no preset of that name.
    """
    name = data.get("preset") if isinstance(data, Mapping) else None
    if not isinstance(name, str):  # none, or a fault that the reader tells
        return data
    if name not in PRESETS:
        raise RecipeError(f"preset: there is no {name!r}", source, f"The presets are {', '.join(PRESETS)}.")
    teachers = data.get("teachers")
    filled = dict(data)
    count = len(teachers) if isinstance(teachers, list | tuple) else 1
    if data.get("student"):
        count *= 2  # as many rows of old styles again
    values_of = PRESETS[name].fill(count or OLD)
    if not count:
        values_of["train"]["teachers_per_step"] = OLD
    for section, values in values_of.items():
        given = data.get(section)
        if given is None or isinstance(given, Mapping):  # anything else is a fault that the reader tells
            filled[section] = {**values, **(given or {})}
    return filled


def with_stages(data: Any) -> Any:
    """A recipe's plain mapping whose ``stages`` say all: what one leaves out is as in the recipe itself.

    ``synthesised`` is the paper's last stage (§3.4): a tenth of the steps, on pictures that the teachers make, and a
    tenth of the learning rates: at the full ones a student that is nearly done leaves its teachers (docs/results.md).
    ``few_step`` takes half of the steps, and makes the guidance with which the data are drawn the student's own.
    """
    stages = data.get("stages") if isinstance(data, Mapping) else None
    if not isinstance(stages, list | tuple):
        return data
    data_of, train = (dict(v) if isinstance(v := data.get(key), Mapping) else {} for key in ("data", "train"))
    steps = train.get("steps", 10_000)
    made: list[Any] = []
    for stage in stages:
        given = {"name": stage} if isinstance(stage, str) else stage
        if not isinstance(given, Mapping):  # a fault that the reader tells
            made.append(stage)
            continue
        own: dict[str, dict[str, Any]] = {"data": {}, "train": {}}
        if given.get("name") == "synthesised":
            own["data"] = {"kind": "teachers", "path": None}
            rates = {"lr": 1e-5, **{key: train[key] for key in ("lr", "style_lr") if train.get(key) is not None}}
            own["train"] = {key: rate / 10 for key, rate in rates.items() if is_number(rate)}
            own["train"] |= {"steps": max(1, int(steps) // 10)} if is_number(steps) else {}
        if given.get("name") == "few_step":
            own["data"] = dict(OWN)
            own["train"] = {"few_step": data_of.get("cfg_scale") or 5.0, **ALONE}
            own["train"] |= {"steps": max(1, int(steps) // 2)} if is_number(steps) else {}
        filled = dict(given)
        for key, common in (("data", data_of), ("train", train)):
            said = given.get(key) or {}
            if isinstance(said, Mapping):
                filled[key] = {**common, **own[key], **said}
        made.append(filled)
    return {**data, "stages": made}
