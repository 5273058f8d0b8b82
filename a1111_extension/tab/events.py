"""Gradio's events, for 3.41 to 6: the same call with the options that each version has."""

from __future__ import annotations

import html
import logging
from collections.abc import Callable
from typing import Any

import gradio as gr

from dmm_core.errors import BadInput, one_line

MAJOR = int(gr.__version__.partition(".")[0])
# in javascript/dmm_tab.js
SHOW_CARD = "() => { window.dmmShowCard && window.dmmShowCard(); return []; }"
OPEN_MIX = "() => { window.dmmOpenMix && window.dmmOpenMix(); return []; }"
log = logging.getLogger("dmm")


def on(
    event: Callable[..., Any], fn: Callable[..., Any] | None, inputs: Any = None, outputs: Any = None,
    js: str | None = None, queue: bool = True,
) -> Any:  # fmt: skip
    """Tie a handler to an event such as ``button.click``; no progress overlay, and not part of the page's API."""
    more: dict[str, Any] = {"show_progress": "hidden"}
    more |= {} if queue else {"queue": False}  # True would be refused where a webui runs without a queue
    more |= {"api_name": False} if MAJOR < 6 else {"api_visibility": "private"}
    if js is not None:
        more["_js" if MAJOR < 4 else "js"] = js
    return event(fn=fn, inputs=inputs, outputs=outputs, **more)


def attempt(work: Callable[[], str]) -> str:
    """What ``work`` says, or what went wrong, as a line of HTML. The page goes on in any case."""
    try:
        return said(work())
    except BadInput as error:
        return said(str(error), bad=True)
    except OSError as error:  # a full disk, a folder without rights
        return said(f"{error.filename or 'the disk'}: {error.strerror or error}. Nothing was changed there.", bad=True)
    except Exception as error:
        log.exception("DMM: the page's action broke off")
        return said(f"This went wrong: {one_line(error)}", bad=True)


def said(line: str, bad: bool = False) -> str:
    if not line:
        return ""
    return f'<div class="dmm-said{" dmm-bad" if bad else ""}" role="status">{html.escape(line)}</div>'
