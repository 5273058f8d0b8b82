"""Picture by picture: on features whose answers are known; in a whole report it is in test_separation.py."""

from __future__ import annotations

import numpy as np
import pytest

from dmm_core.likeness import astray, unlikeness


def features(seed: int, styles: int = 2, n: int = 400, d: int = 6) -> list[np.ndarray]:
    """Each style's pictures: what the prompt says (the same for every seed) and what the seed says."""
    prompts = np.random.default_rng(99).normal(0, 3, (n, d))
    rng = np.random.default_rng(seed)
    return [prompts + style + rng.normal(0, 1 + style, (n, d)) for style in range(styles)]


def test_the_teacher_itself_is_0_and_its_other_seeds_are_1():
    a, b = features(1), features(2)
    assert unlikeness(a, a, b)["mean"] == unlikeness(a, a, b)["error"] == 0
    assert unlikeness(b, a, b) | {"astray": 0} == {
        "mean": 1.0, "error": 0.0, "per_style": [1.0, 1.0], "astray": 0,
    }  # fmt: skip


def test_a_third_seed_is_about_1_within_its_error():
    told = unlikeness(features(3), features(1), features(2))
    assert 0 < told["error"] < 0.05 and abs(told["mean"] - 1) < 3 * told["error"]


def test_half_of_the_way_to_another_seed_is_a_quarter_in_each_style():
    a, b = features(1), features(2)
    half = [(x + y) / 2 for x, y in zip(a, b, strict=True)]
    assert unlikeness(half, a, b)["per_style"] == pytest.approx([0.25, 0.25])


def test_pictures_of_other_prompts_are_far_though_the_set_is_the_same():
    """What Fréchet distances cannot see: every picture is there, beside another prompt."""
    a, b = features(1), features(2)
    assert unlikeness([x[::-1] for x in a], a, b)["mean"] > 4


def test_pictures_in_a_wrong_style_are_counted():
    """Nearer to what another style's teacher draws of the same prompt and seed, whatever the sets look like."""
    a, b = features(1), features(2, styles=3)
    assert astray(a, a) == [[], []] == unlikeness(a, a, b[:2])["astray"]
    drawn = [x.copy() for x in a]
    drawn[1][[3, 7]] = a[0][[3, 7]] + 0.01
    assert astray(drawn, a) == [[], [3, 7]]
    assert astray([a[0]], [a[0]]) == [[]], "with one style there is no other"
