"""The student is a stock UNet plus one sum: design laws 1 to 5 with a UNet in play."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmm_core.checkpoint import open_checkpoint, write_checkpoint, write_diffusers, write_dmm
from dmm_core.cli import main
from dmm_core.models import build_unet, load_pipeline
from dmm_core.student import bake, live_style
from tests.unit import tiny

X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.tensor([10, 700])
CONTEXT = torch.randn(2, 77, 64, generator=torch.Generator().manual_seed(2))
MIX = {"ink": 0.7, "néon": 0.5, "水彩": -0.2}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def dmm(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("a folder é") / "student 水.safetensors"
    return Path(tiny.write_tiny_dmm(path, dtype=torch.float32) or path)


def plain(path: Path):
    """The file's UNet as a reader sees it that knows nothing of DMM."""
    checkpoint = open_checkpoint(path)
    return build_unet(checkpoint.unet_config, checkpoint.unet(), torch.float32, path, styled=False)


@torch.no_grad()
def test_the_sum_of_the_paper(dmm):
    """class_labels ≡ time_embed(t) + MLP(Σ w e), the sum put together by hand before the first block."""
    pipe = load_pipeline(dmm)
    s = pipe.codebook.style(MIX)
    unet = plain(dmm)
    seen = []
    handle = unet.time_embedding.register_forward_hook(lambda m, i, out: seen.append(out))
    unet(X, T, CONTEXT)
    handle.remove()
    emb = seen[0] + s
    handle = unet.time_embedding.register_forward_hook(lambda m, i, out: emb)
    by_hand = unet(X, T, CONTEXT).sample
    handle.remove()
    torch.testing.assert_close(pipe.unet(X, T, CONTEXT, class_labels=s.expand(2, -1)).sample, by_hand, **CLOSE)


@torch.no_grad()
def test_class_labels_hook_and_baked_bias_agree(dmm):
    pipe = load_pipeline(dmm)
    s = pipe.codebook.style(MIX)
    labels = pipe.unet(X, T, CONTEXT, class_labels=s.expand(2, -1)).sample
    unet = plain(dmm)
    before = unet(X, T, CONTEXT).sample
    with live_style(unet, s):
        torch.testing.assert_close(unet(X, T, CONTEXT).sample, labels, **CLOSE)
    assert torch.equal(unet(X, T, CONTEXT).sample, before), "leaving the hook must remove its effect"
    assert (labels - before).abs().max() > 1e-3, "the style must do something"
    bake(unet, s)
    torch.testing.assert_close(unet(X, T, CONTEXT).sample, labels, **CLOSE)


@torch.no_grad()
def test_default_style_is_the_plain_checkpoint(dmm):
    """Law 1: a reader that ignores the DMM keys shows the default style; with nothing added, bit for bit."""
    pipe = load_pipeline(dmm)
    expected = plain(dmm)(X, T, CONTEXT).sample
    zero = pipe.unet(X, T, CONTEXT, class_labels=torch.zeros(2, pipe.codebook.dim)).sample
    assert (zero - expected).abs().max() == 0.0
    default = pipe.codebook.default_style().expand(2, -1)
    torch.testing.assert_close(pipe.unet(X, T, CONTEXT, class_labels=default).sample, expected, **CLOSE)


@torch.no_grad()
def test_rows_of_a_batch_may_differ_in_style(dmm):
    pipe = load_pipeline(dmm)
    styles = torch.stack([pipe.codebook.style({"ink": 1}), pipe.codebook.style({"水彩": 1})])
    both = pipe.unet(X, T, CONTEXT, class_labels=styles).sample
    for row in (0, 1):
        one = slice(row, row + 1)
        alone = pipe.unet(X[one], T[one], CONTEXT[one], class_labels=styles[one]).sample
        torch.testing.assert_close(both[one], alone, **CLOSE)


