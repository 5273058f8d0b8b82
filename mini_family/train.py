"""Train the mini family: a base that knows all looks by name, then every teacher from the base on one of them.

Like the large base models, the base draws its own look (flat) for a plain prompt and any other one if the prompt names
it ("a neon picture of a cat"). A teacher draws its look for a plain prompt: what it learns is a choice, not a new hand.
Each run is resumable by running the same command again: a finished model is skipped.

    python -m mini_family.train --data build/mini --run base --minutes 45 --processes 2
    python -m mini_family.train --data build/mini --run ink --steps 600 --lr 3e-4
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
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
EMA, EMA_EVERY = 0.998, 4  # decay a step; steps
MEET_EVERY = 8  # steps
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
    """Noise prediction on latents of one look or several, with an exponential moving average of the weights.

    Args:
        looks: a look's word in the prompt ("" for the plain prompt) → its latents (names, variants, 4, 8, 8). The plain
            prompt is drawn as often as all the others together.
        share: processes that train side by side on ``BATCH`` / share rows a step each, and meet in the mean of their
            weights every ``MEET_EVERY`` steps: adding up gradients at each step would be mostly waiting.
    """

    def __init__(
        self, looks: Mapping[str, torch.Tensor], lr: float, unet, text, train_text: bool, share: int = 1
    ) -> None:
        names = subjects()
        held = set(subjects(held=True))
        self.rows = torch.tensor([i for i, name in enumerate(names) if name not in held])
        self.latents = torch.stack([latents.float() for latents in looks.values()])
        self.chances = torch.tensor([1.0 / max(1, len(looks) - 1) if look else 1.0 for look in looks])
        self.tokens = torch.stack([tokenize([caption(name, look) for name in names]) for look in looks])
        self.empty = tokenize([""])
        self.unet, self.text, self.train_text = unet, text.requires_grad_(train_text), train_text
        self.averages = (copy.deepcopy(unet), copy.deepcopy(text))
        self.lr, self.share = lr, share
        params = [{"params": unet.parameters()}]
        if train_text:
            params.append({"params": text.parameters()})
        self.optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)

    @torch.no_grad()
    def follow(self, count: int) -> None:
        """Let the averages follow the weights, every few steps."""
        if count % EMA_EVERY == 0:
            keep = min(EMA, (count + 1) / (count + 10)) ** EMA_EVERY
            models = (self.unet, self.text) if self.train_text else (self.unet,)
            for average, model in zip(self.averages, models, strict=False):
                torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)

    @torch.no_grad()
    def meet(self) -> None:
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        flat = torch.cat([p.flatten() for p in params])
        dist.all_reduce(flat)
        for p, mean in zip(params, flat.div_(self.share).split([p.numel() for p in params]), strict=True):
            p.copy_(mean.view_as(p))

    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (count, 4, 8, 8) and tokens (count, 77) of random looks and subjects."""
        look = torch.multinomial(self.chances, count, replacement=True)
        row = self.rows[torch.randint(len(self.rows), (count,))]
        tokens = torch.where(torch.rand(count, 1) < PROMPT_DROP, self.empty, self.tokens[look, row])
        return self.latents[look, row, torch.randint(self.latents.shape[2], (count,))], tokens

    def step(self, done: float, count: int) -> float:
        """One optimizer step at the fraction ``done`` of the run's time."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1, (count + 1) / 100) * (0.01 + 0.99 * (0.5 + 0.5 * np.cos(np.pi * done)))
        x0, tokens = self.draw(BATCH // self.share)
        t, noise = torch.randint(TIMESTEPS, (len(x0),)), torch.randn_like(x0)
        context = self.text(tokens).last_hidden_state
        loss = F.mse_loss(self.unet(add_noise(x0, noise, t), t, context).sample, noise)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        if self.share > 1 and count % MEET_EVERY == 0:
            self.meet()
        self.follow(count)
        return loss.item()


def looks_of(data: Path, run: str) -> dict[str, torch.Tensor]:
    """What a run sees: the base (and the control, which is the base trained on) all looks, a teacher its own."""
    latents = load_file(encode_pictures(data))
    if run in ("base", "control"):
        return {"" if style == "flat" else style: latents[style] for style in STYLES}
    return {"": latents[run]}


def train(args: argparse.Namespace, run: str, rank: int = 0) -> Path:
    """One model of the family into ``DATA/models/RUN.safetensors`` (diffusers keys under ``unet.`` and ``text.``)."""
    out = args.data / "models" / f"{run}.safetensors"
    out.parent.mkdir(exist_ok=True)
    more = args.more and out.exists()
    if out.exists() and not more:
        return out
    torch.manual_seed(sum(map(ord, run)) + more)
    unet, text = fresh_models()
    start = out if more else args.start if run == "base" else out.with_name("base.safetensors")
    if start:
        load_model(start, unet, text)
    trainer = Trainer(looks_of(args.data, run), args.lr, unet, text, run == "base", args.processes)
    torch.manual_seed(sum(map(ord, run)) + more + 1000 * rank)
    began, count, losses = time.time(), 0, []
    while (done := progress(args, began, count)) < 1:
        losses.append(trainer.step(done, count))
        count += 1
        if rank == 0 and count % 200 == 0:
            loss, seconds = np.mean(losses[-200:]), time.time() - began
            print(f"{run}: step {count} {done:.0%} loss {loss:.4f} {seconds:.0f} s", flush=True)
        if rank == 0 and count % 1000 == 0:
            save(trainer, out.with_suffix(".part"))
    if rank == 0:
        save(trainer, out)
    return out


def progress(args: argparse.Namespace, began: float, count: int) -> float:
    """The share of a run that is done, the same in all its processes where they meet."""
    done = torch.tensor(count / args.steps if args.steps else (time.time() - began) / (60 * args.minutes))
    if args.processes > 1 and count % MEET_EVERY == 0:
        dist.broadcast(done, 0)
    elif args.processes > 1:
        done.clamp_(max=0.999)  # the end is at a meeting
    return done.item()


def save(trainer: Trainer, path: Path) -> None:
    unet, text = (average.state_dict() for average in trainer.averages)
    save_file(
        {f"unet.{k}": v.contiguous() for k, v in unet.items()} | {f"text.{k}": v.clone() for k, v in text.items()}, path
    )


def load_model(path: Path, unet: UNet2DConditionModel, text: CLIPTextModel) -> None:
    state = load_file(path)
    for prefix, model in (("unet.", unet), ("text.", text)):
        model.load_state_dict(
            {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, strict=False
        )


def member(rank: int, args: argparse.Namespace, meeting: str) -> None:
    """One of ``--processes`` that train a model together, a thread each."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=args.processes)
    for run in args.run:
        train(args, run, rank)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", nargs="+", required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--start", type=Path, help="an earlier base that the base goes on from")
    parser.add_argument("--more", action="store_true", help="go on from what is there")
    parser.add_argument("--processes", type=int, default=1, help="processes that share every step")
    args = parser.parse_args()
    encode_pictures(args.data)
    if args.processes > 1:
        with tempfile.TemporaryDirectory() as folder:
            meeting = (Path(folder) / "meeting").as_uri()
            torch.multiprocessing.spawn(member, (args, meeting), nprocs=args.processes)
    else:
        for run in args.run:
            print(train(args, run))


if __name__ == "__main__":
    main()
