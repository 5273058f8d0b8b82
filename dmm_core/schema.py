"""Frozen dataclasses from plain mappings, driven by type hints; every fault names the file, the key and both values.

Understood hints: bool, int, float, str, Path, ``Literal``, ``X | None``, ``tuple[X, ...]``, ``tuple[X, Y]``,
``dict[str, X]``, ``dict[str, X] | tuple[X, ...]`` (whichever is given), other dataclasses, and
``Annotated[number, Range(…)]`` or ``Annotated[str, Pattern(…)]``.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from dmm_core.errors import RecipeError


def is_number(value: Any) -> bool:
    """Whether a value can be computed with: neither true nor false, no NaN or infinity, nor too long for a float."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


@dataclass(frozen=True)
class Range:
    """What a number may be: from ``low`` to ``high``, without the ends where they are ``open``."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        return above and (value < self.high if self.high_open else value <= self.high)

    def __str__(self) -> str:
        low = f"{'greater than' if self.low_open else 'at least'} {self.low:g}" if self.low > -math.inf else ""
        high = f"{'less than' if self.high_open else 'at most'} {self.high:g}" if self.high < math.inf else ""
        return " and ".join(filter(None, (low, high)))


@dataclass(frozen=True)
class Pattern:
    """What a text must match as a whole, and how to say so."""

    regex: str
    told: str


@dataclass(frozen=True)
class Reader:
    """Reads values of one source.

    Args:
        source: the file that errors name.
        folder: what relative paths start from.
    """

    source: str | Path
    folder: Path

    def fault(self, key: str, expected: str, got: Any, hint: str = "") -> RecipeError:
        shown = "nothing" if got is None else repr(got)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return RecipeError(f"{key or 'recipe'}: expected {expected}, got {shown}", self.source, hint)

    def read(self, hint: Any, value: Any, key: str = "") -> Any:
        """``value`` as ``hint`` wants it.

        Raises:
            RecipeError: an unknown or missing key, a wrong type, or a value out of its bounds.
        """
        origin, args = get_origin(hint), get_args(hint)
        if origin is Annotated:
            return self._bounded(args[0], args[1], value, key)
        if origin in (Union, types.UnionType):
            if value is None:
                return None
            return self.read(_option(args, value), value, key)
        if origin is Literal:
            if value in args and type(value) is type(args[0]):
                return value
            raise self.fault(key, "one of " + ", ".join(map(str, args)), value, _guess(value, args))
        if origin is tuple:
            return self._sequence(args, value, key)
        if origin is dict:
            if not isinstance(value, Mapping):
                raise self.fault(key, "a mapping", value)
            return {self.read(str, k, key): self.read(args[1], v, f"{key}.{k}") for k, v in value.items()}
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            return self._dataclass(hint, value, key)
        return self._scalar(hint, value, key)

    def _bounded(self, hint: Any, bound: Range | Pattern, value: Any, key: str) -> Any:
        read = self.read(hint, value, key)
        if isinstance(bound, Range) and read not in bound:
            raise self.fault(key, f"a number {bound}", value)
        if isinstance(bound, Pattern) and not re.fullmatch(bound.regex, read):
            raise self.fault(key, bound.told, value)
        return read

    def _sequence(self, args: tuple, value: Any, key: str) -> tuple:
        if not isinstance(value, list | tuple):
            raise self.fault(key, "a list", value)
        hints = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(hints) != len(value):
            raise self.fault(key, f"a list of {len(hints)}", value)
        return tuple(self.read(h, v, f"{key}[{i}]") for i, (h, v) in enumerate(zip(hints, value, strict=True)))

    def _dataclass(self, cls: Any, value: Any, key: str) -> Any:
        """A mapping of the class's fields; or the field it names as ``shorthand``, alone."""
        shorthand = getattr(cls, "shorthand", None)
        if shorthand and isinstance(value, str | Path):
            value = {shorthand: value}
        if not isinstance(value, Mapping):
            raise self.fault(key, "a mapping", value)
        hints = get_type_hints(cls, include_extras=True)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        prefix = f"{key}." if key else ""
        for name in value:
            if name not in fields:
                told = _guess(name, fields) or f"The keys there are: {', '.join(fields)}."
                raise RecipeError(f"unknown key {prefix}{name}", self.source, told)
        for name, field in fields.items():
            needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if needed and name not in value:
                raise RecipeError(f"{prefix}{name} is missing", self.source)
        return cls(**{name: self.read(hints[name], item, prefix + name) for name, item in value.items()})

    def _scalar(self, hint: Any, value: Any, key: str) -> Any:
        number = is_number(value)
        if hint is bool:
            if isinstance(value, bool):
                return value
            raise self.fault(key, "true or false", value)
        if hint is int:
            if number and value == int(value):
                return int(value)
            raise self.fault(key, "a whole number", value)
        if hint is float:
            if number:
                return float(value)
            raise self.fault(key, "a number", value)
        if hint is Path and isinstance(value, str | Path) and str(value):
            with suppress(RuntimeError):  # ~x where nobody is called x: a file's name
                value = Path(value).expanduser()
            return self.folder / value
        if hint is str and isinstance(value, str):
            return value
        quotes = "Put it in quotes." if isinstance(value, bool | int | float) else ""
        raise self.fault(key, "a path" if hint is Path else "text", value, quotes)


def plain(value: Any, path: Any = str) -> Any:
    """The mapping, list or scalar that ``Reader`` reads back; paths go through ``path``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name), path) for field in dataclasses.fields(value)}
    if isinstance(value, Path):
        return path(value)
    if isinstance(value, Mapping):
        return {key: plain(item, path) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, path) for item in value]
    return value


def _option(hints: tuple, value: Any) -> Any:
    """Of a union's hints the one for this value: a tuple for a list, else the first."""
    hints = tuple(hint for hint in hints if hint is not type(None))
    lists = [hint for hint in hints if get_origin(hint) is tuple]
    return lists[0] if lists and isinstance(value, list | tuple) else hints[0]


def _guess(value: Any, known: Any) -> str:
    near = difflib.get_close_matches(str(value), list(map(str, known)), 1)
    return f"Did you mean {near[0]}?" if near else ""
