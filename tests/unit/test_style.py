"""The codebook: design laws 1 and 2 where no UNet is needed."""

from __future__ import annotations

import pytest
import torch

from dmm_core.errors import StyleError
from dmm_core.style import Codebook, lerp, one_hot
from tests.unit import tiny

NAMES = ("ink", "neon", "clay")


def book() -> Codebook:
    return tiny.codebook(NAMES, dim=32)


def test_style_vector_is_the_mlp_of_the_mixed_row():
    """s = MLP(Σ w e), written out by hand."""
    codebook = book()
    e = 0.7 * codebook.model_embedding.weight[0] + 0.3 * codebook.model_embedding.weight[2]
    one, two = codebook.add_embedding.linear_1, codebook.add_embedding.linear_2
    hidden = one.weight @ e + one.bias
    by_hand = two.weight @ (hidden * torch.sigmoid(hidden)) + two.bias
    torch.testing.assert_close(codebook.style({"ink": 0.7, "clay": 0.3}), by_hand)


def test_one_hot_is_that_style():
    codebook = book()
    for i, name in enumerate(NAMES):
        alone = codebook.add_embedding(codebook.model_embedding.weight[i])
        torch.testing.assert_close(codebook.style(one_hot(NAMES, name)), alone)


def test_mixing_is_linear_before_the_mlp_and_not_after():
    codebook = book()
    mixed = codebook.style({"ink": 1, "neon": 1})
    row = codebook.model_embedding.weight[:2].mean(0)
    torch.testing.assert_close(mixed, codebook.add_embedding(row))
    average_of_styles = (codebook.style({"ink": 1}) + codebook.style({"neon": 1})) / 2
    assert (mixed - average_of_styles).abs().max() > 0.01


def test_order_of_styles_does_not_matter():
    codebook = book()
    a, b = codebook.style({"ink": 0.2, "clay": 0.8}), codebook.style({"clay": 0.8, "ink": 0.2})
    assert torch.equal(a, b)


def test_normalising_divides_by_the_sum():
    codebook = book()
    assert torch.equal(codebook.weights({"ink": 2, "neon": 6}), torch.tensor([0.25, 0.75, 0.0]))
    assert torch.equal(codebook.weights({"ink": 2, "neon": -0.5}, normalize=False), torch.tensor([2, -0.5, 0.0]))


@pytest.mark.parametrize(
    ("mix", "told"),
    [({"inc": 1}, "ink, neon, clay"), ({"ink": 0}, "sum to 0"), ({"ink": 1, "neon": -1}, "sum to 0"),
     ({"ink": float("nan")}, "finite")],
)  # fmt: skip
def test_impossible_mixes_say_what_is_wrong(mix, told):
    with pytest.raises(StyleError, match=told):
        book().weights(mix)


@pytest.mark.parametrize("names", [[], ["a", "a"], ["a", ""]])
def test_impossible_names(names):
    with pytest.raises(StyleError):
        Codebook(names, 8)


def test_folding_keeps_every_sum():
    codebook = book()
    before = codebook(torch.eye(3))
    s0 = codebook.fold()
    torch.testing.assert_close(codebook(torch.eye(3)) + s0, before)
    assert codebook.default_style().abs().max() < 1e-6


def test_stretching_keeps_the_mean_and_moves_all_away_from_it():
    codebook = book()
    styles = lambda: torch.stack([codebook.style(one_hot(NAMES, name)) for name in NAMES])  # noqa: E731
    before, middle = styles(), codebook.style({"ink": 1, "neon": 1})
    codebook.stretch(1.5)
    mean = before.mean(0)
    torch.testing.assert_close(styles(), mean + 1.5 * (before - mean))
    torch.testing.assert_close(codebook.style({"ink": 1, "neon": 1}), mean + 1.5 * (middle - mean))


def test_an_untrained_codebook_changes_nothing():
    assert torch.equal(Codebook(NAMES, 16)(torch.eye(3)), torch.zeros(3, 16))


def test_lerp_ends_are_the_styles():
    a, b = one_hot(NAMES, "ink"), one_hot(NAMES, "neon")
    assert lerp(a, b, 0) == a and lerp(a, b, 1) == b
    assert lerp({"ink": 1}, {"neon": 1}, 0.25) == {"ink": 0.75, "neon": 0.25}
