"""What a style costs inside ComfyUI: 50 sampling steps with and without one, and Load DMM beside the stock loader.

Runs in ComfyUI's own Python, in pairs that take turns; prints medians and their ratio as one JSON object. The second
part writes a file of random SD1.5 weights (2 GB) and loads it in a process of its own each time, for its peak memory.

    eval "$(python tests/hosts/comfyui/prepare.py)"
    "$DMM_COMFYUI_PYTHON" benchmarks/comfyui_style.py steps --pairs 25
    "$DMM_COMFYUI_PYTHON" benchmarks/comfyui_style.py load --pairs 5
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def inside_comfyui() -> None:
    """Make ComfyUI's modules and the node pack importable, on CPU."""
    sys.path[:0] = [str(ROOT), os.environ["DMM_COMFYUI"]]
    tests = types.ModuleType("tests")  # some package of ComfyUI's requirements brings a folder of that name
    tests.__path__ = [str(ROOT / "tests")]
    sys.modules["tests"] = tests
    import comfy.cli_args

    comfy.cli_args.args.cpu = True


def ratio(first: list[float], second: list[float], names: tuple[str, str], unit: str) -> dict[str, Any]:
    a, b = statistics.median(first), statistics.median(second)
    pairs = [x / y for x, y in zip(first, second, strict=True)]
    return {names[0]: a, names[1]: b, "unit": unit, "ratio": a / b, "pairs": [min(pairs), max(pairs)]}


def time_steps(pairs: int) -> dict[str, Any]:
    inside_comfyui()
    import torch

    from comfyui_dmm import host, loading, values
    from tests.hosts.comfyui.inside_tools import encode, sample, write_dmm

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        model, clip, _, book = loading.load(write_dmm(Path(folder) / "mini.safetensors"))
        positive, negative = encode(clip, "a picture of a house"), encode(clip, "")
        styled = host.apply(model, values.named(book, book.names[0], 1.0))
        taken: dict[bool, list[float]] = {True: [], False: []}
        for k in range(pairs + 1):
            for live in (k % 2 == 0, k % 2 == 1):
                began = time.perf_counter()
                sample(styled if live else model, positive, negative, steps=50)
                if k:  # the first pair warms up
                    taken[live].append(1000 * (time.perf_counter() - began))
    return ratio(taken[True], taken[False], ("live", "none"), "ms for 50 steps")


def load_once(path: str, ours: bool) -> None:
    """What a child does: one load, then its seconds and peak memory on stdout."""
    inside_comfyui()
    import resource

    import comfy.sd
    import torch

    from comfyui_dmm import loading

    began = time.perf_counter()
    with torch.inference_mode():
        if ours:
            loading.load(Path(path))
        else:
            comfy.sd.load_checkpoint_guess_config(path)
    print(json.dumps([time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


def compare_loaders(pairs: int) -> dict[str, Any]:
    inside_comfyui()
    from benchmarks.full_size import SD15
    from tests.hosts.comfyui.inside_tools import random_unet, write_dmm

    taken: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.safetensors"
        write_dmm(path, {k: v.half() for k, v in random_unet(SD15).items()}, text_encoders=[])
        for k in range(pairs + 1):
            for ours in (k % 2 == 0, k % 2 == 1):
                command = [sys.executable, __file__, "one", str(path), "ours" if ours else "stock"]
                told = subprocess.run(command, check=True, capture_output=True, text=True)
                if k:  # the first pair fills the page cache
                    taken[ours].append(json.loads(told.stdout.strip().splitlines()[-1]))
    columns = {ours: list(zip(*rows, strict=True)) for ours, rows in taken.items()}
    names = ("Load DMM", "stock")
    return {
        "seconds": ratio(list(columns[True][0]), list(columns[False][0]), names, "s"),
        "peak": ratio(list(columns[True][1]), list(columns[False][1]), names, "MB"),
    }


def main() -> None:
    if sys.argv[1:2] == ["one"]:
        return load_once(sys.argv[2], sys.argv[3] == "ours")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("steps", "load"))
    parser.add_argument("--pairs", type=int, default=9)
    args = parser.parse_args()
    if "DMM_COMFYUI" not in os.environ:
        parser.error("set DMM_COMFYUI to ComfyUI's folder")
    print(json.dumps((time_steps if args.what == "steps" else compare_loaders)(args.pairs), indent=1))


if __name__ == "__main__":
    main()
