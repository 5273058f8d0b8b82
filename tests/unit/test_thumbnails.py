"""Pictures of the styles inside the DMM file: small enough, of one subject, and made from what the teachers drew."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from dmm_core.checkpoint import inspect_file, open_checkpoint
from dmm_core.checkpoint.metadata import THUMBNAIL_LIMIT, read_styles
from dmm_core.data import Pool
from dmm_core.recipe import recipe_from_dict
from dmm_core.report.thumbnails import SIDE, data_uri, shared_subject
from dmm_core.run import prepare
from tests.unit import tiny

PIXEL = "data:image/png;base64,AA"


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


@pytest.mark.parametrize("thumbnail", [
    "http://example.org/x.png", "//example.org/x.png", "data:text/html,x", " data:image/png;base64,AA",
    "data:image/png;base64," + "A" * THUMBNAIL_LIMIT, ["data:image/png;base64,AA"], None,
])  # fmt: skip
def test_of_a_file_that_came_from_elsewhere_only_pictures_are_read(tmp_path, thumbnail):
    """Whoever shows them, an address would be fetched by the user's browser."""
    named = [{"name": "ink", "teacher": "t", "thumbnail": thumbnail}, {"name": "clay", "thumbnail": PIXEL}]
    read = read_styles(tmp_path, {"dmm.styles": json.dumps(named)}, 2, "sd15", 64)
    assert read == [{"name": "ink", "teacher": "t"}, named[1]]


def test_an_opened_file_has_no_address_for_a_picture(tmp_path):
    path = tmp_path / "from elsewhere.safetensors"
    info = [{"name": name, "thumbnail": "http://example.org/x.png"} for name in tiny.NAMES]
    tiny.write_tiny_dmm(path)
    tensors, metadata = {}, {}
    with safe_open(str(path), "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata() | {"dmm.styles": json.dumps(info)}
    save_file(tensors, str(path), metadata)
    assert open_checkpoint(path).style_info == [{"name": name} for name in tiny.NAMES]
    assert "example.org" not in json.dumps(inspect_file(path)["styles"])


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


def test_the_users_own_pictures_are_not_shown(tmp_path):
    """One teacher has one pool of latents; so have pictures, which a file must not give away."""
    tiny.write_tiny(tmp_path / "teacher.safetensors")
    folder = tmp_path / "private"
    folder.mkdir()
    Image.new("RGB", (64, 64), (200, 0, 0)).save(folder / "a.png")
    (folder / "a.txt").write_text("me", encoding="utf-8")
    merge = prepare(
        recipe_from_dict({
            "teachers": [str(tmp_path / "teacher.safetensors")], "out": str(tmp_path / "out.safetensors"),
            "data": {"kind": "images", "path": str(folder), "size": 64},
            "train": {"steps": 1, "batch": 1, "precision": "fp32", "device": "cpu"},
        })
    )  # fmt: skip
    assert not any("thumbnail" in entry for entry in open_checkpoint(merge.save()).style_info)
