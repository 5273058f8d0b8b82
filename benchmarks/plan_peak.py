"""Whether the planner is right: the peak of the device's memory that it predicts, and the one that the merge then has.

    python benchmarks/plan_peak.py --out FILE.json         # a GPU: full-size files of random weights, with VAE and CLIP
    python benchmarks/plan_peak.py --family sdxl --teachers 2
    python benchmarks/plan_peak.py --device cpu            # the mini family

Every setting is planned (``trial.fit``: a few steps in a process of its own) and then run in another fresh process,
from the teachers' latents to the saved file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.subjects import random_whole
from dmm_core.errors import BadInput
from dmm_core.measure import commit, device_name
from dmm_core.memory import peak_resident_bytes
from dmm_core.plan import choose_device, plan
from dmm_core.recipe import Recipe, recipe_from_dict
from dmm_core.run import prepare
from dmm_core.trial import fit

BATCH = 4
SETTINGS: dict[str, dict[str, Any]] = {
    "preset preview": {},
    "full, 8-bit": {"weights": "bf16", "optimizer": "adamw8bit", "fused_backward": True, "checkpointing": True,
                    "resident": 1, "teachers_per_step": 1, "batch": 1},
    "LoRA": {"student": "lora", "weights": "bf16", "checkpointing": True, "resident": 1, "micro": 1, "batch": 1},
}  # fmt: skip


def recipe_of(args: argparse.Namespace, files: list[Path], folder: Path, train: dict[str, Any]) -> Recipe:
    return recipe_from_dict({
        "teachers": [{"path": str(path), "name": f"style {i}"} for i, path in enumerate(files)],
        "out": str(folder / "merged.safetensors"), "preset": "preview",
        "data": {"latents_per_teacher": 16, "steps": 2, "size": args.pixels},
        "train": {"steps": args.steps, "save_every": 0, "device": args.device, **train},
    })  # fmt: skip


def real(recipe: Recipe, answer: Any) -> None:
    """Run the whole merge and tell its peak, bytes, and the seconds of its last steps."""
    merge = prepare(recipe)
    times = []
    for result in merge.timed_steps():
        assert result.loss > 0  # reading it waits for the device
        times.append(time.monotonic())
    merge.save()
    cuda = merge.distillation.device.type == "cuda"
    peak = torch.cuda.max_memory_reserved() if cuda else peak_resident_bytes()
    half = len(times) // 2
    answer.send((peak, (times[-1] - times[half]) / (len(times) - 1 - half)))


def compare(recipe: Recipe) -> dict[str, Any]:
    """Plan a recipe and run what was planned."""
    told = plan(recipe)
    try:
        found = fit(recipe, told.device, told.unet_parameters, note=lambda text: print(" ", text, file=sys.stderr))
    except BadInput as error:  # bitsandbytes is not everywhere
        return {"fits": False, "why": str(error)}
    if found is None:
        return {"fits": False, "why": "out of memory"}
    told = plan(recipe, found, tried=True)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=real, args=(found.recipe, theirs))
    child.start()
    theirs.close()
    peak, seconds = ours.recv()
    child.join()
    return {"fits": True, "changes": found.changes, "predicted": told.peak_bytes, "real": peak,
            "off": told.peak_bytes / peak - 1,
            "seconds_per_step": {"predicted": told.seconds_per_step, "real": seconds}}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--family", choices=["sd15", "sdxl"], default="sd15")
    parser.add_argument("--teachers", type=int, default=3)
    parser.add_argument("--pixels", type=int)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--folder", type=Path, help="where the models are made and kept")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    args.device = choose_device(args.device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if args.device == "cpu":
            from mini_family.family import TEACHERS, unpack

            files = unpack(folder, TEACHERS[: args.teachers])[1:]
        else:
            names = [folder / f"whole {args.family} {i}.safetensors" for i in range(args.teachers)]
            files = [random_whole(path, args.family, i, torch.device(args.device)) for i, path in enumerate(names)]
        found: dict[str, Any] = {
            "device": device_name(torch.device(args.device)), "torch": torch.__version__, "commit": commit(),
            "date": str(date.today()), "family": args.family, "teachers": args.teachers, "pixels": args.pixels,
        }  # fmt: skip
        found["settings"] = {}
        for name in args.only:
            print(name, file=sys.stderr)
            found["settings"][name] = told = compare(recipe_of(args, files, Path(temporary), SETTINGS[name]))
            if told["fits"]:
                told_gib = f"predicted {told['predicted'] / 2**30:.2f} GiB, real {told['real'] / 2**30:.2f} GiB"
                print(f"  {told_gib}, {100 * told['off']:+.1f} %", file=sys.stderr)
            else:
                print(f"  {told['why']}", file=sys.stderr)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
