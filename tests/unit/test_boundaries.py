"""What may import what, and what is said in one place only."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dmm_core

STDLIB = set(sys.stdlib_module_names)
OURS = {"dmm_core", "mini_family"}
HOSTS = {"comfy", "comfy_api", "comfy_extras", "folder_paths", "nodes", "server", "modules", "gradio", "modules_forge"}
ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(p for p in ROOT.glob("dmm_core/**/*.py"))


def imports(path: Path, top_only: bool = False) -> set[str]:
    """Top-level names of what a file imports by absolute name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_there_are_sources():
    assert len(SOURCES) > 10


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_core_knows_no_host(path):
    assert not imports(path) & HOSTS


def test_core_imports_nothing_undeclared():
    """Whatever training and the demo import is in the train extra, so that install.py --demo brings it."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    train = re.search(r"^train = (\[.*?^\])", text, re.MULTILINE | re.DOTALL)
    assert train
    declared = {re.split(r"[<>=]", line)[0] for line in ast.literal_eval(train[1])}
    names = {"pillow": "PIL", "pyyaml": "yaml"}
    allowed = STDLIB | OURS | {"torch"} | {names.get(name, name) for name in declared}
    tools = {ROOT / "dmm_core" / "assets" / "make_mobilenet.py"}  # made the shipped file once; not run by users
    allowed |= {"bitsandbytes"}  # optional: 8-bit moments, where it is installed
    opens = {
        ROOT / "dmm_core" / "commands" / "ui.py": {"a1111_extension"},  # the tab, over gradio alone
        # comes with torch for CUDA on Linux; asked for before it is used
        **{path: {"triton"} for path in ROOT.glob("dmm_core/kernels*.py")},
    }
    stray = {str(p.relative_to(ROOT)): imports(p) - allowed - opens.get(p, set()) for p in SOURCES if p not in tools}
    assert not {path: names for path, names in stray.items() if names}


def test_tab_knows_the_webuis_in_one_place():
    """All else of it is the page of ``dmm ui`` too."""
    tab = ROOT / "a1111_extension" / "tab"
    assert {p.name for p in tab.glob("*.py") if imports(p) & HOSTS - {"gradio"}} == {"webui.py"}
    assert not imports(tab / "words.py") & HOSTS
    shared = [ROOT / "a1111_extension" / f"{name}.py" for name in ("args", "styles", "sliders")]
    assert not any(imports(p) & HOSTS - {"gradio"} for p in shared)


@pytest.mark.parametrize("name", ["install.py", "__init__.py"])
def test_what_hosts_start_is_standard_library(name):
    assert imports(ROOT / name) <= STDLIB


def test_commands_are_light_until_chosen():
    for path in sorted((ROOT / "dmm_core" / "commands").glob("*.py")):
        assert imports(path, top_only=True) <= STDLIB | OURS, path.name
    code = "import sys; from dmm_core.cli import build_parser; build_parser(); print(sorted(sys.modules))"
    assert not loaded(code) & {"torch", "numpy", "diffusers", "transformers", "yaml", "PIL", "safetensors"}


def loaded(code: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in ast.literal_eval(done.stdout)}


@pytest.mark.parametrize("module", ["style", "checkpoint"])
def test_inference_needs_torch_and_safetensors_alone(module):
    """A finder that refuses the others, so that neither they nor what they bring can be needed."""
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {{"diffusers", "transformers", "yaml", "PIL", "tqdm", "scipy"}}:
            raise ImportError("refused: " + name)
sys.meta_path.insert(0, Refuse())
import dmm_core.{module}
print(sorted(sys.modules))
"""
    assert not loaded(code) & {"diffusers", "transformers", "yaml", "PIL", "scipy", "tqdm"}


def test_one_version():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{dmm_core.__version__}"' in text
    assert f"## {dmm_core.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_root_entry_is_small_and_silent_without_comfyui(tmp_path):
    text = (ROOT / "__init__.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 10
    package = tmp_path / "custom_node_copy"
    package.mkdir()
    (package / "__init__.py").write_text(text, encoding="utf-8")
    code = "import custom_node_copy as c; print([n for n in vars(c) if not n.startswith('_')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['find_spec']"
