"""One validated object behind the panel, the API, the infotext and the XYZ grid.

A style is given as text (``ink``, ``ink=0.7, clay=0.3``, ``default``) or as a dict of weights. Which names there are is
only known with the checkpoint: ``styles`` looks them up.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from dmm_core import schedule
from dmm_core.errors import StyleError

SLIDERS = 16  # in the panel; a checkpoint's further styles are reached by name
PASSES = ("both", "base", "hires")
DEFAULT = "default"
Given = str | Mapping[str, float]  # a style as users give it; "" where they give none


@dataclass(frozen=True)
class Args:
    """What is to be drawn. ``weights`` is a style, or the panel's sliders in the order of ``names``.

    Raises:
        StyleError: a value of the wrong kind or out of range, with the field's name.
    """

    enabled: bool = True
    weights: Given | tuple[float, ...] = DEFAULT
    normalise: bool = True
    apply_to: str = "both"
    negative: Given = ""  # "": as the positive half
    to: Given = ""  # what the schedule ends with; "": no schedule
    start: float = 0.0
    end: float = 1.0
    mode: str = "blend"
    batch: tuple[Given, ...] = ()  # a style an image, in turn; () for the same in all
    names: tuple[str, ...] = field(default=(), repr=False)  # of the sliders; () for the checkpoint's first ones

    def __post_init__(self) -> None:
        for name in ("enabled", "normalise"):
            if not isinstance(getattr(self, name), bool):
                raise StyleError(f"{name} should be true or false, got {getattr(self, name)!r}")
        if self.apply_to not in PASSES:
            raise StyleError(f"there is no pass {self.apply_to!r}", hint=f"apply_to is one of: {', '.join(PASSES)}.")
        if not isinstance(self.weights, tuple):
            _given("weights", self.weights)
        for given in (self.negative, self.to, *self.batch):
            _given("a style", given)
        for name in ("start", "end"):
            share = _number(name, getattr(self, name))
            if not 0 <= share <= 1:
                raise StyleError(f"{name} is {share:g}; it is a share of the steps, from 0 to 1")
        schedule.check(self.mode, self.start, self.end)


def parse(values: Sequence[Any]) -> Args:
    """Args of what a webui passes: the panel's values in order, or from the API one dict in their place.

    ``{"args": [{"weights": {"ink": 0.7, "clay": 0.3}}]}`` (modules/api/api.py fills the rest up with the panel's own).

    Raises:
        StyleError: an unknown key, or a value that cannot be.
    """
    if values and isinstance(values[0], Mapping):
        return from_dict(values[0])
    if len(values) != len(CONTROLS) + SLIDERS + 1:
        raise StyleError(f"expected {len(CONTROLS) + SLIDERS + 1} values, got {len(values)}", hint="Give one dict.")
    fixed = dict(zip(CONTROLS, values, strict=False))
    sliders, names = values[len(CONTROLS) : -1], read_names(values[-1])
    weights = tuple(_number(f"slider {i + 1}", value) for i, value in enumerate(sliders))
    untouched = not names and not any(weights)  # a panel that no page has filled yet
    fixed["batch"] = split_batch(fixed["batch"])
    for name in ("negative", "to"):
        fixed[name] = fixed[name] or ""  # an empty dropdown is None
    return Args(**fixed, weights=DEFAULT if untouched else weights, names=names)


CONTROLS = ("enabled", "normalise", "apply_to", "negative", "to", "start", "end", "mode", "batch")  # before the sliders


def from_dict(given: Mapping[str, Any]) -> Args:
    known = [one.name for one in fields(Args) if one.name != "names"]
    for key in given:
        if key not in known:
            raise StyleError(f"there is no argument {key!r}", hint=f"The arguments are: {', '.join(known)}.")
    values = dict(given)
    if isinstance(values.get("weights"), (list, tuple)):
        values["weights"] = tuple(_number("weights", value) for value in values["weights"])
    if "batch" in values:
        batch = values["batch"]
        if not isinstance(batch, (str, list, tuple)):
            raise StyleError(f"batch should be a list of styles, got {batch!r}")
        values["batch"] = split_batch(batch) if isinstance(batch, str) else tuple(batch)
    for name in ("negative", "to"):
        values[name] = values[name] if values.get(name) is not None else ""
    return Args(**values)


def split_batch(text: str | None) -> tuple[str, ...]:
    """``"ink; clay=0.5, neon=0.5"`` → one entry an image."""
    return tuple(_split((text or "").replace("\n", ";"), ";"))


def _split(text: str, mark: str) -> list[str]:
    """The parts between marks that stand outside of double quotes, without the empty ones."""
    parts = re.findall(rf'(?:"(?:\\.|[^"\\])*"|[^{mark}])+', text)
    return [part.strip() for part in parts if part.strip()]


def parse_mix(text: str) -> dict[str, float]:
    """``"ink=0.7, clay=0.3"`` → weights; a name without a weight counts 1, one with a comma stands in double quotes.

    Raises:
        StyleError: a weight that is no number, a name twice, or nothing at all.
    """
    mix: dict[str, float] = {}
    for part in _split(text, ","):
        quoted = re.fullmatch(r'("(?:\\.|[^"\\])*")\s*(?:=(.*))?', part)
        name, equals, weight = (quoted[1], quoted[2] is not None, quoted[2]) if quoted else part.rpartition("=")
        name, weight = (name, weight) if equals else (quoted[1] if quoted else part, "1")
        try:
            name = json.loads(name) if quoted else name.strip()
            value = float(weight)
        except ValueError:
            raise StyleError(f"{weight!r} in {text!r} is no number", hint="Write e.g. ink=0.7, clay=0.3.") from None
        if name in mix:
            raise StyleError(f"{name} is given twice in {text!r}")
        mix[name] = value
    if not mix:
        raise StyleError("a style is empty", hint="Write e.g. ink=0.7, clay=0.3.")
    return mix


def write_mix(given: Given) -> str:
    """The text of a mix, which ``parse_mix`` reads back; weights to nine digits, those of 0 left out."""
    if isinstance(given, str):
        return given
    shown = {name: weight for name, weight in given.items() if weight} or given

    def quoted(name: str) -> str:
        plain = not any(mark in name for mark in ',;="\n') and name == name.strip()
        return name if plain else json.dumps(name, ensure_ascii=False)

    return ", ".join(f"{quoted(name)}={weight:.9g}" for name, weight in shown.items())


def read_names(text: object) -> tuple[str, ...]:
    """The names that the panel shows beside its sliders: a JSON list in a hidden field; anything else is none."""
    try:
        names = json.loads(text) if isinstance(text, str) and text else []
    except ValueError:
        return ()
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def _given(what: str, given: Any) -> None:
    if isinstance(given, Mapping):
        for name, weight in given.items():
            _number(f"the weight of {name}", weight)
    elif not isinstance(given, str):
        raise StyleError(f"{what} should be text or weights by name, got {given!r}", hint='Such as {"ink": 1}.')


def _number(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise StyleError(f"{what} should be a number, got {value!r}")
    return float(value)
