"""The tab in the real gradio of each webui: built, its handlers run as a page would, memory lent and given back."""

from __future__ import annotations

import errno
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from tests.hosts.webui.driver import Processing

pytestmark = pytest.mark.hosts


@pytest.fixture
def tab(host, files, tmp_path, monkeypatch):
    """The tab's module, over folders with the tests' files; nothing left running."""
    from a1111_extension.tab import webui
    from dmm_core.studio.folders import Folders

    monkeypatch.setenv("DMM_LOCKS", str(tmp_path / "locks"))
    models = Path(host.sd_models.model_path)
    for name in ("dmm", "other", "plain"):
        shutil.copy(files / f"{name}.safetensors", models)
    shutil.copy(files / "plain.safetensors", models / "second.safetensors")
    host.sd_models.list_models()
    loras = tmp_path / "Lora"
    loras.mkdir()
    made = webui.folders()
    assert made.checkpoints == (models,) and made.loras == (models.with_name("Lora"),) and made.own.name == "dmm"
    monkeypatch.setattr(webui.STUDIO, "folders", Folders((models,), (loras,), tmp_path / "own", made.listing))
    host.sd_models.moves.clear()
    yield webui
    webui.STUDIO.desk.close()
    webui.STUDIO.desk.activity = None
    webui.HOST.lent = None


def press(host, elem_id: str, *values: Any, event: str = "click") -> list[Any]:
    """What the handler of a component's event returns."""
    blocks = {block.elem_id: block for block in host.page.blocks.values() if getattr(block, "elem_id", None)}
    wanted = blocks[elem_id]._id
    if isinstance(host.page.fns, dict):  # gradio 4
        found = [fn.fn for fn in host.page.fns.values() if (wanted, event) in fn.targets]
    else:
        pairs = zip(host.page.dependencies, host.page.fns, strict=True)
        found = [fn.fn for dep, fn in pairs if wanted in dep["targets"] and dep["trigger"] == event]
    told = found[0](*values)
    return list(told) if isinstance(told, (list, tuple)) else [told]


def merge_values(**given: Any) -> list[Any]:
    from a1111_extension.tab.forms import FIELDS

    usual = {"name": "mixed", "checkpoints": ["plain.safetensors", "second.safetensors"], "loras": [], "base": None,
             "student": "", "preset": "mini", "prompts": "", "steps": 2, "pictures": 1, "replace": False}  # fmt: skip
    return [{**usual, **given}[name] for name in FIELDS]


def poll(host, seen: str = "") -> list[Any]:
    return press(host, "dmm_poll", seen)


def test_tab_is_among_the_webuis(host, tab):
    made = tab.tab()
    assert [entry[1:] for entry in made] == [("DMM", "dmm_tab")]
    ids = [getattr(block, "elem_id", None) for block in host.page.blocks.values()]
    own = [name for name in ids if name and name.startswith("dmm_")]
    assert len(own) == len(set(own)) > 60
    assert {"dmm_page", "dmm_tabs", "dmm_poll", "dmm_receive", "dmm_merge_start", "dmm_evaluate_start"} <= set(own)
    labels = [getattr(block, "label", None) for block in made[0][0].blocks.values() if isinstance(block, gr.TabItem)]
    assert labels == ["Merge", "Inspect", "Mix & export", "Extend", "Evaluate"]


def test_lists_are_the_webuis(host, tab):
    told = poll(host)
    choices = [update["choices"] for update in told if isinstance(update, dict) and "choices" in update]
    assert ["dmm.safetensors", "other.safetensors"] in choices
    assert any(set(found) >= {"plain.safetensors", "second.safetensors"} for found in choices)
    again = poll(host, told[0])
    assert not any("choices" in update or "value" in update for update in again[1:])


def test_memory_is_lent_and_given_back(host, tab, profile):
    during: list[Any] = []

    def work(activity):
        during.extend(host.memory.calls if host.memory else host.sd_models.moves)
        host.process(Processing())  # somebody draws meanwhile
        during.extend(host.sd_models.moves)
        return "done"

    if host.memory:
        host.memory.calls.clear()
    activity = tab.STUDIO.desk.begin("Merges x", work)
    tab.STUDIO.desk.wait(600)
    assert activity.state == "done", activity.line
    model = host.shared.sd_model
    if profile == "a1111":
        assert during == [("unload", model), ("unload", model), ("device", model)]
        assert host.sd_models.moves == [("unload", model), ("device", model), "list"]
    else:
        assert during == ["unload", "empty"] and host.sd_models.moves == ["list"]


def test_model_comes_back_after_a_failure(host, tab, profile):
    def work(activity):
        raise RuntimeError("CUDA error")

    activity = tab.STUDIO.desk.begin("Merges x", work)
    tab.STUDIO.desk.wait(600)
    assert activity.state == "failed" and "CUDA error" in activity.line
    if profile == "a1111":
        assert host.sd_models.moves[-2:] == [("device", host.shared.sd_model), "list"]


def test_not_while_the_webui_draws(host, tab, monkeypatch):
    monkeypatch.setattr(host.shared.state, "job", "txt2img")
    monkeypatch.setattr(tab.HOST, "training", lambda: None)
    told = press(host, "dmm_merge_start", *merge_values())
    assert "the webui is drawing. Wait until it is done" in told[0] and tab.STUDIO.desk.activity is None


