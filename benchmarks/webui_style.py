"""What the webui extension costs a sampling step: on with all weights default, and on with a mix, against off.

Runs in the double of the webuis with ldm's real UNet, in an environment of theirs; jobs take turns in pairs, in
CPU time, which a busy machine blurs less. Prints one JSON object: the ratios, and beside them the share of a job's CPU
time that is spent in the extension's own functions, which noise of some percent cannot hide.

    eval "$(python tests/hosts/webui/prepare.py)"
    "$DMM_WEBUI_341" benchmarks/webui_style.py --profile a1111
    "$DMM_WEBUI_440" benchmarks/webui_style.py --profile forge
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def write_file(path: Path) -> Path:
    """A DMM file of the mini family's base with random styles; needs torch alone."""
    import torch

    from dmm_core.checkpoint import open_checkpoint, write_dmm
    from dmm_core.style import Codebook

    base = open_checkpoint(ROOT / "mini_family" / "weights" / "base.safetensors")
    torch.manual_seed(0)
    book = Codebook(("ink", "clay", "neon", "pixel"), base.style_width)
    torch.nn.init.normal_(book.add_embedding.linear_2.weight, std=0.1)
    return write_dmm(
        path, family=base.family, unet=base.unet(), vae=base.vae(), text_encoders=[base.text_encoder(0)],
        codebook=book.requires_grad_(False), resolution=64, vae_config=base.vae_config,
    )  # fmt: skip


def own_share(host: Any, job: Any) -> float:
    """The share of a job's CPU time inside the extension's entry points: script, tag, callback and hooks."""
    from a1111_extension import hook, session

    spent, depth = [0.0], [0]

    def timed(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            depth[0] += 1
            began = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                depth[0] -= 1
                if not depth[0]:  # not again what an outer one counts
                    spent[0] += time.thread_time() - began

        return run

    places: list[tuple[Any, str]] = [(hook.LIVE, "_before"), (hook.LIVE, "_after"), (hook.LIVE, "step")]
    places += [(session.SESSION, name) for name in ("begin", "tag", "refresh", "batch", "end")]
    for place, name in places:
        setattr(place, name, timed(getattr(place, name)))
    began = time.thread_time()
    host.process(job)
    total = time.thread_time() - began
    for place, name in places:
        delattr(place, name)
    return spent[0] / total


def measure(profile: str, pairs: int, steps: int, batch: int) -> dict[str, Any]:
    from tests.hosts.webui.driver import Host, Processing

    host = Host(profile)
    with tempfile.TemporaryDirectory() as folder:
        host.load(write_file(Path(folder) / "dmm.safetensors"))
        names = ["ink", "clay", "neon", "pixel"]
        kinds = {
            "off": host.values(),
            "off again": host.values(),  # how far two equal things come out apart here
            "default": host.api({"weights": dict.fromkeys(names, 0.25)}),
            "mix": host.api({"weights": {"ink": 0.7, "clay": 0.3}}),
        }
        taken: dict[str, list[float]] = {kind: [] for kind in kinds}
        for k in range(pairs + 1):
            for kind in list(kinds)[k % 4 :] + list(kinds)[: k % 4]:
                began = time.process_time()
                host.process(Processing(steps=steps, batch_size=batch, script_args=kinds[kind]))
                if k:  # the first round warms up
                    taken[kind].append(1000 * (time.process_time() - began) / steps)
        shares = {
            kind: statistics.median(
                own_share(host, Processing(steps=steps, batch_size=batch, script_args=values)) for _ in range(5)
            )
            for kind, values in kinds.items()
        }
    off = taken["off"]
    told: dict[str, Any] = {"profile": profile, "ms a step, off": statistics.median(off)}
    for kind in ("off again", "default", "mix"):
        ratios = sorted(on / base for on, base in zip(taken[kind], off, strict=True))
        told[kind] = {
            "ms a step": statistics.median(taken[kind]),
            "median of the pairs' ratios": statistics.median(ratios),
            "quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
            "fastest against fastest": min(taken[kind]) / min(off),
            "share of the extension's own functions": shares[kind],
        }
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=("a1111", "forge", "reforge"), default="a1111")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    print(json.dumps(measure(args.profile, args.pairs, args.steps, args.batch), indent=1))


if __name__ == "__main__":
    main()
