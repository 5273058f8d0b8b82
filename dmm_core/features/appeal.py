"""How well pictures fit their prompts, and how much people like them: CLIP score, PickScore, aesthetic score.

DMM (arXiv:2504.12364) §4.1 sets a mix of all styles beside the weight average by these three. Their networks do not
ship here and nothing is downloaded: a score is told where its weights are on the machine. An environment variable names
them; CLIP and PickScore are also found in the hub's cache.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from dmm_core.environment import importing
from dmm_core.errors import BadInput
from dmm_core.features import named_weights
from dmm_core.tokens import tokenize

CLIP = ("DMM_CLIP", "openai/clip-vit-large-patch14")
PICK = ("DMM_PICKSCORE", "yuvalkirstain/PickScore_v1")
AESTHETIC = "DMM_AESTHETIC"
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training
BATCH = 16


@dataclass(frozen=True)
class Network:
    """A CLIP of both pictures and texts, and what is made of its embeddings.

    ``taste``: layers (weight, bias) from a picture's embedding to a score; None: the likeness of picture and prompt.
    """

    score: str
    name: str
    clip: Any
    taste: Sequence[tuple[Tensor, Tensor]] | None = None

    @torch.no_grad()
    def __call__(self, pictures: np.ndarray, prompts: Sequence[str]) -> float:
        """Mean score of pictures (n, H, W, 3) uint8, one prompt each."""
        device, size = self.clip.device, self.clip.config.vision_config.image_size
        total = 0.0
        for start in range(0, len(pictures), BATCH):
            rows = slice(start, start + BATCH)
            pixels = prepared(torch.from_numpy(np.ascontiguousarray(pictures[rows])).to(device), size)
            told = self.clip(
                input_ids=tokenize(list(prompts[rows])).to(device), pixel_values=pixels.to(self.clip.dtype)
            )
            image, text = told.image_embeds.float(), told.text_embeds.float()  # both of length 1
            if self.taste is None:
                scores = self.clip.logit_scale.exp().float() * (image * text).sum(-1)
            else:
                scores = image
                for weight, bias in self.taste:
                    scores = F.linear(scores, weight, bias)
            total += scores.sum().item()
        return total / len(pictures)


def prepared(pictures: Tensor, size: int) -> Tensor:
    """Pictures (B, H, W, 3) uint8 as CLIP sees them (B, 3, s, s): shorter side at ``size``, its middle, normalised."""
    pixels = pictures.permute(0, 3, 1, 2).float() / 255
    scale = size / min(pixels.shape[-2:])
    shape = [round(side * scale) for side in pixels.shape[-2:]]
    pixels = F.interpolate(pixels, shape, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = ((side - size) // 2 for side in shape)
    pixels = pixels[..., top : top + size, left : left + size]
    mean, deviation = (torch.tensor(x, device=pixels.device).view(3, 1, 1) for x in (MEAN, DEVIATION))
    return (pixels - mean) / deviation


def find(device: torch.device | str = "cpu") -> list[Network]:
    """The scores whose networks are on this machine; often none.

    Raises:
        BadInput: a variable that names something else.
    """
    found = []
    clip = _open(*CLIP, device)
    if clip is not None:
        found.append(Network("CLIP score", clip.name_or_path, clip))
    pick = _open(*PICK, device)
    if pick is not None:
        found.append(Network("PickScore", pick.name_or_path, pick))
    if path := os.environ.get(AESTHETIC, "").strip():
        if clip is None:
            raise BadInput(f"{AESTHETIC} needs the CLIP whose embeddings it scores", path, f"Set {CLIP[0]} too.")
        found.append(Network("aesthetic score", Path(path).name, clip, taste(Path(path), clip, device)))
    return found


def _open(variable: str, name: str, device: torch.device | str) -> Any:
    """A CLIP that the variable names, or that the hub's cache holds; None where there is neither."""
    given = os.environ.get(variable, "").strip()
    if not given and not _cached(name):
        return None
    with importing():
        from transformers import CLIPModel
    hint = "Give the folder of the model: config.json and model.safetensors."
    if given and not Path(given).expanduser().joinpath("config.json").is_file():
        raise BadInput(f"{variable} must name a folder with a CLIP model", given, hint)
    source = str(Path(given).expanduser()) if given else name
    try:
        return CLIPModel.from_pretrained(source, local_files_only=True, use_safetensors=True).eval().to(device)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if not given:  # half of it is in the cache, or only a pickle
            return None
        raise BadInput(f"is no CLIP model that can be opened ({error})", given, hint) from error


def _cached(name: str) -> bool:
    """Whether the hub's cache on this machine has the model; nobody is asked."""
    with importing():
        from transformers.utils import cached_file
    try:
        return cached_file(name, "config.json", local_files_only=True) is not None
    except OSError:
        return False


def taste(path: Path, clip: Any, device: torch.device | str) -> list[tuple[Tensor, Tensor]]:
    """The layers of an aesthetic predictor: LAION's linear one, or the improved one, which is five linear layers.

    Raises:
        BadInput: not a .safetensors file, or layers that do not lead from this CLIP's embedding to one number.
    """
    path = path.expanduser()
    hint = "Convert it: save_file(torch.load(FILE, weights_only=True), 'aesthetic.safetensors')."
    state = named_weights(AESTHETIC, path, hint)
    order = lambda key: [int(part) if part.isdigit() else part for part in key.split(".")]  # noqa: E731
    weights = sorted((key for key in state if key.endswith("weight")), key=order)
    layers = [(state[key], state[key.removesuffix("weight") + "bias"]) for key in weights if
              key.removesuffix("weight") + "bias" in state]  # fmt: skip
    widths = [clip.config.projection_dim, *(len(weight) for weight, _ in layers)]
    if [weight.shape[1:] for weight, _ in layers] != [(width,) for width in widths[:-1]] or widths[-1] != 1:
        raise BadInput(f"does not lead from {widths[0]} numbers, this CLIP's, to one", path, hint)
    return [(weight.to(device, torch.float32), bias.to(device, torch.float32)) for weight, bias in layers]


def table(
    networks: Sequence[Network], sets: Mapping[str, Sequence[np.ndarray]], prompts: Sequence[str]
) -> list[dict[str, Any]]:
    """What a report says: for each network the mean score of each set of pictures; a set is made of parts (n, H, W, 3),
    each with a picture a prompt."""
    return [
        {
            "score": network.score, "network": network.name,
            "means": {what: float(np.mean([network(part, prompts) for part in parts])) for what, parts in sets.items()},
        }
        for network in networks
    ]  # fmt: skip
