"""DMM files for the tests, and what ``dmm generate``'s own models make of them: written by the tests' Python, which has
diffusers, for the webuis' environments, which have not."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from dmm_core.checkpoint import open_checkpoint
from dmm_core.checkpoint.reader import Tensors
from dmm_core.checkpoint.writer import write_safetensors
from dmm_core.models import load_pipeline
from dmm_core.student import Student

ROOT = Path(__file__).resolve().parents[3]
NAMES = ("ink", "clay", "水彩, wet")  # the last: not Latin, with a comma
OTHERS = ("neon", "pixel")
MIXES = {"one": {"ink": 1.0}, "mix": {"ink": 0.5, "clay": 0.3, "水彩, wet": 0.2}, "more": {"ink": 1.6, "clay": -0.4}}
PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACw="


def make(path: Path, names: tuple[str, ...], seed: int) -> Path:
    """Untrained, but with style vectors as large as trained ones."""
    base = open_checkpoint(ROOT / "mini_family" / "weights" / "base.safetensors")
    student = Student.start(base, base.unet(), names, None, seed)
    generator = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(student.codebook.add_embedding.linear_2.weight, std=0.1, generator=generator)
    info = [{"name": n, "teacher": "t.safetensors", "sha256": "0" * 64, "thumbnail": PIXEL} for n in names]
    return student.save(path, base, style_info=info, title="test")


def authors(path: Path, ours: Path) -> Path:
    """The same tensors as the published single file has them: no metadata at all."""
    tensors = Tensors.open(ours)
    write_safetensors(path, {key: tensors[key] for key in tensors}, {})
    return path


def write(folder: Path) -> None:
    """dmm.safetensors, other.safetensors, authors.safetensors, plain.safetensors and reference.json."""
    ours = make(folder / "dmm.safetensors", NAMES, 0)
    make(folder / "other.safetensors", OTHERS, 1)
    authors(folder / "authors.safetensors", ours)
    plain = ROOT / "mini_family" / "weights" / "base.safetensors"
    (folder / "plain.safetensors").write_bytes(plain.read_bytes())
    pipe = load_pipeline(ours)
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 64, generator=generator)
    told = {"x": x.tolist(), "context": context.tolist(), "t": 400.0, "cases": []}
    with torch.no_grad():
        for name, mix in MIXES.items():
            style = pipe.codebook.style(mix, normalize=True)
            labels = style.expand(2, -1)
            eps = pipe.unet(x, torch.tensor(400.0), context, class_labels=labels).sample
            told["cases"].append({"name": name, "mix": mix, "style": style.tolist(), "eps": eps.tolist()})
    (folder / "reference.json").write_text(json.dumps(told), encoding="utf-8")
