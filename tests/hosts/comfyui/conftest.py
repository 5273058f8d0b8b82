"""Fixtures of the ComfyUI tests: one server for all of them; or ComfyUI's modules, for the files inside_*.py."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mini_family import family
from tests.hosts.comfyui.browser import BRIEF, BRIEF_RECIPE, FLAGS, SHORT, SHORT_RECIPE, Page
from tests.hosts.comfyui.harness import ROOT, Server, host_paths, make_dmm
from tests.hosts.comfyui.inside_tools import write_dmm
from tests.hosts.comfyui.other_files import (
    CONTROL_LORA,
    CONTROLNET,
    LORA,
    write_control_lora,
    write_controlnet,
    write_lora,
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The page's tests last: as long as it is open, it follows all that the server does, and draws it."""
    items.sort(key=lambda item: item.path.parent == Path(__file__).parent and "page" in item.fixturenames)


@pytest.fixture(scope="session")
def dmm_file(tmp_path_factory) -> Path:
    return make_dmm(tmp_path_factory.mktemp("dmm") / "mini-dmm.safetensors")


@pytest.fixture(scope="session")
def server(tmp_path_factory, dmm_file) -> Iterator[Server]:
    host_paths()
    os.environ.setdefault("DMM_TRAIN_PYTHON", sys.executable)  # the merges of these tests run with what runs the tests
    os.environ["DMM_LOCKS"] = str(tmp_path_factory.mktemp("locks"))
    base = tmp_path_factory.mktemp("comfy base")  # with a space, as users have them
    for folder in ("checkpoints", "controlnet", "diffusion_models", "loras"):
        (base / "models" / folder).mkdir(parents=True)
    for folder in ("custom_nodes", "input", "output", "user"):
        (base / folder).mkdir()
    (base / "custom_nodes" / "dmm").symlink_to(ROOT, target_is_directory=True)
    checkpoints = base / "models" / "checkpoints"
    (checkpoints / "mini-dmm.safetensors").write_bytes(dmm_file.read_bytes())
    make_dmm(checkpoints / "other-dmm.safetensors", ("ink", "clay", "neon"), seed=1, few_step=True)
    (checkpoints / "plain.safetensors").write_bytes((family.WEIGHTS / "base.safetensors").read_bytes())
    (checkpoints / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{not a header!!}")
    family.unpack(checkpoints, ("ink", "clay", "neon"))
    (base / "input" / SHORT).write_text(SHORT_RECIPE, encoding="utf-8")
    (base / "input" / BRIEF).write_text(BRIEF_RECIPE, encoding="utf-8")
    write_lora(base / "models" / "loras" / LORA)
    write_controlnet(base / "models" / "controlnet" / CONTROLNET)
    write_control_lora(base / "models" / "controlnet" / CONTROL_LORA)
    shutil.copy(Path(__file__).with_name("adapter_node.py"), base / "custom_nodes")
    running = Server(base)
    running.start()
    yield running
    running.stop()


# ---------------------------------------------------------------- ComfyUI's page


@pytest.fixture(scope="session")
def shots(tmp_path_factory) -> Path:
    folder = Path(os.environ.get("DMM_SHOTS") or tmp_path_factory.mktemp("shots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if not found:
        pytest.skip("no chromium on the PATH")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session", params=[False, True], ids=["classic", "nodes2"])
def page(request, server, chromium) -> Iterator[Page]:
    tab = chromium.new_page(viewport={"width": 1600, "height": 900})
    tab.set_default_timeout(60_000)
    for banner in ("vueNodesBannerDismissed", "comfy.vueNodesMigration.dismissed"):  # they would cover the canvas
        tab.add_init_script(f"localStorage.setItem('{banner}', 'true')")
    errors: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    opened = Page(tab, server, request.param)
    opened.open()
    yield opened
    tab.close()
    assert not [error for error in errors if "dmm" in error.lower()]


@pytest.fixture
def shoot(page, shots) -> Callable[[str], None]:
    """Keep a picture of the page; comfyui-mix-nodes2.png and others in docs/ were made so."""

    def take(name: str) -> None:
        page.fit()
        page.page.screenshot(path=str(shots / f"comfyui-{name}{'-nodes2' if page.nodes2 else ''}.png"))

    return take


# ---------------------------------------------------------------- inside ComfyUI's own process


@pytest.fixture(scope="module")
def comfy():
    folder, _ = host_paths()
    sys.path.insert(0, str(folder))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    return comfy


@pytest.fixture(scope="module")
def pack(comfy):
    from comfyui_dmm import host, loading, values

    return type("Pack", (), {"host": host, "loading": loading, "values": values})


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return write_dmm(tmp_path_factory.mktemp("dmm") / "mini.safetensors")


@pytest.fixture(scope="module")
def loaded(pack, file):
    with torch.inference_mode():
        return pack.loading.load(file)