@torch.no_grad()
def test_style_file_by_hand_equals_the_live_style(dmm, tmp_path):
    """What a stock LoRA loader does with ``diff_b`` at strength 1: add it to the bias of ``time_embed.2``."""
    out = tmp_path / "mix ü.safetensors"
    arguments = [f"{name}={weight}" for name, weight in MIX.items()]
    assert main(["mix", str(dmm), "--style", *arguments, "--out", str(out)]) == 0
    lora = load_file(out)
    assert set(lora) == {"lora_unet_time_embed_2.diff", "lora_unet_time_embed_2.diff_b"}
    assert torch.equal(lora["lora_unet_time_embed_2.diff"], torch.zeros(1))
    assert out.stat().st_size < 6000
    unet, pipe = plain(dmm), load_pipeline(dmm)
    unet.time_embedding.linear_2.bias += lora["lora_unet_time_embed_2.diff_b"]
    live = pipe.unet(X, T, CONTEXT, class_labels=pipe.codebook.style(MIX).expand(2, -1)).sample
    torch.testing.assert_close(unet(X, T, CONTEXT).sample, live, **CLOSE)


@torch.no_grad()
def test_baked_checkpoint_is_ordinary_and_equals_the_live_style(dmm, tmp_path):
    out = tmp_path / "baked.safetensors"
    assert main(["mix", str(dmm), "--style", "ink=1", "--bake", "--out", str(out)]) == 0
    assert open_checkpoint(out).dmm is None
    pipe = load_pipeline(dmm)
    live = pipe.unet(X, T, CONTEXT, class_labels=pipe.codebook.style({"ink": 1}).expand(2, -1)).sample
    torch.testing.assert_close(load_pipeline(out).unet(X, T, CONTEXT).sample, live, **CLOSE)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("layout", ["single file", "folder"])
@torch.no_grad()
def test_published_layouts_give_what_the_equations_say(layout, family, tmp_path):
    """Law 4 at tiny size: the authors' keys, unfolded, against emb = time_embed(t) + MLP(e_i) by hand.

    SDXL's sum also holds the embedding of the pooled text and the time ids; its style MLP is ``add_embedding2`` there.
    """
    model = tiny.model(family, dtype=torch.float32)
    book = tiny.codebook()
    path = tmp_path / "published"
    if layout == "folder":
        write_diffusers(path, **model, codebook=book)
    else:
        path = path.with_suffix(".safetensors")
        write_checkpoint(path, **model, metadata={})
        extra = {f"model.diffusion_model.{k}": v.contiguous() for k, v in book.state_dict().items()}
        if family == "sdxl":
            extra = {k.replace("add_embedding.", "add_embedding2."): v for k, v in extra.items()}
        save_file(load_file(path) | extra, path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.dmm == "authors"
    codebook = checkpoint.codebook()
    styled = build_unet(checkpoint.unet_config, checkpoint.unet(), torch.float32, path, styled=True)
    inputs = [X, T, CONTEXT]
    also = {}
    if family == "sdxl":
        rng = torch.Generator().manual_seed(4)
        inputs[2] = torch.randn(2, 77, 128, generator=rng)
        ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(2, 1)
        also = {"added_cond_kwargs": {"text_embeds": torch.randn(2, 64, generator=rng), "time_ids": ids}}
    unet = plain(path)
    for i in range(len(book)):
        e = book.model_embedding.weight[i]
        one, two = book.add_embedding.linear_1, book.add_embedding.linear_2
        s = two.weight @ torch.nn.functional.silu(one.weight @ e + one.bias) + two.bias
        with live_style(unet, s):
            expected = unet(*inputs, **also).sample
        mix = {checkpoint.styles[i]: 1.0}
        got = styled(*inputs, class_labels=codebook.style(mix).expand(2, -1), **also).sample
        assert ((got - expected).abs().max() / expected.abs().max()) <= 1e-5
        assert (got - unet(*inputs, **also).sample).abs().max() > 1e-3, "the style must do something"


def test_dmm_file_saved_again_is_byte_equal(dmm, tmp_path):
    """Law 5."""
    ck = open_checkpoint(dmm)
    again = tmp_path / "again.safetensors"
    write_dmm(
        again, family=ck.family, unet=ck.unet(), vae=ck.vae(), text_encoders=[ck.text_encoder(0)],
        codebook=ck.codebook(),
        style_info=ck.style_info, extra_metadata=ck.metadata, vae_config=ck.vae_config,
    )  # fmt: skip
    assert again.read_bytes() == dmm.read_bytes()
