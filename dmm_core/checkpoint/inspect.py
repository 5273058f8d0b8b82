"""What a file is, as data for a person or a program; nothing here raises for a file that is merely of another kind."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from dmm_core.checkpoint import kinds
from dmm_core.checkpoint.checkpoint import Checkpoint
from dmm_core.checkpoint.errors import CheckpointError
from dmm_core.checkpoint.opening import open_checkpoint, open_tensors
from dmm_core.checkpoint.reader import Tensors
from dmm_core.checkpoint.writer import non_finite


def inspect_file(path: str | Path, check_values: bool = False) -> dict[str, Any]:
    """Everything about a model file or folder that JSON can hold; reads headers only unless values are to be checked.

    Keys: path, kind ("checkpoint", "dmm", "style", "lora" or "unknown"), problem (why it is no usable checkpoint, or
    None), layout, family, dmm, architecture, parameters (per part), dtype (of most of the UNet), dtypes (tensors of
    each type), prediction_type, styles, default_style, metadata, size (bytes), tensors (how many), and non_finite: a
    list of {tensor, count} if ``check_values``, else None.

    Raises:
        MissingFile, PickleRefused, NotSafetensors, TruncatedFile, NoUnetFolder: nothing can be said about such a file.
    """
    path = Path(path)
    tensors, _ = open_tensors(path)
    result: dict[str, Any] = {
        "path": str(path), "kind": "unknown", "problem": None, "layout": None, "family": None, "dmm": None,
        "architecture": None, "parameters": {"all": sum(info.count for info in tensors.info.values())}, "dtype": None,
        "dtypes": dict(Counter(str(info.code) for info in tensors.info.values())), "prediction_type": None,
        "styles": [], "default_style": None, "metadata": dict(tensors.metadata),
        "size": sum(file.stat().st_size for file in {info.path for info in tensors.info.values()}) or _size(path),
        "tensors": len(tensors), "non_finite": None,
    }  # fmt: skip
    if set(tensors) == kinds.STYLE_FILE:
        result |= _style(tensors)
    elif kinds.is_lora(tensors):
        result["kind"] = "lora"
    else:
        try:
            result |= _checkpoint(open_checkpoint(path))
        except CheckpointError as error:
            result["problem"] = str(error)
    if check_values:
        bad = [
            {"tensor": key, "count": count} for key, tensor in tensors.read(tensors) if (count := non_finite(tensor))
        ]
        result["non_finite"] = sorted(bad, key=lambda entry: str(entry["tensor"]))
    return result


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _style(tensors: Tensors) -> dict[str, Any]:
    weights = tensors.metadata.get("dmm.style_weights")
    try:
        parsed = json.loads(weights) if weights else None
    except ValueError:
        parsed = None
    name = tensors.metadata.get("dmm.style_name")
    return {"kind": "style", "styles": [{"name": name}] if name else [], "default_style": parsed}


def _checkpoint(ck: Checkpoint) -> dict[str, Any]:
    counts = {
        name: sum(_count(shape) for shape in ck.shapes(name).values()) for name in ck.parts
    }  # by shapes, not by stored tensors: stacked ones count once
    total = sum(info.count for info in ck.tensors.info.values())
    keep = ("block_out_channels", "layers_per_block", "transformer_layers_per_block", "cross_attention_dim")
    return {
        "kind": "dmm" if ck.dmm else "checkpoint",
        "layout": ck.layout,
        "family": ck.family,
        "dmm": ck.dmm,
        "architecture": {
            "unet": {key: ck.unet_config[key] for key in keep},
            "vae": ck.vae_config
            and {"kind": ck.vae_config["kind"], "latent_channels": ck.vae_config["latent_channels"]},
            "text_encoders": [
                {key: c[key] for key in ("kind", "hidden_size", "num_hidden_layers", "vocab_size")}
                for c in ck.text_configs
            ],
            "style_width": ck.style_width,
        },
        "parameters": {**counts, "other": total - sum(counts.values()), "all": total},
        "dtype": str(ck.dtype).removeprefix("torch."),
        "prediction_type": ck.prediction_type,
        "styles": ck.style_info,
        "default_style": ck.default_style or None,
    }


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count
