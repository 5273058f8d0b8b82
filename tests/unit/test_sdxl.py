"""SDXL: both text encoders, the pooled embedding and the sizes reach the UNet; it is sampled, distilled and resumed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from dmm_core.checkpoint import open_checkpoint
from dmm_core.conditioning import Context, encode_prompts, predict
from dmm_core.diffusion import SCHEDULER
from dmm_core.models import Pipeline, load_pipeline
from dmm_core.run import prepare
from dmm_core.sample import sample
from dmm_core.tokens import clip_tokenizer
from tests.unit.merges import after, built, furthest, recipe, tiny_teachers

PROMPTS = ["a red apple", "", "two cats on a very long bench"]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> list[Path]:
    return tiny_teachers(tmp_path_factory.mktemp("teachers"), 2, "sdxl")


@pytest.fixture(scope="module")
def pipe(teachers) -> Pipeline:
    return load_pipeline(teachers[0])


@pytest.fixture(scope="module")
def oracle(pipe):
    """diffusers' own pipeline around the same modules."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    with_zeros = copy.deepcopy(clip_tokenizer())
    with_zeros.pad_token = "!"
    return StableDiffusionXLPipeline(
        pipe.vae, *pipe.text_encoders, clip_tokenizer(), with_zeros, pipe.unet,
        EulerDiscreteScheduler(**SCHEDULER), force_zeros_for_empty_prompt=False, add_watermarker=False,
    )  # fmt: skip


def test_embeddings_are_those_of_diffusers_own_pipeline(pipe, oracle):
    mine = encode_prompts(pipe.text_encoders, PROMPTS)
    tokens, _, pooled, _ = oracle.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
    assert mine.tokens.shape == (3, 77, 128) and mine.pooled.shape == (3, 64)
    torch.testing.assert_close(mine.tokens, tokens)
    torch.testing.assert_close(mine.pooled, pooled)


def test_a_prediction_is_that_of_diffusers_own_pipeline(pipe, oracle):
    """One step of its Euler sampler, undone: what its UNet said with its own sizes."""
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    said = []
    handle = pipe.unet.register_forward_hook(lambda module, args, out: said.append((*args, out[0])))
    oracle.set_progress_bar_config(disable=True)
    oracle(
        PROMPTS, num_inference_steps=1, guidance_scale=1.0, height=64, width=64, latents=latents, output_type="latent"
    )
    handle.remove()
    x, t, theirs = said[0]
    with torch.no_grad():
        mine = predict(pipe.unet, x, t, encode_prompts(pipe.text_encoders, PROMPTS))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("what", ["tokens", "pooled", "size"])
def test_each_part_of_the_conditioning_counts(pipe, what):
    g = torch.Generator().manual_seed(0)
    context = Context(torch.randn(1, 77, 128, generator=g), torch.randn(1, 64, generator=g))
    x, t = torch.randn(1, 4, 8, 8, generator=g), torch.tensor([500])
    with torch.no_grad():
        plain = predict(pipe.unet, x, t, context)
        if what == "size":
            wide = predict(pipe.unet, torch.cat([x, x], 3), t, context)
            told_sizes = torch.tensor([[64.0, 128, 0, 0, 64, 128]])
            told = pipe.unet(
                torch.cat([x, x], 3), t, context.tokens,
                added_cond_kwargs={"text_embeds": context.pooled, "time_ids": told_sizes},
            ).sample  # fmt: skip
            torch.testing.assert_close(wide, told)
            return
        other = (
            Context(-context.tokens, context.pooled) if what == "tokens" else Context(context.tokens, -context.pooled)
        )
        assert not torch.allclose(plain, predict(pipe.unet, x, t, other), atol=1e-3)


def test_a_student_learns_and_its_file_gives_what_it_gave(tmp_path, teachers):
    run = built(tmp_path / "o.safetensors", teachers, lr=3e-3, feature=0.001, steps=40)
    losses = [run.step().loss for _ in range(20)]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    path = run.student.save(tmp_path / "dmm.safetensors", open_checkpoint(teachers[0]), torch.float32)
    read = load_pipeline(path)
    assert read.family == "sdxl" and read.codebook.names == ("style 0", "style 1")
    context = encode_prompts(read.text_encoders, PROMPTS[:2])
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([20, 900])
    with torch.no_grad():
        live = run.student(x, t, context, torch.eye(2))
        torch.testing.assert_close(
            predict(read.unet, x, t, context, read.codebook(torch.eye(2))), live, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("more", [{}, {"student": "lora", "rank": 2}, {"adversarial": 0.1}])
def test_resume_is_exact(tmp_path, teachers, more):
    """Law 6."""
    whole = built(tmp_path / "o.safetensors", teachers, **more)
    expected = after(whole, 4)
    first = built(tmp_path / "o.safetensors", teachers, **more)
    after(first, 2)
    first.save_state(tmp_path / "state.safetensors")
    second = built(tmp_path / "o.safetensors", teachers, **more)
    second.load_state(tmp_path / "state.safetensors")
    assert furthest(after(second, 2), expected) == 0


def test_a_merge_from_a_recipe_and_pictures_of_its_file(tmp_path, teachers):
    merge = prepare(recipe(tmp_path / "o.safetensors", teachers, steps=2))
    for _ in merge.steps():
        pass
    pipe = load_pipeline(merge.save())
    styles = torch.stack([pipe.codebook.style({name: 1.0}) for name in pipe.codebook.names])
    latents = sample(pipe, ["a cat"] * 2, seeds=[1, 1], steps=2, cfg_scale=3.0, style=styles)
    assert latents.shape == (2, 4, 8, 8) and latents.isfinite().all() and not torch.equal(*latents)
