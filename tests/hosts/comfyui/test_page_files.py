"""What the pack brings for the page: example workflows that run, help pages, texts in three languages."""

from __future__ import annotations

import json

import pytest

from tests.hosts.comfyui.browser import WORKFLOWS, put_styles, workflow
from tests.hosts.comfyui.harness import ROOT

pytestmark = pytest.mark.hosts
DOCS = ROOT / "comfyui_dmm" / "web" / "docs"


@pytest.fixture(scope="module", autouse=True)
def _four_styles(server) -> None:
    put_styles(server)


@pytest.mark.parametrize("path", sorted((ROOT / "workflows" / "api").glob("*.json")), ids=lambda path: path.stem)
def test_every_api_workflow_runs(server, path):
    outputs = server.run(workflow(path))
    assert any(out.get("images") for out in outputs.values())


def test_every_workflow_is_a_template(server):
    assert sorted(server.get("/api/workflow_templates")["dmm"]) == [path.stem for path in WORKFLOWS]
    for path in WORKFLOWS:
        assert server.raw(f"/api/workflow_templates/dmm/{path.name}")[0] == 200
        assert (ROOT / "workflows" / "api" / path.name).is_file()


def ours(server) -> dict:
    return {name: node for name, node in server.get("/object_info").items() if node["category"].startswith("DMM")}


def test_every_node_has_a_help_page(server):
    assert {path.stem for path in DOCS.glob("*.md")} == set(ours(server))
    for name in ours(server):
        status, text = server.raw(f"/extensions/dmm/docs/{name}.md")
        assert (status, text[:2]) == (200, b"# ")


@pytest.mark.parametrize("language", ["en", "zh", "ja"])
def test_every_text_is_translated(server, language):
    """The texts name exactly the nodes, inputs and outputs that the server has; English is the server's own."""
    texts = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert server.get("/api/i18n")[language]["nodeDefs"] == texts
    nodes = ours(server)
    assert set(texts) == set(nodes)
    for name, node in nodes.items():
        inputs = {key: spec for group in ("required", "optional") for key, spec in node["input"].get(group, {}).items()}
        assert set(texts[name]["inputs"]) == set(inputs), name
        assert len(texts[name].get("outputs", {})) == len(node["output"]), name
        if language == "en":
            assert texts[name]["description"] == node["description"]
            assert texts[name]["display_name"] == node["display_name"]
            for key, spec in inputs.items():
                assert texts[name]["inputs"][key].get("tooltip") == dict(*spec[1:]).get("tooltip"), (name, key)
