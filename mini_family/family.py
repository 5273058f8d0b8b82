"""The shipped weights: the base as a whole checkpoint, every teacher as what it adds to the base, in 8 bits.

python -m mini_family.family pack --data build/mini      # what training made → mini_family/weights
python -m mini_family.family unpack --out DIR            # → ordinary checkpoints, base.safetensors, ink.safetensors …
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dmm_core.checkpoint import Checkpoint, open_checkpoint, write_checkpoint
from dmm_core.checkpoint.writer import write_safetensors
from dmm_core.files import write_atomically

HERE = Path(__file__).parent
WEIGHTS = HERE / "weights"
TEACHERS = ("ink", "clay", "blueprint", "neon")  # what the demo merges
LATER = ("pixel", "comic")  # held back, for adding teachers later
TITLE = {
    "modelspec.sai_model_spec": "1.0.1",
    "modelspec.architecture": "stable-diffusion-v1",
    "modelspec.resolution": "64x64",
}


def quantize(delta: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and a float32 scale for each row of the first dimension (float16 would be coarse below 6e-5)."""
    rows = delta.float().flatten(1) if delta.ndim > 1 else delta.float()[:, None]
    scale = (rows.abs().amax(1) / 127).clamp_min(1e-12)
    return (rows / scale[:, None]).round().clamp(-127, 127).to(torch.int8).view(delta.shape), scale


def restore(values: Tensor, scale: Tensor) -> Tensor:
    return values.float() * scale.float().view(-1, *[1] * (values.ndim - 1))


def pack(data: Path) -> Iterable[Path]:
    """Write the shipped weights of what ``mini_family.train`` and ``mini_family.autoencoder`` made."""
    base = load_file(data / "models" / "base.safetensors")
    part = lambda prefix: {k.removeprefix(prefix): v.half() for k, v in base.items() if k.startswith(prefix)}  # noqa: E731
    vae = {k: v.half() for k, v in load_file(data / "vae" / "diffusion_pytorch_model.safetensors").items()}
    WEIGHTS.mkdir(exist_ok=True)
    path = WEIGHTS / "base.safetensors"
    unet = part("unet.")
    text = {k: v for k, v in part("text.").items() if not k.endswith("position_ids")}
    write_checkpoint(
        path,
        family="sd15",
        unet=unet,
        vae=vae,
        text_encoders=[text],
        metadata=TITLE | {"modelspec.title": "mini family: base"},
    )
    yield path
    for name in (*TEACHERS, *LATER):
        teacher = load_file(data / "models" / f"{name}.safetensors")
        tensors = {}
        for key, tensor in unet.items():
            tensors[f"{key}.q"], tensors[f"{key}.scale"] = quantize(teacher[f"unet.{key}"] - tensor.float())
        write_safetensors(WEIGHTS / f"{name}.safetensors", tensors, {"delta": "int8 rows to add to base.safetensors"})
        yield WEIGHTS / f"{name}.safetensors"


def teacher_unet(base: Checkpoint, name: str) -> dict[str, Tensor]:
    """The UNet of one teacher, float16, diffusers keys."""
    delta = load_file(WEIGHTS / f"{name}.safetensors")
    return {k: (v.float() + restore(delta[f"{k}.q"], delta[f"{k}.scale"])).half() for k, v in base.unet().items()}


def unpack(out: Path, names: Iterable[str] = TEACHERS) -> list[Path]:
    """Write the base and the named teachers as ordinary checkpoints (18 MB each); what is there stays."""
    out.mkdir(parents=True, exist_ok=True)
    base = open_checkpoint(WEIGHTS / "base.safetensors")
    paths = [out / "base.safetensors"]
    if not paths[0].exists():
        write_atomically(paths[0], base.path.read_bytes())
    for name in names:
        paths.append(out / f"{name}.safetensors")
        if not paths[-1].exists():
            write_checkpoint(
                paths[-1], family="sd15", unet=teacher_unet(base, name), vae=base.vae(),
                text_encoders=[base.text_encoder(0)],
                metadata=TITLE | {"modelspec.title": f"mini family: {name}"},
            )  # fmt: skip
    return paths


def distances() -> Iterable[str]:
    """How far each teacher lies from the base: the norm of the difference over the base's norm."""
    base = open_checkpoint(WEIGHTS / "base.safetensors")
    start = torch.cat([tensor.float().flatten() for tensor in base.unet().values()])
    for name in (*TEACHERS, *LATER):
        teacher = torch.cat([tensor.float().flatten() for tensor in teacher_unet(base, name).values()])
        yield f"{name} {(teacher - start).norm() / start.norm():.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pack", "unpack", "distances"))
    parser.add_argument("--data", type=Path, default=Path("build/mini"))
    parser.add_argument("--out", type=Path, default=Path("mini"))
    args = parser.parse_args()
    if args.what == "distances":
        print("\n".join(distances()))
        return
    for path in pack(args.data) if args.what == "pack" else unpack(args.out, (*TEACHERS, *LATER)):
        print(path, f"{path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
