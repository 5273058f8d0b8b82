"""Merges of the mini family by the commands that users call: what several benchmarks have in common."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import yaml

from dmm_core.presets import DATA
from dmm_core.recipe import load_recipe
from dmm_core.stages import unfinished
from mini_family import demo, family

ROOT = Path(demo.__file__).resolve().parents[1]
IMAGES = 96  # a style
SCORE = {"feature": 0.0, "adversarial": 0.0, "mixed": 0.0, "blockwise": 0.0, "unshrink": False}
LONG = 4500  # steps from which a merge is made as the best of docs/results.md, "Longer merges", was
LONG_DATA = {"latents_per_teacher": 4600, **DATA}
LONG_TRAIN = {"lr": 2.5e-4, "feature": 0.001}
LONG_INVENTED = 4000


def foreign(steps: int) -> float:
    """``data.foreign`` of a merge of so many steps."""
    return DATA["foreign"] if steps >= LONG else 0.0


def dmm(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "dmm_core", *map(str, words)], cwd=ROOT, check=True)


class Folder:
    """A folder with the family's checkpoints and prompts. A merge that lies in it already is not made again."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self.path, self.device = path.absolute(), device
        self.path.mkdir(parents=True, exist_ok=True)
        paths = family.unpack(self.path / "teachers", (*family.TEACHERS, *family.LATER))
        self.files = {path.stem: path for path in paths}
        (self.path / "held-out.txt").write_text("\n".join(demo.held_out_prompts()) + "\n", encoding="utf-8")

    def prompts(self, invented: int = demo.INVENTED) -> Path:
        """A file of prompts to train with."""
        path = self.path / f"train-{invented}.txt"
        path.write_text("\n".join(demo.training_prompts(invented)) + "\n", encoding="utf-8")
        return path

    def recipe(self, teachers: Sequence[Path], steps: int, base: Path | None = None) -> dict[str, Any]:
        """The demo's, of other teachers and length, in one process; from ``LONG`` steps on as the longer merges are.

        With the score loss alone where the case says nothing: so docs/results.md has them.
        """
        long = steps >= LONG
        prompts = self.prompts(LONG_INVENTED if long else demo.INVENTED)
        made = demo.recipe_of(self.path, list(teachers), base or self.files["base"], prompts, steps)
        made["train"] |= {"processes": 1, "device": self.device, **SCORE, **(LONG_TRAIN if long else {})}
        made["data"] |= LONG_DATA if long else {"foreign": 0.0}
        return made

    def make(self, name: str, recipe: dict[str, Any], verb: str = "distill") -> Path:
        """The DMM file of a recipe; one that was interrupted goes on."""
        out, path = self.path / f"{name}.safetensors", self.path / f"{name}.yaml"
        if not out.exists():
            path.write_text(yaml.safe_dump({**recipe, "out": str(out)}), encoding="utf-8")
            dmm(verb, path, *(["--resume"] if unfinished(load_recipe(path)) else []))
        return out

    def evaluate(self, name: str, student: Path, teachers: Sequence[Path], *more: object) -> dict[str, Any]:
        """report.json of a student beside its teachers."""
        out = self.path / f"{name}.evaluation"
        dmm("evaluate", student, "--teacher", *teachers, "--prompts", self.path / "held-out.txt", "--images", IMAGES,
            "--device", self.device, "--out", out, *more)  # fmt: skip
        return json.loads((out / "report.json").read_text(encoding="utf-8"))


def about(report: dict[str, Any]) -> dict[str, Any]:
    """What a line of results says of how it was measured."""
    told = {key: report[key] for key in ("extractor", "device", "commit")}
    return told | {"torch": torch.__version__, "date": str(date.today())}
