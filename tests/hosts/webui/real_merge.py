"""A merge from a click in a real, running webui: plan, progress, previews, a stop, and going on to the end. By hand.

    python tests/hosts/webui/real_merge.py http://127.0.0.1:7860 WEBUI      # its folder; pictures: DMM_SHOTS=FOLDER

Puts the mini family's ink, clay and base into the webui's ``models/Stable-diffusion/mini/`` (start it afterwards, or
refresh its list). Where training has no environment yet, the page's button makes it. Needs Chromium and playwright.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from dmm_core.checkpoint import open_checkpoint  # noqa: E402
from mini_family import demo, family  # noqa: E402
from tests.hosts.ui.page import FLAGS, MINUTES, Page, merge_form  # noqa: E402
from tests.hosts.webui.real_api import Webui  # noqa: E402

NAME = "dmm-check-merged"


def put_teachers(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        for path in family.unpack(Path(temporary), ["ink", "clay"]):
            if not (folder / path.name).exists():
                shutil.copy(path, folder)


def start(page: Page) -> None:
    """Begin the merge, once there is an environment to train in."""
    if page.page.locator("#dmm_install").is_visible():
        began = time.monotonic()
        page.shot("install")
        page.press("dmm_install")
        page.page.locator("#dmm_install").wait_for(state="hidden", timeout=20 * MINUTES)
        print(f"the button made an environment for training in {time.monotonic() - began:.0f} s")
    page.press("dmm_merge_start")
    told = page.wait("dmm_card", r"step [1-9]\d* of|failed", minutes=5)
    assert "failed" not in told, told


def check(page: Page, webui: Webui, out: Path, steps: int) -> None:
    merge_form(page, NAME, "mini/ink.safetensors", "mini/clay.safetensors", base="mini/base.safetensors")
    page.page.get_by_text("More", exact=True).first.click()
    page.fill("dmm_merge_steps", str(steps))
    page.fill("dmm_merge_pictures", str(max(4, steps // 4)))
    page.fill("dmm_merge_prompts", "\n".join(demo.shown_prompts()))
    began = time.monotonic()
    start(page)
    print(f"first step after {time.monotonic() - began:.0f} s")
    page.page.wait_for_selector("#dmm_preview img", timeout=10 * MINUTES)
    card = page.text("dmm_card")
    print("progress:", " | ".join(card.split("\n")))
    page.page.evaluate("window.scrollTo(0, 0)")
    page.shot("running")
    picture = webui.ask("/sdapi/v1/txt2img", {"prompt": "a cat", "steps": 1, "width": 64, "height": 64, "seed": 1})
    print("a picture of the webui while the merge runs:", len(picture["images"][0]), "characters")
    page.press("dmm_cancel")
    told = page.wait("dmm_card", rf"Stopped at step \d+ of {steps}")
    print("stopped:", told.split("\n")[0])
    assert not out.exists(), f"{out} was written by a merge that was stopped"
    page.choose("dmm_unfinished", NAME)
    page.press("dmm_resume")
    page.wait("dmm_card", rf"step {steps // 20}\d+ of|Done")
    page.page.evaluate("window.scrollTo(0, 0)")
    page.shot("resumed")
    page.wait("dmm_card", rf"Done: {NAME}\.safetensors")
    before = int(re.search(r"at step (\d+)", told)[1])  # type: ignore[index]
    print(f"resumed from step {before}, done: styles", open_checkpoint(out).styles)
    page.shot("done")
    webui.ask("/sdapi/v1/refresh-checkpoints", {})
    titles = [entry["title"] for entry in webui.ask("/sdapi/v1/sd-models")]
    assert any(NAME in title for title in titles), titles
    print("the webui lists the new file")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("webui", type=Path)
    parser.add_argument("--steps", type=int, default=40, help="of the merge; pictures worth showing take 300")
    args = parser.parse_args()
    url = args.url.rstrip("/")
    webui = Webui(url, 64, 1)
    models = args.webui / "models" / "Stable-diffusion"
    put_teachers(models / "mini")
    out = models / f"{NAME}.safetensors"
    out.unlink(missing_ok=True)
    webui.ask("/sdapi/v1/refresh-checkpoints", {})
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = Page(browser, url + "/", inside="DMM")
        try:
            check(page, webui, out, args.steps)
        finally:
            page.shot("last")
            print("errors of the page's scripts:", page.errors or "none")
            browser.close()


if __name__ == "__main__":
    main()
