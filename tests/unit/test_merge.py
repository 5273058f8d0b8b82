"""Weight-space merges: the methods against hand-computed matrices, and block weights."""

from __future__ import annotations

import pytest
import torch

from dmm_core.errors import BadInput
from dmm_core.merge import add_difference, shares, weighted_average, weighted_sum
from dmm_core.merge_blocks import block_alphas, block_of, unet_blocks
from dmm_core.merge_files import merge_values

A = torch.tensor([[1.0, 2, 3, 4], [0, -1, 0, 1], [8, 4, 2, 1], [0.5, 0, 0, -0.5]])
B = torch.tensor([[3.0, 2, 1, 0], [0, 1, 0, -1], [0, 0, 0, 1], [1.5, 2, 4, 0.5]])
C = torch.tensor([[2.0, 2, 2, 2], [1, 1, 1, 1], [0, 4, 0, 4], [0.5, 0, 0, 0.5]])
UNET = "model.diffusion_model."


# ---------------------------------------------------------------- methods


def test_weighted_sum_by_hand():
    expected = torch.tensor([[1.5, 2, 2.5, 3], [0, -0.5, 0, 0.5], [6, 3, 1.5, 1], [0.75, 0.5, 1, -0.25]])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        merged = weighted_sum([A.to(dtype), B.to(dtype)], [0.75, 0.25])
        assert merged.dtype == torch.float32 and torch.equal(merged, expected)
    expected = torch.tensor([[1.75, 2, 2.25, 2.5], [0.25, 0, 0.25, 0.5], [4, 3, 1, 1.75], [0.75, 0.5, 1, 0]])
    assert torch.equal(weighted_sum([A, B, C], [0.5, 0.25, 0.25]), expected)


def test_add_difference_by_hand():
    expected = torch.tensor([[1.5, 2, 2.5, 3], [-0.5, -1, -0.5, 0], [8, 2, 2, -0.5], [1, 1, 2, -0.5]])
    assert torch.equal(add_difference(A, [B], C, [0.5]), expected)
    both = add_difference(A, [B, C], C, [0.5, 3.0])
    assert torch.equal(both, expected), "C - C adds nothing"
    fine = torch.rand(4, 4)
    assert torch.equal(add_difference(A, [fine], fine, [0.7]), A)


def test_methods_change_no_argument():
    a, b, c = A.clone(), B.clone(), C.clone()
    weighted_sum([a, b], [0.3, 0.7]), add_difference(a, [b], c, [0.3])
    assert torch.equal(a, A) and torch.equal(b, B) and torch.equal(c, C)


def test_shares():
    assert shares([3, 1]) == [0.75, 0.25]
    assert shares([1, 3, 1], alpha=0.5) == [0.5, 0.375, 0.125]
    assert shares([1, 1], alpha=0.0) == [1, 0] and shares([1, 1], alpha=1.5) == [-0.5, 1.5]
    for bad in ({"weights": [1, -1]}, {"weights": [1, 1, -1], "alpha": 0.5}):
        with pytest.raises(ValueError, match="sum to 0"):
            shares(**bad)
    with pytest.raises(ValueError, match="one weight a model"):
        weighted_sum([A, B], [1.0])


def test_weighted_average_of_states():
    merged = weighted_average([lambda: {"w": A}, lambda: {"w": B}], [3, 1])
    assert torch.equal(merged["w"], weighted_sum([A, B], [0.75, 0.25]))


def test_pieces_of_a_cache_make_no_difference(monkeypatch):
    monkeypatch.setattr("dmm_core.merge_files.WORK", 7)
    values, delta = [A.half().flatten(), B.half().flatten()], torch.arange(16.0)
    merged = merge_values(lambda v: weighted_sum(v, [0.75, 0.25]), values, delta, torch.float16)
    assert torch.equal(merged, (weighted_sum([A, B], [0.75, 0.25]).flatten() + delta).half())


# ---------------------------------------------------------------- blocks


@pytest.mark.parametrize(("family", "count", "last"), [("sd15", 25, "out.11"), ("sdxl", 19, "out.8")])
def test_blocks_of_full_models(family, count, last):
    from benchmarks.inspect_large import full_shapes

    names = full_shapes(family)
    blocks = unet_blocks(names)
    assert len(blocks) == count and blocks[-1] == last and blocks[count // 2] == "mid"
    unet = [name for name in names if name.startswith(UNET)]
    assert {block_of(name, "unet", blocks) for name in unet} == set(blocks)
    assert block_of(UNET + "time_embed.2.bias", "unet", blocks) == "in.0"
    assert block_of(UNET + "out.2.weight", "unet", blocks) == last
    assert block_of(UNET + "output_blocks.5.1.norm.weight", "unet", blocks) == "out.5"
    assert block_of("first_stage_model.x", "vae", blocks) == "vae"
    assert block_of("anything", "text_encoder_1", blocks) == "text"


def test_block_alphas():
    blocks = ["in.0", "in.1", "mid", "out.0", "out.1"]
    assert block_alphas({"mid": 0.9, "vae": 0.0}, 0.4, blocks) == {
        "in.0": 0.4, "in.1": 0.4, "mid": 0.9, "out.0": 0.4, "out.1": 0.4, "text": 0.4, "vae": 0.0,
    }  # fmt: skip
    assert list(block_alphas([0.1, 0.2, 0.3, 0.4, 0.5], 0.7, blocks).values()) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.7]
    with pytest.raises(BadInput, match=r"5 numbers \(2 in, mid, 2 out\) for these models, got 25"):
        block_alphas([0.5] * 25, 0.5, blocks)
    with pytest.raises(BadInput, match=r"no block 'in.11'.*in.0 to in.1, mid, out.0 to out.1, text and vae"):
        block_alphas({"in.11": 1.0}, 0.5, blocks)
