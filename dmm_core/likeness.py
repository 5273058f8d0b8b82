"""Does the student draw what its teacher draws of the same prompt and the same noise? Picture by picture, numpy alone.

Distances between sets of pictures say whether the student draws as its teacher does; they are blind to a picture that
is in the style but shows something else, and some hundred pictures leave them uncertain by several percent. Two models
that predict the same noise draw the same picture, so that each pair of pictures is a measurement of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 200  # for the error


def unlikeness(
    drawn: Sequence[np.ndarray], reference: Sequence[np.ndarray], others: Sequence[np.ndarray], seed: int = 0
) -> dict[str, object]:
    """How far pictures are from the teachers' of the same prompt and seed, in units of what another seed changes.

    Args:
        drawn: features (n, d) of each style's pictures, of a student or of another model.
        reference: the teachers', with the prompts and seeds of ``drawn``.
        others: the teachers', with the same prompts and other seeds.
        seed: of the resampling.

    Returns:
        ``per_style``: Σ_k |drawn_k − reference_k|² / Σ_k |others_k − reference_k|², 0 for the teacher itself and about
        1 for a picture that has the style and the prompt in common with the teacher's and nothing else; ``mean`` over
        styles and its ``error``, one standard deviation over resamples of the prompts; ``astray``, what that of the
        same name says.
    """
    squares = np.stack([[((x - r) ** 2).sum(1) for x, r in zip(part, reference, strict=True)]
                        for part in (drawn, others)])  # (2, styles, n)  # fmt: skip
    pick = np.random.default_rng(seed).integers(squares.shape[2], size=(RESAMPLES, squares.shape[2]))
    mine, other = squares[:, :, pick].sum(3)  # (styles, resamples)
    whole = squares[0].sum(1) / squares[1].sum(1)
    return {
        "mean": float(whole.mean()),
        "error": float((mine / other).mean(0).std(ddof=1)),
        "per_style": [float(value) for value in whole],
        "astray": astray(drawn, reference),
    }


def astray(drawn: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> list[list[int]]:
    """Of each style the numbers of the pictures that are nearer to what another style's teacher draws of their seed.

    Args:
        drawn, reference: features (n, d) of each style's pictures, as ``unlikeness`` takes them.
    """
    apart = np.array([[((x - r) ** 2).sum(1) for r in reference] for x in drawn])  # (drawn, teachers, n)
    return [np.flatnonzero(rows.argmin(0) != own).tolist() for own, rows in enumerate(apart)]
