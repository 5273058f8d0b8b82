"""What the ComfyUI pack brings beside its code: texts in every language, and what its registry reads."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from dmm_core.outputs import target

ROOT = Path(__file__).resolve().parents[2]
NODES = ("LoadDMM", "StyleVector", "StyleMix", "StyleBatch", "ApplyStyle", "ConditioningStyle", "StyleSchedule",
         "SaveStyle", "BakeStyle", "MergeCheckpoints")  # fmt: skip


def flat(texts: dict, at: str = "") -> dict[str, str]:
    """Path → text of a tree of texts."""
    return {
        path: text
        for key, value in texts.items()
        for path, text in (flat(value, f"{at}{key}/") if isinstance(value, dict) else {at + key: value}).items()
    }


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_no_text_is_left_out(language):
    """Each language has every text that English has, and its own for every node, widget and tooltip."""
    english, own = (
        flat(json.loads((ROOT / "locales" / code / "nodeDefs.json").read_text(encoding="utf-8")))
        for code in ("en", language)
    )
    assert set(own) == set(english)
    assert all(text.strip() for text in own.values())
    same = [path for path in own if own[path] == english[path] and not re.fullmatch(r"[A-Z]+|w\d", english[path])]
    assert same == [], "types such as MODEL, and sliders that have no style, alone stay as they are"


def comfy_table() -> dict[str, str]:
    """``[tool.comfy]``, whose values are plain strings (tomllib is newer than Python 3.10)."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = re.search(r"^\[tool\.comfy\]\n(.*?)^\[", text, re.MULTILINE | re.DOTALL)
    assert table
    lines = [line for line in table[1].splitlines() if line and not line.startswith("#")]
    pairs = [re.fullmatch(r'([\w-]+) = "([^"]*)"(?: #.*)?', line) for line in lines]
    assert all(pairs), lines
    return dict(pair.groups() for pair in pairs if pair)


def test_what_the_registry_reads():
    """docs.comfy.org/registry/specifications: the keys, an id or none yet, a picture, a range of versions."""
    table = comfy_table()
    assert set(table) == {"PublisherId", "DisplayName", "Icon", "requires-comfyui"}
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]*|", table["PublisherId"]), (
        "the publisher's own, or empty until there is one"
    )
    assert re.fullmatch(r"[A-Za-z][\w .-]{0,99}", table["DisplayName"])
    assert re.fullmatch(r">=\d+\.\d+\.\d+", table["requires-comfyui"])
    if not re.fullmatch(r"https://\S+\.(svg|png|jpg|gif)", table["Icon"]):
        assert table["Icon"] == "docs/icon.svg", "the file here until its address is known"


def test_the_icon_is_a_square_picture():
    """At most 400 × 400, and nothing fetched from elsewhere."""
    icon = ET.parse(ROOT / "docs" / "icon.svg").getroot()
    assert icon.tag == "{http://www.w3.org/2000/svg}svg"
    assert icon.get("width") == icon.get("height") and 0 < int(icon.get("width", "0")) <= 400
    assert not [node for node in icon.iter() for key in node.keys() if key.endswith("href")]  # noqa: SIM118


NAMES = {
    "my-styles": "my-styles.safetensors",
    "my-styles.safetensors": "my-styles.safetensors",
    "  my styles \n": "my styles.safetensors",
    "sub\\x": "sub/x.safetensors",
    "x.safetensors.safetensors": "x.safetensors.safetensors",
    "": None,
    " ": None,
}


@pytest.mark.skipif(shutil.which("node") is None, reason="no Node.js on the PATH")
def test_the_page_knows_the_file_that_a_merge_writes(tmp_path):
    """graph.js names it as ``outputs.target`` does, so that a wired Load DMM's sliders get their names."""
    folder = tmp_path / "extensions" / "dmm"
    folder.mkdir(parents=True)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "package.json").write_text('{"type": "module"}', encoding="utf-8")
    (tmp_path / "scripts" / "app.js").write_text("export const app = { graph: {} };", encoding="utf-8")
    shutil.copy(ROOT / "comfyui_dmm" / "web" / "graph.js", folder)
    (folder / "test.js").write_text(
        """
        import { checkpointOf } from "./graph.js";
        const graph = (name) => {
          const merge = { comfyClass: "MergeCheckpoints", inputs: [], widgets: [{ name: "name", value: name }] };
          const loader = { comfyClass: "LoadDMM", inputs: [{ name: "checkpoint", link: 1 }], widgets: [] };
          const mix = { inputs: [{ name: "codebook", link: 2 }] };
          const nodes = { 1: merge, 2: loader };
          const made = { links: { 1: { origin_id: 1 }, 2: { origin_id: 2 } }, getNodeById: (id) => nodes[id] };
          for (const node of [merge, loader, mix]) node.graph = made;
          return checkpointOf(mix);
        };
        console.log(JSON.stringify(JSON.parse(process.argv[2]).map(graph)));
        """,
        encoding="utf-8",
    )
    command = ["node", str(folder / "test.js"), json.dumps(list(NAMES))]
    told = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout) == list(NAMES.values())
    for name, file in NAMES.items():
        if file:
            assert target(name, "folder") == Path("folder", file)


def test_all_nodes_have_texts():
    for code in ("en", "zh", "ja"):
        texts = json.loads((ROOT / "locales" / code / "nodeDefs.json").read_text(encoding="utf-8"))
        assert set(texts) == set(NODES)
