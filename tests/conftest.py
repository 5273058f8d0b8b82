"""What every test has: no hub, no busy waiting, and the way to the clone's root."""

from __future__ import annotations

import os
from pathlib import Path

# Before any test imports torch or transformers.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the clone."""
    return ROOT


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same numbers in every run and in any order."""
    import torch

    torch.manual_seed(0)
