"""Makes the environments of the webui tests beside the clone, once: the gradio of A1111 and reForge, and that of Forge.

    python tests/hosts/webui/prepare.py     # prints the two variables that the tests read

Each has ldm's UNet too. torch and pytest are those of ``.venv-dmm`` (``python install.py --test`` makes it): its
packages come after an environment's own.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
TESTS = ROOT / ".venv-dmm"
# Without these versions pip searches for minutes, and finds sets that do not start.
COMMON = (
    "huggingface-hub==0.26.2", "numpy==1.26.4", "pillow==10.4.0", "pandas==2.2.3", "matplotlib==3.9.2",
    "markupsafe==2.1.5", "einops==0.8.0",
)  # fmt: skip
ENVIRONMENTS = {
    "DMM_WEBUI_341": (ROOT / ".venv-webui-3.41", (
        "gradio==3.41.2", "gradio-client==0.5.0", "fastapi==0.94.0", "starlette==0.26.1", "pydantic==1.10.19",
        "httpx==0.24.1", "websockets==11.0.3", "altair==5.4.1",
    )),
    "DMM_WEBUI_440": (ROOT / ".venv-webui-4.40", ("gradio==4.40.0", "fastapi==0.104.1", "pydantic==2.8.2")),
}  # fmt: skip
UNET = "stable-diffusion-sdkit==2.1.5"  # carries ldm's UNetModel; what it asks for besides is not needed


def python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def packages(venv: Path) -> str:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return subprocess.run([str(python(venv)), "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def install(venv: Path, wanted: tuple[str, ...], bare: tuple[str, ...]) -> None:
    """``wanted`` with what they need, ``bare`` without; torch and pytest stay those of ``.venv-dmm``."""
    base = python(TESTS)
    if not base.exists():
        raise SystemExit("prepare.py: there is no .venv-dmm yet. Run: python install.py --test -k no_test")
    shutil.rmtree(venv, ignore_errors=True)
    subprocess.run([str(base), "-m", "venv", str(venv)], check=True)  # of the same Python: it is to load its torch
    pip = [str(python(venv)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += [] if sys.dont_write_bytecode else ["--no-compile"]  # what is imported is compiled then, and only that
    subprocess.run([*pip, "--only-binary=:all:", *wanted], check=True)
    if bare:
        subprocess.run([*pip, "--no-deps", *bare], check=True)
    line = f"import sys; sys.path.append({packages(TESTS)!a})\n"  # after pip: it would take them for its own
    Path(packages(venv), "zz-dmm.pth").write_text(line, encoding="ascii")


def prepare(variable: str, venv: Path, wanted: tuple[str, ...], bare: tuple[str, ...] = ()) -> None:
    """Make the environment, unless it is there already, and print the variable that names its Python."""
    content = "\n".join((sys.version, str(python(TESTS).resolve()), *wanted, *bare))
    stamp, state = venv / "dmm.stamp", hashlib.sha256(content.encode()).hexdigest()
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != state:
        print(f"prepare.py: makes {venv.name}, a minute or two", file=sys.stderr, flush=True)
        install(venv, wanted, bare)
        stamp.write_text(state, encoding="utf-8")
    print(f"export {variable}='{python(venv)}'")


def main() -> None:
    for variable, (venv, wanted) in ENVIRONMENTS.items():
        prepare(variable, venv, (*wanted, *COMMON), (UNET,))


if __name__ == "__main__":
    main()
