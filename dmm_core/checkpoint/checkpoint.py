"""One model, in whatever layout it came: what it is, and its tensors in the names of diffusers and transformers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmm_core.checkpoint.errors import NonFinite, NotACheckpoint
from dmm_core.checkpoint.metadata import FEW_STEP, FEW_STEP_HINT
from dmm_core.checkpoint.parts import Part, read_part
from dmm_core.checkpoint.reader import Tensors, sha256
from dmm_core.checkpoint.shapes import Shapes, codebook_shapes, text_shapes, unet_shapes, vae_shapes
from dmm_core.checkpoint.writer import non_finite
from dmm_core.style import Codebook


@dataclass(eq=False)
class Checkpoint:
    """An opened model: headers are read, tensors are not. Made by ``open_checkpoint``.

    ``parts`` says for "unet", "vae", "text_encoder_0" … and "codebook" where each tensor lies in ``tensors``.
    """

    path: Path
    layout: str  # "ldm" or "diffusers"
    family: str  # "sd15" or "sdxl"
    tensors: Tensors
    unet_config: dict[str, Any]
    prediction_type: str = "epsilon"
    zero_snr: bool = False  # trained to start from pure noise: the schedule's last SNR is 0
    dmm: str | None = None  # "ours" or "authors"
    vae_config: dict[str, Any] | None = None
    text_configs: list[dict[str, Any]] = field(default_factory=list)
    style_info: list[dict[str, Any]] = field(default_factory=list)
    default_style: dict[str, float] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)
    weights_files: tuple[Path, ...] = ()
    _sha256: str = ""

    @property
    def styles(self) -> tuple[str, ...]:
        return tuple(style["name"] for style in self.style_info)

    @property
    def dtype(self) -> torch.dtype:
        """The type that most of the UNet's parameters have."""
        counts: Counter[torch.dtype] = Counter()
        for source in self.parts["unet"].values():
            info = self.tensors.info[source.key]
            counts[info.dtype] += info.count
        return counts.most_common(1)[0][0]

    def shapes(self, part: str) -> Shapes:
        """Keys and shapes of a part, without reading it."""
        if part == "unet":
            return unet_shapes(self.unet_config)
        if part == "vae":
            return vae_shapes(self.vae_config) if self.vae_config else {}
        if part == "codebook":
            return codebook_shapes(len(self.styles), self.style_width) if self.dmm else {}
        return text_shapes(self.text_configs[int(part.removeprefix("text_encoder_"))])

    @property
    def style_width(self) -> int:
        """Numbers in a style vector: the width of the time embedding, 1280 for the full models."""
        return 4 * self.unet_config["block_out_channels"][0]

    @property
    def few_step(self) -> float:
        """The guidance scale that a student for 4 to 8 sampling steps has in itself; 0 for ordinary models."""
        try:
            return float(self.metadata.get(FEW_STEP, 0))
        except ValueError:
            return 0.0

    @property
    def usage(self) -> str:
        """What a user must know to draw with it, in a sentence; "" for ordinary models."""
        return FEW_STEP_HINT if self.few_step else ""

    def unet(self) -> dict[str, Tensor]:
        """The UNet in diffusers' keys, without those of DMM."""
        return self._read("unet")

    def vae(self) -> dict[str, Tensor]:
        """The VAE in diffusers' keys. Raises NotACheckpoint where there is none."""
        if "vae" not in self.parts:
            raise NotACheckpoint("holds no VAE", self.path, "Use a full checkpoint.")
        return read_part(self.tensors, self.parts["vae"])

    def text_encoder(self, index: int = 0) -> dict[str, Tensor]:
        """A text encoder in transformers' keys. Raises NotACheckpoint where there is none."""
        if f"text_encoder_{index}" not in self.parts:
            raise NotACheckpoint(f"holds no text encoder number {index + 1}", self.path, "Use a full checkpoint.")
        return self._read(f"text_encoder_{index}")

    def tensor(self, part: str, key: str) -> Tensor:
        """One tensor alone, e.g. ``("unet", "conv_in.weight")``; for work that goes tensor by tensor."""
        source = self.parts[part][key]
        return self.changed(part, key, source.take(self.tensors[source.key]))

    def changed(self, part: str, key: str, tensor: Tensor) -> Tensor:
        """A tensor as this model has it, given as its file has it; where that differs, see ``LoraTeacher``."""
        return tensor

    def _read(self, part: str) -> dict[str, Tensor]:
        state = read_part(self.tensors, self.parts[part])
        return {key: self.changed(part, key, tensor) for key, tensor in state.items()}

    def codebook(self) -> Codebook | None:
        """The styles, in float32; None where this is no DMM model."""
        if not self.dmm:
            return None
        codebook = Codebook(self.styles, self.style_width, self.default_style)
        state = read_part(self.tensors, self.parts["codebook"])
        codebook.load_state_dict({key: tensor.float() for key, tensor in state.items()})
        return codebook.requires_grad_(False)

    def check_finite(self) -> None:
        """Read every tensor in use, one at a time. Raises NonFinite, naming the first bad one."""
        used = {source.key for part in self.parts.values() for source in part.values()}
        for key, tensor in self.tensors.read(used):
            if bad := non_finite(tensor):
                raise NonFinite(self.path, key, bad)

    def sha256(self) -> str:
        """Hex digest of the whole file; of a folder, the UNet's weight file(s). Computed once."""
        self._sha256 = self._sha256 or sha256(*self.weights_files)
        return self._sha256
