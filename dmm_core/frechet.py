"""Distances between two sets of feature vectors: Fréchet (what FID is) and kernel (KID). numpy alone, float64.

Fréchet distance of Gaussians fitted to the sets (Heusel et al., arXiv:1706.08500):
    |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2))
It is biased upwards by few samples, so compare only equal counts and look at the floor. KID (Bińkowski et al.,
arXiv:1801.01401) is the unbiased squared MMD with the kernel (x.y / d + 1)^3; it can come out slightly negative.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

CHUNK = 1024  # rows of a kernel matrix held at once


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean (d,) and unbiased covariance (d, d) of a set of features."""

    mean: np.ndarray
    cov: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Gaussian:
        """The Gaussian of features (n, d); n ≥ 2."""
        x = np.asarray(features, dtype=np.float64)
        if x.ndim != 2 or len(x) < 2:
            raise ValueError(f"expected features (n >= 2, d), got {x.shape}")
        mean = x.mean(0)
        centred = x - mean
        return cls(mean, centred.T @ centred / (len(x) - 1))

    @cached_property
    def root(self) -> np.ndarray:
        """The symmetric square root of the covariance."""
        values, vectors = np.linalg.eigh(self.cov)
        return (vectors * np.sqrt(values.clip(0))) @ vectors.T  # rounding makes zero eigenvalues slightly negative


def frechet(a: Gaussian | np.ndarray, b: Gaussian | np.ndarray) -> float:
    """Fréchet distance of two Gaussians, or of the ones fitted to features (n, d); 0 or more.

    tr (A B)^(1/2) is the sum of the square roots of the eigenvalues of B^(1/2) A B^(1/2), which is symmetric.
    """
    p = a if isinstance(a, Gaussian) else Gaussian.of(a)
    q = b if isinstance(b, Gaussian) else Gaussian.of(b)
    shift = p.mean - q.mean
    common = np.sqrt(np.linalg.eigvalsh(q.root @ p.cov @ q.root).clip(0)).sum()
    return max(0.0, float(shift @ shift + np.trace(p.cov) + np.trace(q.cov) - 2 * common))


def _kernel_sum(x: np.ndarray, y: np.ndarray) -> float:
    """Σ_ij (x_i · y_j / d + 1)^3."""
    parts = (x[i : i + CHUNK] @ y.T / x.shape[1] + 1 for i in range(0, len(x), CHUNK))
    return float(sum(((k * k) * k).sum() for k in parts))


def kernel_mean(x: np.ndarray) -> float:
    """Mean of the kernel over all pairs of DIFFERENT rows of x (n, d)."""
    n = len(x)
    own = (((x * x).sum(1) / x.shape[1] + 1) ** 3).sum()
    return float((_kernel_sum(x, x) - own) / (n * (n - 1)))


def kid(a: np.ndarray, b: np.ndarray, mean_a: float | None = None, mean_b: float | None = None) -> float:
    """Kernel distance of features (n, d) and (m, d); 0 in the mean for sets of one source.

    ``mean_a`` and ``mean_b`` spare :func:`kernel_mean` of a set that meets many others.
    """
    within = (kernel_mean(a) if mean_a is None else mean_a) + (kernel_mean(b) if mean_b is None else mean_b)
    return float(within - 2 * _kernel_sum(a, b) / (len(a) * len(b)))


def kid_matrix(rows: list[np.ndarray], columns: list[np.ndarray]) -> np.ndarray:
    """KID of every row set with every column set, (len(rows), len(columns))."""
    row_means, column_means = [kernel_mean(x) for x in rows], [kernel_mean(x) for x in columns]
    return np.array(
        [
            [kid(a, b, p, q) for b, q in zip(columns, column_means, strict=True)]
            for a, p in zip(rows, row_means, strict=True)
        ]
    )


def frechet_matrix(rows: list[Gaussian], columns: list[Gaussian]) -> np.ndarray:
    """Fréchet distance of every row with every column, (len(rows), len(columns))."""
    return np.array([[frechet(a, b) for b in columns] for a in rows])


def floor(features: np.ndarray, seed: int = 0) -> float:
    """What the distance cannot tell from nothing: one random half of a set (n, d) against the other.

    The halves have n // 2 rows each and share no prompt, both of which make the distance larger: two sets of n rows
    on the SAME prompts can lie below it.
    """
    order = np.random.default_rng(seed).permutation(len(features))
    half = len(features) // 2
    return frechet(features[order[:half]], features[order[half : 2 * half]])


def bootstrap_distances(
    measured: list[list[np.ndarray]], targets: list[np.ndarray], resamples: int, seed: int = 0
) -> np.ndarray:
    """Distances of resampled sets, (resamples, len(measured), N), for error bars.

    Args:
        measured: lists of N sets (n, d); the distance of set j from target j is what is resampled.
        targets: N sets (n, d).

    One draw of rows (with replacement) serves every set at once, because row k of all of them belongs to one prompt.
    Repeated rows make the distances themselves too large: use the spread, not the mean.
    """
    rng = np.random.default_rng(seed)
    out = np.empty((resamples, len(measured), len(targets)))
    for k in range(resamples):
        draw = rng.integers(0, len(targets[0]), len(targets[0]))
        for j, target in enumerate(targets):
            gaussian = Gaussian.of(target[draw])
            out[k, :, j] = [frechet(sets[j][draw], gaussian) for sets in measured]
    return out


def ratio_errors(distances: np.ndarray) -> tuple[tuple[float | None, ...], tuple[float | None, ...]]:
    """Standard deviations of each measured list's ratio to the reference, and of each style's of the student.

    ``distances`` (resamples, 2 or more, N) of :func:`bootstrap_distances`: student, reference, then any others. A ratio
    is the sum over the styles divided by the reference's. None with fewer than 2 resamples.
    """
    if len(distances) < 2:
        return (None,) * distances.shape[1], (None,) * distances.shape[2]
    total = distances.sum(2)
    ratios = (total / total[:, 1:2]).std(0, ddof=1)
    per_style = (distances[:, 0] / distances[:, 1]).std(0, ddof=1)
    return tuple(map(float, ratios)), tuple(map(float, per_style))
