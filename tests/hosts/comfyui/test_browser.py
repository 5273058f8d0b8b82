"""The real page in Chromium, on the classic canvas and on Nodes 2.0.

Names on the sliders, a slider dragged with the mouse, the Run button, another picture.

DMM_SHOTS is a folder for the screenshots, DMM_SHOTS_FILE a DMM file of the styles ink, clay, blueprint and neon to make
them with (the demo's); otherwise the styles are untrained. docs/comfyui-*.png are some of them, made by
DMM_SHOTS=… DMM_SHOTS_FILE=… python -m pytest tests/hosts/comfyui -k "drag or regions or merge_shows"
"""

from __future__ import annotations

import json

import pytest

from tests.hosts.comfyui.browser import FILE, PICTURES, STYLES, put_styles, workflow
from tests.hosts.comfyui.harness import ROOT

pytestmark = pytest.mark.hosts


@pytest.fixture(scope="module", autouse=True)
def _four_styles(server) -> None:
    put_styles(server)


MIX = ROOT / "workflows" / "dmm_2_mix_with_sliders.json"


def test_drag_a_slider_and_see_another_picture(page, shoot):
    page.load(MIX)
    page.wait_labels([*STYLES, "normalise", "first"])
    before = page.run()
    assert page.value("w1") == 0
    page.drag(1, 0.9)
    assert 1.4 < page.value("w1") <= 2
    after = page.run()
    assert before != after
    shoot("mix")


def test_unchanged_values_in_a_saved_workflow(page):
    page.load(MIX)
    page.wait_labels(STYLES)
    saved = page.page.evaluate("() => app.graph.serialize()")
    for node in workflow(MIX)["nodes"]:
        again = next(n for n in saved["nodes"] if n["id"] == node["id"])
        assert not node["widgets_values"] or again["widgets_values"] == node["widgets_values"], node["type"]


def test_another_checkpoint_other_names(page):
    """Also after a slider was moved, when Nodes 2.0 holds copies of the widgets."""
    page.load(MIX)
    page.wait_labels(STYLES)
    page.drag(0, 0.8)
    choose = """(name) => { const w = app.graph.nodes.find(n => n.comfyClass === 'LoadDMM').widgets[0];
                            w.value = name; w.callback?.(name) }"""
    page.page.evaluate(choose, "other-dmm.safetensors")
    page.wait_labels(["ink", "clay", "neon", "w3", "normalise"])  # w3 has a weight: it stays in sight
    page.page.evaluate(choose, FILE)
    page.wait_labels([*STYLES, "normalise"])


def test_a_file_for_few_steps_says_so(page, shoot):
    """Under the widget of Load DMM, as long as that file is chosen."""
    said = """() => [...document.querySelectorAll('.dmm-progress')].filter(e => e.checkVisibility())
                        .map(e => e.textContent)"""
    choose = """(name) => { const w = app.graph.nodes.find(n => n.comfyClass === 'LoadDMM').widgets[0];
                            w.value = name; w.callback?.(name) }"""
    page.load(MIX)
    assert page.page.evaluate(said) == []
    page.page.evaluate(choose, "other-dmm.safetensors")
    page.until(f"() => ({said})().some(text => text.includes('4 to 8 at CFG 1'))")
    shoot("few-steps")
    page.page.evaluate(choose, FILE)
    page.until(f"() => !({said})().length")


def test_wires(page):
    """Unplugged, and through two reroutes: the names go and come back."""
    page.load(MIX)
    page.wait_labels(STYLES)
    find = "const by = (kind) => app.graph.nodes.find(n => n.comfyClass === kind);"
    page.page.evaluate(f"() => {{ {find} by('StyleMix').disconnectInput(0) }}")
    page.wait_labels([*(f"w{i}" for i in range(8)), "normalise", "first"])
    page.page.evaluate(
        f"""() => {{ {find}
            const [a, b] = [0, 1].map(() => LiteGraph.createNode('Reroute'));
            app.graph.add(a); app.graph.add(b);
            by('LoadDMM').connect(3, a, 0); a.connect(0, b, 0); b.connect(0, by('StyleMix'), 0) }}"""
    )
    page.wait_labels([*STYLES, "normalise", "first"])


def test_inside_a_subgraph(page):
    page.load(MIX)
    page.wait_labels(STYLES)
    inner = page.page.evaluate(
        """() => { const mix = app.graph.nodes.find(n => n.comfyClass === 'StyleMix');
                   const made = app.graph.convertToSubgraph(new Set([mix]));
                   const inner = made.subgraph.nodes[0]; inner.widgets.forEach(w => w.label = '?');
                   window.inner = inner; inner.onConnectionsChange(); return inner.comfyClass }"""
    )
    assert inner == "StyleMix"
    page.until(
        "(n) => JSON.stringify(inner.widgets.slice(0, 4).map(w => w.label)) === n",
        json.dumps(STYLES, separators=(",", ":")),
    )


