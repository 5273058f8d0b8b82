"""Distillation of N teachers into one student: DMM (arXiv:2504.12364) §3.4. The step is on one screen.

``Distillation.run`` is a generator that yields a result a step; logging, saving, previews and stopping belong to the
caller. Everything that decides the next step is in ``resume.py``'s file: a resumed run equals an uninterrupted one bit
for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dmm_core import course, resume
from dmm_core.asking import Asking, Target
from dmm_core.between import put_between
from dmm_core.conditioning import Context
from dmm_core.data import Batch, LatentData
from dmm_core.diffusion import predict_x0
from dmm_core.discriminator import Critic, Discriminator
from dmm_core.economy import Economy, is_out_of_memory, let_go
from dmm_core.errors import BadInput
from dmm_core.extension import teachers_of_step
from dmm_core.fewstep import INSIDE
from dmm_core.losses import timestep_weights
from dmm_core.lowrank import FASTER
from dmm_core.optim import StudentOptimizer
from dmm_core.passes import Passes, tally
from dmm_core.ranks import Alone
from dmm_core.recipe import TrainSpec
from dmm_core.result import LOSSES, StepResult
from dmm_core.speed import to_device
from dmm_core.student import Student
from dmm_core.teachers import Teachers


def require_wide(precision: str, spec: TrainSpec) -> None:
    """Raises BadInput: steps inside the backward pass know nothing of float16's scale of the loss."""
    if precision == "fp16" and spec.fused_backward:
        raise BadInput("train.fused_backward needs bf16 or fp32, and this device computes in fp16")


