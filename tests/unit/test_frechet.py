"""Distances against independent oracles: closed forms, scipy's matrix square root, a plain loop."""

from __future__ import annotations

import numpy as np
import pytest

from dmm_core.frechet import (
    Gaussian,
    bootstrap_distances,
    floor,
    frechet,
    frechet_matrix,
    kid,
    kid_matrix,
    ratio_errors,
)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def test_closed_form_in_one_dimension():
    a, b = (Gaussian(np.array([m]), np.array([[v]])) for m, v in ((1.0, 4.0), (3.0, 9.0)))
    assert frechet(a, b) == pytest.approx((1 - 3) ** 2 + (2 - 3) ** 2)


def test_closed_form_of_diagonal_gaussians(rng):
    m, n, v, w = (rng.uniform(0.1, 3, 6) for _ in range(4))
    expected = ((m - n) ** 2).sum() + ((np.sqrt(v) - np.sqrt(w)) ** 2).sum()
    assert frechet(Gaussian(m, np.diag(v)), Gaussian(n, np.diag(w))) == pytest.approx(expected)


@pytest.mark.parametrize("count", [200, 12])  # 12 < 20 features: singular covariances
def test_matches_scipy_square_root(rng, count):
    linalg = pytest.importorskip("scipy.linalg")
    a, b = rng.normal(size=(count, 20)), rng.normal(0.3, 1.4, (count, 20)) @ rng.normal(size=(20, 20))
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = linalg.sqrtm(cov_a @ cov_b)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root.real)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-5)


def test_is_symmetric_and_zero_for_itself(rng):
    a, b = rng.normal(size=(50, 8)), rng.normal(1, 2, (50, 8))
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-9)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)


def test_refuses_too_few_rows():
    with pytest.raises(ValueError, match="n >= 2"):
        Gaussian.of(np.zeros((1, 4)))


def test_kid_matches_plain_loop(rng):
    a, b = rng.normal(size=(7, 5)), rng.normal(0.5, 1, (9, 5))

    def k(x, y):
        return (float(x @ y) / 5 + 1) ** 3

    within_a = np.mean([k(a[i], a[j]) for i in range(7) for j in range(7) if i != j])
    within_b = np.mean([k(b[i], b[j]) for i in range(9) for j in range(9) if i != j])
    between = np.mean([k(x, y) for x in a for y in b])
    assert kid(a, b) == pytest.approx(within_a + within_b - 2 * between)
    assert kid_matrix([a, b], [b])[0, 0] == pytest.approx(kid(a, b))


def test_kid_is_unbiased_where_frechet_is_not(rng):
    pairs = [rng.normal(size=(2, 12, 6)) for _ in range(400)]
    values = [kid(a, b) for a, b in pairs]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))
    assert min(frechet(a, b) for a, b in pairs) > 0


def test_kid_in_chunks(rng, monkeypatch):
    a, b = rng.normal(size=(23, 5)), rng.normal(size=(17, 5))
    whole = kid(a, b)
    monkeypatch.setattr("dmm_core.frechet.CHUNK", 4)
    assert kid(a, b) == pytest.approx(whole)


def test_matrix_has_rows_and_columns_in_place(rng):
    sets = [rng.normal(k, 1, (60, 4)) for k in range(3)]
    gaussians = [Gaussian.of(x) for x in sets]
    matrix = frechet_matrix(gaussians[:2], gaussians)
    assert matrix.shape == (2, 3)
    assert matrix[1, 2] == pytest.approx(frechet(sets[1], sets[2]))


def test_floor_is_repeatable_and_small(rng):
    x = rng.normal(size=(400, 4))
    assert floor(x, 1) == floor(x, 1) != floor(x, 2)
    assert 0 < floor(x) < 0.2 < frechet(x, x + 1)


def test_bootstrap_keeps_prompts_paired(rng):
    """A set and its exact copy as student and reference: their ratio is 1 in every resample, whatever is drawn."""
    x, target = rng.normal(size=(30, 4)), rng.normal(0.2, 1, (30, 4))
    draws = bootstrap_distances([[x], [x.copy()]], [target], 20, seed=3)
    assert draws.shape == (20, 2, 1)
    assert np.ptp(draws[:, 0]) > 0
    assert ratio_errors(draws) == ((0.0, 0.0), (0.0,))


def test_bootstrap_error_has_the_size_of_the_real_spread(rng):
    def draw(count=150):
        target = rng.normal(size=(count, 3))
        return [rng.normal(0.8, 1, (count, 3))], [rng.normal(0.4, 1, (count, 3))], [target]

    fresh = [frechet(s[0], t[0]) / frechet(r[0], t[0]) for s, r, t in (draw() for _ in range(200))]
    told = [
        ratio_errors(bootstrap_distances([s, r], t, 60, seed=k))[0][0]
        for k, (s, r, t) in enumerate(draw() for _ in range(12))
    ]
    assert 0.5 < np.mean(told) / np.std(fresh) < 2


def test_no_errors_without_resamples(rng):
    x = [rng.normal(size=(10, 2))]
    assert ratio_errors(bootstrap_distances([x, x, x], x, 0)) == ((None,) * 3, (None,))
