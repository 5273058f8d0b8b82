"""What the files inside_*.py share."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.hosts.webui.driver import Host, Processing


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def reference() -> dict[str, Any]:
    return json.loads((Path(os.environ["DMM_WEBUI_FILES"]) / "reference.json").read_text(encoding="utf-8"))


def job(host: Host, args: Any = None, sliders: list[float] | None = None, **options: Any) -> Any:
    """A job with the API's dict, with sliders as the panel has them, or with the script off."""
    values = host.values()
    if args is not None:
        values = host.api(args)
    if sliders is not None:
        names = json.dumps(host.session.checkpoint.current().names)
        first = len(host.args.CONTROLS)
        values[0], values[first : first + len(sliders)], values[-1] = True, sliders, names
    return host.process(Processing(**options, script_args=values))


def draw(host: Host, args: Any = None, sliders: list[float] | None = None, **options: Any) -> Tensor:
    return job(host, args, sliders, **options).latents


def baked(host: Host, mix: dict[str, float], **options: Any) -> Tensor:
    """The same with s in ``time_embed.2.bias`` and the script off; the bias is put back to the bit."""
    bias, style = host.unet.time_embed[2].bias, host.session.checkpoint.current().codebook.style(mix)
    before = bias.detach().clone()
    bias.data += style
    try:
        return draw(host, **options)
    finally:
        bias.data.copy_(before)


def vectors_of(host: Host, args: Any, **options: Any) -> list[Tensor]:
    """What the time embedding gains, row by row over all calls of a job; nothing for calls without a style."""
    seen: list[Tensor] = []
    after = host.live._after

    def see(module: Any, given: Any, out: Tensor) -> Tensor | None:
        made = after(module, given, out)
        if made is not None:
            seen.extend((made - out).clone())
        return made

    host.live._after = see
    try:
        job(host, args, **options)
    finally:
        del host.live._after
    return seen
