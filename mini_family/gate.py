"""Are the teachers worth distilling? Each must be nearest its own drawn style, and beat every other model there.

Rows are models (the base, the control: the base trained on for as long on its own pictures, and the teachers), columns
the real drawings. All on held-out subjects, with bootstrap errors.

    python -m mini_family.gate --data build/mini --out docs/gate.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny

from dmm_core.conditioning import encode_prompts
from dmm_core.features import Extractor
from dmm_core.frechet import Gaussian, bootstrap_distances, frechet
from dmm_core.sample import decode, initial_noise, sample_latents
from mini_family.demo import CFG_SCALE, SAMPLER_STEPS
from mini_family.family import LATER, TEACHERS
from mini_family.models import fresh_models, load_models
from mini_family.names import caption, subjects

MODELS = ("base", "control", *TEACHERS, *LATER)
STYLES = ("flat", *TEACHERS, *LATER)


@torch.no_grad()
def drawn_by(data: Path, model: str, vae: AutoencoderTiny, names: list[str], seed: int) -> np.ndarray:
    """Pictures (names, 64, 64, 3) of one trained model."""
    unet, text = fresh_models()
    load_models(data / "models" / f"{model}.safetensors", unet.eval(), text.eval())
    context, empty = (encode_prompts(text, prompts) for prompts in ([caption(name) for name in names], [""]))
    noise = initial_noise([seed + i for i in range(len(names))])
    return decode(vae, sample_latents(unet, context, noise, steps=SAMPLER_STEPS, cfg_scale=CFG_SCALE, negative=empty))


def real(data: Path, style: str, names: list[str], variants: int) -> np.ndarray:
    file = np.load(data / f"{style}.npz")
    rows = [list(file["names"]).index(name) for name in names]
    return file["pictures"][rows][:, :variants].reshape(-1, 64, 64, 3)


def gate(data: Path, variants: int = 4, resamples: int = 100) -> dict:
    """The matrix of distances with errors, and who wins each row and column."""
    names, extractor = subjects(held=True), Extractor.find()
    vae = AutoencoderTiny.from_pretrained(data / "vae").eval()
    repeated = [name for name in names for _ in range(variants)]
    made = [extractor(drawn_by(data, model, vae, repeated, 10_000)) for model in MODELS]
    drawn = [extractor(real(data, style, names, variants)) for style in STYLES]
    matrix = np.array([[frechet(Gaussian.of(m), Gaussian.of(d)) for d in drawn] for m in made])
    errors = np.zeros_like(matrix)
    for j, target in enumerate(drawn):
        for i, rows in enumerate(made):
            errors[i, j] = np.std(bootstrap_distances([[rows]], [target], resamples))
    own = {model: STYLES.index("flat" if model in ("base", "control") else model) for model in MODELS}
    verdict = {}
    for i, model in enumerate(MODELS[2:], 2):
        j = own[model]
        others = [k for k in range(len(MODELS)) if k != i]
        row = all(matrix[i, j] + errors[i, j] < matrix[i, k] - errors[i, k] for k in range(len(STYLES)) if k != j)
        column = all(matrix[i, j] + errors[i, j] < matrix[k, j] - errors[k, j] for k in others)
        verdict[model] = {"own_row": bool(row), "own_column": bool(column)}
    return {
        "models": MODELS, "styles": STYLES, "extractor": extractor.name, "pictures": len(repeated),
        "matrix": matrix.round(3).tolist(), "errors": errors.round(3).tolist(), "wins": verdict,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    result = gate(args.data)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["wins"], indent=1))


if __name__ == "__main__":
    main()
