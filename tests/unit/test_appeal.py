"""CLIP score, PickScore and aesthetic score: against transformers' own pieces.

In a report, from end to end, they are in test_separation.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dmm_core.errors import BadInput
from dmm_core.features import appeal
from dmm_core.tokens import tokenize
from tests.unit import tiny

PROMPTS = ["a red apple", "two cats on a long bench", "a house"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return tiny.write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(autouse=True)
def nothing_else(monkeypatch, tmp_path_factory):
    """No score of the machine that runs the tests."""
    for name in (appeal.CLIP[0], appeal.PICK[0], appeal.AESTHETIC):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(appeal, "_cached", lambda name: False)


def some_pictures(count: int = 3, shape: tuple[int, int] = (64, 96)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape, 3), dtype=np.uint8)


def test_without_weights_there_are_no_scores():
    assert appeal.find() == []


def test_half_of_a_model_in_the_cache_is_none(monkeypatch):
    monkeypatch.setattr(appeal, "_cached", lambda name: name == "nobody/has-this")
    monkeypatch.setattr(appeal, "CLIP", (appeal.CLIP[0], "nobody/has-this"))
    assert appeal.find() == []


def test_pictures_are_prepared_as_transformers_does():
    from transformers import CLIPImageProcessor

    smooth = np.asarray(
        torch.nn.functional.interpolate(
            torch.from_numpy(some_pictures(2, (8, 12))).permute(0, 3, 1, 2).float(), (64, 96), mode="bicubic"
        ).clamp(0, 255).permute(0, 2, 3, 1).byte()
    )  # fmt: skip
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    theirs = torch.as_tensor(np.stack([processor(picture)["pixel_values"][0] for picture in smooth]))
    mine = appeal.prepared(torch.from_numpy(smooth), 32)
    assert mine.shape == (2, 3, 32, 32)
    assert (mine - theirs).abs().max() < 0.03  # they round to bytes between: 1/255 / 0.26


def test_scores_are_what_clip_says(clip, monkeypatch):
    monkeypatch.setenv(appeal.CLIP[0], str(clip))
    monkeypatch.setenv(appeal.PICK[0], str(clip))
    score, pick = appeal.find()
    assert (score.score, pick.score) == ("CLIP score", "PickScore")
    pictures = some_pictures(20)
    prompts = [PROMPTS[i % 3] for i in range(20)]
    with torch.no_grad():
        pixels = appeal.prepared(torch.from_numpy(pictures), 32)
        told = score.clip(input_ids=tokenize(prompts), pixel_values=pixels)
    expected = told.logits_per_image.diagonal().mean().item()
    assert abs(expected) > 0.01
    assert score(pictures, prompts) == pytest.approx(expected, rel=1e-5) == pick(pictures, prompts)


@pytest.mark.parametrize("shapes", [[(1, 16)], [(8, 16), (4, 8), (1, 4)]])
def test_aesthetic_layers_are_put_in_their_order(clip, monkeypatch, tmp_path, shapes):
    generator = torch.Generator().manual_seed(0)
    layers = [(torch.randn(s, generator=generator), torch.randn(s[0], generator=generator)) for s in shapes]
    names = ["" if len(layers) == 1 else f"layers.{2 * i + 8}." for i in range(len(layers))]  # 8, 10, 12
    state = {f"{n}{k}": v for n, pair in zip(names, layers, strict=True) for k, v in zip(("weight", "bias"), pair)}  # noqa: B905
    save_file(state, tmp_path / "taste.safetensors")
    monkeypatch.setenv(appeal.CLIP[0], str(clip))
    monkeypatch.setenv(appeal.AESTHETIC, str(tmp_path / "taste.safetensors"))
    *_, network = appeal.find()
    pictures = some_pictures()
    with torch.no_grad():
        pixels = appeal.prepared(torch.from_numpy(pictures), 32)
        x = network.clip(input_ids=tokenize(PROMPTS), pixel_values=pixels).image_embeds
    for weight, bias in layers:
        x = x @ weight.T + bias
    assert network(pictures, PROMPTS) == pytest.approx(x.mean().item(), rel=1e-4)


def test_what_is_named_and_is_not_there(clip, monkeypatch, tmp_path):
    monkeypatch.setenv(appeal.CLIP[0], str(tmp_path))
    with pytest.raises(BadInput, match="DMM_CLIP must name a folder with a CLIP model"):
        appeal.find()
    (tmp_path / "config.json").write_text((clip / "config.json").read_text())
    with pytest.raises(BadInput, match="is no CLIP model that can be opened"):
        appeal.find()
    monkeypatch.setenv(appeal.AESTHETIC, str(tmp_path / "taste.pth"))
    monkeypatch.delenv(appeal.CLIP[0])
    with pytest.raises(BadInput, match="Set DMM_CLIP too"):
        appeal.find()
    monkeypatch.setenv(appeal.CLIP[0], str(clip))
    with pytest.raises(BadInput, match=r"must name an existing \.safetensors"):
        appeal.find()
    save_file({"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}, tmp_path / "taste.safetensors")
    monkeypatch.setenv(appeal.AESTHETIC, str(tmp_path / "taste.safetensors"))
    with pytest.raises(BadInput, match="does not lead from 16 numbers"):
        appeal.find()
