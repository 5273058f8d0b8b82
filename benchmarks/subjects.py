"""What the trainer's benchmarks train: full-size models of random weights on a GPU, the mini family on a CPU."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.full_size import CLIP_G, CLIP_L, SD15, SDXL, VAE
from dmm_core.checkpoint import open_checkpoint, write_checkpoint
from dmm_core.checkpoint.shapes import Shapes, text_shapes, unet_shapes, vae_shapes
from dmm_core.conditioning import Context
from dmm_core.data import LatentData, Pool
from dmm_core.discriminator import discriminator_of
from dmm_core.distill import Distillation
from dmm_core.models import build_unet
from dmm_core.plan import DTYPES, choose_precision
from dmm_core.recipe import TrainSpec
from dmm_core.residency import HostStore
from dmm_core.speed import quicken, wants_channels_last
from dmm_core.student import Student
from dmm_core.teachers import Teachers

FULL = {"sd15": (SD15, 512), "sdxl": (SDXL, 1024)}  # and the pixels it is made for
POOLED = 1280  # width of SDXL's pooled embedding


@dataclass(frozen=True, eq=False)
class RandomTeacher:
    """As much of a checkpoint as the trainer asks of one: a full-size UNet of random weights, which lies in no file."""

    family: str
    seed: int
    device: torch.device
    prediction_type: str = "epsilon"
    zero_snr: bool = False

    @property
    def path(self) -> Path:
        return Path(f"{self.family} {self.seed}.safetensors")

    @property
    def unet_config(self) -> dict[str, Any]:
        return FULL[self.family][0]

    def shapes(self, part: str) -> Shapes:
        return unet_shapes(self.unet_config) if part == "unet" else {}

    def unet(self) -> dict[str, Tensor]:
        """Made on the device, at once and the same each time."""
        return random_weights(unet_shapes(self.unet_config), self.seed, self.device)


@dataclass
class Subjects:
    """Checkpoints of one architecture, and random data that fits them."""

    checkpoints: list[Any]
    device: torch.device
    latents: Tensor
    context: Context
    store: HostStore | None = None  # random teachers in pinned memory, made when first needed

    @classmethod
    def make(
        cls, device: torch.device, count: int, folder: Path, pixels: int | None = None, family: str = "sd15"
    ) -> Subjects:
        """``count`` teachers."""
        checkpoints: list[Any]
        if device.type == "cpu":
            from mini_family.family import LATER, TEACHERS, unpack

            paths = unpack(folder, [*TEACHERS, *LATER][:count])[1:]
            checkpoints, pixels = [open_checkpoint(path) for path in paths], pixels or 64
        else:
            checkpoints, pixels = [RandomTeacher(family, i, device) for i in range(count)], pixels or FULL[family][1]
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
        kind = RandomTeachers if isinstance(checkpoints[0], RandomTeacher) else Teachers
        pool = kind(checkpoints, self.device, DTYPES[precision], spec.resident, last, spec.compile)
        pool._store = self.store
        pool._embeddings = dict.fromkeys(range(len(checkpoints)), self.context.to(DTYPES[precision]))
        names = tuple(checkpoint.path.stem for checkpoint in checkpoints)
        student = Student.start(
            checkpoints[0], checkpoints[0].unet(), names, None, 0, DTYPES[spec.weights],
            spec.rank if spec.student == "lora" else None,
        ).to(self.device)  # fmt: skip
        quicken(student.unet, last, spec.compile)
        if pool.resident < len(checkpoints):
            self.store = pool.store  # for the next one too
        data = LatentData([str(i) for i in range(64)], [Pool(self.latents, torch.arange(64))], 0.1)
        against = discriminator_of(spec, checkpoints[0], len(names), pool) if spec.adversarial else None
        return Distillation(student, pool, data, self.context, spec, precision, against)


class RandomTeachers(Teachers):
    """Teachers that lie in no file."""

    @property
    def store(self) -> HostStore:
        if self._store is None:
            self._store = pinned_store(self.checkpoints, self.dtype, self.channels_last)
        return self._store


def pinned_store(teachers: list[Any], dtype: torch.dtype, channels_last: bool) -> HostStore:
    """What ``residency.host_store`` makes of files."""
    store = HostStore(dtype, True, channels_last)
    store._teachers = {teacher: {k: store._pin(v) for k, v in teacher.unet().items()} for teacher in teachers}
    return store


def random_whole(path: Path, family: str, seed: int, device: torch.device) -> Path:
    """A file of a full-size model of random weights, float16. VAE and text encoders are the same for every seed."""
    if not path.exists():
        texts = [CLIP_L] if family == "sd15" else [CLIP_L, {**CLIP_G, "projection_dim": POOLED}]

        def weights(shapes: Shapes, seed: int) -> dict[str, Tensor]:
            return {key: value.cpu() for key, value in random_weights(shapes, seed, device).items()}

        write_checkpoint(
            path, family=family, unet=weights(unet_shapes(FULL[family][0]), seed), vae=weights(vae_shapes(VAE), 100),
            vae_config=VAE, text_encoders=[weights(text_shapes(config), 101) for config in texts], metadata={},
        )  # fmt: skip
    return path


def random_weights(shapes: Shapes, seed: int, device: torch.device) -> dict[str, Tensor]:
    """float16 tensors on the device, scaled so that layers keep the size of what they are given."""
    generator = torch.Generator(device).manual_seed(seed)
    state = {}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=generator, device=device)
        if len(shape) > 1:
            value = noise * torch.Size(shape[1:]).numel() ** -0.5
        else:
            value = (1 + 0.1 * noise) if key.endswith("weight") else 0.1 * noise
        state[key] = value.half()
    return state
