"""Which checkpoints can be merged: one architecture, predictions that can be converted; and what may surprise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dmm_core.checkpoint import Checkpoint
from dmm_core.errors import BadInput


def must_fit(base: Checkpoint, other: Checkpoint) -> None:
    """Raise BadInput unless both have one architecture, prediction type and prompt width."""
    for what, mine, theirs in (
        ("family", base.family, other.family),
        ("UNet shape", _architecture(base), _architecture(other)),
    ):
        if mine != theirs:
            told = (
                f"{theirs} where {base.path.name} is {mine}"
                if isinstance(mine, str)
                else f"another one than {base.path.name}"
            )
            raise BadInput(f"its {what} is {told}", other.path, "Only models of one architecture can be merged.")
    require_convertible(base, other)
    if other.dmm is not None:
        raise BadInput(
            "is a DMM file already, not a teacher", other.path, "Export one of its styles with dmm mix --bake."
        )
    if not other.text_configs:
        raise BadInput("holds no text encoder", other.path, "Use the full checkpoint.")


def same_prediction(a: Checkpoint, b: Checkpoint | None = None) -> bool:
    """Whether two models predict the same, by the same noise schedule; without a second: ε by the ordinary one."""
    return (a.prediction_type, a.zero_snr) == ((b.prediction_type, b.zero_snr) if b else ("epsilon", False))


def require_convertible(base: Checkpoint, other: Checkpoint) -> None:
    """Raise BadInput unless what ``other`` predicts can be told as ``base`` does.

    v becomes ε, and times of a zero-terminal-SNR schedule those with as much noise. Of ε no v is made: that would
    divide the teacher's error by √ᾱ_t, 15 times at the noisiest end.
    """
    hint = "Give the recipe an ordinary epsilon model as base."
    if base.zero_snr:
        raise BadInput("is a zero-terminal-SNR model, by whose schedule no student is trained", base.path, hint)
    if base.prediction_type != "epsilon" and other.prediction_type != base.prediction_type:
        told = f"its prediction type is {other.prediction_type} where {base.path.name} is {base.prediction_type}"
        raise BadInput(told, other.path, hint)


def _architecture(checkpoint: Checkpoint) -> dict[str, Any]:
    """The UNet's configuration less the picture size it is meant for, which is no matter of shapes."""
    return {key: value for key, value in checkpoint.unet_config.items() if key != "sample_size"}


def differences(base: Checkpoint, teachers: Sequence[Checkpoint]) -> list[str]:
    """What can be merged and may surprise: another VAE or text encoder than the base's."""
    others = [teacher for teacher in teachers if teacher.path != base.path]
    found = [
        f"{teacher.path.name} has another text encoder than {base.path.name}, whose text encoder the student keeps."
        for teacher in others
        if not all(_same(base.text_encoder(i), teacher.text_encoder(i)) for i in range(len(base.text_configs)))
    ]
    for teacher in others:
        if not same_prediction(base, teacher):
            what = "a zero-terminal-SNR model" if teacher.zero_snr else "a v-prediction model"
            found.append(f"{teacher.path.name} is {what}: what it predicts is converted; it is left out of averages.")
    if base.vae_config is None:
        return [*found, f"{base.path.name} holds no VAE; the DMM file will have none."]
    mine = base.vae()
    return found + [
        f"{teacher.path.name} has another VAE than {base.path.name}, whose VAE the student keeps."
        for teacher in others
        if teacher.vae_config and not _same(mine, teacher.vae())
    ]


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key].float(), b[key].float()) for key in a)
