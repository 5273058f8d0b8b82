"""A full-size file is inspected in under a second and little memory (goal: 2 GB in < 1 s, < 200 MB)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "inspect_large.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("inspect_large", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_inspecting_a_large_file(script, family):
    result = script.measure(family)
    assert result["kind"] == "checkpoint" and result["family"] == family
    assert result["size"] > 2e9
    assert result["seconds"] < 1
    assert result["megabytes"] < 200