@pytest.mark.parametrize(("change", "said"), [
    ({"name": ""}, "has no name yet"),
    ({"name": "../mixed"}, "is not a file&#x27;s name"),
    ({"checkpoints": ["plain.safetensors"]}, "at least two checkpoints"),
    ({"checkpoints": None}, "at least two checkpoints"),
    ({"checkpoints": ["plain.safetensors", "../../x"]}, "leads out of the folder"),
    ({"checkpoints": ["plain.safetensors", "<script>"]}, "there is no checkpoint &#x27;&lt;script&gt;&#x27;"),
])  # fmt: skip
def test_bad_input_is_a_sentence(host, tab, change, said):
    assert said in press(host, "dmm_merge_start", *merge_values(**change))[0]


def test_no_environment_yet(host, tab, monkeypatch):
    from dmm_core.environment import NotInstalled

    def missing():
        raise NotInstalled("what training needs is not installed", hint="Run: …")

    monkeypatch.setattr(tab.HOST, "training", missing)
    monkeypatch.setattr(tab.STUDIO, "_ready", False)
    assert "what training needs is not installed" in press(host, "dmm_merge_start", *merge_values())[0]
    setup = poll(host)[5]
    assert setup["visible"] is True
    monkeypatch.setattr(tab.HOST, "training", lambda: None)
    assert tab.STUDIO.ready()


def test_inspect(host, tab):
    told, found = press(host, "dmm_inspect_start", "dmm.safetensors", False)
    assert told == "" and "DMM file" in found and "水彩, wet" in found
    assert "leads out" in press(host, "dmm_inspect_start", "../x", False)[0]


def test_panel_sends_its_sliders(host, tab):
    """What the panel has, the tab shows; exported, it is the style file of that mix."""
    models = Path(host.sd_models.model_path)
    host.load(models / "dmm.safetensors")
    names = json.dumps(host.session.checkpoint.current().names)
    weights = [0.25, 0.5, 0.25, *[0.0] * (host.args.SLIDERS - 3)]
    press(host, "script_txt2img_dmm_styles_send", names, True, *weights)
    told = press(host, "dmm_receive")
    assert told[0]["value"] == "dmm.safetensors" and told[1]["value"] is True
    sliders = told[3 + 2 * host.args.SLIDERS : 3 + 3 * host.args.SLIDERS]
    assert [update["value"] for update in sliders[:3]] == [0.25, 0.5, 0.25]
    assert [update["label"] for update in sliders[:3]] == list(json.loads(names))
    shown = told[-1]["value"]
    kept = press(host, "dmm_mix_student", "dmm.safetensors", shown, event="change")
    assert "value" not in kept[1 + 2 * host.args.SLIDERS], "the choice of the file it shows keeps the sliders"
    said = press(host, "dmm_mix_export", "dmm.safetensors", shown, "", True, "Style file for stock LoRA loaders",
                 "mine", *weights)  # fmt: skip
    assert "0.5 clay" in said[0] and (tab.STUDIO.folders.loras[0] / "mine.safetensors").exists()
    other = press(host, "dmm_mix_student", "other.safetensors", shown, event="change")
    assert other[-2]["value"] == "", "what was written for the styles of the one before is not this one's"
    assert "value" not in kept[-2]
    sent = json.dumps(["ink", "beyond"])  # of a file with more styles than sliders, or another one than is there by now
    press(host, "script_txt2img_dmm_styles_send", sent, True, 0.25, 0.75, *weights[2:])
    told = press(host, "dmm_receive")
    values = [update["value"] for update in told[3 + 2 * host.args.SLIDERS : 3 + 3 * host.args.SLIDERS]]
    by_name = dict(zip(json.loads(told[-1]["value"]), values, strict=False))
    assert by_name["ink"] == 0.25 and sum(by_name.values()) == 0.25 and told[-2]["value"] == "beyond=0.75"
    none = [0.0] * host.args.SLIDERS
    bad = press(host, "dmm_mix_export", "dmm.safetensors", shown, "", True, "", "x", *none)
    assert "dmm-bad" in bad[0] and "sum" in bad[0]
    assert all(not update.get("value") for update in press(host, "dmm_receive")), "taken once"


def test_full_disk_is_a_sentence(host, tab, monkeypatch):
    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device", "mine.safetensors")

    monkeypatch.setattr(tab.STUDIO, "export", full)
    given = ("dmm.safetensors", '["ink"]', "", True, "", "mine", *[1.0] * host.args.SLIDERS)
    assert "mine.safetensors: No space left on device." in press(host, "dmm_mix_export", *given)[0]


def test_merge_to_its_end(host, tab, profile):
    """A real child process trains; polls tell how far it is, and the new file is in the lists."""
    if profile == "reforge":
        pytest.skip("as in a1111: the same gradio")
    assert press(host, "dmm_merge_start", *merge_values()) == [""]
    seen, cards, until = "", [], time.monotonic() + 900
    while tab.STUDIO.desk.activity.running:
        assert time.monotonic() < until, cards[-1:]
        told = poll(host, seen)
        seen = told[0]
        if "value" in told[1]:
            cards.append(told[1]["value"])
        time.sleep(0.2)
    told = poll(host, "")
    assert "Done: mixed.safetensors." in told[1]["value"], told[1]["value"]
    assert "data:image/jpeg" in told[3]["value"], "the preview"
    assert any(re.search(r"step \d of 2", card) for card in cards) and 'data-live="1"' in cards[0]
    assert any("mixed.safetensors" in update.get("choices", ()) for update in told[1:])
    assert "finished already" in press(host, "dmm_merge_start", *merge_values())[0]
