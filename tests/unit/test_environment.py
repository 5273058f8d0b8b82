"""How the heavy libraries are brought in: without what nothing here asks for, and everywhere in that way."""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib
import os
import subprocess
import sys
import threading

from dmm_core.environment import importing
from tests.unit.test_boundaries import ROOT, SOURCES

LIBRARIES = ("diffusers", "transformers")


def test_what_is_hidden_is_there_again(monkeypatch):
    monkeypatch.setattr("dmm_core.environment._came_before", lambda: False)

    collects = gc.isenabled()
    with importing():
        assert not gc.isenabled() and importlib.util.find_spec("scipy") is None
        assert importlib.util.find_spec("torch")
        with importing():
            pass
        assert importlib.util.find_spec("scipy") is None and not gc.isenabled()
        assert importlib.import_module("scipy.sparse")
    assert importlib.util.find_spec("scipy") and gc.isenabled() == collects


def test_threads_that_import_at_once_leave_no_trace():
    find, inside = importlib.util.find_spec, threading.Barrier(2, timeout=0.3)

    def use() -> None:
        with importing(), contextlib.suppress(threading.BrokenBarrierError):
            inside.wait()  # which never happens: one waits until the other is out

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert importlib.util.find_spec is find and inside.broken and gc.isenabled()


def test_scikit_learn_on_the_way_finds_scipy(tmp_path):
    """transformers imports it where it is there, and it cannot do without scipy."""
    package = tmp_path / "sklearn"
    package.mkdir()
    (package / "__init__.py").write_text("import scipy.sparse\n")
    about = tmp_path / "scikit_learn-1.7.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: scikit-learn\nVersion: 1.7.0\n")
    (package / "metrics.py").write_text("import sys\nprint('asked')\nroc_curve = None\n")
    code = (
        "from dmm_core.environment import importing\nwith importing():\n    from diffusers import UNet2DConditionModel"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert (told.returncode, told.stdout) == (0, "asked\n"), told.stderr[-500:]


def test_diffusers_that_others_have_imported_keeps_what_it_saw():
    """It found scipy, and imports it when its scheduler is wanted."""
    code = "import diffusers; from dmm_core.sample import scheduler_of; scheduler_of(2, 'epsilon', False, False)"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr[-500:]


def test_every_import_of_them_is_such_a_one():
    inside, outside = 0, []
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        kept = {
            id(statement)
            for node in ast.walk(tree)
            if isinstance(node, ast.With) and ast.unparse(node.items[0].context_expr) == "importing()"
            for statement in node.body
        }
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.partition(".")[0] in LIBRARIES for name in names):
                inside += id(node) in kept
                outside += [] if id(node) in kept else [f"{path.name}:{node.lineno}"]
    assert inside >= 5 and not outside


def test_a_hosts_old_peft_is_out_of_sight(tmp_path):
    """Forge has 0.13, and diffusers 0.39 refuses to start beside it."""
    old = tmp_path / "host"
    (old / "peft").mkdir(parents=True)
    (old / "peft" / "__init__.py").write_text("raise ImportError('an old peft was imported')", encoding="utf-8")
    about = old / "peft-0.13.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.13.2\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(old)))}

    def run(code):
        told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        return told.returncode, told.stderr[-2000:]

    wanted = "from diffusers import UNet2DConditionModel; from transformers import CLIPTextModel"
    code, told = run(f"from dmm_core.environment import importing\nwith importing():\n    {wanted}")
    assert code == 0, told
    code, told = run(wanted)
    assert code and "peft" in told, "diffusers no longer minds: this can go"
