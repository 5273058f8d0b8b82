r"""Styles added later against all at once, with and without the earlier student as a teacher of its own styles.

The demo's four teachers and then the two that were held back; four at once; three and then one; two and then two. First
merges are what the recipe of the demo says. ``dmm distill`` and ``dmm extend`` make them, ``dmm evaluate --before``
measures the end. What lies in the folder already is not made again: stop it and call it again.

    python benchmarks/add_styles.py --out benchmarks/results/add_styles.jsonl
    python benchmarks/add_styles.py --out benchmarks/results/add_styles.jsonl --show
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rows
from merges import LONG, Folder, about, foreign

from dmm_core.extension import teachers_of_step
from dmm_core.recipe import TrainSpec
from mini_family import demo, family


@dataclass(frozen=True)
class Case:
    """Teachers of the first merge, and those added to it in so many steps, with so many batches of old styles each."""

    first: tuple[str, ...]
    later: tuple[str, ...] = ()
    regularize: int | None = None  # as the recipe's
    steps: int = 1200
    adversarial: float = 0.0  # as the recipe's

    @property
    def name(self) -> str:
        """Of its student's file."""
        between = ({None: "with", 0: "without"}.get(self.regularize, f"with{self.regularize}"),) if self.later else ()
        longer = (str(self.steps),) if self.later and self.steps != Case.steps else ()
        against = ("adversarial",) if self.adversarial else ()
        return "-".join((*self.first, *between, *self.later, *longer, *against))


FOUR = family.TEACHERS
CASES = (
    *(Case(FOUR, family.LATER[::-1], steps=steps, adversarial=0.01) for steps in (LONG, 10000)),
    *(Case(FOUR, family.LATER[::-1], steps=steps) for steps in (4000, 8000, 12000)),
    Case(FOUR),
    *(Case(FOUR[:3], FOUR[3:], regularize) for regularize in (None, 0, 1, 3)),
    *(Case(FOUR[:2], FOUR[2:], regularize) for regularize in (None, 0)),
    Case(FOUR[:2], FOUR[2:], steps=2400),
)


def student(folder: Folder, case: Case) -> Path:
    """The case's DMM file."""
    if not case.later:
        return folder.make(case.name, folder.recipe([folder.files[name] for name in case.first], demo.MOST))
    recipe = folder.recipe([folder.files[name] for name in case.later], case.steps)
    del recipe["base"]
    recipe["student"] = str(student(folder, Case(case.first)))
    if case.steps < LONG:
        recipe["data"] |= {"latents_per_teacher": case.steps // 2, "prompts": str(folder.prompts(case.steps // 2))}
    recipe["train"] |= {"regularize": case.regularize, "adversarial": case.adversarial}
    return folder.make(case.name, recipe, "extend")


def measure(folder: Folder, case: Case) -> dict[str, Any]:
    """report.json of the case's student, ``before`` being what the first merge drew."""
    before = ["--before", student(folder, Case(case.first))] if case.later else []
    teachers = [folder.files[name] for name in (*case.first, *case.later)]
    return folder.evaluate(case.name, student(folder, case), teachers, *before)


def key_of(case: Case) -> dict[str, Any]:
    steps = [demo.MOST, *([case.steps] if case.later else [])]
    return {"first": list(case.first), "later": list(case.later), "regularize": case.regularize, "steps": steps,
            "foreign": foreign(case.steps), "adversarial": case.adversarial or None}  # fmt: skip


def row_of(case: Case, report: dict[str, Any]) -> dict[str, Any]:
    keys = ("style", "student", "reference", "ratio", "ratio_error", "before")
    return key_of(case) | {
        "styles": [{key: row[key] for key in keys} for row in report["per_style"]],
        "gap_closed": report["gap_closed"]["per_style"], "separation": report["separation"]["student"],
        "same_seed": report["same_seed"],
        **about(report),
    }  # fmt: skip


def table(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Markdown: distance of a style from its teacher over the teacher's own, and what became of the old styles."""
    names = [*FOUR, *family.LATER[::-1]]
    before = " | steps | old styles' batches in each | "
    yield "|" + before + " | ".join(names) + " | old styles against before | new styles, ratio |"
    yield "|---" * (len(names) + 5) + "|"
    for row in lines:
        by_name = {style["style"]: style for style in row["styles"]}
        cells = [f"{by_name[name]['ratio']:.2f}" if name in by_name else "" for name in names]
        old, new = ([by_name[name] for name in row[part]] for part in ("first", "later"))
        total = lambda part, key: sum(style[key] for style in part)  # noqa: E731
        changed = f"{total(old, 'student') / total(old, 'before') - 1:+.1%}" if new else ""
        ratio = f"{total(new, 'student') / total(new, 'reference'):.3f}" if new else ""
        what = " + ".join(str(len(part)) for part in (old, new) if part)
        what += f", foreign {row['foreign']:g}" if row["foreign"] else ""
        what += ", adversarial" if row.get("adversarial") else ""
        asked = teachers_of_step(TrainSpec(regularize=row["regularize"]), 0, len(by_name), len(old))
        kept = len(asked) - len(new) if new else ""
        steps = f"{row['steps'][-1]:,}"
        yield f"| {what} | {steps} | {kept} | " + " | ".join(cells) + f" | {changed} | {ratio} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("build/add_styles"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="e.g. ink-clay-blueprint-without-neon")
    parser.add_argument("--show", action="store_true", help="print the table of what was measured; nothing is trained")
    args = parser.parse_args()
    if args.show:
        print("\n".join(table(rows.read(args.out))))
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    folder = Folder(args.folder, args.device)
    for case in (case for case in CASES if not args.only or case.name in args.only):
        if not rows.has(args.out, key_of(case)):
            rows.append(args.out, row_of(case, measure(folder, case)))


if __name__ == "__main__":
    main()
