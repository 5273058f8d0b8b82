"""What a step of a distillation tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from dmm_core.recipe import TrainSpec

LOSSES = ("score", "feature", "adversarial", "discriminator")  # all but the last one are the student's


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. Losses are means a teacher over its rows of this step.

    They are read from the device when they are first asked for; steps whose losses nobody reads need not wait.
    """

    step: int
    samples_seen: int
    lr: float
    warnings: tuple[str, ...]
    tally: Tensor  # (teachers, 5): sums of LOSSES, rows
    names: Sequence[str]
    spec: TrainSpec

    @cached_property
    def means(self) -> dict[str, dict[str, float]]:
        """Style → each of LOSSES."""
        rows = zip(self.names, self.tally.tolist(), strict=True)
        return {
            name: {kind: total / count for kind, total in zip(LOSSES, sums, strict=True)}
            for name, (*sums, count) in rows
            if count
        }

    def of(self, kind: str) -> dict[str, float]:
        """Style → one of LOSSES; nothing where this loss is off."""
        weight = self.spec.adversarial if kind == "discriminator" else getattr(self.spec, kind)
        return {name: losses[kind] for name, losses in self.means.items()} if weight > 0 else {}

    @property
    def score(self) -> dict[str, float]:
        return self.of("score")

    @property
    def feature(self) -> dict[str, float]:
        return self.of("feature")

    @property
    def loss(self) -> float:
        """The student's: L = L_score + λ_feat L_feat + λ_adv L_adv."""
        weighed = (getattr(self.spec, kind) * m[kind] for m in self.means.values() for kind in LOSSES[:3])
        return sum(weighed) / len(self.means)
