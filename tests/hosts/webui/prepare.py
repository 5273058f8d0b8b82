"""Makes the environments of the webui tests beside the clone, once: the gradio of A1111 and reForge, and that of Forge.

    python tests/hosts/webui/prepare.py     # prints the two variables that the tests read

Each has ldm's UNet too. torch and pytest are those of ``.venv-dmm`` (``python install.py --test`` makes it): its
packages come after an environment's own.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from tests.hosts import environment  # noqa: E402

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


def prepare(variable: str, venv: Path, wanted: tuple[str, ...], bare: tuple[str, ...] = ()) -> None:
    """``wanted`` with what they need, ``bare`` without; prints the variable that names the environment's Python."""

    def install() -> None:
        environment.pip(venv, "install", "--only-binary=:all:", *wanted)
        if bare:
            environment.pip(venv, "install", "--no-deps", *bare)
        environment.see_all(venv)

    print(f"export {variable}='{environment.prepare(venv, chr(10).join((*wanted, *bare)), install)}'")


def main() -> None:
    for variable, (venv, wanted) in ENVIRONMENTS.items():
        prepare(variable, venv, (*wanted, *COMMON), (UNET,))


if __name__ == "__main__":
    main()
