"""How long `dmm merge` takes for four full-size files, against copying the same bytes, and how much memory.

Makes four float16 files with the keys and shapes of SD1.5 (2.1 GB each; up to 17 GB of disk, deleted afterwards) and
runs, each in a fresh process and in an order that turns round by round:

    copy     read the four files, write the bytes of one: what a merge cannot do without; flushed to the disk
    copy4    copy all four files, each flushed to the disk
    ours     the mean of the four files, as `dmm merge` makes it: NaN check, hash in the metadata, flushed to the disk
    mecha    the same by sd-mecha (PyPI), with its defaults, flushed to the disk; where it can be imported

Seconds are of the work alone, without starting Python and importing torch. Before each run the files are dropped from
the system's cache (--cache warm reads them into it instead; only Linux can drop them).

    python benchmarks/weight_merge.py [--rounds 3] [--ways copy ours] [--cache warm] [--out FILE] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

BLOCK = 4 << 20
COUNT = 4


def make(path: Path, seed: int) -> None:
    """A file of random values, cut from one pool, that every loader takes for a checkpoint."""
    import torch
    from inspect_large import full_shapes

    from dmm_core.checkpoint import metadata as meta
    from dmm_core.checkpoint.writer import write_pieces, writing_order

    generator = torch.Generator().manual_seed(seed)
    pool = (0.05 * torch.randn(1 << 24, generator=generator)).half()
    kinds = {key: torch.empty(shape, dtype=torch.float16, device="meta") for key, shape in full_shapes("sd15").items()}

    def pieces() -> Any:
        for number, key in enumerate(writing_order(kinds)):
            count, start = kinds[key].numel(), number * 7919 % 4096
            while count > 0:
                piece = pool[start : start + count]
                yield key, piece
                count, start = count - piece.numel(), 0

    write_pieces(path, kinds, meta.modelspec("sd15", "epsilon", {}, path.stem), pieces())


def flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def read_all(path: Path, to: Any = None) -> None:
    buffer = bytearray(BLOCK)
    with path.open("rb", buffering=0) as file:
        while got := file.readinto(buffer):
            if to is not None:
                to.write(memoryview(buffer)[:got])


def copy(inputs: list[Path], out: Path) -> None:
    for path in inputs[1:]:
        read_all(path)
    with out.open("wb", buffering=0) as file:
        read_all(inputs[0], file)
        os.fsync(file.fileno())


def copy4(inputs: list[Path], out: Path) -> None:
    for number, path in enumerate(inputs):
        with out.with_suffix(f".{number}").open("wb", buffering=0) as file:
            read_all(path, file)
            os.fsync(file.fileno())


def ours(inputs: list[Path], out: Path) -> None:
    from dmm_core.merge_files import merge_files
    from dmm_core.merge_recipe import merge_recipe_from_dict

    merge_files(merge_recipe_from_dict({"models": [str(path) for path in inputs], "out": str(out)}))


def mecha(inputs: list[Path], out: Path) -> None:
    import sd_mecha

    recipe = sd_mecha.n_average(*(sd_mecha.model(path) for path in inputs))
    sd_mecha.merge(recipe, output=out)
    flush(out)


WAYS: dict[str, Callable[[list[Path], Path], None]] = {"copy": copy, "copy4": copy4, "ours": ours, "mecha": mecha}


def peak_memory() -> float:
    """Highest resident memory of this process, in MB. On Linux getrusage's count would begin with the parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text(encoding="utf-8").partition("VmHWM:")[2].split()[0]) / 1e3
    try:
        import resource
    except ImportError:  # Windows does not say
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if platform.system() == "Darwin" else 1e3)


def measure_here(way: str, folder: Path) -> dict[str, Any]:
    """One way in this process: seconds without imports, processor seconds, peak memory in MB (all of it)."""
    if way in ("ours", "mecha"):
        import torch  # noqa: F401
    if way == "ours":
        import dmm_core.merge_files  # noqa: F401
    if way == "mecha":
        import sd_mecha  # noqa: F401
    before, cpu, start = peak_memory(), time.process_time(), time.perf_counter()
    WAYS[way](files(folder), folder / f"{way}.safetensors")
    seconds = time.perf_counter() - start
    return {"way": way, "seconds": seconds, "cpu_seconds": time.process_time() - cpu, "before_mb": before,
            "peak_mb": peak_memory()}  # fmt: skip


