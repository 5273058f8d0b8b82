"""The trainer's step against the plain one (plain_step.py), in one run on one device.

    python benchmarks/train_step.py --out FILE.json     # a GPU: 8 full-size SD1.5 of random weights at 512 px
    python benchmarks/train_step.py --family sdxl       # a GPU: 4 full-size SDXL at 1024 px
    python benchmarks/train_step.py --device cpu        # the mini family
    python benchmarks/train_step.py --only plain "all resident, compiled" --parts speeds profile

Measures samples/s of both at equal rows a step, what rotation costs, the share of the measured matmul peak, and on CUDA
peak memory of a full and a LoRA student. What cannot run here (no memory, no compiler) is named, and the rest goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.plain_step import FEATURE_WEIGHT, PlainStep
from benchmarks.subjects import Subjects
from dmm_core.economy import is_out_of_memory
from dmm_core.measure import commit, device_name
from dmm_core.plan import DTYPES, choose_device, choose_precision
from dmm_core.presets import TRAIN
from dmm_core.recipe import TrainSpec

TOGETHER = 2  # teachers of a step that does not ask all of them
SMALL_FULL = {"weights": "bf16", "fused_backward": True, "checkpointing": True, "resident": 1, "teachers_per_step": 1}
SMALL_LORA = {"student": "lora", "weights": "bf16", "checkpointing": True, "resident": 1, "micro": 1, "rank": 64}
SMALL_LORA_XL = {**SMALL_LORA, "rank": 32, "optimizer": "adamw8bit"}


class Bench:
    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.device = args, torch.device(choose_device(args.device))
        count = args.teachers or (4 if args.family == "sdxl" else 8)
        self.subjects = Subjects.make(self.device, count, folder, args.pixels, args.family)
        self.teachers = len(self.subjects.checkpoints)
        self.batch = args.batch or (6 if self.device.type == "cpu" else 2 if args.family == "sdxl" else 4)
        self.half = choose_precision("auto", self.device.type)
        self.steps = args.steps or (10 if self.device.type == "cuda" else 3)
        self.failed: dict[str, str] = {}

    @property
    def rows(self) -> int:
        return self.batch * self.teachers

    def spec(self, **more: Any) -> TrainSpec:
        return TrainSpec(**{"batch": self.batch, "feature": FEATURE_WEIGHT, "warmup": 0, **more})

    def variants(self) -> dict[str, Callable[[], Any]]:
        """What is timed, by name: each call builds a thing with a ``step``."""
        s = self.subjects
        fast: dict[str, Any] = {"weights": "bf16"} if self.device.type == "cuda" else {}
        few: dict[str, Any] = {**fast, "teachers_per_step": TOGETHER, "batch": max(1, self.rows // TOGETHER)}
        pairs = {
            "fp32 weights, all resident": {},
            "all resident": fast,
            "all resident, no CUDA graphs": {**fast, "cuda_graphs": False},
            "resident 1, a pass a teacher": {**fast, "resident": 1, "micro": 1},
            "resident 2, a pass a teacher": {**fast, "resident": min(2, self.teachers), "micro": 1},
            "all resident, a pass a teacher": {**fast, "micro": 1},
        }
        if self.teachers > TOGETHER:  # as many rows of fewer teachers: each pass of a teacher fills the device better
            pairs["two teachers a step"] = few
            pairs |= {f"two teachers a step, resident {r}": {**few, "resident": r} for r in (0, 3, 4)}
            pairs["two teachers a step, adversarial"] = {**few, **TRAIN, "blockwise": 0.0}
            pairs["two teachers a step, blockwise"] = {**few, **TRAIN}  # the presets' first part
        if self.device.type != "cuda":
            del pairs["all resident, no CUDA graphs"]
        if self.args.family == "sdxl":
            pairs["all resident, two teachers a pass"] = {**fast, "micro": 2}
        if self.args.compile:
            pairs["all resident, compiled"] = {**fast, "compile": True}
            pairs["two teachers a step, compiled"] = {**few, "compile": True}
            pairs["resident 1, a pass a teacher, compiled"] = {**fast, "resident": 1, "micro": 1, "compile": True}
        made: dict[str, Callable[[], Any]] = {
            name: partial(
                PlainStep, s.unet, s.latents, s.context[:64], self.rows, DTYPES[self.half], self.device, sparing
            )
            for name, sparing in (("plain", False), ("plain, checkpointing", True))
        }
        made |= {name: partial(s.distillation, self.spec(**more)) for name, more in pairs.items()}
        return {name: make for name, make in made.items() if name in (self.args.only or made)}

    def seconds(self, thing: Any) -> list[float]:
        """Seconds a step, of several steps together on CUDA, of each on a CPU."""
        blocks, each = (3, self.steps) if self.device.type == "cuda" else (self.steps, 1)
        found = []
        for _ in range(blocks):
            self.wait()
            began = time.perf_counter()
            for _ in range(each):
                thing.step()
            self.wait()
            found.append((time.perf_counter() - began) / each)
        return found

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def clear(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def attempt(self, name: str, work: Callable[[], Any]) -> Any:
        """The work's result, or None where it failed, which the report then says."""
        self.clear()
        try:
            return work()
        except Exception as error:
            self.failed[name] = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {error}"[:300]
            if not is_out_of_memory(error):
                traceback.print_exc()
            return None

    # ------------------------------------------------------------ what is measured

    def speeds(self) -> dict[str, dict[str, float]]:
        """Median seconds a step and samples/s. On a CPU, whose load changes, the variants take turns round by round."""
        times: dict[str, list[float]] = {}
        rounds = 1 if self.device.type == "cuda" else self.args.rounds
        for _ in range(rounds):
            for name, make in self.variants().items():
                if name in self.failed or (name == "plain, checkpointing" and "plain" in times and times["plain"]):
                    continue

                def work(make: Callable[[], Any] = make) -> list[float]:
                    thing = make()
                    for _ in range(3 if self.device.type == "cuda" else 1):
                        thing.step()
                    return self.seconds(thing)

                found = self.attempt(name, work) or []
                times.setdefault(name, []).extend(found)
                print(name, [round(seconds, 4) for seconds in found] or self.failed.get(name), file=sys.stderr)
        medians = {name: statistics.median(found) for name, found in times.items() if found}
        return {name: {"seconds": s, "samples_per_second": self.rows / s} for name, s in medians.items()}

    def flops(self) -> float | None:
        """Floating-point operations of one step, counted (convolutions, matrix products, attention)."""

        def work() -> float:
            run = self.subjects.distillation(self.spec(cuda_graphs=False, micro=1))  # a replay hides what it does
            with FlopCounterMode(display=False) as counter:
                run.step()
            return float(counter.get_total_flops())

        return self.attempt("flops", work)

    def peak(self) -> float:
        """Operations a second of a large matrix product in the type that the training computes in."""
        size = 8192 if self.device.type == "cuda" else 1024
        a, b = (torch.randn(size, size, device=self.device, dtype=DTYPES[self.half]) for _ in range(2))
        best = float("inf")
        for _ in range(10):
            self.wait()
            began = time.perf_counter()
            a @ b
            self.wait()
            best = min(best, time.perf_counter() - began)
        return 2 * size**3 / best

    def memory(self) -> dict[str, Any]:
        """Peak VRAM of the smallest settings of a full and a LoRA student, one row a step and the batch; CUDA alone."""
        found: dict[str, Any] = {}
        if self.device.type != "cuda":
            return found
        self.clear()
        lora = {"LoRA, rank 64": SMALL_LORA}
        if self.args.family == "sdxl":
            lora["LoRA, rank 32, 8-bit"] = SMALL_LORA_XL
        settings: dict[str, dict[str, Any]] = {
            "full, 8-bit": {**SMALL_FULL, "optimizer": "adamw8bit"},
            "full": SMALL_FULL,
        }
        settings |= lora
        settings |= {f"{name}, no teacher stays": {**settings[name], "resident": 0} for name in ("full, 8-bit", *lora)}
        wanted = {name: more for name, more in settings.items() if name in (self.args.only or settings)}
        for name, more in wanted.items():
            for batch in dict.fromkeys((1, self.batch)):

                def work(more: dict[str, Any] = more, batch: int = batch) -> dict[str, int]:
                    left = torch.cuda.memory_allocated()  # of what came before: nothing, or the figures are wrong
                    run = self.subjects.distillation(self.spec(**{**more, "batch": batch}), teachers=2)
                    self.clear()
                    for _ in range(3):
                        if run.step().warnings:
                            raise torch.cuda.OutOfMemoryError("had to step down")
                    return {
                        "left before": left,
                        "allocated": torch.cuda.max_memory_allocated(),
                        "reserved": torch.cuda.max_memory_reserved(),
                    }

                told = f"{name}, {batch} rows"
                found[told] = self.attempt(told, work)
                print(told, gib(found[told]), file=sys.stderr)
        return found

    def profile(self) -> str | None:
        """Which operations a step's time on the device goes to, as torch's profiler tables them."""

        def work() -> str:
            from torch.profiler import ProfilerActivity, profile

            made = self.variants()
            thing = made[(self.args.only or list(made))[-1]]()
            for _ in range(3):
                thing.step()
            self.wait()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as told:
                for _ in range(2):
                    thing.step()
                self.wait()
            return told.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=70)

        return self.attempt("profile", work) if self.device.type == "cuda" else None

    def report(self) -> dict[str, Any]:
        wanted = self.args.parts
        speeds = self.speeds() if "speeds" in wanted else {}
        flops, peak = (self.flops(), self.peak()) if "speeds" in wanted else (None, 0.0)
        if "profile" in wanted:
            print(self.profile(), file=sys.stderr)
        plain = next((name for name in speeds if name.startswith("plain")), "plain")
        ours = [name for name in speeds if not name.startswith("plain")]
        fastest = min(ours, key=lambda n: speeds[n]["seconds"], default=None)
        ratio = lambda a, b: speeds[a]["seconds"] / speeds[b]["seconds"] if a in speeds and b in speeds else None  # noqa: E731
        stay = {"resident {}, a pass a teacher": "all resident, a pass a teacher",
                "two teachers a step, resident {}": "two teachers a step"}  # fmt: skip
        rotation = {
            (name := form.format(kept)): ratio(name, still) for form, still in stay.items() for kept in range(5)
        }
        return {
            "device": device_name(self.device), "torch": torch.__version__, "commit": commit(),
            "date": str(date.today()), "teachers": self.teachers, "rows": self.rows, "precision": self.half,
            "latent": list(self.subjects.latents.shape[1:]), "speeds": speeds, "fastest": fastest,
            "times_plain": ratio(plain, fastest) if fastest else None, "plain": plain,
            "rotation_cost": {name: cost - 1 for name, cost in rotation.items() if cost},
            "flops_a_step": flops, "matmul_peak": peak,
            "share_of_peak": flops / speeds[fastest]["seconds"] / peak if fastest and flops else None,
            "peak_vram": self.memory() if "memory" in wanted else {}, "failed": self.failed,
        }  # fmt: skip


