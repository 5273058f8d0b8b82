"""The tab *DMM* in Chromium, by itself (``dmm ui``) or in a webui: what the tests click, and how they wait."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
SIZES = {"laptop": (1280, 800), "phone": (390, 844)}
MINUTES = 60_000  # milliseconds; generous, since a merge is at work meanwhile


class Page:
    """The page in one width and theme; what goes wrong in its scripts fails the test at its end.

    ``inside``: the webui's own tab that holds the page.
    """

    def __init__(
        self, browser: Any, address: str, size: str = "laptop", theme: str = "light", inside: str | None = None
    ) -> None:
        width, height = SIZES[size]
        self.name, self.kind = f"{size}-{theme}", "webui" if inside else "ui"
        self.page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
        self.page.set_default_timeout(MINUTES / 2)  # a click; what a merge needs is said where it is awaited
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(f"{address}?__theme={theme}")
        if inside:
            self.page.locator("#tabs button", has_text=inside).first.click(timeout=5 * MINUTES)
        self.page.wait_for_selector("#dmm_tabs")

    def tab(self, name: str) -> None:
        if self.kind == "ui":
            self.page.get_by_role("tab", name=name).first.click()
        else:  # gradio 3.41's have no role
            self.page.locator("#dmm_tabs > .tab-nav button", has_text=name).first.click()

    def choose(self, elem_id: str, *values: str) -> None:
        """Pick from a dropdown's list, or type what is not in it."""
        for value in values:
            box = self.page.locator(f"#{elem_id} input").first
            box.click()
            box.fill(value)
            option = self.page.get_by_role("option", name=value, exact=True)
            if self.kind == "webui":
                option = option.or_(self.page.locator(f"#{elem_id} ul.options li", has_text=value))  # gradio 3.41's
            option = option.first
            try:
                option.click(timeout=5000)  # the list follows the typing, and may be drawn anew under the mouse
            except Exception:
                box.press("Enter")
            box.press("Escape")

    def fill(self, elem_id: str, value: str) -> None:
        field = self.page.locator(f"#{elem_id} textarea, #{elem_id} input").first
        field.fill(value)
        field.blur()

    def press(self, elem_id: str) -> None:
        self.page.locator(f"button#{elem_id}, #{elem_id} button").first.click()

    def wait(self, elem_id: str, pattern: str, minutes: float = 8) -> str:
        """The element's text once it matches."""
        code = "([id, re]) => { const e = document.getElementById(id); return e && RegExp(re, 's').test(e.innerText); }"
        try:
            self.page.wait_for_function(code, arg=[elem_id, pattern], timeout=minutes * MINUTES, polling=250)
        except Exception as error:
            raise AssertionError(f"{pattern!r} not in {self.text(elem_id)!r}") from error
        return self.text(elem_id)

    def text(self, elem_id: str) -> str:
        return self.page.locator(f"#{elem_id}").first.inner_text()  # gradio 3.41 gives the id twice

    def shot(self, name: str) -> None:
        if folder := os.environ.get("DMM_SHOTS"):
            self.page.wait_for_timeout(600)
            self.page.screenshot(path=str(Path(folder) / f"{self.kind}-{name}-{self.name}.png"))

    def close(self) -> None:
        self.page.close()
        assert not self.errors


def merge_form(page: Page, name: str, *checkpoints: str, base: str = "base.safetensors") -> None:
    page.tab("Merge")
    page.choose("dmm_merge_checkpoints", *checkpoints)
    page.choose("dmm_merge_base", base)
    page.fill("dmm_merge_name", name)
    page.page.locator("#dmm_merge_preset").get_by_text("mini", exact=True).click()
