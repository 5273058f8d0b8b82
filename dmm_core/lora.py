"""LoRA files: what they hold, and what they add to a checkpoint's weights.

Read are LoRA and LoCon (linear layers and convolutions, also with a middle factor) in kohya's names (``lora_unet_…``,
``lora_te_…``; the UNet in diffusers' or LDM's names) and in diffusers' and peft's (``unet.….lora_A.weight``). Every key
of a file is used, or named in the error.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmm_core.checkpoint import keymap
from dmm_core.checkpoint.checkpoint import Checkpoint
from dmm_core.checkpoint.errors import BadMetadata, CheckpointError, NonFinite
from dmm_core.checkpoint.kinds import is_lora
from dmm_core.checkpoint.opening import open_tensors
from dmm_core.checkpoint.reader import Tensors
from dmm_core.checkpoint.writer import non_finite

ROLES = {  # end of a key → its role
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".lora_mid.weight": "mid", ".alpha": "alpha",
    ".lora_A.weight": "down", ".lora_B.weight": "up", ".lora_A.default.weight": "down", ".lora_B.default.weight": "up",
    ".lora.down.weight": "down", ".lora.up.weight": "up", "_lora.down.weight": "down", "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
}  # fmt: skip
OTHERS = {  # what a key matches → what has such keys
    r"\.hada_": "LoHa", r"\.lokr_": "LoKr", r"\.dora_scale|lora_magnitude_vector": "DoRA", r"\.oft_": "OFT",
    r"\.[ab][12]\.weight$": "GLoRA", r"\.on_input$": "IA3", r"\.[wb]_norm$": "a LoRA with norms",
    r"\.diff(_b)?$": "a file of full differences (or a DMM style file)", r"^bundle_emb\.": "a LoRA with embeddings",
    r"\.lora_(bias|B\.bias)$": "a LoRA with biases",
}  # fmt: skip
ADAPTER = "lora_adapter_metadata"  # where diffusers writes peft's settings
COMPONENTS = {"unet": "unet", "text_encoder_0": "text_encoder", "text_encoder_1": "text_encoder_2"}
Target = tuple[str, str]  # part of a checkpoint, key in diffusers' or transformers' names


class LoraError(CheckpointError):
    """A LoRA file of a kind that is not read here, or that does not fit the checkpoint."""


@dataclass(eq=False)
class Lora:
    """An opened file: for every layer, by the file's name for it, the key of each role (down, up, mid, alpha)."""

    path: Path
    tensors: Tensors
    layers: dict[str, dict[str, str]]
    settings: dict[str, Any] = field(default_factory=dict)  # peft's, e.g. {"unet.lora_alpha": 8}

    def check_finite(self) -> None:
        """Read every tensor. Raises NonFinite, naming the first bad one."""
        for key in self.tensors:
            if bad := non_finite(self.tensors[key]):
                raise NonFinite(self.path, key, bad)

    def fit(self, ck: Checkpoint) -> FittedLora:
        """Find the checkpoint's tensor for every layer, and check shapes.

        Raises:
            LoraError: a layer that the checkpoint has not, or of another shape; the key is named.
        """
        names = layer_names(ck)
        found: dict[Target, dict[str, str]] = {}
        for layer, keys in self.layers.items():
            target = names.get(_modern(layer))
            if target is None:
                lost = sum(_modern(other) not in names for other in self.layers)
                count = "a layer" if lost == 1 else f"{lost} of {len(self.layers)} layers"
                what = f"has {count} for which {ck.path.name} ({ck.family}) has no place: {keys['down']}"
                raise LoraError(what, self.path, "Use a LoRA made for this architecture.")
            if target in found:
                raise LoraError(f"has two layers for {target[1]}: {keys['down']} is the second", self.path)
            self._check_shape(keys, ck.shapes(target[0])[target[1]], ck)
            found[target] = keys
        return FittedLora(self, found)

    def _check_shape(self, keys: dict[str, str], wanted: tuple[int, ...], ck: Checkpoint) -> None:
        down, up = self.tensors.shape(keys["down"]), self.tensors.shape(keys["up"])
        rank, fits = (down[0] if down else 0), False
        made: tuple[int, ...] = ()
        if len(down) > 1 and "mid" in keys:
            mid = self.tensors.shape(keys["mid"])
            made = (up[0], down[1], *mid[2:])
            fits = mid[:2] == (rank, rank) and math.prod(down) == rank * down[1] and math.prod(up) == up[0] * rank
        elif len(down) > 1 and len(up) > 1:
            made = (up[0], *down[1:])
            fits = math.prod(up) == up[0] * rank
        if not fits or _bare(made) != _bare(wanted):
            told = f"{keys['down']} {list(down)} and {keys['up']} {list(up)} do not make {list(wanted)}"
            raise LoraError(f"{told}, the shape in {ck.path.name}", self.path, "Use a LoRA made for this architecture.")


