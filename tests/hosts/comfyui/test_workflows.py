"""The shipped workflows in the real page, on the classic canvas and on Nodes 2.0; a merge and a bypass there."""

from __future__ import annotations

import shutil

import pytest

from tests.hosts.comfyui.browser import FILE, SHORT, STYLES, WORKFLOWS, put_styles, workflow
from tests.hosts.comfyui.harness import ROOT
from tests.hosts.comfyui.test_nodes import apart

pytestmark = pytest.mark.hosts


@pytest.fixture(scope="module", autouse=True)
def _four_styles(server) -> None:
    put_styles(server)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_workflow_is_its_api_format(page, path, shoot):
    """The page turns each workflow into exactly the prompt that workflows/api keeps, and it opens in good order."""
    page.load(path)
    for kind in ("StyleMix", "StyleVector"):  # their pictures make them taller
        if kind in path.read_text(encoding="utf-8"):
            page.wait_pictures(kind, STYLES)
    assert page.overlapping() == []
    assert page.page.evaluate("() => app.canvas.ds.scale") > 8 / 14, "smaller than that, Nodes 2.0 leaves widgets out"
    screen = page.page.viewport_size
    for x, y, width, height in page.rectangles().values():
        assert x >= 60 and y >= 80 and x + width <= screen["width"] and y + height <= screen["height"]
    prompt = page.page.evaluate("async () => (await app.graphToPrompt()).output")
    kept = workflow(ROOT / "workflows" / "api" / path.name)
    assert {k: (n["class_type"], n["inputs"]) for k, n in prompt.items()} == {
        k: (n["class_type"], n["inputs"]) for k, n in kept.items()
    }
    page.run()
    assert page.overlapping() == [], "with its pictures"
    if path == MERGE:
        page.until(f"() => /^Done\\.|finished already/.test(({DRAWN})())")
    shoot(path.stem)


MERGE = ROOT / "workflows" / "dmm_8_merge_checkpoints.json"
# The text as it is seen: drawn, inside its node, with a height of its own.
DRAWN = """() => [...document.querySelectorAll('.dmm-progress')].filter(
    e => e.checkVisibility({ opacityProperty: true }) && e.clientHeight >= 32).map(e => e.innerText).join('\\n')"""


def assert_inside(page, part, node: int) -> None:
    """An element of the page lies within the rectangle of a node, as it is drawn."""
    box, (x, y, width, height) = part.bounding_box(), page.rectangles()[node]
    assert x - 1 <= box["x"] and box["x"] + box["width"] <= x + width + 1, (box, x, width)
    assert y - 1 <= box["y"] and box["y"] + box["height"] <= y + height + 1, (box, y, height)


def test_a_merge_shows_its_progress_and_cancel_keeps_it(page, shoot):
    """Bar, text with time left and losses, live picture; Cancel on the page; what it says then."""
    page.load(MERGE)
    name = f"page-{'nodes2' if page.nodes2 else 'classic'}"
    page.page.evaluate(
        """(values) => { const node = app.graph.nodes.find(n => n.comfyClass === 'MergeCheckpoints');
            for (const w of node.widgets) if (w.name in values) w.callback?.(w.value = values[w.name])
        }""",
        {"name": name, "recipe": SHORT, "prompts": "a picture of a cat face\na picture of a crown"},
    )
    page.press_run()
    page.until(f"() => /step \\d+ of 40, .* left\\s+loss: ink 0\\.\\d+, clay 0/.test(({DRAWN})())", None, 240)
    node = page.node_id("MergeCheckpoints")
    assert_inside(page, page.page.locator(".dmm-progress:visible"), node)
    values, names = page.page.evaluate(
        "(id) => { const n = app.graph.getNodeById(id);"
        " return [n.serialize().widgets_values.length, n.widgets.map(w => w.name)] }", node,
    )  # fmt: skip
    assert values == 14, "the text is saved nowhere"
    assert not [name for name in names if "text-preview" in name], "one text, not ComfyUI's too"
    page.until("(id) => app.nodePreviewImages?.[id]?.length || app.graph.getNodeById(id).imgs?.length", node, 60)
    page.page.wait_for_timeout(700)  # until it is drawn
    shoot("merge")
    page.page.evaluate("() => app.extensionManager.command.execute('Comfy.Interrupt')")
    page.until(
        f"() => /Stopped at step \\d+ of 40\\. Run it again to go on from there\\./.test(({DRAWN})())", None, 120
    )
    shoot("merge-cancelled")
    assert (page.server.base / "user" / "dmm" / f"{name}.work" / "state.safetensors").exists()


@pytest.mark.parametrize("name", ["my-styles", " my-styles.safetensors ", "sub\\my-styles"])
def test_the_sliders_know_a_merge_by_its_name(page, name):
    """A Load DMM that is wired to Merge Checkpoints: the file that it writes for this name is there already."""
    checkpoints = page.server.base / "models" / "checkpoints"
    (checkpoints / "sub").mkdir(exist_ok=True)
    shutil.copy(checkpoints / FILE, checkpoints / "sub")
    page.load(ROOT / "workflows" / "dmm_2_mix_with_sliders.json")
    page.wait_labels(STYLES)
    load = "const load = app.graph.nodes.find(n => n.comfyClass === 'LoadDMM'), [w] = load.widgets;"
    page.page.evaluate(f"() => {{ {load} w.value = 'other-dmm.safetensors'; w.callback?.(w.value) }}")
    page.wait_labels(["ink", "clay", "neon"])
    page.page.evaluate(
        f"""(name) => {{ {load} const merge = LiteGraph.createNode('MergeCheckpoints');
            app.graph.add(merge);
            merge.widgets.find(w => w.name === 'name').value = name;
            merge.connect(0, load, load.inputs.findIndex(i => i.name === 'checkpoint')) }}""",
        name,
    )
    page.wait_labels(STYLES)


def test_bypassed_apply_style_is_the_default(server, page):
    """The page leaves a bypassed node out of the prompt and joins its wires of one type."""
    page.load(ROOT / "workflows" / "dmm_1_single_style.json")
    with_style, bypassed = (
        page.page.evaluate(
            "async (mode) => { app.graph.nodes.find(n => n.comfyClass === 'ApplyStyle').mode = mode;"
            " return (await app.graphToPrompt()).output }", mode,
        )
        for mode in (0, 4)
    )  # fmt: skip
    assert "ApplyStyle" not in {n["class_type"] for n in bypassed.values()}
    default = workflow(ROOT / "workflows" / "api" / "dmm_1_single_style.json")
    default["7"]["inputs"]["strength"] = 0.0
    assert apart(server.pictures(bypassed, "6"), server.pictures(default, "6")) == 0
    assert apart(server.pictures(bypassed, "6"), server.pictures(with_style, "6")) > 20
