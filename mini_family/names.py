"""What the mini family draws, and the prompts that name it."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent


def subjects(held: bool | None = None) -> list[str]:
    """Icon names of ``subjects.txt``; ``held`` True for the held-out ones, False for the others, None for all."""
    rows = [line.split() for line in (HERE / "subjects.txt").read_text(encoding="utf-8").splitlines() if line[0] != "#"]
    return [row[0] for row in rows if held is None or (len(row) > 1) == held]


def caption(name: str, look: str = "") -> str:
    """The prompt that names a subject, and a look if one is wanted: ``red-apple`` → ``a picture of a red apple``."""
    return " ".join(["a", *look.split(), "picture of a", *name.split("-")])
