"""Whether files can be merged weight by weight: the same tensors with the same shapes, and a meaning in common."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from dmm_core.checkpoint.checkpoint import Checkpoint
from dmm_core.errors import BadInput

SAME = "Only models of one architecture can be merged."
PARTS = {"unet": "UNet", "vae": "VAE", "text_encoder_0": "text encoder", "text_encoder_1": "second text encoder"}


def check_inputs(models: Sequence[Checkpoint], needs: Collection[tuple[int, str]]) -> None:
    """Raise BadInput, naming the first file that does not fit the first one.

    Args:
        needs: (number of a model, part) of all that is read; what is not may differ or be missing.
    """
    first = models[0]
    for number, model in enumerate(models):
        if model.dmm is not None:
            hint = "Export one of its styles with dmm mix --bake, or merge teachers with dmm distill."
            raise BadInput("is a DMM file, whose styles an average would spoil", model.path, hint)
        for what, mine, theirs in (
            ("family", first.family, model.family),
            ("prediction type", first.prediction_type, model.prediction_type),
        ):
            if mine != theirs:
                raise BadInput(f"its {what} is {theirs} where {first.path.name} is {mine}", model.path, SAME)
        for part in first.parts:
            if (number, part) in needs:
                _check_part(first, model, part)


def _check_part(first: Checkpoint, model: Checkpoint, part: str) -> None:
    name = PARTS[part]
    if part not in model.parts:
        block = "vae" if part == "vae" else "text"
        hint = f"blocks: {{{block}: 0}} keeps that of {first.path.name}."
        raise BadInput(f"holds no {name}, and {first.path.name} has one", model.path, hint)
    mine, theirs = first.shapes(part), model.shapes(part)
    for key in mine.keys() | theirs.keys():
        if mine.get(key) != theirs.get(key):
            told = f"{_shape(theirs.get(key))} where {first.path.name} has {_shape(mine.get(key))}"
            raise BadInput(f"its {name} is of another shape: {key} is {told}", model.path, SAME)
    for key in mine:
        info = model.tensors.info[model.parts[part][key].key]
        if not info.dtype.is_floating_point:
            hint = "Give a file in fp16, bf16 or fp32."
            raise BadInput(f"is quantized: {key} has values of type {info.code}", model.path, hint)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))
