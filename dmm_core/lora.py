"""LoRA files: what they hold, and what they add to a checkpoint's weights.

Read are LoRA and LoCon (linear layers and convolutions, also with a middle factor), LoHa and LoKr, each also as DoRA,
in kohya's names (``lora_unet_…``, ``lora_te_…``; the UNet in diffusers' or LDM's names) and in diffusers' and peft's
(``unet.….lora_A.weight``). What they add is in ``adapters.py``. Every key of a file is used, or named in the error.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmm_core import adapters
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
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up", ".dora_scale": "dora_scale",
    **{f".lora_magnitude_vector{end}": "magnitude" for end in ("", ".weight", ".default", ".default.weight")},
    **{f".{role}": role for form in adapters.FORMS for role in form if "_w" in role or "_t" in role},
}  # fmt: skip
OTHERS = {  # what a key matches → what has such keys
    r"\.oft_": "OFT",
    r"\.[ab][12]\.weight$": "GLoRA", r"\.on_input$": "IA3", r"\.[wb]_norm$": "a LoRA with norms",
    r"\.diff(_b)?$": "a file of full differences (or a DMM style file)", r"^bundle_emb\.": "a LoRA with embeddings",
    r"\.lora_(bias|B\.bias)$": "a LoRA with biases",
}  # fmt: skip
READ = "LoRA, LoCon, LoHa, LoKr and DoRA files are."
ADAPTER = "lora_adapter_metadata"  # where diffusers writes peft's settings
PEFT = "base_model.model."  # begins the keys of a file that peft itself has saved
COMPONENTS = {"unet": "unet", "text_encoder_0": "text_encoder", "text_encoder_1": "text_encoder_2"}
Target = tuple[str, str]  # part of a checkpoint, key in diffusers' or transformers' names


class LoraError(CheckpointError):
    """A LoRA file of a kind that is not read here, or that does not fit the checkpoint."""


@dataclass(eq=False)
class Lora:
    """An opened file: for every layer, by the file's name for it, the key of each role (down, up, alpha …)."""

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
                what = f"has {count} for which {ck.path.name} ({ck.family}) has no place: {_first(keys)}"
                raise LoraError(what, self.path, "Use a LoRA made for this architecture.")
            if target in found:
                raise LoraError(f"has two layers for {target[1]}: {_first(keys)} is the second", self.path)
            self._check_shape(keys, ck.shapes(target[0])[target[1]], ck)
            found[target] = keys
        return FittedLora(self, found)

    def _check_shape(self, keys: dict[str, str], wanted: tuple[int, ...], ck: Checkpoint) -> None:
        shapes = {role: self.tensors.shape(key) for role, key in keys.items()}
        values = {role: torch.empty(shape, device="meta") for role, shape in shapes.items()}
        try:
            fits = tuple(adapters.change(values).shape) == (wanted[0], math.prod(wanted[1:]))
            adapters.magnitude(values, wanted)
        except (RuntimeError, ValueError, IndexError):
            fits = False
        if not fits:
            made = " and ".join(f"{keys[role]} {list(shape)}" for role, shape in shapes.items() if role != "alpha")
            told = f"{made} do not make {list(wanted)}, the shape in {ck.path.name}"
            raise LoraError(told, self.path, "Use a LoRA made for this architecture.")


