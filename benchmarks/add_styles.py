r"""Styles added later against all at once, with and without the earlier student as a teacher of its own styles.

The demo's four teachers and then the two that were held back; four at once; three and then one; two and then two. First
merges are what the recipe of the demo says. ``dmm distill`` and ``dmm extend`` make them, ``dmm evaluate --before``
measures the end. What lies in the folder already is not made again: stop it and call it again.

    python benchmarks/add_styles.py --out benchmarks/results/add_styles.jsonl
    python benchmarks/add_styles.py --out benchmarks/results/add_styles.jsonl --show
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rows

from dmm_core.recipe import load_recipe
from dmm_core.stages import unfinished
from mini_family import demo, family

ROOT = Path(demo.__file__).resolve().parents[1]
IMAGES = 96  # a style
FIRST_STEPS = 700
# Of adding to it: less haste than from an average, for the old styles are at their best already; and more pictures.
LATER = {"data": {"latents_per_teacher": 480, "cfg_scale": 2.0}, "train": {"lr": 5e-4, "snr_power": 0.25}}


@dataclass(frozen=True)
class Case:
    """Teachers of the first merge, and those added to it in so many steps."""

    first: tuple[str, ...]
    later: tuple[str, ...] = ()
    regularized: bool = True
    steps: int = 1200

    @property
    def name(self) -> str:
        """Of its student's file."""
        between = ("with" if self.regularized else "without",) if self.later else ()
        return "-".join((*self.first, *between, *self.later))


FOUR = family.TEACHERS
CASES = (
    Case(FOUR, family.LATER[::-1], steps=2400),
    Case(FOUR),
    *(Case(FOUR[:3], FOUR[3:], regularized) for regularized in (True, False)),
    *(Case(FOUR[:2], FOUR[2:], regularized) for regularized in (True, False)),
)


class Bench:
    """The folder that all cases share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = family.unpack(folder / "teachers", (*FOUR, *family.LATER))
        self.files = {path.stem: path for path in paths}
        (folder / "train.txt").write_text("\n".join(demo.training_prompts()) + "\n", encoding="utf-8")
        (folder / "held-out.txt").write_text("\n".join(demo.held_out_prompts()) + "\n", encoding="utf-8")

    def student(self, case: Case) -> Path:
        """The case's DMM file, made if it is not there."""
        out = self.folder / f"{case.name}.safetensors"
        if out.exists():
            return out
        teachers = [self.files[name] for name in case.later or case.first]
        steps = case.steps if case.later else FIRST_STEPS
        recipe = demo.recipe_of(self.folder, teachers, self.files["base"], self.folder / "train.txt", steps)
        recipe["out"] = str(out)
        recipe["train"]["processes"] = 1
        if case.later:
            del recipe["base"]
            recipe["student"] = str(self.student(Case(case.first)))
            recipe["data"] |= LATER["data"]
            recipe["train"] |= LATER["train"] | ({} if case.regularized else {"regularize": 0})
        path = self.folder / f"{case.name}.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        dmm("extend" if case.later else "distill", path, *(["--resume"] if unfinished(load_recipe(path)) else []))
        return out

    def measure(self, case: Case) -> dict[str, Any]:
        """report.json of the case's student, ``before`` being what the first merge drew."""
        out = self.folder / f"{case.name}.evaluation"
        teachers = [self.files[name] for name in (*case.first, *case.later)]
        before = ["--before", self.student(Case(case.first))] if case.later else []
        dmm("evaluate", self.student(case), "--teacher", *teachers, *before, "--prompts", self.folder / "held-out.txt",
            "--images", IMAGES, "--out", out)  # fmt: skip
        return json.loads((out / "report.json").read_text(encoding="utf-8"))


def dmm(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "dmm_core", *map(str, words)], cwd=ROOT, check=True)


def key_of(case: Case) -> dict[str, Any]:
    steps = [FIRST_STEPS, *([case.steps] if case.later else [])]
    return {"first": list(case.first), "later": list(case.later), "regularized": case.regularized, "steps": steps}


def row_of(case: Case, report: dict[str, Any]) -> dict[str, Any]:
    keys = ("style", "student", "reference", "ratio", "ratio_error", "before")
    return key_of(case) | {
        "styles": [{key: row[key] for key in keys} for row in report["per_style"]],
        "gap_closed": report["gap_closed"]["per_style"], "separation": report["separation"]["student"],
        "extractor": report["extractor"], "device": report["device"], "torch": torch.__version__,
        "commit": report["commit"], "date": str(date.today()),
    }  # fmt: skip


def table(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Markdown: distance of a style from its teacher over the teacher's own, and what became of the old styles."""
    names = [*FOUR, *family.LATER[::-1]]
    yield "| | regularised | " + " | ".join(names) + " | old styles against before | new styles, ratio |"
    yield "|---" * (len(names) + 4) + "|"
    for row in lines:
        by_name = {style["style"]: style for style in row["styles"]}
        cells = [f"{by_name[name]['ratio']:.2f}" if name in by_name else "" for name in names]
        old, new = ([by_name[name] for name in row[part]] for part in ("first", "later"))
        total = lambda part, key: sum(style[key] for style in part)  # noqa: E731
        changed = f"{total(old, 'student') / total(old, 'before') - 1:+.1%}" if new else ""
        ratio = f"{total(new, 'student') / total(new, 'reference'):.3f}" if new else ""
        what = " + ".join(str(len(part)) for part in (old, new) if part)
        kept = ("yes" if row["regularized"] else "no") if new else ""
        yield f"| {what} | {kept} | " + " | ".join(cells) + f" | {changed} | {ratio} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("build/add_styles"))
    parser.add_argument("--only", nargs="+", metavar="CASE", help="e.g. ink-clay-blueprint-without-neon")
    parser.add_argument("--show", action="store_true", help="print the table of what was measured; nothing is trained")
    args = parser.parse_args()
    if args.show:
        print("\n".join(table(rows.read(args.out))))
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.folder.absolute())
    for case in (case for case in CASES if not args.only or case.name in args.only):
        if not rows.has(args.out, key_of(case)):
            rows.append(args.out, row_of(case, bench.measure(case)))


if __name__ == "__main__":
    main()
