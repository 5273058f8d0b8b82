"""Pictures of the styles inside the DMM file: small enough, of one subject, and made from what the teachers drew."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from dmm_core.checkpoint import open_checkpoint
from dmm_core.checkpoint.metadata import THUMBNAIL_LIMIT
from dmm_core.data import Pool
from dmm_core.recipe import recipe_from_dict
from dmm_core.report.thumbnails import SIDE, data_uri, shared_subject
from dmm_core.run import prepare
from tests.unit import tiny


def picture_of(uri: str) -> np.ndarray:
    head, data = uri.split(",", 1)
    assert head == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.mark.parametrize("size", [(64, 64), (512, 768), (1024, 1024)])
def test_fits_whatever_the_picture(size):
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)  # what compresses worst
    uri = data_uri(noise)
    shown = picture_of(uri)
    assert len(uri) <= THUMBNAIL_LIMIT
    assert max(shown.shape[:2]) <= SIDE
    assert shown.shape[0] / shown.shape[1] == pytest.approx(size[0] / size[1], rel=0.05)


def test_looks_like_the_picture():
    red = np.full((64, 64, 3), (200, 30, 40), np.uint8)
    assert picture_of(data_uri(red)).shape == red.shape, "a small picture is not enlarged"
    assert np.abs(picture_of(data_uri(red)).astype(int) - red).max() <= 6


def test_one_subject_for_all_where_there_is_one():
    assert shared_subject([torch.tensor([3, 5, 2]), torch.tensor([9, 5, 3]), torch.tensor([5, 3, 3])]) == [0, 2, 1]
    assert shared_subject([torch.tensor([3, 5]), torch.tensor([4, 6])]) == [0, 0]


def test_a_merge_puts_them_into_its_file(tmp_path):
    paths = [tmp_path / f"teacher {seed}.safetensors" for seed in (0, 50)]
    for seed, path in zip((0, 50), paths, strict=True):
        tiny.write_tiny(path, seed=seed)
    merge = prepare(
        recipe_from_dict({
            "teachers": [{"path": str(path), "name": path.stem} for path in paths],
            "out": str(tmp_path / "out.safetensors"),
            "data": {"latents_per_teacher": 2, "steps": 1, "cfg_scale": 1.0, "size": 64},
            "train": {"steps": 1, "batch": 1, "precision": "fp32", "device": "cpu"},
        })
    )  # fmt: skip
    entries = open_checkpoint(merge.save()).style_info
    shown = [picture_of(entry["thumbnail"]) for entry in entries]
    assert [entry["name"] for entry in entries] == ["teacher 0", "teacher 50"]
    assert shown[0].shape == shown[1].shape == (64, 64, 3)
    assert not np.array_equal(*shown), "each teacher's own"
    assert not any("thumbnail" in entry for entry in merge.style_info()), "the report shows whole pictures"
    merge.distillation.data.pools = [(Pool(torch.zeros(1, 4, 8, 8), torch.zeros(1)),)]  # pictures of no teacher's
    assert not any("thumbnail" in entry for entry in merge.shown_styles())
