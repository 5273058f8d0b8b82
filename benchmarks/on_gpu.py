"""Everything that only a GPU can tell, in one go and a given time: the most wanted first, each part in its own process.

    python benchmarks/on_gpu.py --out benchmarks/results/gpu --minutes 9
    python benchmarks/on_gpu.py --out benchmarks/results/gpu --minutes 9      # again: what the first call did not reach
    python benchmarks/on_gpu.py --out /tmp/gpu --device cpu --minutes 5       # try it without one, on the mini family

A part writes NAME.json and NAME.log there; one that is there is not run again. A part is begun only if its usual length
fits into the rest of the time, and stopped at twice that length or when the time is over.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Part:
    """``line``: a script of this folder and its arguments; ``seconds``: about what it takes on an H200."""

    name: str
    seconds: int
    line: tuple[str, ...]


FAST = "two teachers a step"
SPEEDS = ("plain", FAST, "two teachers a step, resident 3", "all resident", "resident 1, a pass a teacher",
          "all resident, a pass a teacher")  # fmt: skip
SD15, SDXL = ("--batch", "2", "--steps", "5"), ("--family", "sdxl", "--batch", "2", "--steps", "3")
PARTS = (
    Part("sdxl-speeds", 90, ("train_step.py", *SDXL, "--parts", "speeds", "--only", "plain", FAST)),
    Part("sd15-memory", 60, ("train_step.py", *SD15, "--parts", "memory")),
    Part("sd15-speeds", 100, ("train_step.py", *SD15, "--parts", "speeds", "--only", *SPEEDS)),
    Part("sdxl-memory", 80, ("train_step.py", *SDXL, "--parts", "memory")),
    Part("planner", 120, ("plan_peak.py", "--teachers", "2", "--only", "LoRA", "full, 8-bit")),
    *(Part(f"sd15-{8 * batch}-rows", 50, ("train_step.py", "--batch", str(batch), "--steps", "5", "--parts", "speeds",
                                          "--only", "plain", FAST)) for batch in (1, 3)),
    Part("sd15-profile", 40, ("train_step.py", *SD15, "--parts", "profile", "--only", FAST)),
    Part("sd15-compiled", 300, ("train_step.py", *SD15, "--parts", "speeds", "--compile", "--only", "plain", FAST,
                                "two teachers a step, compiled")),
)  # fmt: skip


def run(part: Part, out: Path, more: Sequence[str], limit: float) -> str:
    """What became of it."""
    script, *arguments = part.line
    line = [
        sys.executable,
        str(ROOT / "benchmarks" / script),
        *arguments,
        *more,
        "--out",
        str(out / f"{part.name}.json"),
    ]
    began = time.monotonic()
    with (out / f"{part.name}.log").open("wb") as log:
        process = subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s; {part.name}.log has what it told until then"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its children too, which hold the device's memory
                process.wait()
    told = "done" if code == 0 else f"failed ({code}), see {part.name}.log"
    return f"{told}, {time.monotonic() - began:.0f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS])
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    end = time.monotonic() + 60 * args.minutes
    for part in PARTS:
        if (args.only and part.name not in args.only) or (args.out / f"{part.name}.json").exists():
            continue
        left = end - time.monotonic()
        told = "no time left for it"
        if left >= part.seconds:
            told = run(part, args.out, ("--device", args.device), min(left, 2 * part.seconds))
        print(f"{part.name}: {told}", flush=True)
    return 0 if all((args.out / f"{part.name}.json").exists() for part in PARTS) else 1


if __name__ == "__main__":
    sys.exit(main())
