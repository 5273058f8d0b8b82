"""The mini family's trainer: what it writes opens as an ordinary checkpoint or LoRA file and says what was trained."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmm_core.checkpoint import open_checkpoint
from dmm_core.conditioning import encode_prompts, predict
from dmm_core.lora import open_lora
from dmm_core.lowrank import Adapters
from dmm_core.models import load_pipeline
from mini_family import family, models, train
from mini_family.draw import STYLES, VARIANTS
from mini_family.names import subjects
from tests.unit import tiny


@pytest.fixture(scope="module", autouse=True)
def few():
    """A few subjects and small batches, for the tests' time."""
    names = subjects()[:6]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "subjects", lambda held=None: names[:1] if held else names)
        patch.setattr(train, "BATCH", 4)
        yield names


@pytest.fixture(scope="module")
def data(tmp_path_factory, few) -> Path:
    """What ``mini_family.draw`` and ``mini_family.autoencoder`` leave, with random values."""
    folder = tmp_path_factory.mktemp("mini")
    generator = torch.Generator().manual_seed(0)
    shape = (len(few), VARIANTS, 4, 8, 8)
    save_file(
        {style: torch.randn(shape, generator=generator).half() for style in STYLES}, folder / "latents.safetensors"
    )
    (folder / "vae").mkdir()
    save_file(tiny.vae(dtype=torch.float32), folder / "vae" / "diffusion_pytorch_model.safetensors")
    return folder


def settings(data: Path, **more) -> argparse.Namespace:
    common = {"steps": 2, "lr": 1e-3, "start": None, "family": "sd15", "lora": 0, "more": False, "processes": 1}
    return argparse.Namespace(data=data, **{**common, **more})


@pytest.fixture(scope="module")
def base(data) -> Path:
    return train.train(settings(data), "base")


def said(unet, text) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        context = encode_prompts(text, ["a picture of a red apple", ""])
        return predict(unet, torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([20, 900]), context)


def test_sdxl_begins_as_sd15_ended_and_opens_as_sdxl(data, base, tmp_path):
    other = tmp_path / "xl"
    (other / "models").mkdir(parents=True)
    for name in ("latents.safetensors", "vae"):
        (other / name).symlink_to(data / name)
    unet, text = models.fresh_models("sdxl")
    models.load_models(base, unet, text)
    given = load_file(base)
    key = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert torch.equal(unet.state_dict()[key][:, :64], given[f"unet.{key}"])
    assert not unet.state_dict()[key][:, 64:].any()
    assert not unet.down_blocks[1].attentions[0].proj_out.weight.any()
    train.train(settings(other, family="sdxl", start=base), "base")
    path = train.train(settings(other, family="sdxl"), "ink")
    unet, text = models.fresh_models("sdxl")
    models.load_models(path, unet.eval(), text.eval())
    ck = open_checkpoint(family.whole(other, "ink", tmp_path))
    assert ck.family == "sdxl" and len(ck.text_configs) == 2
    pipe = load_pipeline(ck)
    torch.testing.assert_close(said(pipe.unet, pipe.text_encoders), said(unet, text), rtol=0.02, atol=0.02)


def test_a_lora_in_kohyas_names_is_what_was_trained(data, base, tmp_path):
    """Learned beside a frozen UNet, then read as any LoRA file: the base's file with it says the same."""
    path = train.train(settings(data, lora=4), "ink")
    assert path.stem == "ink-lora" and all(k.startswith("lora_unet_") for k in load_file(path))
    unet, text = models.fresh_models()
    models.load_models(base, unet.eval(), text.eval())
    plain, adapters = said(unet, text), Adapters(unet.requires_grad_(False), 4, seed=0)
    trainer = train.Trainer(train.looks_of(data, "ink"), 0.05, unet, text.requires_grad_(False), [adapters])
    for count in range(4):
        trainer.step(0.0, count + 100)
    trainer.averages = [adapters]
    train.save(trainer, path)
    trained = said(unet, text)
    fitted = open_lora(path).fit(open_checkpoint(family.whole(data, "base", tmp_path)))
    other, _ = models.fresh_models()
    other.load_state_dict(fitted.apply("unet", load_unet(base)))
    assert (trained - plain).abs().max() > 0.2
    torch.testing.assert_close(said(other.eval(), text), trained, rtol=0.02, atol=0.02)


def load_unet(path: Path) -> dict[str, torch.Tensor]:
    return {k.removeprefix("unet."): v for k, v in load_file(path).items() if k.startswith("unet.")}


def test_an_interrupted_training_goes_on(data, base, tmp_path, monkeypatch):
    """Weights, moments, average and the place in the schedule; then the part file is gone."""
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    looks = train.looks_of(data, "ink")

    def trainer():
        torch.manual_seed(0)
        unet, text = models.fresh_models()
        models.load_models(base, unet, text)
        return train.Trainer(looks, 1e-3, unet, text.requires_grad_(False), [unet])

    first, second = trainer(), trainer()
    for count in range(2):
        first.step(count / 4, count)
    first.put_down(tmp_path / "ink.part", 2, 7.5)
    assert second.take_up(tmp_path / "ink.part") == (2, 7.5)
    for run in (first, second):
        torch.manual_seed(1)
        run.step(0.5, 2)
    for key, value in first.state().items():
        assert torch.equal(value, second.state()[key]), key

    part = data / "models" / "clay.part"
    stopped = iter([0.0, 0.3, 0.6])
    monkeypatch.setattr(train, "progress", lambda args, began, count: next(stopped))
    with pytest.raises(StopIteration):
        train.train(settings(data, steps=4), "clay")
    monkeypatch.undo()
    assert part.exists()
    seen = []
    step = train.Trainer.step
    monkeypatch.setattr(train.Trainer, "step", lambda self, done, count: seen.append(count) or step(self, done, count))
    assert train.train(settings(data, steps=4), "clay").exists()
    assert seen == [2, 3] and not part.exists()
