"""The multi-class discriminator: whose clean prediction is this? DMM (arXiv:2504.12364) Eq. 11, Alg. 1, A.2.

2N classes: "of teacher i" for the first N, "of the student in style i" for the others. What is judged is the clean
prediction x̂0, diffused again. The body is the encoder half of a UNet (as in DMD2, arXiv:2405.14867, and SDXL-Lightning,
arXiv:2402.13929); whether it is trained with its head or stays as it is, the paper leaves open: both are here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmm_core.checkpoint import Checkpoint
from dmm_core.conditioning import Context, added
from dmm_core.diffusion import add_noise
from dmm_core.models import build_unet
from dmm_core.optim import StudentOptimizer
from dmm_core.recipe import TrainSpec
from dmm_core.speed import quicken
from dmm_core.teachers import Teachers

GROUPS = 32  # of the head's normalisation, as everywhere in the UNet
LIFT = 1024.0  # keeps small gradients inside float16's range
ENCODER = ("conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block")  # what is kept of a UNet


class Discriminator(nn.Module):
    """Logits (B, 2N) of noisy latents (B, 4, h, w), from what a UNet's mid block makes of them.

    Args:
        unet: a stock ``UNet2DConditionModel`` without style input, which is taken apart: its decoder goes.
        styles: N.
        seed: of the head's first weights.
        trained: whether the body learns too; else only the head does.
    """

    def __init__(self, unet: Any, styles: int, seed: int, trained: bool = False) -> None:
        super().__init__()
        unet.up_blocks, unet.conv_norm_out, unet.conv_out = nn.ModuleList(), None, None
        self.body, self.styles, self.trained = unet.requires_grad_(trained), styles, trained
        width = unet.config.block_out_channels[-1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(GROUPS, width), nn.SiLU(),
                nn.Conv2d(width, width, 3, stride=2, padding=1), nn.GroupNorm(GROUPS, width), nn.SiLU(),
            )  # fmt: skip
            self.classes = nn.Linear(width, 2 * styles)

    def forward(self, x_t: Tensor, t: Tensor, context: Context) -> Tensor:
        """x_t (B, 4, h, w) at t (B,), B prompts."""
        body = self.body
        x, context = x_t.to(body.dtype), context.to(body.dtype)
        time = body.time_embedding(body.get_time_embed(sample=x, timestep=t))
        more = body.get_aug_embed(time, context.tokens, added(context, x))
        time = time if more is None else time + more
        x = body.conv_in(x)
        for block in [*body.down_blocks, body.mid_block]:
            attends = {"encoder_hidden_states": context.tokens} if getattr(block, "has_cross_attention", False) else {}
            x = block(x, time, **attends)
            x = x[0] if isinstance(x, tuple) else x  # down blocks return (hidden states, residuals)
        return self.classes(self.head(x.float()).mean((2, 3)).float()).float()

    def learning(self) -> list[nn.Parameter]:
        """What is trained."""
        return list((self if self.trained else nn.ModuleList([self.head, self.classes])).parameters())

    def learned(self) -> dict[str, Tensor]:
        """The tensors that training changes."""
        return {k: v for k, v in self.state_dict().items() if self.trained or not k.startswith("body.")}


class Critic:
    """A discriminator at work: what it costs the student to be recognised, and its own step.

    Its random draws (a timestep and noise a row) are the batch's, so that they are the same however a step is split.

    Args:
        precision: what its passes are autocast to.
    """

    def __init__(self, discriminator: Discriminator, spec: TrainSpec, device: torch.device, precision: str) -> None:
        self.module = discriminator.to(device)
        self.parameters = discriminator.learning()
        plain = replace(spec, fused_backward=False, optimizer="adamw")
        self.optimizer = StudentOptimizer([(self.parameters, spec.adversarial_lr or spec.lr)], plain, device)
        self.device, self.precision = device, precision
        self.require_gradients(False)

    def logits(self, x0: Tensor, t: Tensor, noise: Tensor, context: Context) -> Tensor:
        """Of clean predictions (B, 4, h, w), diffused again to t (B,) with noise of their shape: (B, 2N)."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        with torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            return self.module(add_noise(x0, noise, t), t, context)

    def fool(self, x0: Tensor, t: Tensor, noise: Tensor, context: Context, style: Tensor) -> Tensor:
        """The student's loss L_adv (B,), Eq. 11: cross-entropy of its x̂0 to "of teacher i"; for styles i (B,).

        Its gradient with respect to x̂0 is taken here: it is no reason for the discriminator to change, and the
        discriminator's activations go before the student's backward pass.
        """
        x = x0.detach().requires_grad_()
        loss = F.cross_entropy(self.logits(x, t, noise, context), style, reduction="none")
        gradient = torch.autograd.grad(LIFT * loss.sum(), x)[0] / LIFT
        return loss.detach() + ((x0 - x0.detach()) * gradient).sum((1, 2, 3))

    def learn(
        self, student: Tensor, teacher: Tensor, t: Tensor, noise: Tensor, context: Context, style: Tensor, scale: Any
    ) -> Tensor:
        """Add the gradient of the discriminator's step in Alg. 1; returns its loss a row, (B,).

        Cross-entropy of the student's x̂0 to "of the student in style i", and of the teacher's to "of teacher i".

        Args:
            scale: what the loss (B,) goes through before its backward pass.
        """
        twice = (torch.cat([t, t]), torch.cat([noise, noise]), Context.cat([context, context]))
        told = torch.cat([style + self.module.styles, style])
        self.require_gradients(True)
        try:
            loss = F.cross_entropy(self.logits(torch.cat([student, teacher]), *twice), told, reduction="none")
            rows = loss.view(2, -1).sum(0)
            scale(rows).backward()
        finally:  # memory may run out
            self.require_gradients(False)
        return rows.detach()

    def require_gradients(self, wanted: bool) -> None:
        """Only in its own step: the student's loss is no reason for the discriminator to change."""
        for p in self.parameters:
            p.requires_grad_(wanted)

    def step(self, scaler: Any, ranks: Any) -> None:
        """Use the gradients of all processes; ``scaler.update`` is the caller's."""
        ranks.add_gradients(self.parameters)
        self.optimizer.step(scaler)

    def be_sparing(self, checkpointing: bool) -> None:
        """Let go of gradients; with ``checkpointing`` keep fewer activations."""
        self.optimizer.zero_grad()
        if checkpointing:
            self.module.body.train().enable_gradient_checkpointing()

    # ------------------------------------------------------------ exact resume

    def state(self) -> dict[str, Tensor]:
        """Everything that decides its next step, under ``critic.`` and ``critic_optimizer.``."""
        weights = {f"critic.{key}": value for key, value in self.module.learned().items()}
        return weights | {f"critic_optimizer.{key}": value for key, value in self.optimizer.state().items()}

    def load_state(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Put what ``state`` gave back; KeyError where something is missing."""
        for key, mine in self.module.learned().items():
            mine.copy_(weights[key])
        self.optimizer.load_state(moments)


def discriminator_of(spec: TrainSpec, base: Checkpoint, styles: int, teachers: Teachers) -> Discriminator:
    """On the base's UNet, whose text encoder the student has; a body that does not learn is as narrow as teachers."""
    trained = spec.discriminator == "full"
    dtype = torch.float32 if trained else teachers.dtype
    body = build_unet(base.unet_config, base.unet(), dtype, base.path, styled=False)
    quicken(body, teachers.channels_last, spec.compile)
    return Discriminator(body, styles, spec.seed, trained)


def encoder_parameters(shapes: Mapping[str, Sequence[int]]) -> int:
    """How many parameters of a UNet (keys in diffusers' names and their shapes) its encoder half has."""
    return sum(torch.Size(shape).numel() for key, shape in shapes.items() if key.partition(".")[0] in ENCODER)
