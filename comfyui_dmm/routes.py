"""What the page asks the server: the styles of a file, read from its header alone."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from dmm_core.checkpoint.errors import MissingFile
from dmm_core.errors import BadInput

from . import loading


def styles_of(name: str) -> dict[str, Any]:
    """``{"styles": [{"name", "thumbnail"?}, …], "default": {name: weight}, "usage"}`` of a file that ComfyUI lists.

    Raises:
        MissingFile: a name that is not listed; BadInput: a file that cannot be read or holds no styles.
    """
    checkpoint = loading.open_dmm(loading.find(listed(name)))
    shown = [{key: style[key] for key in ("name", "thumbnail") if key in style} for style in checkpoint.style_info]
    return {"styles": shown, "default": checkpoint.default_style, "usage": checkpoint.usage}


def listed(name: str) -> str:
    """The name as ComfyUI lists it: on Windows with a backslash where the page has ``a/b`` of Merge Checkpoints."""
    names = loading.choices()
    return name if name in names else next((other for other in names if other.replace("\\", "/") == name), name)


async def get_styles(request: web.Request) -> web.Response:
    """GET /dmm/styles?checkpoint=NAME → 200 with the styles; 404 or 422 with ``{"error": sentence}``."""
    name = request.query.get("checkpoint", "")
    try:
        found = await asyncio.get_running_loop().run_in_executor(None, styles_of, name)
    except MissingFile as error:
        return web.json_response({"error": str(error)}, status=404)
    except BadInput as error:
        return web.json_response({"error": str(error)}, status=422)
    return web.json_response(found)


def register() -> None:
    """Add the route to the running server; where ComfyUI's nodes are used without one, there is nothing to add to."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.routes.get("/dmm/styles")(get_styles)
