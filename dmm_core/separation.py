"""Can the styles be told apart? A classifier of the teachers' pictures is asked about the student's. numpy alone.

Distances between sets say how near a style is as a whole; this says of how many single pictures one sees the style.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SHRINKAGE = 0.1  # towards a round covariance, so that few pictures suffice


class StyleClassifier:
    """Linear discriminant analysis: the nearest class mean, by the covariance that all classes have in common.

    Args:
        classes: features (n, d) of each style.
    """

    def __init__(self, classes: Sequence[np.ndarray]) -> None:
        self.means = np.stack([features.mean(0) for features in classes])
        centred = np.concatenate([features - mean for features, mean in zip(classes, self.means, strict=True)])
        cov = centred.T @ centred / max(1, len(centred) - len(classes))
        size = np.trace(cov) / len(cov)
        cov = (1 - SHRINKAGE) * cov + (SHRINKAGE * size + 1e-12) * np.eye(len(cov))
        self.weights = np.linalg.solve(cov, self.means.T)  # (d, classes)
        self.bias = -0.5 * (self.means * self.weights.T).sum(1)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """The class of each row of features (n, d): (n,)."""
        return (features @ self.weights + self.bias).argmax(1)

    def recognised(self, rows: Sequence[np.ndarray]) -> list[float]:
        """Of each style's features the share that is taken for this style."""
        return [float((self(features) == i).mean()) for i, features in enumerate(rows)]


def separation(
    student: Sequence[np.ndarray], teachers: Sequence[np.ndarray], reference: Sequence[np.ndarray]
) -> dict[str, object] | None:
    """The style-separation score: of how many pictures the style is recognised, as shares.

    Args:
        student, teachers, reference: features (n, d) of each style, as in ``evaluate_pictures``; the classifier learns
            from ``teachers``, and ``reference`` (the same teachers, other seeds) says what can be had.

    Returns:
        ``student``, ``teachers``, ``per_style`` (student), ``chance``, which is also what one picture for all styles
        gets, e.g. the weight average's; None for a single style.
    """
    if len(teachers) < 2:
        return None
    classify = StyleClassifier(teachers)
    mine = classify.recognised(student)
    return {
        "student": float(np.mean(mine)),
        "teachers": float(np.mean(classify.recognised(reference))),
        "per_style": mine,
        "chance": 1 / len(teachers),
    }
