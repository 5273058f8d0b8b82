"""What our files say about themselves: ``modelspec.*`` (Stability's Model Metadata Standard 1.0.1) and ``dmm.*``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dmm_core.checkpoint.errors import BadMetadata, StyleCount
from dmm_core.checkpoint.writer import HASH_KEY, NO_HASH

FORMAT = "1"
ARCHITECTURES = {"sd15": "stable-diffusion-v1", "sdxl": "stable-diffusion-xl-v1-base"}
IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"
FEW_STEP = "dmm.few_step"  # of a student for 4 to 8 sampling steps: the guidance scale that it has in itself
FEW_STEP_HINT = "Made for few steps: draw in 4 to 8 at CFG 1, sampler Euler, schedule SGM Uniform."
THUMBNAIL_LIMIT = 16 * 1024  # bytes of the data URI
# The published models' styles in order; their files hold no names. Known by family and count, at full width.
PUBLISHED = {
    ("sd15", 8): ("JuggernautReborn", "MajicmixRealisticV7", "EpicRealismV5", "RealisticVisionV5", "MajicmixFantasyV3",
                  "MinimalismV2", "RealCartoon3dV17", "AWPaintingV1.4"),
    ("sdxl", 4): ("JuggernautXLV10", "LEOSAMXLV7", "GhostXLV1", "AnimagineV3.1"),
}  # fmt: skip
PUBLISHED_WIDTH = 1280


def prediction_type(name: str | None) -> str | None:
    """``epsilon`` or ``v_prediction`` for any of the spellings in use (modelspec's is ``v``); None for others."""
    known = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
    return known.get((name or "").lower().replace("-", "_"))


def modelspec(family: str, prediction: str, given: Mapping[str, str], title: str) -> dict[str, str]:
    """The standard's keys. What is ``given`` stays (date and title too, so that saving again gives equal bytes), but
    not what follows from the model itself: architecture, prediction type and hash."""
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction_type must be epsilon or v_prediction, got {prediction!r}")
    size = 512 if family == "sd15" else 1024
    defaults = {
        "modelspec.title": title,
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    return {
        **defaults,
        **given,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": ARCHITECTURES[family],
        "modelspec.implementation": IMPLEMENTATION,
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else "epsilon",
        HASH_KEY: NO_HASH,
    }


def to_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=False, allow_nan=False)


def styles_json(path: Path, names: Sequence[str], info: Sequence[Mapping[str, Any]]) -> str:
    """``dmm.styles``: one entry a codebook row, in its order.

    Raises:
        StyleCount, BadMetadata: other names than the codebook's, or a thumbnail that is too large.
    """
    if len(info) != len(names):
        raise StyleCount(path, len(info), len(names))
    for name, entry in zip(names, info, strict=True):
        if entry.get("name") != name:
            raise BadMetadata(path, "dmm.styles", f"has {entry.get('name')!r} in the place of the style {name!r}")
        if len(str(entry.get("thumbnail", ""))) > THUMBNAIL_LIMIT:
            raise BadMetadata(
                path, "dmm.styles", f"has a thumbnail of more than {THUMBNAIL_LIMIT // 1024} KiB for {name!r}"
            )
    return to_json([dict(entry) for entry in info])


def _parse(path: Path, metadata: Mapping[str, str], key: str, kind: type) -> Any:
    try:
        value = json.loads(metadata[key])
    except ValueError as error:
        raise BadMetadata(path, key, "is not valid JSON") from error
    if not isinstance(value, kind):
        raise BadMetadata(path, key, f"should be a JSON {'list' if kind is list else 'object'}")
    return value


def is_thumbnail(value: object) -> bool:
    """Whether a page may show it: a picture that is in the file and small, never an address that it would fetch."""
    return isinstance(value, str) and value.startswith("data:image/") and len(value) <= THUMBNAIL_LIMIT


def read_styles(path: Path, metadata: Mapping[str, str], rows: int, family: str, width: int) -> list[dict[str, Any]]:
    """One entry with a ``name`` for each of the codebook's rows; without metadata the published or numbered names.

    A thumbnail that is none (``is_thumbnail``) is left out.

    Raises:
        StyleCount, BadMetadata
    """
    if "dmm.styles" not in metadata:
        names = PUBLISHED.get((family, rows)) if width == PUBLISHED_WIDTH else None
        return [{"name": name} for name in names or [f"style {i + 1}" for i in range(rows)]]
    styles = _parse(path, metadata, "dmm.styles", list)
    if not all(isinstance(s, dict) and isinstance(s.get("name"), str) and s["name"] for s in styles):
        raise BadMetadata(path, "dmm.styles", "should be a list of objects with a name")
    if len(styles) != rows:
        raise StyleCount(path, len(styles), rows)
    if len({s["name"] for s in styles}) < len(styles):
        raise BadMetadata(path, "dmm.styles", "has the same name twice")
    return [{k: v for k, v in s.items() if k != "thumbnail" or is_thumbnail(v)} for s in styles]


def read_default(path: Path, metadata: Mapping[str, str], names: Sequence[str]) -> dict[str, float]:
    """The default style's weights; the mean of all styles where nothing is said."""
    if "dmm.default_style" not in metadata:
        return dict.fromkeys(names, 1 / len(names))
    default = _parse(path, metadata, "dmm.default_style", dict)
    good = all(k in names and isinstance(v, (int, float)) and math.isfinite(v) for k, v in default.items())
    if not good or abs(sum(default.values())) < 1e-6:
        raise BadMetadata(path, "dmm.default_style", "should give weights of this file's styles that do not sum to 0")
    return {name: float(weight) for name, weight in default.items()}


def read_resolution(metadata: Mapping[str, str]) -> int | None:
    """The smaller side of ``modelspec.resolution``, e.g. 512; None where it says nothing usable."""
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", metadata.get("modelspec.resolution", ""))
    return min(int(n) for n in match.groups() if n) if match else None
