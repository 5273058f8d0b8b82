"""The prompt's ``<dmm:name:weight>``; several make a mix. ``modules/extra_networks.py``.

Only the first prompt's tags of a batch count, and negative prompts are not parsed: that is how the webuis do it.
"""

from __future__ import annotations

import math
from typing import Any

from modules import extra_networks

from .session import SESSION, complain

NAME = "dmm"


class DMMTag(extra_networks.ExtraNetwork):
    def __init__(self) -> None:
        super().__init__(NAME)

    def activate(self, p: Any, params_list: list[Any]) -> None:
        """On every run, with [] where the prompt has no tag; again for the hires pass with that pass's tags."""
        SESSION.tag(p, read(p, params_list))

    def deactivate(self, p: Any) -> None:
        pass  # postprocess clears all


def read(p: Any, params_list: list[Any]) -> dict[str, float]:
    """Weights by name; a weight left out is 1, the same name twice adds up. What cannot be read is complained of."""
    tags: dict[str, float] = {}
    for params in params_list:
        name, *rest = [str(item).strip() for item in params.items]
        try:
            weight = float(rest[0]) if rest else 1.0
        except ValueError:
            weight = math.nan
        if len(rest) > 1 or not math.isfinite(weight):
            complain(p, f"<dmm:{':'.join([name, *rest])}>: expected <dmm:name:weight>.")
            continue
        tags[name] = tags.get(name, 0.0) + weight
    return tags


def register() -> None:
    """In ``on_before_ui``: the webuis clear the registry after scripts are loaded (modules/initialize.py)."""
    extra_networks.register_extra_network(DMMTag())