def files(folder: Path) -> list[Path]:
    return [folder / f"model {number}.safetensors" for number in range(COUNT)]


def drop_from_cache(paths: list[Path]) -> None:
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(way: str, folder: Path, cold: bool) -> dict[str, Any]:
    """One way in a fresh process; copies are deleted, merges stay until the next round, to be compared."""
    (folder / f"{way}.safetensors").unlink(missing_ok=True)
    if cold:
        drop_from_cache(files(folder))
    else:
        for path in files(folder):
            read_all(path)
    command = [sys.executable, str(Path(__file__).resolve()), "--run", way, "--folder", str(folder)]
    environment = {"GOMP_SPINCOUNT": "10000", **os.environ}  # as the command sets it: threads wait, not spin
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment)
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{done.stderr[-2000:]}")
    for number in range(COUNT):
        (folder / f"copy4.{number}").unlink(missing_ok=True)
    (folder / "copy.safetensors").unlink(missing_ok=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def largest_difference(one: Path, other: Path) -> float:
    from dmm_core.checkpoint.reader import Tensors

    a, b = Tensors.open(one), Tensors.open(other)
    return max((float((a[key].float() - b[key].float()).abs().max()) for key in a if key in b), default=float("nan"))


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Per way the median seconds, and of each round its ratio to that round's copy."""
    found: dict[str, Any] = {}
    for way in dict.fromkeys(run["way"] for run in runs):
        own = [run for run in runs if run["way"] == way]
        base = {run["round"]: run["seconds"] for run in runs if run["way"] == "copy"}
        base4 = {run["round"]: run["seconds"] for run in runs if run["way"] == "copy4"}
        found[way] = {
            "seconds": round(statistics.median(run["seconds"] for run in own), 2),
            "cpu_seconds": round(statistics.median(run["cpu_seconds"] for run in own), 2),
            "peak_mb": round(max(run["peak_mb"] for run in own)),
            "to_copy": [round(run["seconds"] / base[run["round"]], 2) for run in own if run["round"] in base],
            "to_copy4": [round(run["seconds"] / base4[run["round"]], 2) for run in own if run["round"] in base4],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS), help="only these of the four")
    parser.add_argument("--cache", choices=("cold", "warm"), default="cold" if hasattr(os, "posix_fadvise") else "warm")
    parser.add_argument("--folder", type=Path, help="where to make the files (default: the system's temporary folder)")
    parser.add_argument("--out", type=Path, help="write the results here too")
    parser.add_argument("--run", choices=("make", *WAYS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run == "make":
        for number, path in enumerate(files(args.folder)):
            make(path, number)
        return
    if args.run:
        print(json.dumps(measure_here(args.run, args.folder)))
        return
    ways = [way for way in args.ways if way != "mecha" or find_spec("sd_mecha")]
    if ways != args.ways:
        print("sd-mecha is not installed here and is left out (pip install sd-mecha)", file=sys.stderr)
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        make_all = [sys.executable, str(Path(__file__).resolve()), "--run", "make", "--folder", name]
        subprocess.run(make_all, check=True)  # apart, so that no run inherits this process's memory
        runs, load = [], os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        for number in range(args.rounds):
            turned = ways[number % len(ways) :] + ways[: number % len(ways)]
            for way in turned:
                runs.append({"round": number, **measure(way, folder, args.cache == "cold")})
                print(json.dumps(runs[-1]), file=sys.stderr)
        outputs = [folder / f"{way}.safetensors" for way in ("ours", "mecha")]
        difference = largest_difference(*outputs) if all(path.exists() for path in outputs) else None
        size = files(folder)[0].stat().st_size
    import torch

    result = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "platform": platform.platform(),
        "cores": os.cpu_count(),
        "load_before": load, "torch": torch.__version__,
        "file_bytes": size, "cache": args.cache, "ours_minus_mecha": difference, **summary(runs),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps({**result, "runs": runs}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
