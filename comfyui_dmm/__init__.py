"""The ComfyUI node pack: thin nodes over ``dmm_core``. ComfyUI's own modules are imported here, never in the core."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _find_core() -> None:
    """Import this clone's ``dmm_core`` without putting the clone's root, and names like ``tests``, on ``sys.path``."""
    if "dmm_core" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location("dmm_core", ROOT / "dmm_core" / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["dmm_core"] = module
    spec.loader.exec_module(module)


_find_core()

from comfy_api.latest import ComfyExtension, io  # noqa: E402

from . import merge_node, routes  # noqa: E402
from .nodes import NODES  # noqa: E402

WEB_DIRECTORY = "./comfyui_dmm/web"  # as seen from the root, whose __init__ hands it on
__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


class DMMExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [*NODES, *merge_node.NODES]


async def comfy_entrypoint() -> DMMExtension:
    routes.register()
    return DMMExtension()
