"""What the trainer's benchmarks train: full-size models of random weights on a GPU, the mini family on a CPU."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.full_size import CLIP_G, CLIP_L, SD15, SDXL, VAE
from dmm_core.checkpoint import Checkpoint, open_checkpoint, write_checkpoint
from dmm_core.checkpoint.shapes import Shapes, text_shapes, unet_shapes, vae_shapes
from dmm_core.conditioning import Context
from dmm_core.data import LatentData, Pool
from dmm_core.distill import Distillation
from dmm_core.models import build_unet
from dmm_core.plan import choose_precision
from dmm_core.recipe import TrainSpec
from dmm_core.speed import quicken, wants_channels_last
from dmm_core.student import Student
from dmm_core.teachers import Teachers

FULL = {"sd15": (SD15, 512), "sdxl": (SDXL, 1024)}  # and the pixels it is made for
POOLED = 1280  # width of SDXL's pooled embedding
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Subjects:
    """Checkpoints of one architecture, and random data that fits them."""

    checkpoints: list[Checkpoint]
    device: torch.device
    latents: Tensor
    context: Context

    @classmethod
    def make(
        cls, device: torch.device, count: int, folder: Path, pixels: int | None = None, family: str = "sd15"
    ) -> Subjects:
        """``count`` teachers; files that are in the folder already are used again."""
        folder.mkdir(parents=True, exist_ok=True)
        if device.type == "cpu":
            from mini_family.family import LATER, TEACHERS, unpack

            paths = unpack(folder, [*TEACHERS, *LATER][:count])[1:]
            pixels = pixels or 64
        else:
            paths = [random_full(folder / f"{family} {i}.safetensors", family, i, device) for i in range(count)]
            pixels = pixels or FULL[family][1]
        checkpoints = [open_checkpoint(path) for path in paths]
        generator = torch.Generator().manual_seed(0)
        width = checkpoints[0].unet_config["cross_attention_dim"]
        latents = torch.randn(64, 4, pixels // 8, pixels // 8, generator=generator)
        tokens = torch.randn(65, 77, width, generator=generator)
        pooled = torch.randn(65, POOLED, generator=generator) if checkpoints[0].family == "sdxl" else None
        return cls(checkpoints, device, latents, Context(tokens, pooled))

    def unet(self, dtype: torch.dtype, styled: bool) -> torch.nn.Module:
        first = self.checkpoints[0]
        return build_unet(first.unet_config, first.unet(), dtype, first.path, styled)

    def distillation(self, spec: TrainSpec, teachers: int | None = None) -> Distillation:
        """The trainer as a recipe would build it, but for the text encoders, whose embeddings are random."""
        checkpoints = self.checkpoints[:teachers]
        precision = choose_precision(spec.precision, self.device.type, spec.weights)
        last = wants_channels_last(spec.channels_last, self.device)
        pool = Teachers(checkpoints, self.device, DTYPES[precision], spec.resident, last, spec.compile)
        pool._embeddings = dict.fromkeys(range(len(checkpoints)), self.context.to(DTYPES[precision]))
        names = tuple(checkpoint.path.stem for checkpoint in checkpoints)
        student = Student.start(
            checkpoints[0], checkpoints[0].unet(), names, None, 0, DTYPES[spec.weights],
            spec.rank if spec.student == "lora" else None,
        ).to(self.device)  # fmt: skip
        quicken(student.unet, last, spec.compile)
        data = LatentData([str(i) for i in range(64)], [Pool(self.latents, torch.arange(64))], 0.1)
        return Distillation(student, pool, data, self.context, spec, precision)


def random_full(path: Path, family: str, seed: int, device: torch.device) -> Path:
    """A full-size UNet whose outputs are of order 1, as float16 in a file (SD1.5 1.7 GB, SDXL 5.1 GB)."""
    if not path.exists():
        unet = random_weights(unet_shapes(FULL[family][0]), seed, device)
        write_checkpoint(path, family=family, unet=unet, vae=None, text_encoders=[], metadata={})
    return path


def random_whole(path: Path, family: str, seed: int, device: torch.device) -> Path:
    """The same with VAE and text encoders, which are the same for every seed."""
    if not path.exists():
        texts = [CLIP_L] if family == "sd15" else [CLIP_L, {**CLIP_G, "projection_dim": POOLED}]
        write_checkpoint(
            path, family=family, unet=random_weights(unet_shapes(FULL[family][0]), seed, device),
            vae=random_weights(vae_shapes(VAE), 100, device), vae_config=VAE,
            text_encoders=[random_weights(text_shapes(config), 101, device) for config in texts], metadata={},
        )  # fmt: skip
    return path


def random_weights(shapes: Shapes, seed: int, device: torch.device) -> dict[str, Tensor]:
    """float16 tensors on the CPU, scaled so that layers keep the size of what they are given."""
    generator = torch.Generator(device).manual_seed(seed)
    state = {}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=generator, device=device)
        if len(shape) > 1:
            value = noise * torch.Size(shape[1:]).numel() ** -0.5
        else:
            value = (1 + 0.1 * noise) if key.endswith("weight") else 0.1 * noise
        state[key] = value.half().cpu()
    return state
