r"""Merges of other kinds: LoRA files as teachers, SDXL's shape, and students for four and eight sampling steps.

LoRA files and SDXL checkpoints are trained first (minutes each; see ``mini_family/CREDITS.md``). What lies in the
folder already is not made again: stop it and call it again.

    python benchmarks/kinds.py --out benchmarks/results/kinds.jsonl --only lora --data build/mini
    python benchmarks/kinds.py --out benchmarks/results/kinds.jsonl --only sdxl --data build/mini-xl
    python benchmarks/kinds.py --out benchmarks/results/kinds.jsonl --only few-step
    python benchmarks/kinds.py --out benchmarks/results/kinds.jsonl --show
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rows
from merges import Folder, about, foreign

from mini_family import demo, family

STEPS = {"lora": 8000, "sdxl": 8000, "few-step": 2400}
FULL, FEW = 25, (8, 4)  # sampling steps


def lora(folder: Folder, args: argparse.Namespace, steps: int) -> Iterator[dict[str, Any]]:
    """Four LoRA files in kohya's names on the family's base."""
    files = [args.data / "models" / f"{name}-lora.safetensors" for name in family.TEACHERS]
    student = folder.make("lora", folder.recipe(files, steps))
    yield folder.evaluate("lora", student, files, "--base", folder.files["base"])


def sdxl(folder: Folder, args: argparse.Namespace, steps: int) -> Iterator[dict[str, Any]]:
    """Four teachers of SDXL's shape and their base."""
    out = folder.path / "sdxl"
    base, *files = [family.whole(args.data, name, out) for name in ("base", *family.TEACHERS)]
    recipe = folder.recipe(files, steps, base)
    recipe["train"]["adversarial"] = args.adversarial
    student = folder.make("sdxl", recipe)
    yield folder.evaluate("sdxl", student, files)


def few_step(folder: Folder, args: argparse.Namespace, steps: int) -> Iterator[dict[str, Any]]:
    """A student of the four teachers, and what becomes of it: drawn in 25 steps, in 8 and in 4."""
    files = [folder.files[name] for name in family.TEACHERS]
    first = args.student or folder.make("four", folder.recipe(files, demo.MOST))
    yield folder.evaluate(f"steps-{FULL}", first, files, "--steps", FULL)
    recipe = folder.recipe([], steps)
    del recipe["base"]
    recipe |= {"student": str(first)}
    recipe["train"] |= {"few_step": recipe["data"]["cfg_scale"], "snr_power": 0.0, "ema": 0.995}
    made = folder.make("few-step", recipe)
    for count in FEW:
        yield folder.evaluate(f"steps-{count}", made, files, "--steps", FULL, "--few-steps", count)


KINDS = {"lora": lora, "sdxl": sdxl, "few-step": few_step}


def table(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Markdown: a line a measurement."""
    names = family.TEACHERS
    yield "| | steps | foreign | " + " | ".join(names) + " | ratio | gap closed | picture by picture |"
    yield "|---" * (len(names) + 6) + "|"
    for row in lines:
        what = row["kind"] + (f", drawn in {row['sampling']}" if row["kind"] == "few-step" else "")
        what += ", adversarial" if row.get("adversarial") else ""
        cells = [f"{row['styles'][name]:.2f}" for name in names]
        gap = f"{row['gap_closed']:.1%}" if row["gap_closed"] is not None else ""
        ratio = f"{row['ratio']:.3f} ± {row['ratio_error']:.3f}"
        alike = row["same_seed"]["student"]
        told = " | ".join((*cells, ratio, gap, f"{alike['mean']:.3f} ± {alike['error']:.3f}"))
        yield f"| {what} | {row['steps']:,} | {row['foreign']:g} | {told} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("build/kinds"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", type=Path, default=Path("build/mini"), help="where mini_family.train wrote")
    parser.add_argument("--student", type=Path, help="of few-step: a DMM file of the four teachers that is there")
    parser.add_argument("--steps", type=int, help="of the merge")
    parser.add_argument("--adversarial", type=float, default=0.0, help="of sdxl: the recipe's train.adversarial")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--show", action="store_true", help="print the table of what was measured; nothing is trained")
    args = parser.parse_args()
    if args.show:
        print("\n".join(table(rows.read(args.out))))
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.data, args.student = args.data.absolute(), args.student and args.student.absolute()
    folder = Folder(args.folder, args.device)
    for kind in args.only:
        steps = args.steps or STEPS[kind]
        key = {"kind": kind, "steps": steps, "foreign": foreign(steps),
               "adversarial": args.adversarial or None}  # fmt: skip
        if rows.has(args.out, key):
            continue
        reports = KINDS[kind](folder, args, steps)
        rows.append(
            args.out, *(key | row_of(report, count) for report, count in zip(reports, (FULL, *FEW), strict=False))
        )


def row_of(report: dict[str, Any], sampling: int) -> dict[str, Any]:
    """``sampling``: steps of the student's sampler, which the kinds but few-step leave as it is."""
    return {
        "sampling": sampling, "ratio": report["ratio"], "ratio_error": report["ratio_error"], "fid_t": report["fid_t"],
        "gap_closed": report["gap_closed"]["mean"], "weight_average": report["weight_average"]["ratio"],
        "same_seed": report["same_seed"],
        "styles": {row["style"].removesuffix("-lora"): row["ratio"] for row in report["per_style"]},
        **about(report),
    }  # fmt: skip


if __name__ == "__main__":
    main()
