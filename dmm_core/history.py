"""How the losses went: a line for each teacher, smoothed, kept over sittings. Standard library alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from dmm_core.files import write_atomically

MEMORY = 0.9  # of the moving average
POINTS = 400  # more are thinned out


class Losses:
    """Takes losses as they are read; ``points`` are (step, smoothed losses), at least ``every`` steps apart.

    Args:
        path: where they are kept. What is there from steps beyond ``step`` was not saved with the state: it is dropped.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.points: list[tuple[int, dict[str, float]]] = []
        self.every = 1
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            self.points = [(int(at), dict(losses)) for at, losses in kept["points"] if at <= step]
            self.every = int(kept["every"])
        except (OSError, ValueError, KeyError, TypeError):  # none yet; a picture less is no loss
            pass
        self.now: dict[str, float] = dict(self.points[-1][1]) if self.points else {}

    def add(self, step: int, losses: Mapping[str, float]) -> None:
        for name, loss in losses.items():
            if not math.isfinite(loss):  # one such step is not the mean of all that follow
                continue
            self.now[name] = MEMORY * self.now.get(name, loss) + (1 - MEMORY) * loss
        if not self.points or step - self.points[-1][0] >= self.every:
            self.points.append((step, dict(self.now)))
        if len(self.points) > POINTS:
            self.points = self.points[::2]
            self.every *= 2

    def save(self) -> None:
        write_atomically(self.path, json.dumps({"every": self.every, "points": self.points}).encode())
