"""The student's passes: what it says of a step's rows, its losses (DMM, arXiv:2504.12364, §3.4) and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dmm_core.blockwise import imitate
from dmm_core.conditioning import Context
from dmm_core.fewstep import path_loss
from dmm_core.losses import BlockFeatures, feature_loss, score_loss
from dmm_core.recipe import TrainSpec
from dmm_core.speed import Recorded, has_room_twice
from dmm_core.student import Student


class Passes:
    """Forward and backward passes of a student, their kernels recorded where that pays (``speed.Recorded``).

    ``given`` are a pass's rows: x_t, t, styles, weights of the score loss, what the teachers said, the prompts'
    embeddings (one tensor, or two with ``pooled``), and the teachers' feature maps if they count.

    Args:
        precision: "fp32", "bf16" or "fp16": what the passes are autocast to.
        prediction_type: what the student predicts.
    """

    def __init__(
        self, student: Student, spec: TrainSpec, precision: str, scaler: Any, prediction_type: str, pooled: bool
    ) -> None:
        self.student, self.spec, self.scaler = student, spec, scaler
        self.prediction_type, self.pooled = prediction_type, pooled
        self.half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.recorded = self._wanted = self._never = False
        self.recordings: dict[int, Recorded] = {}

    # ------------------------------------------------------------ a pass

    def autocast(self) -> AbstractContextManager[Any]:
        """For float32 weights under another precision; bfloat16 weights, like the teachers', compute in their type."""
        if self.half is None or self.spec.weights == "bf16":
            return nullcontext()
        return torch.autocast(self.student.unet.device.type, self.half)

    def losses(self, *given: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The student's ε; and each row's loss but for the adversarial one, score loss and feature loss."""
        x_t, t, styles, weights, wanted, tokens, *more = given
        context = Context(tokens, more.pop(0) if self.pooled else None)
        with self.autocast(), BlockFeatures(self.student.unet, enabled=self.spec.feature > 0) as blocks:
            eps = self.student(x_t, t, context, styles)
        score = path_loss(eps, wanted, x_t, t, self.prediction_type) if self.spec.few_step else score_loss(eps, wanted)
        loss = self.spec.score * score * weights
        feature = torch.zeros_like(score)
        if self.spec.feature > 0:
            feature = feature_loss(blocks.take(), more)
            loss = loss + self.spec.feature * feature
        return eps, loss, score, feature

    def scaled(self, share: int, rows: Tensor) -> Tensor:
        """The part of a step's loss that these rows are; ``share`` teachers make up the step."""
        return self.scaler.scale(rows.sum() / (share * self.spec.batch))

    def imitate(
        self, share: int, x_t: Tensor, t: Tensor, context: Context, styles: Tensor, weights: Tensor,
        maps: Sequence[Tensor],
    ) -> None:  # fmt: skip
        """Add the gradients of ``blockwise.imitate`` for rows with the teachers' ``maps``, weighed as the score is."""
        with self.autocast():
            imitate(
                self.student.unet, x_t, t, context, self.student.codebook(styles), maps,
                lambda rows: self.scaled(share, self.spec.blockwise * rows * weights),
            )  # fmt: skip

    def learn(self, share: int, *given: Tensor) -> Tensor:
        """Add the gradients of rows, without a discriminator; returns their ``tally``."""
        if not self.recorded:
            return self._learn(share, *given)[0]
        if share not in self.recordings:
            self.recordings[share] = Recorded(partial(self._learn, share), torch.cuda.graph_pool_handle(), warm=None)
        return self.recordings[share](*given)[0]

    def _learn(self, share: int, *given: Tensor) -> list[Tensor]:
        _, loss, score, feature = self.losses(*given)
        self.scaled(share, loss).backward()
        nothing = torch.zeros_like(score)
        return [tally(given[2], score, feature, nothing, nothing)]

    # ------------------------------------------------------------ recording

    def record(self, wanted: bool) -> None:
        """Forget what was recorded; record again, or not, from the next step that is over on.

        Recordings write to the gradients where they lie: these must stay while ``recorded`` is true.
        """
        self.recordings.clear()
        self.recorded = False
        self._wanted = wanted and not self._never and not self.spec.fused_backward and not self.scaler.is_enabled()

    def give_up(self) -> str:
        """Memory ran out: never record again; returns what that changes."""
        self._never = True
        self.record(False)
        return "memory ran out: going on without recorded kernels of the student, on the same samples"

    def step_over(self) -> None:
        """A step has shown how much memory it takes: a recording keeps as much from previews and files."""
        if self._wanted and not self.recorded:
            self.recorded = self._wanted = has_room_twice(self.student.unet.device)


def tally(styles: Tensor, *losses: Tensor) -> Tensor:
    """Sums of result.LOSSES and the number of rows, of each style: (styles, 5)."""
    return styles.T @ torch.stack([*(rows.detach() for rows in losses), torch.ones_like(losses[0])], 1)