def gib(sizes: dict[str, int] | None) -> str:
    return ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in sizes.items()) if sizes else "not measured"


def table(found: dict[str, Any]) -> str:
    number = lambda value, form: "not measured" if value is None else format(value, form)  # noqa: E731
    lines = [f"{found['device']}, torch {found['torch']}, {found['teachers']} teachers, {found['rows']} rows a step"]
    lines += [f"  {name:34} {s['seconds']:9.3f} s  {s['samples_per_second']:8.2f} samples/s"
              for name, s in found["speeds"].items()]  # fmt: skip
    lines.append(f"fastest against plain: {number(found['times_plain'], '.2f')} × ({found['fastest']})")
    lines += [f"rotation, {name}: {100 * cost:+.1f} %" for name, cost in found["rotation_cost"].items()]
    share = number(found["share_of_peak"], ".1%")
    lines.append(f"share of the matmul peak ({found['matmul_peak'] / 1e12:.2f} TFLOP/s): {share}")
    lines += [f"peak VRAM, {name}: {gib(sizes)}" for name, sizes in found["peak_vram"].items()]
    lines += [f"could not run {name}: {why}" for name, why in found["failed"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--family", choices=["sd15", "sdxl"], default="sd15", help="of the full-size models")
    parser.add_argument("--teachers", type=int, help="8, or 4 of SDXL; on a CPU at most the 6 of the mini family")
    parser.add_argument("--batch", type=int, help="rows a teacher and step")
    parser.add_argument("--pixels", type=int)
    parser.add_argument("--steps", type=int, help="timed steps of each variant")
    parser.add_argument("--rounds", type=int, default=3, help="on a CPU: how often the variants take turns")
    parser.add_argument("--parts", nargs="+", choices=["speeds", "memory", "profile"], default=["speeds", "memory"])
    told = "variants that are timed, of which the last is profiled, or settings whose memory is measured"
    parser.add_argument("--only", nargs="+", metavar="NAME", help=told)
    parser.add_argument("--compile", action="store_true", help="time a compiled trainer too")
    parser.add_argument("--folder", type=Path, help="where the models are made and kept")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = Bench(args, args.folder or Path(temporary)).report()
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))
    print(table(found), file=sys.stderr)


if __name__ == "__main__":
    main()
