"""The shipped weights: the base as a whole checkpoint, every teacher as what it adds to the base, in 8 bits.

python -m mini_family.family pack --data build/mini      # what training made → mini_family/weights
python -m mini_family.family unpack --out DIR            # → ordinary checkpoints, base.safetensors, ink.safetensors …
python -m mini_family.family whole --data build/mini-xl --out DIR    # the same of what training made, unpacked
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
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
PREFIXES = ("text.", "text_2.")  # of the text encoders in the files that training writes


def title(family: str, name: str) -> dict[str, str]:
    """Metadata of a checkpoint."""
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": {"sd15": "stable-diffusion-v1", "sdxl": "stable-diffusion-xl-v1-base"}[family],
        "modelspec.resolution": "64x64",
        "modelspec.title": f"mini family: {name}",
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
    WEIGHTS.mkdir(exist_ok=True)
    yield whole(data, "base", WEIGHTS)
    unet = halves(load_file(data / "models" / "base.safetensors"), "unet.")
    for name in (*TEACHERS, *LATER):
        teacher = load_file(data / "models" / f"{name}.safetensors")
        tensors = {}
        for key, tensor in unet.items():
            tensors[f"{key}.q"], tensors[f"{key}.scale"] = quantize(teacher[f"unet.{key}"] - tensor.float())
        write_safetensors(WEIGHTS / f"{name}.safetensors", tensors, {"delta": "int8 rows to add to base.safetensors"})
        yield WEIGHTS / f"{name}.safetensors"


def whole(data: Path, name: str, out: Path) -> Path:
    """Write a trained model of either family with the autoencoder as an ordinary checkpoint, float16."""
    state = load_file(data / "models" / f"{name}.safetensors")
    texts = [halves(state, prefix) for prefix in PREFIXES]
    return write_checkpoint(
        out / f"{name}.safetensors",
        family="sdxl" if texts[1] else "sd15",
        unet=halves(state, "unet."),
        vae=halves(load_file(data / "vae" / "diffusion_pytorch_model.safetensors")),
        text_encoders=[text for text in texts if text],
        metadata=title("sdxl" if texts[1] else "sd15", name),
    )


def halves(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The tensors of one part, float16."""
    found = {k.removeprefix(prefix): v.half() for k, v in state.items() if k.startswith(prefix)}
    return {k: v for k, v in found.items() if not k.endswith("position_ids")}


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
                metadata=title("sd15", name),
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
    parser.add_argument("what", choices=("pack", "unpack", "whole", "distances"))
    parser.add_argument("--data", type=Path, default=Path("build/mini"))
    parser.add_argument("--out", type=Path, default=Path("mini"))
    args = parser.parse_args()
    if args.what == "distances":
        print("\n".join(distances()))
        return
    made = {
        "pack": lambda: pack(args.data),
        "unpack": lambda: unpack(args.out, (*TEACHERS, *LATER)),
        "whole": lambda: (whole(args.data, path.stem, args.out) for path in (args.data / "models").glob("*.safetensors")
                          if path.stem != "control" and not path.stem.endswith("-lora")),
    }  # fmt: skip
    for path in made[args.what]():
        print(path, f"{path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
