"""Merge Checkpoints in the real ComfyUI, through /prompt: merged, cancelled, resumed, loaded; and what it refuses."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from dmm_core.checkpoint import open_checkpoint
from tests.hosts.comfyui.browser import BRIEF, BRIEF_RECIPE, SHORT
from tests.hosts.comfyui.graphs import Graph, node, plain, styled
from tests.hosts.comfyui.harness import ROOT, Failed, Server

pytestmark = pytest.mark.hosts


def merge(name: str, *teachers: str, **more: Any) -> dict[str, Any]:
    chosen = {f"checkpoint_{i}": f"{teacher}.safetensors" for i, teacher in enumerate(teachers, 1)}
    return node("MergeCheckpoints", **{"name": name, **chosen, "preset": "mini", "recipe": BRIEF, **more})


def checkpoint(server: Server, name: str) -> Path:
    return server.base / "models" / "checkpoints" / f"{name}.safetensors"


def submit(server: Server, graph: Graph) -> str:
    return json.loads(server.raw("/prompt", {"prompt": graph, "client_id": "tests"})[1])["prompt_id"]


def messages(server: Server, prompt: str) -> dict[str, Any]:
    """What ended a prompt."""
    until = time.monotonic() + 900
    while time.monotonic() < until:
        if entry := server.get(f"/history/{prompt}").get(prompt):
            return dict(entry["status"]["messages"])
        time.sleep(0.1)
    raise TimeoutError("the prompt did not end")


def wait_for(path: Path, seconds: float = 600) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"{path} did not come"
        time.sleep(0.05)


def test_cancelled_resumed_finished_loaded(server):
    """Cancel saves; again goes on from there; Load DMM has it at once.

    That it ends as an uninterrupted merge does, to the bit, is tests/unit/test_jobs.py's to show.
    """
    graph = {"merge": merge("broken off", "ink", "clay", recipe=SHORT)}
    prompt = submit(server, graph)
    work = server.base / "user" / "dmm" / "broken off.work"
    wait_for(work / "state.safetensors")
    server.raw("/interrupt", {})
    assert "execution_interrupted" in messages(server, prompt)
    told = server.text_of_log()
    assert "DMM: the merge was stopped at step " in told and "Run it again to go on from there." in told
    step = int(told.rpartition("stopped at step ")[2].split()[0])
    assert 0 < step < 40 and not checkpoint(server, "broken off").exists() and not (work / "stop").exists()

    picture = plain(steps=2, merge=graph["merge"], **{"load": node("LoadDMM", checkpoint=["merge", 0])})
    outputs = server.run(picture)
    told = server.text_of_log()[len(told) :]
    assert "DMM: goes on with the merge that was stopped" in told
    first = int(told.partition("DMM: merging, step ")[2].split()[0])
    assert first == step, "it did not begin anew"
    assert outputs["picture"]["images"] and outputs["merge"]["images"], "a picture, and the last preview"
    assert not work.exists()

    chosen = styled(node("StyleVector", codebook=["load", 3], style="clay", strength=1.0))
    chosen["load"]["inputs"]["checkpoint"] = "broken off.safetensors"  # from the list, without a restart
    listed = server.get("/object_info/LoadDMM")["LoadDMM"]["input"]["required"]["checkpoint"][1]["options"]
    assert "broken off.safetensors" in listed
    assert server.pictures(chosen).shape == (1, 64, 64, 3)


def test_chained_and_finished_is_not_merged_again_and_missing_is(server):
    """An empty name hands checkpoints on."""
    recipe = server.base / "input" / "own.yaml"
    recipe.write_text(BRIEF_RECIPE, encoding="utf-8")
    last = merge("once", "neon", prompts="a cat\na house", teachers=["first", 1], recipe=recipe.name)
    graph = {"first": merge("", "ink"), "merge": last}
    server.run(graph)
    path = checkpoint(server, "once")
    made = path.stat().st_mtime_ns
    assert open_checkpoint(path).styles == ("ink", "neon")
    server.run(graph)
    assert "merge" in server.cached and path.stat().st_mtime_ns == made
    server.run({**graph, "merge": {**last, "inputs": {**last["inputs"], "replace": True}}})
    assert path.stat().st_mtime_ns == made, "the same settings: what is there is this merge"
    path.unlink()
    server.run(graph)
    assert path.exists() and "merge" not in server.cached
    with pytest.raises(Failed, match=r"is a merge with other settings\. Choose another name, or turn replace on"):
        server.run({"merge": merge("once", "ink", "clay")})
    recipe.write_text(BRIEF_RECIPE.replace("steps: 4", "steps: 5"), encoding="utf-8")
    with pytest.raises(Failed, match="is a merge with other settings"):  # not the result that ComfyUI keeps
        server.run(graph)


BAD = {
    "one checkpoint": (merge("bad", "ink"), "at least two checkpoints"),
    "a DMM file": (merge("bad", "ink", "mini-dmm"), "is a DMM file already"),
    "not a checkpoint": (merge("bad", "ink", "broken"), "not a safetensors file"),
    "twice": (merge("bad", "ink", "ink"), "the style 'ink' is there twice"),
    "outside": (merge("../bad", "ink", "clay"), "is not a file's name"),
    "somebody's file": (merge("plain", "ink", "clay", replace=True), "exists and is not a merge"),
    "no recipe": (merge("bad", "ink", "clay", recipe="gone.yaml"), "gone.yaml: cannot be read"),
    "bad recipe": (merge("bad", "ink", "clay", recipe="bad.yaml"), "unknown key train.stepz"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(server, name):
    (server.base / "input" / "bad.yaml").write_text("train: {stepz: 4}\n", encoding="utf-8")
    before = checkpoint(server, "plain").read_bytes()
    graph, sentence = BAD[name]
    with pytest.raises(Failed) as told:
        server.run({"merge": graph})
    assert sentence in str(told.value), told.value
    assert "\n" not in str(told.value)
    assert checkpoint(server, "plain").read_bytes() == before and not checkpoint(server, "bad").exists()


def test_sockets(server):
    info = server.get("/object_info/MergeCheckpoints")["MergeCheckpoints"]
    assert info["output"] == ["STRING,COMBO", "DMM_TEACHERS"] and info["output_node"]
    assert info["input_order"]["required"] == ["name"], "saved widget values are positional"
    widgets = [f"checkpoint_{i}" for i in range(1, 9)]
    assert info["input_order"]["optional"] == [*widgets, "base", "preset", "prompts", "recipe", "replace", "teachers"]


def test_the_host_imports_nothing_for_training():
    """What the node needs of the host: torch, safetensors, and what ComfyUI brings anyway."""
    from tests.unit.test_boundaries import imports

    for path in (ROOT / "comfyui_dmm").glob("*.py"):
        assert not imports(path) & {"diffusers", "transformers", "yaml", "tqdm"}, path.name
