"""Prompts, captioned images, caches and sampling."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from dmm_core.data import (
    NOISY,
    LatentData,
    Pool,
    built_in_prompts,
    captioned_images,
    encode_images,
    load_cache,
    read_prompts,
    save_cache,
)
from dmm_core.diffusion import SCHEDULER, add_noise, alphas_cumprod, predict_x0
from dmm_core.errors import BadInput
from dmm_core.models import load_pipeline
from dmm_core.sample import decode, encode, sample
from dmm_core.tokens import tokenize
from tests.unit import tiny


def test_schedule_is_that_of_diffusers():
    oracle = DDPMScheduler(**SCHEDULER)
    torch.testing.assert_close(alphas_cumprod(), oracle.alphas_cumprod)
    x0, noise, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    x_t = add_noise(x0, noise, t)
    torch.testing.assert_close(x_t, oracle.add_noise(x0, noise, t))
    torch.testing.assert_close(predict_x0(x_t, noise, t), x0, rtol=1e-3, atol=1e-3)


def test_tokens_are_clips():
    assert tokenize(["a photo of a cat"])[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    assert tokenize(["a photo of a cat"], pad_with_zero=True)[0, 6:9].tolist() == [49407, 0, 0]
    assert tokenize(["word " * 200]).shape == (1, 77)


def test_an_exclamation_mark_is_no_padding():
    """SDXL's second encoder pads with 0, which is "!" at the end of no word."""
    one, two = tokenize(["wow! hello!", ""]), tokenize(["wow! hello!", ""], pad_with_zero=True)
    end = 49407
    length = one[0].tolist().index(end) + 1
    assert torch.equal(one[0, :length], two[0, :length]) and 256 in one[0]
    assert (one[0, length:] == end).all() and (two[0, length:] == 0).all()
    assert two[1].tolist() == [49406, end] + [0] * 75


