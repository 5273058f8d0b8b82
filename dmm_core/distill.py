"""Distillation of N teachers into one student: DMM (arXiv:2504.12364) §3.4. The step is on one screen.

``Distillation.run`` is a generator that yields a result a step; logging, saving, previews and stopping belong to the
caller. Everything that decides the next step is in ``state()``: a resumed run equals an uninterrupted one bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dmm_core.checkpoint.writer import write_safetensors
from dmm_core.data import Batch, LatentData
from dmm_core.errors import BadInput
from dmm_core.losses import BlockFeatures, feature_loss, score_loss, timestep_weights
from dmm_core.ranks import Alone
from dmm_core.recipe import TrainSpec
from dmm_core.student import Student
from dmm_core.teachers import Teachers


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. ``score`` and ``feature`` are means a teacher over its rows of this step."""

    step: int
    samples_seen: int
    loss: float
    score: dict[str, float]
    feature: dict[str, float]
    lr: float


@dataclass(frozen=True)
class Target:
    """A batch and what its teacher said of it."""

    batch: Batch
    eps: Tensor
    features: list[Tensor]


class Distillation:
    """A student, its teachers, their data and the optimizer.

    Args:
        context: the student's own prompt embeddings (prompts + 1, 77, C), the empty prompt last.
        precision: "fp32", "bf16" or "fp16": what the student's passes are autocast to.
    """

    def __init__(
        self,
        student: Student,
        teachers: Teachers,
        data: LatentData,
        context: Tensor,
        spec: TrainSpec,
        precision: str = "fp32",
    ) -> None:
        self.student, self.teachers, self.data, self.context, self.spec = student, teachers, data, context, spec
        self.device = student.unet.device
        self.precision = precision
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        groups = [
            {"params": list(student.unet.parameters()), "peak": spec.lr},
            {"params": list(student.codebook.parameters()), "peak": spec.style_lr or spec.lr},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, weight_decay=spec.weight_decay)
        self.ranks = Alone()
        self.weights = timestep_weights(spec.snr_power)
        self.average = [p.detach().clone() for p in student.parameters()] if spec.ema else []
        self.rng = torch.Generator().manual_seed(spec.seed)
        self.step_count = self.samples_seen = 0

    # ------------------------------------------------------------ the step

    def step(self) -> StepResult:
        """One optimizer step: every teacher of this step says its ε, then the student learns all of them."""
        batches = [self.data.draw(teacher, self.spec.batch, self.rng) for teacher in self.turn()]
        targets = [self.ask(batch) for batch in self.ranks.mine(batches)]
        self.set_lr()
        self.optimizer.zero_grad(set_to_none=True)
        results = self.ranks.gather([self.learn(part, len(batches)) for part in self.micro_batches(targets)])
        self.ranks.add_gradients(self.student.parameters())
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.spec.grad_clip or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.update_average()
        self.step_count += 1
        self.samples_seen += sum(len(batch.t) for batch in batches)
        return self.result(results)

    def ask(self, batch: Batch) -> Target:
        """Let a batch's teacher predict."""
        with self.autocast():
            eps, features = self.teachers.predict(
                batch.teacher,
                batch.x_t.to(self.device),
                batch.t.to(self.device),
                batch.prompt,
                features=self.spec.feature > 0,
            )
        return Target(batch, eps, features)

    def learn(self, targets: list[Target], share: int) -> list[tuple[int, float, float]]:
        """Add the gradient of L = L_score + λ_feat L_feat over these targets; ``share`` teachers make up the step."""
        rows = [len(target.eps) for target in targets]
        which = torch.tensor([target.batch.teacher for target in targets]).repeat_interleave(torch.tensor(rows))
        x_t, t, prompt = (torch.cat([getattr(tg.batch, name) for tg in targets]) for name in ("x_t", "t", "prompt"))
        weights = torch.nn.functional.one_hot(which, len(self.student.codebook)).float().to(self.device)
        with self.autocast(), BlockFeatures(self.student.unet, enabled=self.spec.feature > 0) as blocks:
            eps = self.student(x_t.to(self.device), t.to(self.device), self.context[prompt].to(self.device), weights)
        score = score_loss(eps, torch.cat([target.eps for target in targets]))
        loss = self.spec.score * score * self.weights[t].to(self.device)
        feature = torch.zeros_like(score)
        if self.spec.feature > 0:
            teacher_features = [torch.cat(maps) for maps in zip(*(target.features for target in targets), strict=True)]
            feature = feature_loss(blocks.take(), teacher_features)
            loss = loss + self.spec.feature * feature
        self.scaler.scale(loss.sum() / (share * self.spec.batch)).backward()
        parts = zip(targets, score.detach().split(rows), feature.detach().split(rows), strict=True)
        return [(target.batch.teacher, s.mean().item(), f.mean().item()) for target, s, f in parts]

    # ------------------------------------------------------------ its parts

    def turn(self) -> list[int]:
        """The teachers of this step: all of them, or the next ``teachers_per_step`` in a circle."""
        total = len(self.teachers)
        count = min(self.spec.teachers_per_step or total, total)
        return [(self.step_count * count + i) % total for i in range(count)]

    def micro_batches(self, targets: list[Target]) -> Iterator[list[Target]]:
        """Targets that go through the student together: ``micro`` teachers' rows, all of them where it is not set."""
        size = self.spec.micro or len(targets)
        for start in range(0, len(targets), size or 1):
            yield targets[start : start + size]

    def autocast(self):
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[self.precision])

    def set_lr(self) -> None:
        factor = lr_factor(self.step_count, self.spec)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor

    @torch.no_grad()
    def update_average(self) -> None:
        if self.average:  # early on a shorter memory, so that the start is forgotten
            keep = min(self.spec.ema, (self.step_count + 1) / (self.step_count + 10))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.student.parameters()], 1 - keep)

    def result(self, parts: list[list[tuple[int, float, float]]]) -> StepResult:
        rows = [row for part in parts for row in part]
        names = self.student.codebook.names
        score = {names[i]: s for i, s, _ in rows}
        feature = {names[i]: f for i, _, f in rows} if self.spec.feature > 0 else {}
        loss = sum(self.spec.score * s + self.spec.feature * f for _, s, f in rows) / len(rows)
        return StepResult(
            self.step_count, self.samples_seen, loss, score, feature, self.optimizer.param_groups[0]["lr"]
        )

    def run(self, ranks: Alone | None = None) -> Iterator[StepResult]:
        """Steps until ``spec.steps`` of them are done, counted over all sittings; ``ranks`` share the work."""
        self.ranks = ranks or Alone()
        while self.step_count < self.spec.steps:
            yield self.step()
        self.ranks = Alone()

    @torch.no_grad()
    def use_average(self) -> None:
        """Put the moving average into the student, at the end of training."""
        for parameter, average in zip(self.student.parameters(), self.average, strict=False):
            parameter.copy_(average)

    # ------------------------------------------------------------ exact resume

    def state(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Everything that decides the next step: tensors on the CPU, and strings."""
        tensors: dict[str, Tensor] = {f"student.{k}": v for k, v in self.student.state_dict().items()}
        tensors |= {f"average.{i}": v for i, v in enumerate(self.average)}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in moments.items()}
        tensors["rng"] = self.rng.get_state()
        about = {"step": self.step_count, "samples_seen": self.samples_seen, "scaler": self.scaler.state_dict()}
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        return tensors, {"dmm.resume": json.dumps(about), "dmm.run": self.identity()}

    def identity(self) -> str:
        """What must not change between sittings, as JSON."""
        names = [str(checkpoint.path.name) for checkpoint in self.teachers.checkpoints]
        spec = {k: v for k, v in vars(self.spec).items() if k not in ("save_every", "device", "resident", "processes")}
        return json.dumps(
            {"styles": self.student.codebook.names, "teachers": names, "train": spec}, sort_keys=True, default=list
        )

    def save_state(self, path: Path) -> None:
        """Write the state atomically: the file is the old one or the new one, never half of it."""
        write_safetensors(path, *self.state())

    def load_state(self, path: Path) -> None:
        """Continue where ``save_state`` was called.

        Raises:
            BadInput: not a saved state, or one of another recipe.
        """
        try:
            with safe_open(str(path), "pt") as file:
                about = file.metadata() or {}
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - not a dict
            state, run = json.loads(about["dmm.resume"]), about["dmm.run"]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise BadInput("is no saved state of a distillation", path, "Start again without --resume.") from error
        if run != self.identity():
            raise BadInput(
                "belongs to another recipe", path, "Resume with the recipe it was made with, or start again."
            )
        self.student.load_state_dict(
            {k.removeprefix("student."): v for k, v in tensors.items() if k.startswith("student.")}
        )
        self.average = [tensors[f"average.{i}"].to(self.device) for i in range(len(self.average))]
        optimizer = self.optimizer.state_dict()
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, i, name = key.split(".")
                moments.setdefault(int(i), {})[name] = value
        self.optimizer.load_state_dict({"state": moments, "param_groups": optimizer["param_groups"]})
        self.rng.set_state(tensors["rng"])
        self.scaler.load_state_dict(state["scaler"])
        self.step_count, self.samples_seen = state["step"], state["samples_seen"]


def lr_factor(step: int, spec: TrainSpec) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then constant or a cosine to 1 %."""
    warm = min(1.0, (step + 1) / spec.warmup) if spec.warmup else 1.0
    if spec.schedule == "constant":
        return warm
    return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / max(1, spec.steps))))