@dataclass(eq=False)
class FittedLora:
    """A LoRA and the checkpoint's tensors that it changes."""

    lora: Lora
    layers: dict[Target, dict[str, str]]

    def delta(self, part: str, key: str, strength: float = 1.0) -> Tensor | None:
        """strength · alpha / rank · up @ down, float32, flattened to (out, rest); None where nothing changes.

        Args:
            part, key: as in ``Checkpoint.parts``.

        Raises:
            NonFinite: the file has NaN or infinity.
        """
        keys = self.layers.get((part, key))
        if keys is None or not strength:
            return None
        values = {role: self._read(name) for role, name in keys.items()}
        down, up = values["down"], values["up"]
        scale = strength * self._scale(part, key, down.shape[0], values.get("alpha"))
        if "mid" in values:
            # (i, p) up, (i, j, h, w) mid, (j, q) down: LoCon's "tucker" form
            made = torch.einsum("pi,ijhw,jq->pqhw", up.flatten(1), values["mid"], down.flatten(1))
            return made.flatten(1).mul_(scale)
        return (up.flatten(1) @ down.flatten(1)).mul_(scale)

    def _read(self, key: str) -> Tensor:
        tensor = self.lora.tensors[key]
        if bad := non_finite(tensor):
            raise NonFinite(self.lora.path, key, bad)
        return tensor.float()

    def _scale(self, part: str, key: str, rank: int, alpha: Tensor | None) -> float:
        """alpha / rank; 1 where the file says nothing. peft's settings count where a layer has no alpha of its own."""
        if alpha is not None:
            return float(alpha) / rank
        settings, component = self.lora.settings, COMPONENTS[part]
        value = settings.get(f"{component}.lora_alpha")
        for pattern, own in (settings.get(f"{component}.alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?{pattern}", key.removesuffix(".weight")):
                value = own
        if value is None:
            return 1.0
        return float(value) / (math.sqrt(rank) if settings.get(f"{component}.use_rslora") else rank)

    def apply(self, part: str, state: Mapping[str, Tensor], strength: float = 1.0) -> dict[str, Tensor]:
        """A part's state dict with the LoRA in it; changed tensors are new ones of the same type, the rest the same."""
        changed = dict(state)
        for key, tensor in state.items():
            if (delta := self.delta(part, key, strength)) is not None:
                changed[key] = (tensor.float() + delta.reshape(tensor.shape).to(tensor.device)).to(tensor.dtype)
        return changed


def open_lora(path: str | Path) -> Lora:
    """Read a LoRA file's header.

    Raises:
        LoraError: no LoRA, a relative that is not read here (LoHa, LoKr, DoRA …), or keys that make no layer.
        MissingFile, PickleRefused, NotSafetensors, TruncatedFile
    """
    path = Path(path)
    if path.is_dir():
        raise LoraError("is a folder", path, "Give the LoRA's .safetensors file.")
    tensors, _ = open_tensors(path)
    for pattern, kind in OTHERS.items():
        if key := next((key for key in tensors if re.search(pattern, key)), None):
            raise LoraError(f"is {kind}, which is not read here: {key}", path, "Only LoRA and LoCon files are.")
    if not is_lora(tensors):
        raise LoraError("holds no LoRA", path, "Give a LoRA file; checkpoints are named as models or teachers.")
    layers: dict[str, dict[str, str]] = {}
    for key in tensors:
        end = max((end for end in ROLES if key.endswith(end)), key=len, default="")
        if not end:
            raise LoraError(f"has a key that is no part of a LoRA: {key}", path)
        keys = layers.setdefault(key.removesuffix(end), {})
        if ROLES[end] in keys:
            raise LoraError(f"has {key} beside {keys[ROLES[end]]}", path)
        keys[ROLES[end]] = key
    for keys in layers.values():
        if not {"down", "up"} <= keys.keys():
            raise LoraError(f"lacks the other half of {next(iter(keys.values()))}", path, "Get the file again.")
    return Lora(path, tensors, layers, _settings(path, tensors.metadata))


def _settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if ADAPTER not in metadata:
        return {}
    try:
        settings = json.loads(metadata[ADAPTER])
    except ValueError as error:
        raise BadMetadata(path, ADAPTER, "is not valid JSON") from error
    if not isinstance(settings, dict):
        raise BadMetadata(path, ADAPTER, "should be a JSON object")
    if any(key.endswith("use_dora") and value for key, value in settings.items()):
        raise LoraError("is DoRA, which is not read here (by its metadata)", path, "Only LoRA and LoCon files are.")
    return settings


def _modern(layer: str) -> str:
    """A layer's name as diffusers has it since 2023: attention processors had their own before."""
    layer = layer.removeprefix("base_model.model.").replace(".processor.", ".")
    return layer + ".0" if layer.endswith(".to_out") else layer


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the 1×1 of a convolution that is a matrix."""
    return shape[:2] if all(n == 1 for n in shape[2:]) else shape


def layer_names(ck: Checkpoint) -> dict[str, Target]:
    """Every name that LoRA files have for a layer of this checkpoint → its part and key."""
    found: dict[str, Target] = {}
    for part in ck.parts:
        if part in COMPONENTS:
            for key, shape in ck.shapes(part).items():
                if len(shape) > 1 and key.endswith(".weight"):
                    found |= dict.fromkeys(_names(ck, part, key), (part, key))
    return found


def _names(ck: Checkpoint, part: str, key: str) -> Iterator[str]:
    layer = key.removesuffix(".weight")
    flat = layer.replace(".", "_")
    if part != "unet":
        second = ck.text_configs[int(part.removeprefix("text_encoder_"))]["kind"] == "clip_g"
        yield f"text_encoder{'_2' if second else ''}.{layer}"
        yield f"lora_te{2 if second else 1}_{flat}"
        if not second:
            yield f"lora_te_{flat}"
        return
    ldm = keymap.unet_map([key], ck.unet_config)[key].removesuffix(".weight")
    yield from (f"lora_unet_{flat}", f"lora_unet_{ldm.replace('.', '_')}", f"lycoris_{flat}")
    yield from (f"unet.{layer}", f"diffusion_model.{ldm}", layer)
