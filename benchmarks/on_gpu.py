"""Everything that only a GPU can tell, in one go and a given time, each part in its own process.

Parts that are not timed run beside each other first, then those that are, one after the other, the most wanted first.

    python benchmarks/on_gpu.py --out benchmarks/results/gpu --minutes 9
    python benchmarks/on_gpu.py --out benchmarks/results/gpu --minutes 9      # again: what the first call did not reach
    python benchmarks/on_gpu.py --out /tmp/gpu --device cpu --minutes 5       # try it without one, on the mini family

A part writes NAME.json (tests: NAME.xml) and NAME.log there; one that is there is not run again. A part is begun only
if its usual length fits into the rest of the time, and stopped at twice that length or when the time is over.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Part:
    """``line``: a script of this folder and its arguments, or pytest's; ``seconds``: about what it takes on an H200."""

    name: str
    seconds: int
    line: tuple[str, ...]

    @property
    def tests(self) -> bool:
        return self.line[0] == "pytest"

    def found(self, out: Path) -> Path:
        """What it has written when it is done."""
        return out / (self.name + (".xml" if self.tests else ".json"))

    def command(self, out: Path, device: str) -> list[str]:
        script, *arguments = self.line
        if self.tests:
            return [sys.executable, "-m", "pytest", *arguments, f"--junitxml={self.found(out)}"]
        script = str(ROOT / "benchmarks" / script)
        return [sys.executable, script, *arguments, "--device", device, "--out", str(self.found(out))]


SIDE_BY_SIDE = ("-n", "6") if importlib.util.find_spec("xdist") else ()
FAST = "two teachers a step"
ROTATION = tuple(f"{kept}, a pass a teacher" for kept in ("all resident", "resident 1", "resident 2"))
AHEAD = tuple(f"{FAST}, resident {places}" for places in (0, 3))
STREAMED = "no teacher stays"
SD15, SDXL = ("--batch", "2", "--steps", "5"), ("--family", "sdxl", "--steps", "3")
SPEEDS = ("--parts", "speeds", "--only", "plain")


def few_rows(*more: str) -> tuple[str, ...]:
    """As many teachers as rows."""
    return ("train_step.py", *more, "--batch", "1", "--teachers")


BESIDE = (
    Part("tests", 100, ("pytest", "-q", *SIDE_BY_SIDE, "-m", "gpu or not gpu", *(f"tests/unit/test_{name}.py"
                        for name in ("gpu", "fused", "at_once")))),
    Part("sd15-memory", 60, ("train_step.py", *SD15, "--parts", "memory")),
    Part("sdxl-memory", 130, ("train_step.py", *SDXL, "--batch", "1", "--parts", "memory", "--only",
                             f"full, 8-bit, {STREAMED}", f"LoRA, rank 32, 8-bit, {STREAMED}", "LoRA, rank 32, 8-bit")),
    Part("planner", 150, ("plan_peak.py", "--teachers", "2", "--only", "LoRA")),
)  # fmt: skip
TIMED = (
    Part("sd15-16-rows", 90, ("train_step.py", *SD15, *SPEEDS, *AHEAD, FAST)),
    Part("sdxl-8-rows", 75, ("train_step.py", *SDXL, "--batch", "2", *SPEEDS, FAST)),
    Part("sd15-4-rows", 30, (*few_rows("--steps", "5"), "4", *SPEEDS, FAST)),
    Part("sd15-2-rows", 30, (*few_rows("--steps", "5"), "2", *SPEEDS, "all resident")),
    Part("sdxl-2-rows", 45, (*few_rows(*SDXL), "2", *SPEEDS, "all resident")),
    Part("sd15-rotation", 60, ("train_step.py", "--batch", "4", "--steps", "3", *SPEEDS[:-1], *ROTATION)),
    Part("sd15-adversarial", 60, ("train_step.py", *SD15, *SPEEDS[:-1], FAST, f"{FAST}, adversarial",
                              f"{FAST}, blockwise")),
    Part("sd15-profile", 40, ("train_step.py", *SD15, "--parts", "profile", "--only", FAST)),
    *(Part(f"sd15-{8 * batch}-rows", 50, ("train_step.py", "--batch", str(batch), "--steps", "5", *SPEEDS, FAST))
      for batch in (1, 3)),
    Part("sd15-compiled", 300, ("train_step.py", *SD15, "--compile", *SPEEDS, FAST, f"{FAST}, compiled")),
)  # fmt: skip


class Run:
    """A part that works, until it is done or its time is over."""

    def __init__(self, part: Part, out: Path, device: str, left: float) -> None:
        self.part, self.out = part, out
        self.began, self.limit = time.monotonic(), min(left, 2 * part.seconds)
        with (out / f"{part.name}.log").open("wb") as log:
            line = part.command(out, device)
            self.process = subprocess.Popen(
                line, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self) -> None:
        """Tells what became of it."""
        try:
            code = self.process.wait(max(0, self.began + self.limit - time.monotonic()))
            told = "done" if code == 0 else f"failed ({code}), see {self.part.name}.log"
        except subprocess.TimeoutExpired:
            told = f"stopped; {self.part.name}.log has what it told until then"
        finally:
            self.end()
        print(f"{self.part.name}: {told}, {time.monotonic() - self.began:.0f} s", flush=True)

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # its children too, which hold the device's memory
            self.process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--only", nargs="+", choices=[part.name for part in (*BESIDE, *TIMED)])
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    end = time.monotonic() + 60 * args.minutes
    for group in (BESIDE, *((part,) for part in TIMED)):
        runs: list[Run] = []
        try:
            for part in group:
                if (args.only and part.name not in args.only) or part.found(args.out).exists():
                    continue
                if (left := end - time.monotonic()) < part.seconds:
                    print(f"{part.name}: no time left for it", flush=True)
                else:
                    runs.append(Run(part, args.out, args.device, left))
            for run in runs:
                run.wait()
        finally:
            for run in runs:
                run.end()
    return 0 if all(part.found(args.out).exists() for part in (*BESIDE, *TIMED)) else 1


if __name__ == "__main__":
    sys.exit(main())
