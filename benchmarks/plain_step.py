"""What the paper's authors' training does in one step, in plain diffusers and torch: the yardstick of train_step.py.

A float32 student under autocast and ONE teacher that stays on the device, score + feature loss, gradient clipping,
AdamW as torch has it by default, and the loss read after every step for the log.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dmm_core.conditioning import Context, predict
from dmm_core.diffusion import add_noise

FEATURE_WEIGHT = 0.001


class PlainStep:
    """Student, teacher and optimizer on one device.

    Args:
        make_unet: called with a dtype and whether it takes a style; gives a diffusers UNet.
        latents, context: clean latents (n, 4, h, w) and their prompts' embeddings on the CPU.
        rows: rows of one step.
        half: what the student is autocast to and the teacher is; float32 for neither.
        sparing: with gradient checkpointing, for a device on which the step does not fit without.
    """

    def __init__(
        self, make_unet: Any, latents: Tensor, context: Context, rows: int, half: torch.dtype, device: torch.device,
        sparing: bool = False,
    ) -> None:  # fmt: skip
        self.latents, self.context, self.rows, self.half, self.device = latents, context, rows, half, device
        self.teacher = make_unet(half, False).to(device).requires_grad_(False).eval()
        self.student = make_unet(torch.float32, True).to(device).requires_grad_(True).train()
        if sparing:
            self.student.enable_gradient_checkpointing()
        width = self.student.time_embedding.linear_2.out_features
        self.codebook = nn.Embedding(1, width).to(device)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)).to(device)
        modules = (self.student, self.codebook, self.mlp)
        self.parameters = [p for module in modules for p in module.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5)
        self.maps: dict[str, list[Tensor]] = {"student": [], "teacher": []}
        for name, unet in (("student", self.student), ("teacher", self.teacher)):
            for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
                block.register_forward_hook(
                    lambda module, inputs, output, name=name: self.maps[name].append(
                        output[0] if isinstance(output, tuple) else output
                    )
                )

    def step(self) -> float:
        pick = torch.randint(len(self.latents), (self.rows,))
        x0, context = self.latents[pick].to(self.device), self.context[pick].to(self.device)
        t = torch.randint(1000, (self.rows,), device=self.device)
        x_t = add_noise(x0, torch.randn_like(x0), t)
        for maps in self.maps.values():
            maps.clear()
        with torch.no_grad():
            wanted = predict(self.teacher, x_t, t, context)
        style = self.mlp(self.codebook(torch.zeros(self.rows, dtype=torch.long, device=self.device)))
        with torch.autocast(self.device.type, self.half, enabled=self.half != torch.float32):
            eps = predict(self.student, x_t, t, context, style)
        loss = nn.functional.mse_loss(eps.float(), wanted.float())
        pairs = list(zip(self.maps["student"], self.maps["teacher"], strict=True))
        loss = loss + FEATURE_WEIGHT * sum(nn.functional.mse_loss(s.float(), t.float()) for s, t in pairs) / len(pairs)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return loss.item()
