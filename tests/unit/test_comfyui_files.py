"""What the ComfyUI pack brings beside its code: texts in every language, and what its registry reads."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

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


def test_all_nodes_have_texts():
    for code in ("en", "zh", "ja"):
        texts = json.loads((ROOT / "locales" / code / "nodeDefs.json").read_text(encoding="utf-8"))
        assert set(texts) == set(NODES)
