"""The panel in the real gradio of each webui, infotexts and the API's args; run by test_webui.py."""

from __future__ import annotations

import json
import os

import gradio as gr
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.hosts.webui import infotexts
from tests.hosts.webui.driver import Processing
from tests.hosts.webui.inside_tools import apart, draw, job

pytestmark = pytest.mark.hosts
ARGS = {
    "weights": {"ink": 1.2, "水彩, wet": -0.2}, "normalise": False, "apply_to": "base", "negative": "clay",
    "to": "ink=0.5, clay=0.5", "start": 0.25, "end": 0.75, "mode": "switch",
}  # fmt: skip


def pasted(host, text: str) -> list:
    """The panel's values after an infotext was pasted into it as it is built."""
    held = infotexts.paste(host.script.infotext_fields, infotexts.read(text))
    values = host.values()
    for i, control in enumerate(host.script.controls):
        value = held.get(control._id)
        assert not isinstance(value, dict), "Forge's API takes updates for values"
        values[i] = values[i] if value is None else value
    return values


def test_gradio_is_the_webuis_own(profile):
    assert gr.__version__ == ("4.40.0" if profile == "forge" else "3.41.2")


def test_labels_are_stable(host):
    """They are the keys of saved defaults, and of the API's script-info: the same in both tabs and for every file."""
    labels = [[control.label for control in script.controls] for script in host.tabs.values()]
    assert labels[0] == labels[1]
    assert len(set(labels[0])) == len(labels[0]) == len(host.args.CONTROLS) + host.args.SLIDERS + 1
    assert labels[0][:3] == ["DMM styles", "DMM normalise", "DMM pass"]
    ids = [control.elem_id for script in host.tabs.values() for control in script.controls]
    assert len(set(ids)) == len(ids)


def test_panel_follows_the_checkpoint(host, files):
    names = host.session.checkpoint.current().names
    sliders, first = host.args.SLIDERS, 1
    made = host.ui.fill("")
    rows, pictures = made[first : first + sliders], made[first + sliders : first + 2 * sliders]
    labelled = made[first + 2 * sliders : first + 3 * sliders]
    assert "dmm.safetensors: 3 styles." in made[0]["value"]
    assert [row["visible"] for row in rows] == [True] * 3 + [False] * (sliders - 3)
    assert "data:image/gif" in pictures[0]["value"] and pictures[3]["value"] == ""
    assert [update["label"] for update in labelled[:3]] == list(names)
    assert [update["value"] for update in labelled[:3]] == [0.3333] * 3
    assert made[-2]["choices"] == ["", "default", *names]
    again = host.ui.fill(made[-1]["value"])
    assert "value" not in again[first + 2 * sliders], "refreshing keeps the sliders"
    host.load(files / "other.safetensors")
    other = host.ui.fill(made[-1]["value"])
    assert [update.get("label") for update in other[first + 2 * sliders :][:3]] == ["neon", "pixel", None]
    host.load(files / "plain.safetensors")
    off = host.ui.fill("")
    assert "Off: plain.safetensors is an ordinary checkpoint without styles." in off[0]["value"]
    assert not any(row["visible"] for row in off[first : first + sliders])


def test_pasted_names_label_the_sliders(host):
    sliders = host.args.SLIDERS
    made = host.ui.relabel(json.dumps(["neon", "pixel"]))
    assert [update["visible"] for update in made[:3]] == [True, True, False]
    assert [update.get("label") for update in made[2 * sliders :][:3]] == ["neon", "pixel", None]
    assert made[sliders]["value"] == "", "no picture of another checkpoint's style"
    assert "value" not in made[2 * sliders]


def test_buttons(host):
    shown = host.ui.fill("")[-1]["value"]
    values = [update["value"] for update in host.ui.random_mix(shown)]
    assert abs(sum(values) - 1) < 0.02 and all(value >= 0 for value in values) and not any(values[3:])
    assert values != [update["value"] for update in host.ui.random_mix(shown)]
    assert [update["value"] for update in host.ui.defaults(shown)][:4] == [0.3333] * 3 + [0.0]
    assert apart(draw(host), draw(host, sliders=[0.3333] * 3)) == 0


