"""Makes ``.venv-ui`` beside the clone, once: the current gradio for ``dmm ui``, over the packages of ``.venv-dmm``.

python tests/hosts/ui/prepare.py     # prints the variable that the tests read
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from tests.hosts.webui.prepare import prepare  # noqa: E402

WANTED = ("gradio>=6", "huggingface-hub<1")  # the latter as transformers of .venv-dmm has it

if __name__ == "__main__":
    prepare("DMM_UI_PYTHON", ROOT / ".venv-ui", WANTED)
