"""Kill a merge at random moments and start it again, until it has been killed so often; is the end still exact?

A merge of tiny random models runs once without interruption, then as jobs whose process is killed (SIGKILL) at random
moments: while it starts, draws its data, trains, or saves. Every step is saved. After each kill the saved state must be
whole and never older than before; the finished file must equal the uninterrupted one in every bit.

    python benchmarks/kill_resume.py --times 100
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safetensors import safe_open

from dmm_core import jobs
from dmm_core.environment import Training
from dmm_core.recipe import Recipe, recipe_from_dict
from tests.unit import tiny

STEPS_A_KILL = 3  # so that the merge is not finished before the last kill


def recipe(out: Path, teachers: list[Path], steps: int) -> Recipe:
    return recipe_from_dict(
        {
            "teachers": list(map(str, teachers)),
            "out": str(out),
            "data": {"latents_per_teacher": 4, "steps": 2, "cfg_scale": 1.0, "size": 64},
            "train": {"steps": steps, "batch": 1, "warmup": 0, "lr": 1e-3, "device": "cpu", "save_every": 1,
                      "ema": 0.9},
        }
    )  # fmt: skip


def digest(path: Path) -> str:
    """Of all tensors' names and bytes."""
    found = hashlib.sha256()
    with safe_open(str(path), "pt") as file:
        for key in sorted(file.keys()):
            found.update(key.encode() + file.get_tensor(key).numpy().tobytes())
    return found.hexdigest()


def saved_step(made: Recipe) -> int:
    """The step of the saved state, 0 where there is none. Raises if the file is torn."""
    state = made.out.with_name(made.out.stem + ".work") / "state.safetensors"
    if not state.exists():
        return 0
    with safe_open(str(state), "pt") as file:
        for key in file.keys():  # noqa: SIM118
            file.get_tensor(key)
        return int(json.loads(file.metadata()["dmm.resume"])["step"])


def run_until(job: jobs.Job, moment: str, wait: float) -> bool:
    """Let a job reach a moment and ``wait`` seconds more, then kill it. False if it was done before."""
    while moment != "start":
        event = job.poll(60)
        if event is None or event.kind in jobs.LAST:
            break
        if event.kind == moment or (moment == "progress" and event.kind == "saved"):
            break
    time.sleep(wait)
    job.process.kill()
    job.process.wait()
    while job.last is None:
        job.poll(1)
    return job.last.kind == "failed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, killed, here = random.Random(args.seed), Counter[str](), Training(Path(sys.executable))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dmm ü ") as name:
        folder = Path(name)
        teachers = [tiny.write_tiny(folder / f"{seed}.safetensors", seed=seed) for seed in (0, 50)]
        steps = 10 + STEPS_A_KILL * args.times
        whole, broken = (recipe(folder / kind / "out.safetensors", teachers, steps) for kind in ("whole", "broken"))
        for _ in jobs.start(whole, preview_seconds=0, training=here).events():
            pass
        last = 0
        while sum(killed.values()) < args.times and not broken.out.exists():
            moment, wait = rng.choice([("start", 3.0), ("stage", 1.0), ("progress", 0.5), ("saved", 0.2)])
            job = jobs.start(broken, preview_seconds=0, training=here)
            if run_until(job, moment, rng.uniform(0, wait)):
                killed[moment] += 1
            step = saved_step(broken)
            assert step >= last or broken.out.exists(), f"the saved state went back from step {last} to {step}"
            last = step
            print(f"killed {sum(killed.values())} of {args.times}, saved step {step} of {steps}", file=sys.stderr)
        if not broken.out.exists():
            for _ in jobs.start(broken, preview_seconds=0, training=here).events():
                pass
        told: dict[str, Any] = {"killed": sum(killed.values()), "at": dict(killed), "steps": steps}
        told |= {"exact": digest(whole.out) == digest(broken.out), "seconds": round(time.monotonic() - began)}
    print(json.dumps(told))
    return 0 if told["exact"] and told["killed"] >= args.times else 1


if __name__ == "__main__":
    sys.exit(main())