def test_page_over_http(host):
    """The real server: the page's config has both panels, and its load event fills them."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from gradio_client import Client

    _, url, _ = host.page.launch(prevent_thread_lock=True, quiet=True, show_api=False, server_name="127.0.0.1")
    try:
        client = Client(url)
        ids = {component["props"].get("elem_id") for component in client.config["components"]}
        assert {"script_txt2img_dmm_styles_w0", "script_img2img_dmm_styles_w15"} <= ids
        outputs = len(host.ui.fill(""))
        panels = {c["id"] for c in client.config["components"] if str(c["props"].get("elem_id")).startswith("script_")}
        of_panels = {i: d for i, d in enumerate(client.config["dependencies"]) if panels & set(d["outputs"])}
        filling = [i for i, d in of_panels.items() if len(d["outputs"]) == outputs]
        assert len(filling) == 6  # a tab: opened, refreshed, page loaded
        told = client.predict("", *[0.0] * host.args.SLIDERS, fn_index=filling[0])
        assert "dmm.safetensors: 3 styles." in str(told)
        counts = {
            name: len(getattr(host.ui, name)('["neon"]')) for name in ("fill", "relabel", "defaults", "random_mix")
        }
        outputs = sorted(len(d["outputs"]) for d in of_panels.values() if len(d["outputs"]) > 1)
        wanted = [counts["fill"]] * 3 + [counts[name] for name in ("relabel", "defaults", "random_mix")]
        assert outputs == sorted(wanted * 2)
    finally:
        host.page.close()


def test_panel_as_nobody_has_touched_it(host):
    """No page has filled the sliders, as for API calls: switched on, it is the default style and not a sum of 0."""
    told = job(host, True)
    assert told.comments == []
    assert apart(told.latents, draw(host)) == 0
    assert told.params[0][1]["DMM weights"] == "default"


def test_sliders_of_another_checkpoint(host):
    values = host.api(True)
    values[len(host.args.CONTROLS)], values[-1] = 1.0, json.dumps(["neon", "pixel"])
    told = host.process(Processing(script_args=values))
    assert "the sliders are those of another checkpoint (neon, pixel). Press the panel's refresh." in told.comments[0]


@pytest.mark.parametrize("args", [ARGS, {"weights": "ink"}, {"batch": ["ink", {"clay": 1.0, "水彩, wet": 0.5}]}])
def test_infotext_round_trip(host, args):
    """Written, pasted into a fresh panel, drawn again: the same picture and the same infotext."""
    options = {"batch_size": 2, "enable_hr": True}
    told = job(host, args, **options)
    assert told.comments == []
    text = infotexts.write(*told.params[0])
    values = pasted(host, text)
    assert values[0] is True
    again = host.process(Processing(script_args=values, **options))
    assert apart(told.latents, again.latents) < 1e-5
    params = again.params[0][1]
    assert infotexts.read(infotexts.write("", params)).keys() == infotexts.read(text).keys()


def test_infotext_without_styles_switches_off(host):
    assert pasted(host, "a cat\nSteps: 20, Sampler: Euler, CFG scale: 7")[0] is False
    assert not any(key.startswith("DMM") for key in job(host).params[0][1])


def test_panel_follows_the_choice(host, files):
    """Before a picture has been drawn with it, after one was drawn with another."""
    host.load(files / "plain.safetensors")
    assert "ordinary checkpoint" in host.ui.fill("")[0]["value"]
    host.choose(files / "dmm.safetensors")
    assert "dmm.safetensors: 3 styles." in host.ui.fill("")[0]["value"]
    host.load(files / "dmm.safetensors")


def test_a_file_for_few_steps_says_so(host, files, tmp_path):
    few = tmp_path / "few.safetensors"
    with safe_open(files / "dmm.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file(load_file(files / "dmm.safetensors"), few, {**metadata, "dmm.few_step": "5"})
    host.choose(few)
    assert "few.safetensors: 3 styles. Made for few steps: draw in 4 to 8 at CFG 1" in host.ui.fill("")[0]["value"]
    host.load(files / "dmm.safetensors")


def test_infotext_before_its_checkpoint_is_loaded(host, files):
    """Names come from the text then; drawn once the checkpoint is there, it is the picture."""
    told = job(host, {"weights": {"ink": 0.25, "clay": 0.75}})
    host.load(files / "other.safetensors")
    values = pasted(host, infotexts.write(*told.params[0]))
    assert json.loads(values[-1]) == ["ink", "clay"]
    host.load(files / "dmm.safetensors")
    assert apart(told.latents, host.process(Processing(script_args=values)).latents) < 1e-5


def filled(host, values: list) -> list:
    """The panel's values after it was filled anew, as Refresh and the page's script do."""
    first, sliders = len(host.args.CONTROLS), host.args.SLIDERS
    made = host.ui.fill(values[-1], *values[first:-1])
    updates = [*made[1 + 2 * sliders : 1 + 3 * sliders], made[-1]]
    return [*values[:first], *(u.get("value", v) for u, v in zip(updates, values[first:], strict=True))]


def test_infotext_beside_an_ordinary_checkpoint(host, files):
    """What was pasted keeps its names, so that no other file takes its values by position."""
    host.load(files / "plain.safetensors")
    values = filled(host, pasted(host, 'a cat\nDMM weights: "clay=0.3, neon=0.7"'))
    assert json.loads(values[-1]) == ["clay", "neon"]
    host.load(files / "dmm.safetensors")
    told = host.process(Processing(script_args=values))
    assert "the sliders are those of another checkpoint (clay, neon)" in told.comments[0]
    assert "DMM weights" not in told.params[0][1]
    made = host.ui.fill(values[-1], *values[len(host.args.CONTROLS) : -1])
    assert "Left out, since it has no such style: neon." in made[0]["value"]
    assert (
        apart(host.process(Processing(script_args=filled(host, values))).latents, draw(host, {"weights": "clay"})) == 0
    )


@pytest.mark.parametrize("before", ["plain", "other"])
def test_refresh_keeps_what_was_pasted(host, files, before):
    """Pasted before its checkpoint is there, then the panel follows it: by name, and 0 for the other styles."""
    told = job(host, {"weights": {"水彩, wet": 0.25, "clay": 0.75}})
    host.load(files / f"{before}.safetensors")
    values = pasted(host, infotexts.write(*told.params[0]))
    host.load(files / "dmm.safetensors")
    values = filled(host, values)
    first = len(host.args.CONTROLS)
    assert json.loads(values[-1]) == ["ink", "clay", "水彩, wet"] and values[first : first + 4] == [0, 0.75, 0.25, 0]
    assert apart(told.latents, host.process(Processing(script_args=values)).latents) < 1e-5
    assert filled(host, values) == values


def test_refresh_keeps_styles_beyond_the_last_slider(host, monkeypatch):
    names = tuple(f"s{i}" for i in range(1, 21))
    codebook = host.session.checkpoint.current().codebook.__class__(names, 4)
    book = host.styles.Book(host.session.checkpoint.current().path, codebook, ("",) * 20, True)
    monkeypatch.setattr(host.session.checkpoint, "current", lambda **_: book)
    first = len(host.args.CONTROLS)
    values = filled(host, pasted(host, 'a cat\nDMM weights: "s18=0.6, s17=0.4"'))
    shown = json.loads(values[-1])
    assert shown == [*names[:14], "s17", "s18"]
    assert dict(zip(shown, values[first:-1], strict=True)) == {**dict.fromkeys(shown, 0.0), "s17": 0.4, "s18": 0.6}
    assert filled(host, values) == values
    values[first + 14 : first + 16] = [0, 0]
    values[first] = 1.0
    assert json.loads(filled(host, values)[-1]) == list(names[:16])
    assert filled(host, values)[first : first + 2] == [1.0, 0.0]


def test_fields_that_are_sent_to_other_tabs(host):
    assert set(host.script.paste_field_names) >= {"DMM weights", "DMM batch"}
