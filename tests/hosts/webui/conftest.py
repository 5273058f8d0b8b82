"""The double of each profile, with a DMM file loaded; for the files inside_*.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "profile" in metafunc.fixturenames:
        profiles = os.environ.get("DMM_WEBUI_PROFILES", "").split(",")
        metafunc.parametrize("profile", profiles, scope="module")


@pytest.fixture(scope="session")
def files() -> Path:
    return Path(os.environ["DMM_WEBUI_FILES"])


@pytest.fixture(scope="module")
def started(profile):
    from tests.hosts.webui.driver import Host

    host = Host(profile)
    from a1111_extension import args, hook, session, styles, ui

    host.args, host.live, host.session, host.styles, host.ui = args, hook.LIVE, session, styles, ui
    return host


@pytest.fixture
def host(started, files):
    started.load(files / "dmm.safetensors")
    yield started
    assert not started.live.hooked, "a hook was left behind"
