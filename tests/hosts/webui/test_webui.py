"""Runs the files inside_*.py in the webuis' two environments: gradio 3.41.2 (A1111, reForge) and 4.40.0 (Forge)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.webui import reference

pytestmark = pytest.mark.hosts
PROFILES = {"DMM_WEBUI_341": "a1111,reforge", "DMM_WEBUI_440": "forge"}
INSIDE = ("inside_styles.py", "inside_life.py", "inside_nested.py", "inside_panel.py", "inside_tab.py")


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """The environments at work side by side, a core each."""
    if not any(map(os.environ.get, PROFILES)):
        pytest.skip("set DMM_WEBUI_341 and DMM_WEBUI_440 (tests/hosts/webui/prepare.py prints them)")
    files = tmp_path_factory.mktemp("webui files")
    reference.write(files)
    started = {}
    for variable, profiles in PROFILES.items():
        if python := os.environ.get(variable):
            command = [python, "-m", "pytest", "-m", "hosts", "-q", "-p", "no:cacheprovider"]
            more = {"DMM_WEBUI_FILES": str(files), "DMM_WEBUI_PROFILES": profiles, "OMP_NUM_THREADS": "1"}
            more["DMM_TRAIN_PYTHON"] = sys.executable
            started[variable] = subprocess.Popen(
                [*command, *(str(Path(__file__).with_name(name)) for name in INSIDE)],
                cwd=reference.ROOT, env={**os.environ, **more}, text=True,
                stdout=(files / f"{variable}.log").open("w", encoding="utf-8"), stderr=subprocess.STDOUT,
            )  # fmt: skip
            started[variable].log = files / f"{variable}.log"  # type: ignore[attr-defined]
    yield started
    for process in started.values():
        if process.poll() is None:
            process.kill()


@pytest.mark.parametrize("variable", PROFILES)
def test_webui_double(running, variable):
    if variable not in running:
        pytest.skip(f"set {variable}")
    code = running[variable].wait(1800)
    told = running[variable].log.read_text(encoding="utf-8")
    assert code == 0, told[-8000:]
    assert " passed" in told
