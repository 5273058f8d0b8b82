"""Stock diffusers and transformers modules, built from a checkpoint's own shapes and filled with its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmm_core.checkpoint import Checkpoint, open_checkpoint
from dmm_core.environment import importing
from dmm_core.errors import BadInput
from dmm_core.style import Codebook


@dataclass
class Pipeline:
    """All parts of one SD1.5- or SDXL-shaped model. ``codebook`` is None where the file is no DMM file."""

    unet: Any
    text_encoders: Sequence[Any]
    vae: Any
    family: str
    prediction_type: str
    codebook: Codebook | None
    path: Path
    few_step: float = 0.0  # the guidance that a student for few steps has in itself; 0: an ordinary model
    zero_snr: bool = False  # trained to start from pure noise

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def styled(self) -> bool:
        """Whether the UNet takes a style vector as ``class_labels``."""
        return self.unet.config.class_embed_type == "identity"


CLIP = "text_model."  # what the names of a text encoder's tensors begin with, in files and up to transformers 4


def _build(
    cls: type, config: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype, what: str, path: Path
) -> Any:
    """One module without initialisation work: on the meta device first, then the file's tensors put in."""
    with torch.device("meta"):
        module = cls(config) if what == "text encoder" else cls(**config)
    wanted = set(module.state_dict())
    if what == "text encoder" and not any(key.startswith(CLIP) for key in wanted):  # transformers 5, CLIPTextModel
        tensors = {key.removeprefix(CLIP): tensor for key, tensor in tensors.items()}
    if missing := sorted(wanted - set(tensors)):
        raise BadInput(f"its {what} lacks {len(missing)} tensors, e.g. {missing[0]}", path, "Is the download complete?")
    state = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    module.load_state_dict({key: state[key] for key in wanted}, strict=True, assign=True)
    for name, buffer in list(module.named_buffers()):  # what no state dict holds, e.g. position ids
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner).register_buffer(leaf, torch.arange(buffer.shape[-1])[None], persistent=False)
    return module.eval().requires_grad_(False)


def build_unet(config: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype, path: Path, styled: bool) -> Any:
    """A stock ``UNet2DConditionModel``; ``styled`` opens the class-label input, which adds to the time embedding."""
    with importing():
        from diffusers import UNet2DConditionModel

    extra = {"class_embed_type": "identity"} if styled else {}
    return _build(UNet2DConditionModel, {**config, **extra}, tensors, dtype, "UNet", path)


def build_text_encoders(checkpoint: Checkpoint, dtype: torch.dtype) -> nn.ModuleList:
    """CLIP-L, and for SDXL the larger one with its projection."""
    with importing():
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    if not checkpoint.text_configs:
        raise BadInput("holds no text encoder", checkpoint.path, "Use a full checkpoint, not a bare UNet.")
    made = nn.ModuleList()
    for index, about in enumerate(checkpoint.text_configs):
        cls = CLIPTextModelWithProjection if index else CLIPTextModel
        config = CLIPTextConfig(**{k: v for k, v in about.items() if k != "kind"})
        made.append(_build(cls, config, checkpoint.text_encoder(index), dtype, "text encoder", checkpoint.path))
    return made


def build_vae(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    with importing():
        from diffusers import AutoencoderKL, AutoencoderTiny

    if checkpoint.vae_config is None:
        raise BadInput("holds no VAE", checkpoint.path, "Use a full checkpoint, not a bare UNet.")
    config = {k: v for k, v in checkpoint.vae_config.items() if k != "kind"}
    cls = AutoencoderTiny if checkpoint.vae_config["kind"] == "taesd" else AutoencoderKL
    return _build(cls, config, checkpoint.vae(), dtype, "VAE", checkpoint.path)


def load_pipeline(
    source: str | Path | Checkpoint,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    unet_dtype: torch.dtype | None = None,
) -> Pipeline:
    """Everything of one checkpoint, ready to sample. A DMM file's UNet takes style vectors.

    ``unet_dtype``: of the UNet, where it differs from that of the other parts.

    Raises:
        BadInput: a file that cannot be read, or a part that is missing.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    codebook = checkpoint.codebook()
    tensors, styled = checkpoint.unet(), codebook is not None
    unet = build_unet(checkpoint.unet_config, tensors, unet_dtype or dtype, checkpoint.path, styled)
    del tensors
    parts: list[nn.Module] = [unet, build_text_encoders(checkpoint, dtype), build_vae(checkpoint, dtype)]
    unet, text_encoders, vae = (part.to(device) for part in parts)
    if codebook is not None:
        codebook = codebook.to(device=device, dtype=torch.float32).requires_grad_(False)
    about = checkpoint.family, checkpoint.prediction_type, codebook, checkpoint.path
    return Pipeline(unet, text_encoders, vae, *about, checkpoint.few_step, checkpoint.zero_snr)
