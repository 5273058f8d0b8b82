r"""A longer merge of the mini family: the paper's losses and stages, average start and base start, several seeds.

A run writes the gap closed and the ratio at several points of its way. The command can be stopped and called again: a
run whose line is in the table already is skipped, and a broken off one goes on where it last saved. Calls with other
seeds may run beside each other.

    python benchmarks/mini_merge.py --out benchmarks/results/mini_merge.jsonl --steps 6000 --seeds 0 1 2
    python benchmarks/mini_merge.py --out benchmarks/results/settings.jsonl --steps 700 --gap-only --seeds 0 \
        --start average --losses score --set train.lr=0.0005
    python benchmarks/mini_merge.py --out benchmarks/results/few_samples.jsonl --steps 20000 --seeds 0 --start base \
        --losses "score + feature" --drawings build/mini --plain --set train.lr=0.00025 train.snr_power=0.0
    python benchmarks/mini_merge.py --out benchmarks/results/mini_merge.jsonl --show docs/mini_merge.png
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rows
from drawings import drawn_latents

from dmm_core.measure import SEEDS_B, Compared, commit, device_name, draw_compared, measure, probe_gap
from dmm_core.recipe import Recipe, recipe_from_dict, work_folder
from dmm_core.run import Merge, bench_of, prepare
from dmm_core.stages import unfinished
from mini_family import demo, family
from mini_family.draw import STYLES

LOSSES: dict[str, dict[str, Any]] = {  # with the paper's λ_feat and λ_adv
    "score": {"feature": 0.0, "adversarial": 0.0},
    "score + feature": {"feature": 0.001, "adversarial": 0.0},
    "score + feature + adversarial": {"feature": 0.001, "adversarial": 0.01},
}
SYNTHESISED = " + synthesised"  # behind one of them: the paper's last stage too, a tenth of the steps
KEY = ("steps", "seed", "start", "losses", "changes")
LATENTS = 1240  # a teacher
SAVE_EVERY = 500  # steps
KEPT = ("samples_seen", "ratio", "ratio_error", "gap_closed", "weight_average", "same_seed")
Changes = Sequence[tuple[str, str, Any]]  # section of the recipe, key, value


class Runs:
    """All runs of one call; what does not depend on the student is drawn once."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.steps, self.points = folder, args.steps, args.points
        self.changes, self.finish = args.changes, args.finish
        self.gap_only, self.invented = args.gap_only, args.invented
        self.drawings, self.looks, self.plain = args.drawings, args.looks, args.plain
        self.compared: Compared | None = None
        self.held_out: dict[str, Tensor] = {}

    def prepare(self, seed: int, start: str, losses: str) -> Merge:
        """A run of these, where it was broken off if it was."""
        base, *teachers = family.unpack(self.folder / "teachers")
        prompts = self.folder / "prompts.txt"
        prompts.write_text("\n".join(demo.training_prompts(self.invented)) + "\n", encoding="utf-8")
        data = demo.recipe_of(self.folder, teachers, base, prompts, self.steps)
        data["out"] = str(self.folder / f"{start}-{losses.replace(' ', '')}-{seed}-{self.steps}.safetensors")
        data["train"] |= {"seed": seed, "start": start, "save_every": SAVE_EVERY, "processes": 1}
        data["train"] |= {"mixed": 0.0, "blockwise": 0.0, "unshrink": False} | LOSSES[losses.removesuffix(SYNTHESISED)]
        data["data"] |= {"latents_per_teacher": LATENTS, "foreign": 0.0}
        for section, key, value in self.changes:
            data[section][key] = value
        drawn = "-".join(str(data["data"][key]) for key in ("latents_per_teacher", "cfg_scale", "steps"))
        drawn += f"-{self.invented}"
        if losses.endswith(SYNTHESISED):  # other pictures than before
            again = {"data": {**data["data"], "latents_per_teacher": LATENTS // 4}, "train": {"seed": seed + 1}}
            data["stages"] = ["distil", {"name": "synthesised", **again}]
        elif self.finish:  # the same pictures again
            last = {key: value for _, key, value in self.finish}
            rest = {"steps": self.steps - last["steps"]}
            data["stages"] = [{"name": "distil", "train": rest}, {"name": "distil", "train": last}]
        latents = self.folder / f"latents-{seed}-{drawn}.safetensors"
        if self.drawings:
            latents = self.folder / f"latents-{'-'.join(self.looks)}{'-plain' * self.plain}.safetensors"
            drawn_latents(self.drawings, base, self.looks, latents, not self.plain)
        elif not latents.exists():
            merge = prepare(recipe_from_dict({key: value for key, value in data.items() if key != "stages"}))
            (work_folder(merge.recipe) / "latents.safetensors").replace(latents)
        data["data"] |= {"kind": "cache", "path": str(latents)}
        recipe = recipe_from_dict(data)
        kept = self.kept_of(recipe)
        if unfinished(recipe) and rows.read(kept)[:1] == [data]:
            return prepare(recipe, resume=True)
        shutil.rmtree(work_folder(recipe), ignore_errors=True)  # of a run with other settings
        kept.unlink(missing_ok=True)
        rows.append(kept, data)
        return prepare(recipe)

    @staticmethod
    def kept_of(recipe: Recipe) -> Path:
        """What a run is, and the points that it has measured: for one that is broken off."""
        return Path(recipe.out).with_suffix(".points.jsonl")

    def run(self, seed: int, start: str, losses: str) -> list[dict[str, Any]]:
        """Train once; returns a measurement at each point, the last one at the end."""
        merge = self.prepare(seed, start, losses)
        kept = self.kept_of(merge.recipe)
        reached, spent = merge.distillation.samples_seen, 0.0
        before = {point["samples_seen"]: point for point in rows.read(kept)[1:]}
        measured = [point for samples, point in before.items() if samples <= reached]
        for result in merge.timed_steps():
            if result.step % max(1, self.steps // self.points) == 0 or result.step == merge.total_steps:
                began = time.monotonic()
                if result.step == merge.total_steps:
                    merge.finish()
                measured.append(self.measure(merge, result.samples_seen))
                measured[-1] |= {"share": merge.share} if merge.share else {}
                rows.append(kept, measured[-1])
                spent += time.monotonic() - began
                told = "" if self.gap_only else f"ratio {measured[-1]['ratio']:.3f}, "
                print(
                    f"  {result.samples_seen} samples: {told}gap {measured[-1]['gap_closed']['mean']:.2%}", flush=True
                )
        if not reached:  # all in one sitting
            measured[-1]["train_seconds"] = round(merge.seconds - spent, 1)
        merge.save()
        kept.unlink()
        return measured

    def measure(self, merge: Merge, samples: int) -> dict[str, Any]:
        bench = bench_of(merge, demo.held_out_prompts(), demo.SAMPLER_STEPS, demo.CFG_SCALE)
        if self.gap_only:
            self.held_out = self.held_out or {n: bench.of_teacher(i, SEEDS_B) for i, n in enumerate(bench.names)}
            report = {"samples_seen": samples, "gap_closed": probe_gap(bench, self.held_out, repeats=3)}
        else:
            self.compared = self.compared or draw_compared(bench)
            report = measure(bench, time.monotonic(), samples, self.compared).report
        merge.distillation.teachers.embed(merge.distillation.data.prompts)
        merge.distillation.student.train()
        return {key: report[key] for key in KEPT if key in report}


def change(text: str) -> tuple[str, str, Any]:
    """``train.lr=0.001`` as a change of the recipe."""
    name, _, value = text.partition("=")
    section, _, key = name.partition(".")
    if section not in ("train", "data") or not (key and value):
        raise argparse.ArgumentTypeError(f"{text}: expected train.KEY=VALUE or data.KEY=VALUE")
    try:
        return section, key, json.loads(value)
    except json.JSONDecodeError:  # lora, bf16
        return section, key, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--points", type=int, default=5, help="measurements along a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--start", nargs="+", default=["average", "base"])
    known = [name + last for name, last in itertools.product(LOSSES, ("", SYNTHESISED))]
    parser.add_argument("--losses", nargs="+", default=known[::2], choices=known)
    parser.add_argument("--set", type=change, nargs="+", default=[], metavar="KEY=VALUE", dest="changes",
                        help="what to change in the recipe: train.lr=0.0005 data.cfg_scale=2")  # fmt: skip
    parser.add_argument("--finish", type=change, nargs="+", default=[], metavar="KEY=VALUE",
                        help="a second stage: train.steps=2000 (of --steps), train.snr_power=0 ...")  # fmt: skip
    parser.add_argument("--invented", type=int, default=demo.INVENTED, help="prompts of names that mean nothing")
    parser.add_argument("--drawings", type=Path, metavar="DIR",
                        help="learn from drawings of mini_family.draw, as the paper from JourneyDB")  # fmt: skip
    parser.add_argument("--looks", nargs="+", default=list(STYLES), choices=STYLES, help="of the drawings")
    parser.add_argument("--plain", action="store_true", help="captions of drawings do not name their look")
    parser.add_argument("--gap-only", action="store_true", help="draw no pictures to compare; three draws of noise")
    parser.add_argument("--folder", type=Path, default=Path("build/mini_merge"))
    parser.add_argument("--label", help="what the chart calls these runs; those of one label are one curve")
    parser.add_argument("--show", type=Path, help="draw what the table holds, and print it; nothing is trained")
    args = parser.parse_args()
    if args.finish and "steps" not in {key for _, key, _ in args.finish}:
        parser.error("--finish: expected train.steps=STEPS among its changes")
    if args.drawings and any(losses.endswith(SYNTHESISED) for losses in args.losses):
        parser.error("--drawings: the synthesised stage needs pictures that the teachers draw")
    if args.show:
        from mini_merge_chart import show

        show(rows.read(args.out), args.show)
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.folder.mkdir(parents=True, exist_ok=True)
    runs = Runs(args.folder.absolute(), args)
    told = [f"{section}.{key}={value}" for section, key, value in args.changes]
    told += [f"finish.{key}={value}" for _, key, value in args.finish]
    if args.drawings:
        told.append(f"drawings={'+'.join(args.looks)}{' plain' * args.plain}")
    elif args.invented != demo.INVENTED:
        told.append(f"invented={args.invented}")
    changes = " ".join(told)
    for seed, start, losses in itertools.product(args.seeds, args.start, args.losses):
        row = dict(zip(KEY, (args.steps, seed, start, losses, changes), strict=True))
        if rows.has(args.out, row):
            continue
        print(row, flush=True)
        points = runs.run(seed, start, losses)
        about = {
            "device": device_name(torch.device("cpu")),
            "torch": torch.__version__,
            "commit": commit(),
            "date": str(date.today()),
        } | ({"label": args.label} if args.label else {})
        made = [row | about | {"points": points}]
        if losses.endswith(SYNTHESISED):  # up to its last stage it was the run without it
            made.insert(0, made[0] | {"losses": losses.removesuffix(SYNTHESISED), "points": points[:-1]})
        rows.append(args.out, *made)


if __name__ == "__main__":
    main()