def test_prompts_file(tmp_path):
    file = tmp_path / "prömpts.txt"
    file.write_text("# comment\na cat\n\n  ein Bär \n", encoding="utf-8")
    assert read_prompts(file) == ["a cat", "ein Bär"]
    file.write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(BadInput, match="no prompt"):
        read_prompts(file)
    with pytest.raises(BadInput, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")


def test_built_in_prompts_vary_and_repeat():
    assert built_in_prompts(50, 1) == built_in_prompts(50, 1) != built_in_prompts(50, 2)
    assert len(set(built_in_prompts(200))) > 190


def picture(path, color=(200, 10, 10)):
    Image.new("RGB", (80, 64), color).save(path)


def test_captions_beside_pictures_and_in_a_table(tmp_path):
    picture(tmp_path / "a b.png")
    with pytest.raises(BadInput, match=r"a b\.txt"):
        list(captioned_images(tmp_path))
    (tmp_path / "a b.txt").write_text("a red thing\n", encoding="utf-8")
    assert list(captioned_images(tmp_path)) == [(tmp_path / "a b.png", "a red thing")]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a b.png", "text": "red"}\n', encoding="utf-8")
    assert list(captioned_images(tmp_path)) == [(tmp_path / "a b.png", "red")]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "no.png", "text": "red"}\n{', encoding="utf-8")
    with pytest.raises(BadInput, match=r"line 1 names no\.png"):
        list(captioned_images(tmp_path))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a b.png", "text": null}\n', encoding="utf-8")
    with pytest.raises(BadInput, match=r"line 1 has a text that is none"):
        list(captioned_images(tmp_path))
    (tmp_path / "metadata.jsonl").write_bytes("ö".encode("latin-1"))
    with pytest.raises(BadInput, match="no UTF-8") as told:
        list(captioned_images(tmp_path))
    assert "metadata.jsonl" in str(told.value)
    with pytest.raises(BadInput, match="no folder"):
        list(captioned_images(tmp_path / "none"))


def test_image_folder_becomes_latents_and_a_broken_picture_is_named(tmp_path):
    path = tmp_path / "tiny.safetensors"
    tiny.write_tiny(path)
    pipe = load_pipeline(path)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("x", "y"):
        picture(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("same", encoding="utf-8")
    prompts, (pool,) = encode_images(pipe.vae, folder, [(8, 8)])
    assert prompts == ["same"] and pool.latents.shape == (2, 4, 8, 8) and pool.prompt.tolist() == [0, 0]
    (folder / "y.png").write_bytes(b"no picture")
    with pytest.raises(BadInput, match=r"y\.png"):
        encode_images(pipe.vae, folder, [(8, 8)])


def test_a_share_of_the_noisy_rows_is_of_any_teachers_pictures():
    """Without noise the latents tell whose they are; so do their prompts."""
    pools = [Pool(torch.full((4, 4, 8, 8), float(i)), torch.full((4,), i)) for i in range(3)]

    def owners(foreign: float, pools=pools) -> tuple[torch.Tensor, torch.Tensor]:
        batch = LatentData(["a", "b", "c"], pools, 0.0, foreign).draw(1, 9000, torch.Generator().manual_seed(0))
        a = alphas_cumprod()[batch.t].view(-1, 1, 1, 1)
        x0 = ((batch.x_t - (1 - a).sqrt() * batch.noise) / a.sqrt()).mean((1, 2, 3))
        assert torch.equal(x0.round().long(), batch.prompt)
        noisy = batch.t >= NOISY
        return (batch.prompt[part].bincount(minlength=3) / part.sum() for part in (noisy, ~noisy))

    for foreign, mine in ((0.0, 1.0), (0.3, 0.8), (1.0, 1 / 3)):
        noisy, rest = owners(foreign)
        rest_of = (1 - mine) / 2
        assert rest.tolist() == [0, 1, 0] and torch.allclose(noisy, torch.tensor([rest_of, mine, rest_of]), atol=0.03)
    assert next(iter(owners(1.0, [(), pools[1], ()]))).tolist() == [0, 1, 0], "styles without latents have none to show"


def test_one_pool_for_all_has_no_others():
    data = LatentData(["a"], [Pool(torch.randn(4, 4, 8, 8), torch.zeros(4, dtype=torch.long))], 0.1, 1.0)
    plain = LatentData(["a"], data.pools, 0.1)
    one, two = (d.draw(2, 5, torch.Generator().manual_seed(0)) for d in (data, plain))
    assert torch.equal(one.x_t, two.x_t) and torch.equal(one.prompt, two.prompt)


def test_cache_round_trip(tmp_path):
    pool = Pool(torch.randn(3, 4, 8, 8).half(), torch.tensor([1, 0, 1]))
    save_cache(tmp_path / "c.safetensors", ["a", "ß"], [(pool,), (pool,)])
    prompts, pools = load_cache(tmp_path / "c.safetensors")
    maps = Path("/proc/self/maps")  # Windows could not delete a file that tensors are mapped to
    assert not maps.exists() or str(tmp_path) not in maps.read_text(encoding="utf-8")
    assert prompts == ["a", "ß"] and len(pools) == 2 and torch.equal(pools[1][0].latents, pool.latents)
    (tmp_path / "c.safetensors").write_bytes(b"12345678")
    with pytest.raises(BadInput, match="no cache"):
        load_cache(tmp_path / "c.safetensors")


def test_sampling_depends_on_seed_and_style_and_repeats(tmp_path):
    path = tmp_path / "dmm.safetensors"
    tiny.write_tiny_dmm(path)
    pipe = load_pipeline(path)
    kwargs = {"seeds": [3], "steps": 2, "cfg_scale": 2.0}
    a = sample(pipe, ["a cat"], style=pipe.codebook.style({"ink": 1}), **kwargs)
    assert torch.equal(a, sample(pipe, ["a cat"], style=pipe.codebook.style({"ink": 1}), **kwargs))
    assert not torch.allclose(a, sample(pipe, ["a cat"], style=pipe.codebook.style({"水彩": 1}), **kwargs), atol=1e-3)
    assert not torch.allclose(a, sample(pipe, ["a cat"], **kwargs | {"seeds": [4]}), atol=1e-3)
    pixels = decode(pipe.vae, a)
    assert pixels.shape == (1, 64, 64, 3) and pixels.dtype == np.uint8
    assert encode(pipe.vae, pixels).shape == (1, 4, 8, 8)