def test_style_vector_is_a_list(page, shoot):
    page.load(ROOT / "workflows" / "dmm_1_single_style.json")
    widget = "app.graph.nodes.find(n => n.comfyClass === 'StyleVector').widgets.find(w => w.name === 'style')"
    page.until(
        f"(names) => JSON.stringify({widget}.options.values) === names", json.dumps(STYLES, separators=(",", ":"))
    )
    assert page.page.evaluate(f"() => [{widget}.type, {widget}.value]") == ["combo", "ink"]
    prompt = page.page.evaluate("async () => (await app.graphToPrompt()).output")
    assert next(n for n in prompt.values() if n["class_type"] == "StyleVector")["inputs"]["style"] == "ink"
    shoot("single")


def test_pictures_of_the_styles(page):
    """They follow the checkpoint and the sliders, and are saved nowhere."""
    page.load(MIX)
    page.wait_labels([*STYLES, "normalise", "first"])
    shown = page.wait_pictures("StyleMix", STYLES)
    assert shown[0][2] > shown[1][2], "ink has a weight, clay has none"
    page.drag(1, 0.9)
    assert page.page.evaluate(PICTURES, "StyleMix")[1][2] > shown[1][2]
    choose = """(name) => { const w = app.graph.nodes.find(n => n.comfyClass === 'LoadDMM').widgets[0];
                            w.value = name; w.callback?.(name) }"""
    page.page.evaluate(choose, "other-dmm.safetensors")  # has no pictures
    page.until(f"() => ({PICTURES})('StyleMix').length === 0")
    assert page.page.locator("div[title='ink'] img:visible").count() == 0
    page.page.evaluate(choose, FILE)
    page.wait_pictures("StyleMix", STYLES)
    node = "app.graph.nodes.find(n => n.comfyClass === 'StyleMix')"
    assert len(page.page.evaluate(f"() => {node}.serialize().widgets_values")) == 10
    prompt = page.page.evaluate("async () => JSON.stringify((await app.graphToPrompt()).output)")
    assert "thumbnail" not in prompt


def test_a_click_on_a_picture_chooses_the_style(page):
    page.load(ROOT / "workflows" / "dmm_1_single_style.json")
    page.wait_pictures("StyleVector", STYLES)
    widget = "app.graph.nodes.find(n => n.comfyClass === 'StyleVector').widgets.find(w => w.name === 'style')"
    page.page.locator("div[title='neon'] img:visible").first.click()
    page.until(f"() => {widget}.value === 'neon'")
    assert [cell[2] for cell in page.page.evaluate(PICTURES, "StyleVector")][3] == 1


SAVED = [0.25, 0.5, 0, 1.5, 0, 0, 0, 0, False, 0]
OTHER_VERSIONS = {
    "before a widget was added": (SAVED[:9], False),
    "with values that came later": ([*SAVED, "later", 3], False),
    "by name": ({"w0": 0.25, "w1": 0.5, "w3": 1.5, "normalise": False, "later": 3}, False),
    "without sockets for widgets": (SAVED, True),
}


@pytest.mark.parametrize("how", OTHER_VERSIONS)
def test_a_workflow_of_another_version(page, how):
    """Slider values stay, whatever the version that saved them knew of the node."""
    values, old_sockets = OTHER_VERSIONS[how]
    saved = workflow(MIX)
    mix = next(n for n in saved["nodes"] if n["type"] == "StyleMix")
    mix["widgets_values"] = values
    if old_sockets:  # older pages kept sockets of the wires alone
        mix["inputs"] = [i for i in mix["inputs"] if not i.get("widget")]
    page.page.evaluate("(w) => app.loadGraphData(w)", saved)
    page.wait_labels(STYLES)
    shown = page.page.evaluate(
        "() => app.graph.nodes.find(n => n.comfyClass === 'StyleMix').widgets.slice(0, 10).map(w => w.value)"
    )
    assert shown == SAVED
    prompt = page.page.evaluate("async () => (await app.graphToPrompt()).output")
    inputs = next(n for n in prompt.values() if n["class_type"] == "StyleMix")["inputs"]
    assert [inputs[f"w{i}"] for i in range(8)] + [inputs["normalise"], inputs["first"]] == SAVED
