"""Train the mini family: a base on one drawn style, then every teacher from the base on another.

Each run is resumable by running the same command again: a finished model is skipped.

    python -m mini_family.train --data build/mini --run base --minutes 25
    python -m mini_family.train --data build/mini --run ink --minutes 8
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from dmm_core.diffusion import TIMESTEPS, add_noise
from dmm_core.tokens import tokenize
from mini_family.draw import STYLES
from mini_family.names import caption, subjects

BATCH = 24
PROMPT_DROP = 0.1
EMA_EVERY = 4  # steps
UNET = dict(
    sample_size=8,
    block_out_channels=(64, 128),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=64,
    attention_head_dim=8,  # diffusers' name for the number of heads in SD1.5
)
TEXT = dict(vocab_size=49408, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=1)


def fresh_models() -> tuple[UNet2DConditionModel, CLIPTextModel]:
    text = CLIPTextModel(CLIPTextConfig(**TEXT, hidden_act="quick_gelu", projection_dim=64, eos_token_id=49407))
    torch.nn.init.normal_(text.text_model.embeddings.token_embedding.weight, std=0.3)
    return UNet2DConditionModel(**UNET), text


@torch.no_grad()
def encode_pictures(data: Path) -> Path:
    """Latents of every style's pictures, float16 (names, variants, 4, 8, 8), once."""
    out = data / "latents.safetensors"
    if not out.exists():
        vae = AutoencoderTiny.from_pretrained(data / "vae").eval()
        latents = {}
        for style in STYLES:
            pictures = np.load(data / f"{style}.npz")["pictures"]
            flat = torch.from_numpy(pictures.reshape(-1, *pictures.shape[2:])).permute(0, 3, 1, 2)
            z = torch.cat([vae.encode(chunk.float() / 127.5 - 1).latents for chunk in flat.split(64)])
            latents[style] = z.reshape(*pictures.shape[:2], *z.shape[1:]).half().contiguous()
        save_file(latents, out)
    return out


class Trainer:
    """Noise prediction on one style's latents, with an exponential moving average of the weights."""

    def __init__(self, latents: torch.Tensor, lr: float, unet, text, train_text: bool, ema: float = 0.998) -> None:
        names = subjects()
        held = set(subjects(held=True))
        self.rows = [i for i, name in enumerate(names) if name not in held]
        self.latents = latents.float()
        self.tokens = tokenize([caption(name) for name in names] + [""])
        self.unet, self.text, self.train_text = unet, text.requires_grad_(train_text), train_text
        self.averages = (copy.deepcopy(unet), copy.deepcopy(text))
        self.ema, self.lr = ema, lr
        params = [{"params": unet.parameters()}]
        if train_text:
            params.append({"params": text.parameters()})
        self.optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)

    @torch.no_grad()
    def follow(self, count: int) -> None:
        """Let the averages follow the weights, every few steps."""
        if count % EMA_EVERY == 0:
            keep = min(self.ema, (count + 1) / (count + 10)) ** EMA_EVERY
            models = (self.unet, self.text) if self.train_text else (self.unet,)
            for average, model in zip(self.averages, models, strict=False):
                torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)

    def step(self, done: float, count: int) -> float:
        """One optimizer step at the fraction ``done`` of the run's time."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1, (count + 1) / 100) * (0.01 + 0.99 * (0.5 + 0.5 * np.cos(np.pi * done)))
        row = torch.tensor(self.rows)[torch.randint(len(self.rows), (BATCH,))]
        x0 = self.latents[row, torch.randint(self.latents.shape[1], (BATCH,))]
        tokens = torch.where(torch.rand(BATCH, 1) < PROMPT_DROP, self.tokens[-1:], self.tokens[row])
        t, noise = torch.randint(TIMESTEPS, (BATCH,)), torch.randn_like(x0)
        context = self.text(tokens).last_hidden_state
        loss = F.mse_loss(self.unet(add_noise(x0, noise, t), t, context).sample, noise)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.follow(count)
        return loss.item()


def train(data: Path, run: str, minutes: float, lr: float, steps: int | None = None) -> Path:
    """One model of the family into ``data/models/RUN.safetensors`` (diffusers keys under ``unet.`` and ``text.``)."""
    out = data / "models" / f"{run}.safetensors"
    out.parent.mkdir(exist_ok=True)
    if out.exists():
        return out
    style = "flat" if run in ("base", "control") else run
    latents = load_file(encode_pictures(data))[style]
    torch.manual_seed(sum(map(ord, run)))
    unet, text = fresh_models()
    if run != "base":
        load_model(data, "base", unet, text)
    trainer = Trainer(latents, lr, unet, text, train_text=run == "base")
    began, count, losses = time.time(), 0, []
    while (done := count / steps if steps else (time.time() - began) / (60 * minutes)) < 1:
        losses.append(trainer.step(done, count))
        count += 1
        if count % 200 == 0:
            print(
                f"{run}: step {count} {done:.0%} loss {np.mean(losses[-200:]):.4f} {time.time() - began:.0f} s",
                flush=True,
            )
        if count % 1000 == 0:
            save(trainer, out.with_suffix(".part"))
    save(trainer, out)
    return out


def save(trainer: Trainer, path: Path) -> None:
    unet, text = (average.state_dict() for average in trainer.averages)
    save_file(
        {f"unet.{k}": v.contiguous() for k, v in unet.items()} | {f"text.{k}": v.clone() for k, v in text.items()}, path
    )


def load_model(data: Path, run: str, unet: UNet2DConditionModel, text: CLIPTextModel) -> None:
    state = load_file(data / "models" / f"{run}.safetensors")
    for prefix, model in (("unet.", unet), ("text.", text)):
        model.load_state_dict(
            {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, strict=False
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", nargs="+", required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    for run in args.run:
        print(train(args.data, run, args.minutes, args.lr, args.steps))


if __name__ == "__main__":
    main()