class Distillation:
    """A student, its teachers, their data and the optimizer.

    Args:
        context: the student's own embeddings of all prompts, the empty prompt last.
        precision: "fp32", "bf16" or "fp16": what the student's passes are autocast to.
        discriminator: needed where ``spec.adversarial`` is not 0.
        old: how many styles, the first ones, an earlier student teaches as it had them.
    """

    def __init__(
        self,
        student: Student,
        teachers: Teachers,
        data: LatentData,
        context: Context,
        spec: TrainSpec,
        precision: str = "fp32",
        discriminator: Discriminator | None = None,
        old: int = 0,
    ) -> None:
        require_wide(precision, spec)
        self.student, self.teachers, self.data, self.context, self.spec = student, teachers, data, context, spec
        self.old = old
        self.device = student.unet.device
        self.precision = precision
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.scaler.scale(torch.zeros((), device=self.device))  # its factor is made now: a rank may have no loss
        unet, codebook = student.learning()
        self.learned = [*unet, *codebook]
        lr = spec.lr * (FASTER if student.adapters else 1)
        self.optimizer = StudentOptimizer([(unet, lr), (codebook, spec.style_lr or spec.lr)], spec, self.device)
        self.critic = Critic(discriminator, spec, self.device, precision) if discriminator else None
        self.ranks = Alone()
        self.weights = timestep_weights(spec.snr_power).to(self.device)
        self.one_hot = torch.eye(len(student.codebook), device=self.device)
        self.average = [p.detach().float().clone() for p in self.learned] if spec.ema else []
        self.rng = torch.Generator().manual_seed(spec.seed)
        self.warnings: list[str] = []  # of what came before the first step, which tells them
        self.step_count = self.samples_seen = 0
        self.steps_before = 0  # those of the recipe's stages before this one
        rows = (spec.micro or len(self.turn(0))) * spec.batch
        self.asking = Asking(teachers, data, context, spec, self.one_hot)
        self.passes = Passes(
            student, spec, precision, self.scaler, teachers.prediction_type, context.pooled is not None
        )
        splits = not spec.fused_backward
        self.economy = Economy(rows, spec.checkpointing, teachers.resident, splits, teachers.least)
        self.be_sparing()

    # ------------------------------------------------------------ the step

    def step(self) -> StepResult:
        """One optimizer step. Where memory runs out, it is made again on the same samples, more sparingly."""
        before, warnings, self.warnings = self.rng.get_state(), self.warnings, []
        for optimizer in self.optimizers:
            optimizer.begin(lr_factor(self.step_count, self.spec), self.step_count)
        while (sums := self.accumulate()) is None:
            self.rng.set_state(before)
            recorded = self.ranks.any(self.passes.recorded, self.device)  # a convenience, which goes first
            warnings.append(self.passes.give_up() if recorded else self.economy.give_up_something())
            self.be_sparing()
            let_go(self.device)
        self.ranks.add_gradients(self.learned)
        self.optimizer.step(self.scaler)
        if self.critic:
            self.critic.step(self.scaler, self.ranks)
        self.scaler.update()
        self.update_average()
        self.passes.step_over()
        self.samples_seen += len(self.turn(self.step_count)) * self.spec.batch
        self.step_count += 1
        names = self.student.codebook.names
        return StepResult(
            self.steps_done, self.samples_seen, self.optimizer.lr, tuple(warnings), sums, names, self.spec
        )

    def accumulate(self) -> Tensor | None:
        """Gradients of one step: every teacher says its ε, the student learns it. None where memory ran out."""
        turn, again = self.turn(self.step_count), self.critic is not None
        size = self.data.choose(self.rng)  # one for the whole step, whose rows pass the student together
        batches = [self.data.draw(teacher, self.spec.batch, self.rng, again, size) for teacher in turn]
        batches = put_between(batches, self.spec, self.step_count, self.rng)
        sums = torch.zeros(len(self.student.codebook), len(LOSSES) + 1, device=self.device)
        for optimizer in self.optimizers:
            optimizer.zero_grad(stay=self.passes.recorded)
        parts = list(self.parts(self.ranks.mine(batches)))
        later = self.ranks.mine(self.turn(self.step_count + 1))
        times = INSIDE if self.spec.few_step else 1
        mine = [batch for part in parts for batch in part]
        order = [*self.asking.order(mine), *later]
        self.teachers.expect([teacher for teacher in order for _ in range(times)])
        layers, failed = course.has("blockwise", self.spec, self.step_count), False
        try:
            given = iter(self.asking.bring(mine))
            for part in parts:
                targets = [self.asking.ask(next(given), layers) for _ in part]
                self.imitate(targets, len(batches))
                sums += self.learn(targets, len(batches))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failed = True
        return None if self.ranks.any(failed, self.device) else self.ranks.add(sums)

    def imitate(self, targets: list[Target], share: int) -> None:
        """Add the gradient of L_block over the targets that have maps, and let go of these: a pass needs the room."""
        if not (having := [target for target in targets if target.maps]):
            return
        x_t, t = (torch.cat([getattr(tg.given.batch, name)[tg.given.pure] for tg in having]) for name in ("x_t", "t"))
        context = Context.cat([target.given.ours[target.given.pure] for target in having])
        styles = torch.cat([target.styles[target.given.pure] for target in having])
        maps = [torch.cat(one) if one[1:] else one[0] for one in zip(*(target.maps for target in having), strict=True)]
        for target in having:
            target.maps.clear()
        self.passes.imitate(share, x_t, t, context, styles, self.weights[t], maps)

    def learn(self, targets: list[Target], share: int) -> Tensor:
        """Add the gradient of L = L_score + λ_feat L_feat + λ_adv L_adv over these targets, and the discriminator's.

        ``share`` teachers make up the step. Returns sums of LOSSES and the number of rows, (teachers, 5).
        """
        batches = [target.given.batch for target in targets]
        x_t, t = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("x_t", "t"))
        styles = torch.cat([target.styles for target in targets])
        weights, context = self.weights[t], Context.cat([target.given.ours for target in targets])
        wanted = torch.cat([target.said for target in targets])
        features = [torch.cat(maps) for maps in zip(*(target.features for target in targets), strict=True)]
        given = (x_t, t, styles, weights, wanted, *context.parts)
        if not self.critic:
            return self.passes.learn(share, *given, *features)
        eps, loss, score, feature = self.passes.losses(*given, *features)
        adversarial, discriminator = torch.zeros_like(score), torch.zeros_like(score)
        scaled = partial(self.passes.scaled, share)
        if not len(pure := self.pure_rows(batches)):
            scaled(loss).backward()
            return tally(styles, score, feature, adversarial, discriminator)
        t_again, noise = (torch.cat(x)[pure] for x in zip(*(batch.again or () for batch in batches), strict=True))
        style = torch.cat([torch.full_like(batch.t, batch.teacher) for batch in batches])[pure]
        mine, theirs = (predict_x0(x_t, e.float(), t, self.teachers.prediction_type)[pure] for e in (eps, wanted))
        judged = t_again, noise, context[pure], style
        adversarial = adversarial.index_put((pure,), self.critic.fool(mine, *judged))
        scaled(loss + self.spec.adversarial * adversarial).backward()
        # now that the student's activations are gone
        discriminator[pure] = self.critic.learn(mine.detach(), theirs, *judged, scaled)
        return tally(styles, score, feature, adversarial, discriminator)

    def pure_rows(self, batches: Sequence[Batch]) -> Tensor:
        """Numbers of the rows of one style: the discriminator has no class for what is between two."""
        between = [torch.arange(len(batch.t)) < len(batch.between or ()) for batch in batches]
        return to_device((torch.cat(between).logical_not().nonzero().flatten(),), self.device)[0]

    # ------------------------------------------------------------ its parts

    def turn(self, step: int) -> list[int]:
        """The teachers of a step."""
        return teachers_of_step(self.spec, step, len(self.teachers), self.old)

    def parts(self, batches: Sequence[Batch]) -> Iterator[Sequence[Batch]]:
        """Batches that go through the student together: whole ones as long as ``economy.rows`` holds one."""
        rows, whole = self.economy.rows, self.spec.batch
        pieces = batches if rows >= whole else [piece for batch in batches for piece in batch.split(rows)]
        size = max(1, rows // whole)
        for start in range(0, len(pieces), size):
            yield pieces[start : start + size]

    @property
    def steps_done(self) -> int:
        """Over all stages."""
        return self.steps_before + self.step_count

    @property
    def optimizers(self) -> list[StudentOptimizer]:
        return [self.optimizer, *([self.critic.optimizer] if self.critic else [])]

    def be_sparing(self) -> None:
        """Make the modules follow ``economy``, and let go of what an interrupted step has left."""
        self.optimizer.zero_grad()
        graphs = self.spec.cuda_graphs if self.spec.cuda_graphs is not None else not self.economy.checkpointing
        graphs = graphs and self.device.type == "cuda"
        self.teachers.keep(self.economy.resident, graphs)
        self.passes.record(graphs and not self.economy.checkpointing and not self.critic)
        if self.economy.checkpointing:
            self.student.unet.train().enable_gradient_checkpointing()  # older diffusers do it in train mode alone
        if self.critic:
            self.critic.be_sparing(self.economy.checkpointing)
        if self.economy.steps_down:
            let_go(self.device)

    @torch.no_grad()
    def update_average(self) -> None:
        if self.average:  # early on a shorter memory, so that the start is forgotten
            keep = min(self.spec.ema, (self.step_count + 1) / (self.step_count + 10))
            if self.spec.weights == "fp32":
                torch._foreach_lerp_(self.average, [p.detach() for p in self.learned], 1 - keep)
            else:  # one after the other: a float32 copy of all weights would not fit
                for average, p in zip(self.average, self.learned, strict=True):
                    average.lerp_(p.detach().float(), 1 - keep)

    def run(self, ranks: Alone | None = None) -> Iterator[StepResult]:
        """Steps until ``spec.steps`` of them are done, counted over all sittings; ``ranks`` share the work."""
        self.ranks = ranks or Alone()
        if self.ranks.world > 1 and self.spec.fused_backward:
            raise BadInput("train.fused_backward works in one process alone", hint="Set it to false.")
        while self.step_count < self.spec.steps:
            yield self.step()
        self.ranks = Alone()

    @torch.no_grad()
    def use_average(self) -> None:
        """Put the moving average into the student, at the end of training."""
        for parameter, average in zip(self.learned, self.average, strict=False):
            parameter.copy_(average)

    # ------------------------------------------------------------ exact resume

    def state(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Everything that decides the next step: its own tensors, wherever they are, and strings."""
        return resume.state(self)

    def save_state(self, path: Path) -> None:
        """Write the state atomically and tensor by tensor: the file is the old one or the new one, never half of it."""
        resume.save(self, path)

    def load_state(self, path: Path) -> None:
        """Continue where ``save_state`` was called; BadInput for no saved state, or one of another recipe."""
        resume.load(self, path)


def lr_factor(step: int, spec: TrainSpec) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then constant or a cosine to 1 %."""
    warm = min(1.0, (step + 1) / spec.warmup) if spec.warmup else 1.0
    if spec.schedule == "constant":
        return warm
    return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / max(1, spec.steps))))
