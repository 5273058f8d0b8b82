"""What the mini family draws, and the prompts that name it."""

from __future__ import annotations

import random
from pathlib import Path

HERE = Path(__file__).parent


def subjects(held: bool | None = None) -> list[str]:
    """Icon names of ``subjects.txt``; ``held`` True for the held-out ones, False for the others, None for all."""
    rows = [line.split() for line in (HERE / "subjects.txt").read_text(encoding="utf-8").splitlines() if line[0] != "#"]
    return [row[0] for row in rows if held is None or (len(row) > 1) == held]


def caption(name: str, look: str = "") -> str:
    """The prompt that names a subject, and a look if one is wanted: ``red-apple`` → ``a picture of a red apple``."""
    return " ".join(["a", *look.split(), "picture of a", *name.split("-")])


def invented(count: int) -> list[str]:
    """Names of no icon, in words that trained names have: ``red-apple`` and ``cat-face`` give ``red-face``.

    What teachers draw for them is odd, but a student that only ever hears the trained names learns these by heart.
    """
    known, trained = set(subjects()), [name.split("-") for name in subjects(held=False)]
    longer = [words for words in trained if len(words) > 1]
    rng, made = random.Random(0), dict[str, None]()
    while len(made) < count:
        name = "-".join([*rng.choice(longer)[:-1], rng.choice(trained)[-1]])
        if name not in known:
            made[name] = None
    return list(made)
