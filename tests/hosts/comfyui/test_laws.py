"""Runs the files inside_*.py with ComfyUI's own Python: what is checked on latents rather than on pictures."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.hosts.comfyui.harness import ROOT, host_paths

pytestmark = pytest.mark.hosts


FILES = ("inside_styles.py", "inside_models.py", "inside_running.py", "inside_adapters.py")


def test_laws_inside_comfyui():
    """In one process: most of a small file's time is the start of torch and ComfyUI."""
    _, python = host_paths()
    command = [python, "-m", "pytest", "-m", "hosts and not slow", "-q", "-p", "no:cacheprovider"]
    told = subprocess.run(
        [*command, *(str(Path(__file__).with_name(name)) for name in FILES)],
        cwd=ROOT, capture_output=True, text=True, env=os.environ, timeout=1800,
    )  # fmt: skip
    assert told.returncode == 0, told.stdout[-6000:] + told.stderr[-2000:]
    assert " passed" in told.stdout