@dataclass(eq=False)
class FittedLora:
    """A LoRA and the checkpoint's tensors that it changes."""

    lora: Lora
    layers: dict[Target, dict[str, str]]

    def needs_weight(self, part: str, key: str) -> bool:
        """Whether ``delta`` depends on the weight that it is added to."""
        return bool(adapters.DORA & self.layers.get((part, key), {}).keys())

    def delta(self, part: str, key: str, strength: float = 1.0, weight: Tensor | None = None) -> Tensor | None:
        """What is added to a weight, float32, flattened to (out, rest); None where nothing changes.

        Args:
            part, key: as in ``Checkpoint.parts``.
            weight: what it is added to, (out, …); needed where ``needs_weight``.

        Raises:
            NonFinite: the file has NaN or infinity.
        """
        keys = self.layers.get((part, key))
        if keys is None or not strength:
            return None
        values = {role: self._read(name) for role, name in keys.items()}
        made = adapters.change(values).mul_(self._scale(part, key, adapters.rank(values), values.get("alpha")))
        if self.needs_weight(part, key):
            assert weight is not None, f"{key}: DoRA needs the weight"
            norms = adapters.magnitude(values, weight.shape)
            assert norms is not None
            made = adapters.rescale(weight.float().cpu(), made.reshape(weight.shape), norms).flatten(1)
        return made.mul_(strength)

    def _read(self, key: str) -> Tensor:
        tensor = self.lora.tensors[key]
        if bad := non_finite(tensor):
            raise NonFinite(self.lora.path, key, bad)
        return tensor.float()

    def _scale(self, part: str, key: str, rank: int | None, alpha: Tensor | None) -> float:
        """alpha / rank; 1 where the file says nothing. peft's settings count where a layer has no alpha of its own."""
        if rank is None:
            return 1.0
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
            if (delta := self.delta(part, key, strength, tensor)) is not None:
                changed[key] = (tensor.float() + delta.reshape(tensor.shape).to(tensor.device)).to(tensor.dtype)
        return changed


def open_lora(path: str | Path) -> Lora:
    """Read a LoRA file's header.

    Raises:
        LoraError: no LoRA, a relative that is not read here (OFT, GLoRA …), or keys that make no layer.
        MissingFile, PickleRefused, NotSafetensors, TruncatedFile
    """
    path = Path(path)
    if path.is_dir():
        raise LoraError("is a folder", path, "Give the LoRA's .safetensors file.")
    tensors, _ = open_tensors(path)
    for pattern, kind in OTHERS.items():
        if key := next((key for key in tensors if re.search(pattern, key)), None):
            raise LoraError(f"is {kind}, which is not read here: {key}", path, READ)
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
    settings = _settings(path, tensors.metadata) or _beside(path, tensors)
    dora = any(key.endswith("use_dora") and value for key, value in settings.items())
    for keys in layers.values():
        whole = adapters.complete(keys)
        if whole is None:
            raise LoraError(f"has keys that make no layer together: {', '.join(keys.values())}", path)
        if not whole:
            raise LoraError(f"lacks the other half of {_first(keys)}", path, "Get the file again.")
    if dora and not any(adapters.DORA & keys.keys() for keys in layers.values()):
        raise LoraError("is DoRA by its metadata, and lacks DoRA's norms", path, "Get the file again.")
    return Lora(path, tensors, layers, settings)


def _first(keys: Mapping[str, str]) -> str:
    return next(iter(keys.values()))


def _settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if ADAPTER not in metadata:
        return {}
    try:
        settings = json.loads(metadata[ADAPTER])
    except ValueError as error:
        raise BadMetadata(path, ADAPTER, "is not valid JSON") from error
    if not isinstance(settings, dict):
        raise BadMetadata(path, ADAPTER, "should be a JSON object")
    return settings


def _beside(path: Path, keys: Iterable[str]) -> dict[str, Any]:
    """peft's own settings of a file that peft has saved: they lie in another one, ``adapter_config.json``."""
    config = path.with_name("adapter_config.json")
    if not any(key.startswith(PEFT) for key in keys) or not config.is_file():
        return {}
    try:
        told = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoraError("cannot be read as JSON", config, "Get it again: it has the LoRA's alpha.") from error
    if not isinstance(told, dict):
        raise LoraError("should be a JSON object", config, "Get it again: it has the LoRA's alpha.")
    return {f"{component}.{name}": value for component in set(COMPONENTS.values()) for name, value in told.items()}


def _modern(layer: str) -> str:
    """A layer's name as diffusers has it since 2023: attention processors had their own before."""
    layer = layer.removeprefix(PEFT).replace(".processor.", ".")
    return layer + ".0" if layer.endswith(".to_out") else layer


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
