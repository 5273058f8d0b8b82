"""A longer merge of the mini family: score alone and score + feature, average start and base start, several seeds.

Every run is skipped if its line is in the table already, so the command can be stopped and called again; a run writes
the gap closed and the ratio at several points of its way.

    python benchmarks/mini_merge.py --out benchmarks/results/mini_merge.jsonl --steps 6000 --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dmm_core.measure import commit, device_name, measure
from dmm_core.recipe import recipe_from_dict
from dmm_core.run import bench_of, prepare
from mini_family import demo, family

VARIANTS = {"score": 0.0, "score + feature": 0.01}
POINTS = 6  # measurements along a run


def one_run(folder: Path, steps: int, seed: int, start: str, feature: float) -> list[dict]:
    """Train once; returns a measurement at each of ``POINTS`` moments, the last one at the end."""
    base, *teachers = family.unpack(folder / "teachers")
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(demo.training_prompts()) + "\n", encoding="utf-8")
    data = demo.recipe_of(folder, teachers, base, prompts, steps)
    data["out"] = str(folder / f"{start}-{feature}-{seed}.safetensors")
    data["train"] |= {"seed": seed, "start": start, "feature": feature, "save_every": 0}
    data["data"]["latents_per_teacher"] = 1240
    merge = prepare(recipe_from_dict(data))
    measured = []
    for result in merge.timed_steps():
        if result.step % max(1, steps // POINTS) == 0:
            bench = bench_of(merge, demo.held_out_prompts(), demo.SAMPLER_STEPS, demo.CFG_SCALE)
            report = measure(bench, time.monotonic() - merge.seconds, result.samples_seen).report
            merge.distillation.teachers.embed(merge.distillation.data.prompts)
            merge.distillation.student.train()
            measured.append(
                {key: report[key] for key in ("samples_seen", "ratio", "ratio_error", "gap_closed", "weight_average")}
            )
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("build/mini_merge"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.folder.mkdir(parents=True, exist_ok=True)
    lines = args.out.read_text(encoding="utf-8").splitlines() if args.out.exists() else []
    key = ("steps", "seed", "start", "losses")
    done = {tuple(json.loads(line)[name] for name in key) for line in lines}
    for seed, start, (losses, feature) in itertools.product(args.seeds, ("average", "base"), VARIANTS.items()):
        if (args.steps, seed, start, losses) in done:
            continue
        measured = one_run(args.folder.absolute(), args.steps, seed, start, feature)
        row = dict(zip(key, (args.steps, seed, start, losses), strict=True))
        about = {
            "device": device_name(torch.device("cpu")),
            "torch": torch.__version__,
            "commit": commit(),
            "date": str(date.today()),
        }
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | about | {"points": measured}) + "\n")
        print(row, measured[-1]["gap_closed"]["mean"], measured[-1]["ratio"], flush=True)


if __name__ == "__main__":
    main()
