r"""The best that averaging can do: a weight for every block and teacher, found by gradient, beside the student.

One model without styles, each block a weighted average of the teachers' ("MBW"), the weights trained on the same score
loss as a student. Then ``dmm evaluate --beside`` measures it.

    python benchmarks/block_merge.py --student dmm-demo/mini-dmm.safetensors --out benchmarks/results/block_merge.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from merges import Folder, about

from dmm_core.checkpoint import open_checkpoint, write_checkpoint
from dmm_core.checkpoint.keymap import UNET, unet_map
from dmm_core.losses import score_loss
from dmm_core.merge_blocks import block_of, unet_blocks
from dmm_core.models import build_unet
from dmm_core.recipe import recipe_from_dict
from dmm_core.run import Merge, prepare
from mini_family import family


class Blocks:
    """Teachers' UNets as one, by weights (blocks, teachers) that sum to 1 in each block; equal at first."""

    def __init__(self, merge: Merge) -> None:
        teachers = merge.sources.teachers
        self.base = merge.sources.base
        names = {key: UNET + name for key, name in unet_map(self.base.unet(), self.base.unet_config).items()}
        self.blocks = unet_blocks(names.values())
        self.where = {key: self.blocks.index(block_of(name, "unet", self.blocks)) for key, name in names.items()}
        states = [teacher.unet() for teacher in teachers]
        self.tensors = {key: torch.stack([state[key].float() for state in states]) for key in names}
        self.logits = torch.zeros(len(self.blocks), len(teachers), requires_grad=True)

    @property
    def weights(self) -> Tensor:
        return self.logits.softmax(1)

    def merged(self) -> dict[str, Tensor]:
        weights = self.weights
        return {key: torch.tensordot(weights[self.where[key]], stack, 1) for key, stack in self.tensors.items()}


def search(merge: Merge, blocks: Blocks, steps: int) -> None:
    """Adam on the blocks' weights; each step every teacher's rows, as a student's."""
    base, run = blocks.base, merge.distillation
    unet = build_unet(base.unet_config, base.unet(), torch.float32, base.path, styled=False)
    optimizer = torch.optim.Adam([blocks.logits], lr=0.1)
    rng = torch.Generator().manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
        state, losses = blocks.merged(), []
        for teacher in range(len(run.teachers)):
            (given,) = run.asking.bring([run.data.draw(teacher, run.spec.batch, rng)])
            target, batch = run.asking.ask(given), given.batch
            eps = functional_call(unet, state, (batch.x_t, batch.t, given.ours.tokens)).sample
            losses.append((score_loss(eps, target.said) * run.weights[batch.t]).mean())
        optimizer.zero_grad()
        loss = torch.stack(losses).mean()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, required=True, help="a DMM file of the mini family's four teachers")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=Path("build/block_merge"))
    args = parser.parse_args()
    folder = Folder(args.folder)
    files = [folder.files[name] for name in family.TEACHERS]
    recipe = folder.recipe(files, args.steps) | {"out": str(folder.path / "unused.safetensors")}
    merge = prepare(recipe_from_dict(recipe))
    blocks = Blocks(merge)
    search(merge, blocks, args.steps)
    base = open_checkpoint(folder.files["base"])
    best = write_checkpoint(
        folder.path / "best-blocks.safetensors", family="sd15", vae=base.vae(), text_encoders=[base.text_encoder(0)],
        unet={key: tensor.detach().half() for key, tensor in blocks.merged().items()}, metadata={},
    )  # fmt: skip
    report = folder.evaluate("beside", args.student.absolute(), files, "--beside", best)
    weights = dict(zip(blocks.blocks, blocks.weights.tolist(), strict=True))
    kept = {key: report[key] for key in ("ratio", "ratio_error", "weight_average", "baselines")}
    kept |= {"gap_closed": report["gap_closed"]["mean"], "teachers": family.TEACHERS, "weights": weights}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(kept | about(report), indent=1) + "\n", encoding="utf-8")
    for name, row in weights.items():
        print(f"{name:8}", *(f"{weight:6.2f}" for weight in row))


if __name__ == "__main__":
    main()
