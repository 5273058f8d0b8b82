"""Teachers weighed alike, however hard they are to follow: each one's loss over its own moving average.

A step's gradient is then that of Σ log L_i rather than Σ L_i, and the teacher furthest from the others takes no more of
it than the nearest. The paper adds the losses as they are (arXiv:2504.12364, §3.4); docs/results.md has both.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dmm_core.recipe import TrainSpec

KEEP = 0.98  # of the averages a step
MOST = 4.0  # times that a teacher may weigh more, or less: one whom the student follows already has no loss left


class Balance:
    """Weights (styles,) of the losses in a step, from the losses in the steps before.

    Args:
        old: how many styles, the first ones, an earlier student teaches: they begin without a loss, and weigh 1.
    """

    def __init__(self, styles: int, old: int, device: torch.device) -> None:
        self.old = 0 if old == styles else old
        self.averages = torch.zeros(styles, device=device)
        self.seen = torch.zeros(styles, device=device)  # steps
        self.weights = torch.ones(styles, device=device)

    @torch.no_grad()
    def update(self, tally: Tensor, spec: TrainSpec) -> None:
        """After a step, whose ``passes.tally`` this is (styles, 5)."""
        count = tally[:, -1]
        loss = (spec.score * tally[:, 0] + spec.feature * tally[:, 1]) / count
        told = (count > 0) & loss.isfinite()
        share = (1 / (self.seen + 1)).clamp(min=1 - KEEP)  # the first step counts whole
        self.averages = torch.where(told, torch.lerp(self.averages, loss, share), self.averages)
        self.seen += told
        self._weigh()

    def _weigh(self) -> None:
        """A teacher's weight is the mean of the averages over its own, so that the sum of the losses stays as it is."""
        new = self.averages[self.old :]
        known = self.seen[self.old :] > 0
        mean = (new * known).sum() / known.sum().clamp(min=1)
        self.weights[self.old :] = torch.where(known & (new > 0), mean / new, 1.0).clamp(1 / MOST, MOST)

    def state(self) -> dict[str, Tensor]:
        return {"balance.averages": self.averages, "balance.seen": self.seen}

    @torch.no_grad()
    def load_state(self, stored: Mapping[str, Tensor]) -> None:
        """KeyError: a tensor is missing."""
        self.averages.copy_(stored["averages"])
        self.seen.copy_(stored["seen"])
        self._weigh()
