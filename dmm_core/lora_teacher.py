"""A LoRA file as a teacher: the base with the LoRA in it, read like any other checkpoint (paper.md: LoRA teachers)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from torch import Tensor

from dmm_core.checkpoint import Checkpoint
from dmm_core.lora import FittedLora, open_lora


@dataclass(eq=False)
class LoraTeacher(Checkpoint):
    """A base whose tensors are changed as they are read, e.g. to W + strength · alpha / rank · up @ down.

    ``path`` and ``sha256`` are the LoRA's. What the LoRA leaves alone is the base's own tensor, and held once with it.
    """

    fitted: FittedLora | None = None
    strength: float = 1.0

    def changed(self, part: str, key: str, tensor: Tensor) -> Tensor:
        """See ``Checkpoint.changed``. Raises NonFinite: the LoRA has NaN or infinity."""
        delta = None if self.fitted is None else self.fitted.delta(part, key, self.strength, tensor)
        return tensor if delta is None else (tensor.float() + delta.reshape(tensor.shape)).to(tensor.dtype)

    def check_finite(self) -> None:
        super().check_finite()
        if self.fitted is not None:
            self.fitted.lora.check_finite()


def lora_teacher(path: str | Path, base: Checkpoint, strength: float = 1.0) -> LoraTeacher:
    """Open a LoRA on top of a base.

    Raises:
        LoraError: not a LoRA that is read here, or one for another architecture.
    """
    fitted = open_lora(path).fit(base)
    like = {field.name: getattr(base, field.name) for field in fields(Checkpoint)}
    own = {"path": Path(path), "weights_files": (Path(path),), "_sha256": ""}
    return LoraTeacher(**{**like, **own}, fitted=fitted, strength=strength)
