"""Train the mini family: a base that knows all looks by name, then every teacher from the base on one of them.

Like the large base models, the base draws its own look (flat) for a plain prompt and any other one if the prompt names
it ("a neon picture of a cat"). A teacher draws its look for a plain prompt: what it learns is a choice, not a new hand.
The same command goes on where it was interrupted; a finished model is skipped.

    python -m mini_family.train --data build/mini --run base --minutes 90 --processes 2
    python -m mini_family.train --data build/mini --run ink --steps 400 --lr 2e-4
    python -m mini_family.train --data build/mini --run ink --steps 600 --lr 1e-3 --lora 16
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from dmm_core.conditioning import embed, predict
from dmm_core.diffusion import TIMESTEPS, add_noise
from dmm_core.losses import timestep_weights
from dmm_core.lowrank import Adapters
from mini_family.draw import STYLES
from mini_family.models import FAMILIES, fresh_models, load_models, save_lora, save_models, tokens_of
from mini_family.names import caption, subjects

BATCH = 24
PROMPT_DROP = 0.1
PLAIN = 2.0
SNR_POWER = 0.25  # the noisy timesteps, which decide what is drawn, weigh a little more than under plain MSE
EMA, EMA_EVERY = 0.998, 4  # decay a step; steps
MEET_EVERY = 8  # steps
SAVE_EVERY = 1000  # steps


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
            prompt is drawn as often as ``PLAIN`` others.
        learned: what of the two is trained, or beside them.
        share: processes that train side by side on ``BATCH`` / share rows a step each, and meet in the mean of their
            weights every ``MEET_EVERY`` steps: adding up gradients at each step would be mostly waiting.
    """

    def __init__(
        self,
        looks: Mapping[str, torch.Tensor],
        lr: float,
        unet: nn.Module,
        text: nn.ModuleList,
        learned: Sequence[nn.Module],
        share: int = 1,
    ) -> None:
        names = subjects()
        held = set(subjects(held=True))
        self.rows = torch.tensor([i for i, name in enumerate(names) if name not in held])
        self.latents = torch.stack([latents.float() for latents in looks.values()])
        self.chances = torch.tensor([1.0 if look else PLAIN for look in looks])
        self.tokens = torch.stack([tokens_of([caption(name, look) for name in names], text) for look in looks])
        self.empty = tokens_of([""], text)
        self.weights = timestep_weights(SNR_POWER)
        self.unet, self.text, self.learned = unet, text, learned
        self.averages = copy.deepcopy(list(learned))
        self.params = [p for model in learned for p in model.parameters()]
        self.lr, self.share = lr, share
        self.optimizer = torch.optim.AdamW(self.params, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)

    @torch.no_grad()
    def follow(self, count: int) -> None:
        """Let the averages follow the weights, every few steps."""
        if count % EMA_EVERY == 0:
            keep = min(EMA, (count + 1) / (count + 10)) ** EMA_EVERY
            torch._foreach_lerp_([p for model in self.averages for p in model.parameters()], self.params, 1 - keep)

    @torch.no_grad()
    def meet(self) -> None:
        flat = torch.cat([p.flatten() for p in self.params])
        dist.all_reduce(flat)
        for p, mean in zip(self.params, flat.div_(self.share).split([p.numel() for p in self.params]), strict=True):
            p.copy_(mean.view_as(p))

    def state(self) -> dict[str, torch.Tensor]:
        """What goes on after an interruption, one flat tensor a kind; the other processes' moments are like these."""
        kinds = {"weights": self.params, "average": [p for model in self.averages for p in model.parameters()]}
        for moment in ("exp_avg", "exp_avg_sq"):
            kinds[moment] = [self.optimizer.state[p].get(moment, torch.zeros_like(p)) for p in self.params]
        return {kind: torch.cat([p.detach().flatten() for p in tensors]) for kind, tensors in kinds.items()}

    def put_down(self, path: Path, count: int, seconds: float) -> None:
        new = path.with_suffix(".new")
        save_file(self.state(), new, {"step": str(count), "seconds": str(seconds)})
        new.replace(path)

    @torch.no_grad()
    def take_up(self, path: Path) -> tuple[int, float]:
        """Go on from ``put_down``'s file: the steps and seconds before it. The samples after it are other ones."""
        with safe_open(path, "pt") as file:
            about = file.metadata()
            kept = {kind: file.get_tensor(kind) for kind in file.keys()}  # noqa: SIM118 (no mapping)
        count = int(about["step"])
        sizes = [p.numel() for p in self.params]
        parts = {kind: flat.split(sizes) for kind, flat in kept.items()}
        averages = [p for model in self.averages for p in model.parameters()]
        for i, (p, average) in enumerate(zip(self.params, averages, strict=True)):
            p.copy_(parts["weights"][i].view_as(p))
            average.copy_(parts["average"][i].view_as(p))
            moments = {k: parts[k][i].view_as(p).clone() for k in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {"step": torch.tensor(float(count)), **moments}
        torch.manual_seed(torch.initial_seed() + count)
        return count, float(about["seconds"])

    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (count, 4, 8, 8) and tokens (count, encoders, 77) of random looks and subjects."""
        look = torch.multinomial(self.chances, count, replacement=True)
        row = self.rows[torch.randint(len(self.rows), (count,))]
        tokens = torch.where(torch.rand(count, 1, 1) < PROMPT_DROP, self.empty, self.tokens[look, row])
        return self.latents[look, row, torch.randint(self.latents.shape[2], (count,))], tokens

    def step(self, done: float, count: int) -> float:
        """One optimizer step at the fraction ``done`` of the run's time."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1, (count + 1) / 100) * (0.01 + 0.99 * (0.5 + 0.5 * np.cos(np.pi * done)))
        x0, tokens = self.draw(BATCH // self.share)
        t, noise = torch.randint(TIMESTEPS, (len(x0),)), torch.randn_like(x0)
        context = embed(self.text, tokens.unbind(1))
        error = F.mse_loss(predict(self.unet, add_noise(x0, noise, t), t, context), noise, reduction="none")
        loss = (error.flatten(1).mean(1) * self.weights[t]).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learned[0].parameters(), 1.0)
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
    """One model of the family into ``DATA/models/RUN.safetensors``, or what a LoRA changes into ``RUN-lora``."""
    out = args.data / "models" / f"{run}{'-lora' if args.lora else ''}.safetensors"
    out.parent.mkdir(exist_ok=True)
    more = args.more and out.exists()
    if out.exists() and not more:
        return out
    torch.manual_seed(sum(map(ord, run)) + more)
    unet, text = fresh_models(args.family)
    start = out if more else args.start if run == "base" else out.with_name("base.safetensors")
    if start:
        load_models(start, unet, text)
    learned: list[nn.Module] = [unet, text] if run == "base" else [unet]
    if args.lora:
        unet.requires_grad_(False)
        learned = [Adapters(unet, args.lora, seed=0)]
    if run != "base":
        text.requires_grad_(False)
    trainer = Trainer(looks_of(args.data, run), args.lr, unet, text, learned, args.processes)
    torch.manual_seed(sum(map(ord, run)) + more + 1000 * rank)
    part = out.with_suffix(".part")
    count, spent = trainer.take_up(part) if part.exists() else (0, 0.0)
    began, losses = time.time() - spent, []
    while (done := progress(args, began, count)) < 1:
        losses.append(trainer.step(done, count))
        count += 1
        if rank == 0 and count % 200 == 0:
            print(
                f"{run}: step {count} {done:.0%} loss {np.mean(losses[-200:]):.4f} {time.time() - began:.0f} s",
                flush=True,
            )
        if rank == 0 and count % SAVE_EVERY == 0:
            trainer.put_down(part, count, time.time() - began)
    if rank == 0:
        save(trainer, out)
        part.unlink(missing_ok=True)
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
    first, *others = trainer.averages
    if isinstance(first, Adapters):
        save_lora(path, first)
    else:
        save_models(path, first, others[0] if others else trainer.text)


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
    parser.add_argument("--family", choices=FAMILIES, default="sd15")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="train a LoRA of the base instead")
    parser.add_argument("--more", action="store_true", help="go on from what is there")
    parser.add_argument("--processes", type=int, default=1, help="processes that share every step")
    args = parser.parse_args()
    if args.more and args.lora:
        parser.error("--more goes on from whole models, not from a LoRA")
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
