"""How ComfyUI runs a model: partly in memory, and compiled; checked on latents, run by test_laws.py.

DMM_COMFYUI=… DMM_COMFYUI_PYTHON=… "$DMM_COMFYUI_PYTHON" -m pytest -m hosts tests/hosts/comfyui/inside_running.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from dmm_core.errors import BadInput
from tests.hosts.comfyui.inside_tools import apart, encode, sample, style

pytestmark = pytest.mark.hosts


@pytest.fixture
def with_memory(monkeypatch) -> Iterator[Callable[[float], None]]:
    """From here on the sampler has so many bytes for a model, as on a small card; on a CPU ComfyUI always loads all."""
    import comfy.model_management as management

    load = management.LoadedModel.model_load

    def limit(size: float) -> None:
        management.unload_all_models()
        monkeypatch.setattr(
            management.LoadedModel, "model_load",
            lambda self, lowvram_model_memory=0, force_patch_weights=False: load(self, size, force_patch_weights),
        )  # fmt: skip

    yield limit
    monkeypatch.undo()
    management.unload_all_models()


def test_a_name_from_the_page_is_found_as_windows_lists_it(pack, monkeypatch):
    """Merge Checkpoints says ``sub/x``; so does the page, which knows no more."""
    from comfyui_dmm import routes

    monkeypatch.setattr(pack.loading, "choices", lambda: ["x.safetensors", "sub\\x.safetensors"])
    assert routes.listed("sub/x.safetensors") == routes.listed("sub\\x.safetensors") == "sub\\x.safetensors"
    assert routes.listed("x.safetensors") == "x.safetensors" and routes.listed("../x") == "../x"


def test_a_merge_looks_at_its_recipe_file_and_at_no_other(pack, tmp_path, monkeypatch):
    import folder_paths

    from comfyui_dmm.merge_node import MergeCheckpoints

    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    recipe = tmp_path / "r.yaml"
    recipe.write_text("train: {steps: 4}")

    def seen() -> tuple:
        return tuple(MergeCheckpoints.fingerprint_inputs(name="m", recipe=named) for named in ("", "r.yaml"))

    first = seen()
    (tmp_path / "picture.png").touch()
    os.utime(tmp_path, (1, 1))
    assert seen() == first
    recipe.write_text("train: {steps: 5000}")
    assert seen()[0] == first[0] and seen()[1] != first[1]


def test_a_style_file_in_use_is_a_sentence(pack, loaded, tmp_path, monkeypatch):
    """Windows refuses to replace a file that LoraLoader has mapped."""
    from comfyui_dmm import files

    def refuse(source, target):
        raise PermissionError(13, "Access is denied", str(target))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(BadInput, match=r"ink\.safetensors: cannot be written\. If a Load LoRA node") as told:
        files.save_style(style(pack, loaded, "ink"), "ink", tmp_path)
    assert "\n" not in str(told.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "about", "told"), [
    ("stopped", {"step": 3}, "Stopped before the first step. Run it again to go on from there."),
    ("failed", {"line": "OSError: No space left on device"}, "Broken off: OSError: No space left on device"),
    ("done", {}, "Done. Load DMM has it in its list."),
])  # fmt: skip
def test_cancel_tells_how_the_merge_ended(pack, tmp_path, kind, about, told):
    """A real child that says one thing when it is asked to stop."""
    import comfy.model_management as management

    from comfyui_dmm import merge_job
    from dmm_core import jobs

    line = json.dumps({"kind": kind, **about})
    code = f"import pathlib, time\nwhile not pathlib.Path('stop').exists(): time.sleep(0.02)\nprint({line!r})"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=tmp_path)
    said: list[str] = []
    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        merge_job._follow(jobs.Job(tmp_path, child), said.append)
    assert said[-1] == told


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_lowvram(pack, loaded, with_memory, share):
    """Live, scheduled, baked: the same with all of the model loaded as with half of it, or nothing, in memory."""
    model, clip = loaded[:2]
    text, empty = encode(clip, "a cat"), encode(clip, "")
    ink, neon = style(pack, loaded, "ink"), style(pack, loaded, "neon")
    change = torch.randn(256, 256, generator=torch.Generator().manual_seed(1)) * 0.02
    lora = pack.host.apply(model, ink).clone()
    lora.add_patches({"diffusion_model.time_embed.2.weight": ("diff", (change,))})
    patched = {
        "plain": model,
        "live": pack.host.apply(model, ink),
        "live with a LoRA": lora,
        "schedule": pack.host.apply(model, pack.values.scheduled([ink, neon], "blend", 0.0, 1.0)),
        "baked": pack.host.bake(model, ink),
        "baked, then live": pack.host.apply(pack.host.bake(model, ink), neon),
    }
    whole = {name: sample(patcher, text, empty) for name, patcher in patched.items()}
    for name, patcher in patched.items():
        with_memory(max(share * model.model_size(), 0.1))
        assert apart(whole[name], sample(patcher, text, empty)) < 1e-5, name
        assert patcher.model.model_lowvram, "the model is loaded in part"
        if name == "baked" and not share:
            assert patcher.lowvram_patch_counter() == 1, "the style is added when the layer runs"
    assert apart(whole["live"], whole["baked"]) < 2e-4
    assert apart(whole["live"], whole["plain"]) > 0.05
    conditioned = sample(model, pack.host.condition(text, ink), pack.host.condition(empty, ink))
    assert apart(conditioned, whole["live"]) < 2e-4


def compile_and_move_sliders(pack, loaded, backend: str) -> None:
    """A compiled model gives the plain one's latents, and no slider makes it compile again."""
    import torch._dynamo
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model, clip = loaded[:2]
    text = encode(clip, "a cat")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = model.clone()
    set_torch_compile_wrapper(model=compiled, backend=backend)
    stats = torch._dynamo.utils.counters["stats"]
    graphs = None
    for weights in ([1, 0, 0], [0, 1, 0], [0.3, 0.2, 0.5]):
        mixed = pack.values.mixed(loaded[3], weights, True)
        made = sample(pack.host.apply(compiled, mixed), text, text, steps=2)
        assert apart(made, sample(pack.host.apply(model, mixed), text, text, steps=2)) < 1e-3
        graphs = graphs or stats["unique_graphs"]
        assert stats["unique_graphs"] == graphs > 0, f"compiled again for {weights}"


def test_torch_compile_keeps_its_graph(pack, loaded):
    compile_and_move_sliders(pack, loaded, "eager")


@pytest.mark.slow
def test_torch_compile_with_inductor(pack, loaded):
    if not (shutil.which("g++") or shutil.which("clang++") or shutil.which("cl")):
        pytest.skip("inductor needs a C++ compiler")
    compile_and_move_sliders(pack, loaded, "inductor")
