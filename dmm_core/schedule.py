"""Style weights that change over the sampling steps; what every host shares. torch alone.

Everything moves in codebook space, before the MLP: s(share) = MLP(Σ w_i(share) e_i), DMM (arXiv:2504.12364) §3.3.
"""

from __future__ import annotations

from torch import Tensor, lerp

from dmm_core.errors import StyleError

MODES = ("blend", "switch")


def check(mode: str, start: float, end: float) -> None:
    """Raises StyleError for an unknown mode, or an end before the start."""
    if mode not in MODES:
        raise StyleError(f"there is no mode {mode!r}", hint=f"The modes are: {', '.join(MODES)}.")
    if end < start:
        raise StyleError(f"the schedule ends at {end:g}, before it starts at {start:g}", hint="Let end be the larger.")


def weights_at(stages: Tensor, share: float, mode: str = "blend", start: float = 0.0, end: float = 1.0) -> Tensor:
    """Weights (...) of stages (S, ...) when ``share`` of the steps is done: 0 at the first step, 1 at the last.

    ``blend`` goes from stage to stage between start and end; ``switch`` gives every stage an equal part of that time.
    """
    last = len(stages) - 1
    if not last:
        return stages[0]
    along = min(max((share - start) / (end - start), 0.0), 1.0) if end > start else float(share >= start)
    if mode == "switch":
        return stages[min(int(along * (last + 1)), last)]
    first = min(int(along * last), last - 1)
    return lerp(stages[first], stages[first + 1], along * last - first)
