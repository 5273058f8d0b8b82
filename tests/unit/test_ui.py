"""``dmm ui`` up to the page, and what the tab says in HTML; the page itself is tested in a browser (tests/hosts/ui)."""

from __future__ import annotations

import importlib.util
import socket

import pytest

from a1111_extension.tab import words
from dmm_core import cli
from dmm_core.follow import View
from dmm_core.jobs import Event
from dmm_core.studio.desk import Activity


@pytest.fixture
def gradio_is_there(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: name == "gradio" or find(name, *more))


def told(capsys, *arguments: str) -> str:
    assert cli.main(["ui", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_without_gradio_it_says_what_to_install(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: find(name, *more) if name != "gradio" else None
    )
    assert "the page needs gradio. Run: python install.py --ui." in told(capsys)


def test_bad_arguments_are_a_line(capsys, tmp_path, gradio_is_there):
    (tmp_path / "file").touch()
    assert "is no folder" in told(capsys, "--models", str(tmp_path / "file"))
    assert "expected 1 to 65535" in told(capsys, "--port", "70000")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "cannot be used" in told(capsys, "--port", str(taken.getsockname()[1]))


def progress(step: int, **losses: float) -> Event:
    return Event("progress", {"step": step, "total": 40, "seconds_left": 125.0, "losses": losses, "loss": None})


def test_view_in_words():
    view = View()
    assert view.line() == "starts" and view.share is None
    view.take(Event("stage", {"what": "draws latents", "done": 3, "total": 8}))
    assert view.line() == "draws latents: 3 of 8" and view.share == 3 / 8
    view.take(progress(10, ink=0.5))
    assert view.line() == "step 10 of 40, 2 min left" and view.share == 0.25
    view.take(Event("stopped", {"step": 12, "resumable": True}))
    assert view.ended(True, "Resume it") == "Stopped at step 12 of 40. Resume it to go on from there."
    assert (
        View().ended(False, "Run it again")
        == "Stopped before the first step. Run it again to go on from its last save."
    )


def test_card_shows_what_is_going_on_and_escapes_names():
    activity = Activity("Merges <b>x</b>", view=View())
    activity.view.take(progress(10, **{"<i>ink</i>": 0.5, "clay": 0.25}))
    shown = words.card(activity)
    assert 'data-live="1"' in shown and "step 10 of 40" in shown and "width:25.0%" in shown
    assert "<i>ink" not in shown and "&lt;i&gt;ink&lt;/i&gt;" in shown and "<b>x" not in shown
    for nothing in ({"ink": None}, {}):  # of a loss that is NaN
        activity.view.take(progress(11, **nothing))
        assert "step 11 of 40" in words.card(activity)
    activity.cancelled.set()
    assert "Saves what was learnt" in words.card(activity)
    activity.state, activity.line = "failed", "the disk is <full>"
    shown = words.card(activity)
    assert 'data-live="0"' in shown and "dmm-failed" in shown and "the disk is &lt;full&gt;" in shown
    assert "Nothing is running" in words.card(None)


def test_pictures_are_in_the_page_itself():
    shown = words.pictures([('a "caption"', b"\x89PNG..."), ("b", b"\xff\xd8...")])
    assert "data:image/png;base64," in shown and "data:image/jpeg;base64," in shown and "a &quot;caption&quot;" in shown


def test_style_pictures_are_never_addresses():
    style = {"name": "ink", "thumbnail": "https://example.org/x.png"}
    found = {
        "kind": "dmm", "problem": None, "family": "sd15", "prediction_type": "epsilon", "parameters": {"unet": 10**6},
        "dtype": "float16", "dtypes": {}, "size": 2**20, "tensors": 3, "default_style": {"ink": 1.0},
        "styles": [style, {"name": "clay", "thumbnail": "data:image/png;base64,AA"}], "non_finite": [],
        "metadata": {"a": "b" * 1000},
    }  # fmt: skip
    shown = words.inspected(found)
    assert "example.org" not in shown and "data:image/png;base64,AA" in shown and "ink 1" in shown
    assert "b" * 301 not in shown and "none" in shown
