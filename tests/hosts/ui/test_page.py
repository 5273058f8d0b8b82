"""``dmm ui`` in Chromium, as a user meets it: a merge from a click, cancelled and resumed, looked at, exported.

DMM_SHOTS names a folder for pictures of the page; those in docs/ that begin with ui- were made so, with DMM_SHOTS_FILE,
the demo's DMM file, among the checkpoints.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from dmm_core.checkpoint import open_checkpoint
from mini_family import family
from tests.hosts.ui.page import FLAGS, MINUTES, Page, merge_form

pytestmark = pytest.mark.hosts
ROOT = Path(__file__).resolve().parents[3]
TABS = ("Merge", "Inspect", "Mix & export", "Extend", "Evaluate")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models ü")
    family.unpack(folder / "checkpoints")
    (folder / "checkpoints" / "blueprint.safetensors").unlink()
    if given := os.environ.get("DMM_SHOTS_FILE"):
        shutil.copy(given, folder / "checkpoints" / "mini-dmm.safetensors")
    return folder


@pytest.fixture(scope="module")
def address(models, tmp_path_factory) -> Iterator[str]:
    python = os.environ.get("DMM_UI_PYTHON")
    if not python:
        pytest.skip("set DMM_UI_PYTHON (tests/hosts/ui/prepare.py prints it)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "log.txt"
    with log.open("w", encoding="utf-8") as file:
        server = subprocess.Popen(
            [python, "-m", "dmm_core", "ui", "--models", str(models), "--port", str(port), "--no-browser"],
            cwd=ROOT, stdout=file, stderr=file,
            env={**os.environ, "DMM_LOCKS": str(log.parent / "locks"), "OMP_NUM_THREADS": "1",
                 "DMM_TRAIN_PYTHON": sys.executable},
        )  # fmt: skip
    until = time.monotonic() + 1200
    while "http://" not in log.read_text(encoding="utf-8"):
        assert server.poll() is None and time.monotonic() < until, log.read_text(encoding="utf-8")
        time.sleep(0.5)
    yield f"http://127.0.0.1:{port}/"
    server.terminate()
    assert server.wait(1200) == 0 or sys.platform == "win32", log.read_text(encoding="utf-8")
    assert "Traceback" not in log.read_text(encoding="utf-8"), log.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    path = shutil.which("chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    if path is None:
        pytest.skip("there is no Chromium on the PATH")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(chromium, address) -> Iterator[Page]:
    made = Page(chromium, address)
    yield made
    made.close()


def test_bad_input_is_a_sentence(page):
    page.tab("Merge")
    page.press("dmm_merge_start")
    page.wait("dmm_merge_told", "the new file has no name yet")
    page.fill("dmm_merge_name", "../outside")
    page.press("dmm_merge_start")
    page.wait("dmm_merge_told", "is not a file's name")
    page.fill("dmm_merge_name", "x")
    page.press("dmm_merge_start")
    page.wait("dmm_merge_told", "a merge needs at least two checkpoints")
    page.choose("dmm_merge_base", "../../etc/passwd")
    page.press("dmm_merge_start")
    page.wait("dmm_merge_told", "leads out of the folder of checkpoints")
    page.shot("bad")
    page.tab("Mix & export")
    page.press("dmm_mix_export")
    page.wait("dmm_mix_told", "no DMM file is chosen")
    page.tab("Evaluate")
    page.press("dmm_evaluate_start")
    page.wait("dmm_evaluate_told", "no checkpoint is chosen")


def test_merge_cancel_resume(page, models):
    """From a click to a DMM file, with a stop in between; previews and losses while it runs."""
    merge_form(page, "two styles", "ink.safetensors", "clay.safetensors")
    page.page.get_by_text("More", exact=True).first.click()
    page.fill("dmm_merge_steps", "30")
    page.fill("dmm_merge_pictures", "2")
    page.press("dmm_merge_start")
    page.wait("dmm_card", r"step [1-9]\d* of 30")
    page.page.wait_for_selector("#dmm_preview img", timeout=60 * MINUTES)
    told = page.text("dmm_card")
    assert "ink" in told and "clay" in told and "Plan" in told
    page.page.evaluate("window.scrollTo(0, 0)")
    page.shot("running")
    page.press("dmm_cancel")
    told = page.wait("dmm_card", r"Stopped at step \d+ of 30\. Resume it to go on from there\.")
    assert not (models / "checkpoints" / "two styles.safetensors").exists()
    page.choose("dmm_unfinished", "two styles")
    page.press("dmm_resume")
    before = int(re.search(r"at step (\d+)", told)[1])
    again = page.wait("dmm_card", r"step [1-9]\d* of 30, .* left|Done")
    page.wait("dmm_card", r"Done: two styles\.safetensors")
    assert "Done" in again or int(re.search(r"step (\d+)", again)[1]) >= before
    assert open_checkpoint(models / "checkpoints" / "two styles.safetensors").styles == ("ink", "clay")


def test_what_is_chosen_stays_when_files_come(page, models):
    page.tab("Merge")
    shutil.copy(models / "checkpoints" / "ink.safetensors", models / "checkpoints" / "a first one.safetensors")
    page.page.wait_for_timeout(6500)  # idle, the page asks every five seconds
    assert page.text("dmm_merge_checkpoints").split()[-2:] == ["ink.safetensors", "clay.safetensors"]
    page.choose("dmm_merge_checkpoints", "a first one.safetensors")
    assert page.text("dmm_merge_checkpoints").split("\n")[-1] == "a first one.safetensors"


def test_inspect(page):
    page.tab("Inspect")
    page.choose("dmm_inspect_file", "two styles.safetensors")
    page.press("dmm_inspect_start")
    told = page.wait("dmm_inspect_found", "DMM file")
    assert "clay.safetensors" in told
    assert page.page.locator("#dmm_inspect_found .dmm-chip img").count() == 2, "the styles' pictures"
    page.shot("inspect")


def test_mix_and_export(page, models):
    """The style file of the sliders is what ``dmm mix`` computes."""
    page.tab("Mix & export")
    page.choose("dmm_mix_student", "two styles.safetensors")
    page.page.wait_for_selector("#dmm_mix_w0 input", state="visible")
    assert "ink" in page.text("dmm_mix_w0") and "clay" in page.text("dmm_mix_w1")
    for elem_id, value in (("dmm_mix_w0", "0.75"), ("dmm_mix_w1", "0.25")):
        field = page.page.locator(f"#{elem_id} input[type=number]").first
        field.fill(value)
        field.blur()
    page.fill("dmm_mix_name", "three quarters")
    page.press("dmm_mix_export")
    page.wait("dmm_mix_told", "Written: .*0.75 ink . 0.25 clay")
    page.shot("mix")
    file = open_checkpoint(models / "checkpoints" / "two styles.safetensors")
    expected = file.codebook().style({"ink": 0.75, "clay": 0.25}).float()
    with safe_open(str(models / "loras" / "three quarters.safetensors"), "pt") as made:
        assert torch.allclose(made.get_tensor("lora_unet_time_embed_2.diff_b").float(), expected, atol=1e-3)
    page.press("dmm_mix_random")
    page.press("dmm_mix_reset")


def test_contact_sheet(page):
    page.tab("Evaluate")
    page.choose("dmm_evaluate_student", "two styles.safetensors")
    page.wait("dmm_evaluate_teachers", "ink.safetensors.*clay.safetensors")
    page.fill("dmm_evaluate_images", "4")
    page.fill("dmm_evaluate_steps", "2")
    page.press("dmm_evaluate_start")
    page.wait("dmm_card", "ratio to the teachers' own distance")
    page.page.wait_for_selector("#dmm_gallery img")
    pictures = page.page.locator("#dmm_gallery img")
    assert pictures.count() == 3
    assert all(pictures.nth(i).evaluate("image => image.naturalWidth") > 200 for i in range(3))
    page.page.locator("#dmm_gallery").scroll_into_view_if_needed()
    page.shot("sheet")


@pytest.mark.parametrize(("size", "theme"), [
    ("laptop", "light"), ("phone", "dark"),
    pytest.param("laptop", "dark", marks=pytest.mark.slow), pytest.param("phone", "light", marks=pytest.mark.slow),
])  # fmt: skip
def test_every_width_and_theme(chromium, address, size, theme):
    """Nothing runs over the side, in any tab."""
    page = Page(chromium, address, size, theme)
    page.wait("dmm_card", r"\S")
    for name in TABS:
        page.tab(name)
        page.page.wait_for_timeout(500)
        if name == "Mix & export":
            page.choose("dmm_mix_student", (os.environ.get("DMM_SHOTS_FILE", "") and "mini-dmm.safetensors")
                        or "two styles.safetensors")  # fmt: skip
            page.page.wait_for_selector("#dmm_mix_w0 input", state="visible")
        wide, inner = page.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert wide <= inner, name
        page.shot(name.split()[0].lower())
    page.close()
