"""What a distance between sets of pictures is measured on: pictures in, feature vectors out. Nothing is downloaded.

Two extractors. Inception-v3, which is what the word FID stands for, if ``DMM_INCEPTION`` names its weights; otherwise
the shipped MobileNetV2 at its 96-channel stage. Numbers of different extractors cannot be compared, so every report
carries the name. With a few hundred pictures the 96 numbers are also the better choice: a covariance of 2048 numbers
needs thousands of pictures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dmm_core.errors import BadInput
from dmm_core.features import inception, mobilenet

MOBILENET = Path(__file__).parents[1] / "assets" / "mobilenetv2_14.safetensors"
INCEPTION_VARIABLE = "DMM_INCEPTION"
CONVERT = (
    "Give the FID Inception weights of the pytorch-fid package as .safetensors: "
    "save_file(torch.load(FILE, weights_only=True), 'inception.safetensors')."
)


@dataclass(frozen=True)
class Extractor:
    """A frozen network that turns pictures into feature vectors.

    Attributes:
        name: what a report must name, e.g. ``"MobileNetV2-96"``.
        metric: what a Fréchet distance on these features may be called; ``FID`` only for Inception.
        dim: length of a feature vector.
    """

    name: str
    metric: str
    dim: int
    network: Callable[[Tensor, Mapping[str, Tensor]], Tensor] = field(repr=False)
    weights: Mapping[str, Tensor] = field(repr=False)
    batch: int = 32

    @torch.no_grad()
    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        """Features (n, dim) float64 of RGB pictures (n, H, W, 3) uint8; any size, resized to the network's own."""
        if pictures.ndim != 4 or pictures.shape[-1] != 3 or pictures.dtype != np.uint8:
            raise ValueError(f"expected pictures (n, H, W, 3) uint8, got {pictures.shape} {pictures.dtype}")
        device = next(iter(self.weights.values())).device
        out = np.empty((len(pictures), self.dim))
        for start in range(0, len(pictures), self.batch):
            rows = np.ascontiguousarray(pictures[start : start + self.batch])
            pixels = torch.from_numpy(rows).to(device).permute(0, 3, 1, 2).float() / 255
            out[start : start + len(rows)] = self.network(pixels, self.weights).cpu().double().numpy()
        return out

    @staticmethod
    def find(device: str | torch.device = "cpu") -> Extractor:
        """The best extractor of this machine: Inception-v3 where ``DMM_INCEPTION`` names it, else the shipped one.

        Raises:
            BadInput: ``DMM_INCEPTION`` is set to something that does not hold those weights.
        """
        path = os.environ.get(INCEPTION_VARIABLE, "").strip()
        return inception_extractor(path, device) if path else mobilenet_extractor(device)


def mobilenet_extractor(device: str | torch.device = "cpu") -> Extractor:
    """The shipped one: 96 numbers a picture, offline."""
    return Extractor(
        name="MobileNetV2-96",
        metric="Fréchet distance (MobileNetV2-96)",
        dim=mobilenet.DIM,
        network=mobilenet.mobilenet_features,
        weights={key: value.to(device) for key, value in load_file(MOBILENET).items()},
    )


def inception_extractor(path: str | Path, device: str | torch.device = "cpu") -> Extractor:
    """The network of FID, from a ``.safetensors`` of its weights.

    Raises:
        BadInput: not a .safetensors file, or not those weights. Pickles are not opened.
    """
    file = Path(path).expanduser()
    state = named_weights(INCEPTION_VARIABLE, file, CONVERT)
    # fc has 1008 outputs in the network of FID and 1000 in the ordinary one, whose features differ
    body = {k: v.to(device, torch.float32) for k, v in state.items() if k.startswith(("Conv2d_", "Mixed_"))}
    missing = {"Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch_pool.bn.running_var"} - body.keys()
    if missing or ("fc.weight" in state and len(state["fc.weight"]) != 1008):
        what = f"has no {min(missing)}" if missing else f"classifies {len(state['fc.weight'])} classes instead of 1008"
        raise BadInput(f"is not the FID Inception: it {what}", file, CONVERT)
    return Extractor("Inception-v3", "FID (Inception-v3)", inception.DIM, inception.inception_features, body)


def named_weights(variable: str, file: Path, hint: str) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file that an environment variable names. Raises BadInput, with the hint."""
    if file.suffix != ".safetensors" or not file.is_file():
        raise BadInput(f"{variable} must name an existing .safetensors file", file, hint)
    try:
        return load_file(file)
    except SafetensorError as error:
        raise BadInput(f"cannot be read as safetensors ({error})", file, hint) from error
