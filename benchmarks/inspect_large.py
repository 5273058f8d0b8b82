"""How long it takes, and how much memory, to say what a full-size model file is.

Writes a sparse file with the keys and shapes of a full SD1.5 (2.1 GB) or SDXL (6.9 GB) checkpoint in float16, whose
data take no room on the disk, and inspects it in a fresh process. Goal: under 1 s and under 200 MB more than before.

    python benchmarks/inspect_large.py [--family sdxl] [--values]
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.full_size import CLIP_G, CLIP_L, UNET, VAE  # noqa: E402
from dmm_core.checkpoint import inspect_file, keymap  # noqa: E402
from dmm_core.checkpoint.shapes import Shapes, text_shapes, unet_shapes, vae_shapes  # noqa: E402


def full_shapes(family: str) -> Shapes:
    """Every key and shape of a full-size LDM file."""
    config = UNET[family]
    unet, vae = unet_shapes(config), vae_shapes(VAE)
    found = {keymap.UNET + name: unet[key] for key, name in keymap.unet_map(unet, config).items()}
    for key, name in keymap.vae_map(vae, VAE).items():
        found[keymap.VAE + name] = (*vae[key], 1, 1) if keymap.vae_is_matrix(key) else vae[key]
    found |= {keymap.TEXT[family][0] + key: shape for key, shape in text_shapes(CLIP_L).items()}
    if family == "sdxl":
        text = text_shapes({**CLIP_G, "projection_dim": 1280})
        for key, name in keymap.open_clip_map(text).items():
            shape = (3 * text[key][0], *text[key][1:]) if keymap.stacked_row(key) is not None else text[key]
            found[keymap.TEXT[family][1] + name] = shape
    return found


def write_sparse(path: Path, shapes: Shapes) -> int:
    """A float16 safetensors file of zeros that the file system does not store; returns its size in bytes."""
    header: dict[str, Any] = {}
    offset = 0
    for key, shape in shapes.items():
        count = 2
        for n in shape:
            count *= n
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + count]}
        offset += count
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + offset)
    return path.stat().st_size


def peak_memory() -> float:
    """Highest resident memory of this process so far, in MB; 0 where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if platform.system() == "Darwin" else 1e3)


def measure_here(path: str, values: bool) -> dict[str, Any]:
    """Inspect in this process: seconds, and growth of the peak memory in MB."""
    before, start = peak_memory(), time.perf_counter()
    found = inspect_file(path, check_values=values)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "megabytes": peak_memory() - before, "family": found["family"], "kind": found["kind"]}


def measure(family: str, values: bool = False) -> dict[str, Any]:
    """The same in a fresh process, on a file made for it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{family}.safetensors"
        size = write_sparse(path, full_shapes(family))
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--file",
            str(path),
            *(["--values"] if values else []),
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8")
    return {**json.loads(done.stdout), "size": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=sorted(UNET), default="sd15")
    parser.add_argument("--values", action="store_true", help="read every tensor and look for NaN, too")
    parser.add_argument("--file", help="inspect this file, in this process")
    args = parser.parse_args()
    result = measure_here(args.file, args.values) if args.file else measure(args.family, args.values)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
