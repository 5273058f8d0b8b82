"""Runs the files inside_*.py in the webuis' two environments: gradio 3.41.2 (A1111, reForge) and 4.40.0 (Forge)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.hosts.webui import reference

pytestmark = pytest.mark.hosts
PROFILES = {"DMM_WEBUI_341": "a1111,reforge", "DMM_WEBUI_440": "forge"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("webui files")
    reference.write(made)
    return made


@pytest.mark.parametrize("variable", PROFILES)
@pytest.mark.parametrize("name", ["inside_styles.py", "inside_life.py", "inside_panel.py"])
def test_webui_double(folder, variable, name):
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"set {variable} (see tests/hosts/webui/prepare.py)")
    command = [python, "-m", "pytest", "-m", "hosts", "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "DMM_WEBUI_FILES": str(folder), "DMM_WEBUI_PROFILES": PROFILES[variable]}
    told = subprocess.run(
        [*command, str(Path(__file__).with_name(name))],
        cwd=reference.ROOT, capture_output=True, text=True, env=environment, timeout=900,
    )  # fmt: skip
    assert told.returncode == 0, told.stdout[-6000:] + told.stderr[-2000:]
    assert " passed" in told.stdout
