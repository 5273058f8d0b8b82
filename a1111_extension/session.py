"""One picture's way through the webui: what was asked for, what the prompt's tags say, and what the UNet shows.

The webuis catch what a script raises and go on (``wrap_call`` in modules/scripts.py), so bad input becomes a sentence
in the picture's info and the default style, never a traceback.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from modules import shared

from dmm_core.errors import BadInput

from . import checkpoint, infotext
from .args import Args, parse
from .hook import LIVE
from .styles import Book, Plan, plan

WARNING = "DMM warning"


class Session:
    """The run in progress. There is one: the webuis draw one job at a time."""

    def __init__(self) -> None:
        self._args: Args | None = None
        self._tags: dict[str, float] = {}
        self._planned: tuple[Any, Plan] | None = None  # what the plan was made of, and it

    def begin(self, p: Any, values: Sequence[Any]) -> None:
        """``process``: take the panel's, the API's and the XYZ grid's values; write the infotext.

        What is to be shown waits for ``tag``, which the webuis call on every run, and for the sampling.
        """
        LIVE.end()
        self._tags, self._args = {}, None
        try:
            self._args = _with_axes(parse(values), getattr(p, "dmm_axes", {}))
        except BadInput as error:
            complain(p, str(error))
            return
        if self._args.enabled and isinstance(book := checkpoint.current(drawing=True), Book):
            with suppress(BadInput):  # ``refresh`` says it, if no tag takes the sliders' place
                self._plan(book, self._args)
                p.extra_generation_params.update(infotext.write(self._args, book))

    def tag(self, p: Any, tags: Mapping[str, float]) -> None:
        """``ExtraNetwork.activate``: each call replaces the tags of the one before; {} on runs without tags."""
        if tags and isinstance(book := checkpoint.current(drawing=True), Book):
            known = {name: weight for name, weight in tags.items() if name in book.names}
            for name in tags:
                if name not in known:
                    complain(p, f"<dmm:{name}>: there is no such style. The styles are: {', '.join(book.names)}.")
            tags = known
        self._tags = dict(tags)
        self.refresh(p)

    def refresh(self, p: Any) -> None:
        """Bring the UNet to what is asked for now: before each sampling, base or hires pass."""
        args = self._args
        if args is not None and not args.enabled:
            args = Args() if self._tags else None  # the tags alone: nothing of a closed panel rules them
        if args is None or not _in_pass(args, p):
            LIVE.hide()
            return
        book = checkpoint.current(drawing=True)
        if not isinstance(book, Book):
            complain(p, book)
            LIVE.hide()
            return
        try:
            made = self._plan(book, args)
            if made.idle:
                LIVE.hide()
            else:
                LIVE.show(shared.sd_model, made)
        except BadInput as error:
            complain(p, f"{book.path.name}: {error}")
            LIVE.hide()

    def _plan(self, book: Book, args: Args) -> Plan:
        """The plan for these args and the tags; the last one is kept, from picture to picture too."""
        key = (args, tuple(self._tags.items()), book)
        if self._planned is None or self._planned[0] != key:
            self._planned = (key, plan(book, args, self._tags))
        return self._planned[1]

    def batch(self, number: int, size: int) -> None:
        """``before_process_batch``: images are counted through the whole job."""
        LIVE.first_image = number * size

    def end(self) -> None:
        """``postprocess``: no hook stays behind."""
        LIVE.end()
        self._args, self._tags = None, {}


def step(params: Any) -> None:
    """``on_cfg_denoiser``; a refiner may have put another checkpoint in place in mid-sampling."""
    if LIVE.plan is None:
        return
    if checkpoint.current_path() != LIVE.plan.book.path:
        LIVE.end()
        return
    LIVE.ensure(shared.sd_model)
    LIVE.step(params, forks=hasattr(shared.sd_model, "forge_objects"))


def complain(p: Any, sentence: str) -> None:
    """A line under the picture (``p.comment``) and in its infotext."""
    p.comment(f"DMM: {sentence}")
    said = p.extra_generation_params.get(WARNING)
    if said is None or sentence not in said:
        p.extra_generation_params[WARNING] = sentence if said is None else f"{said} {sentence}"


def _in_pass(args: Args, p: Any) -> bool:
    hires = bool(getattr(p, "is_hr_pass", False))
    return args.apply_to == "both" or args.apply_to == ("hires" if hires else "base")


def _with_axes(args: Args, axes: Mapping[str | int, Any]) -> Args:
    """The XYZ grid's values over the panel's: a whole style, and single sliders by number on top."""
    if not axes:
        return args
    weights = axes.get("style", args.weights)
    sliders = {key: value for key, value in axes.items() if isinstance(key, int)}
    if sliders:
        book = checkpoint.current(drawing=True)
        if not isinstance(book, Book):
            return replace(args, enabled=True, weights=weights)
        mix = book.sliders(weights, args.names) if isinstance(weights, tuple) else book.mix(weights)
        if over := [number + 1 for number in sliders if number >= len(book.names)]:
            raise BadInput(f"there is no style number {over[0]}", book.path.name, f"It has {len(book.names)}.")
        weights = {**mix, **{book.names[number]: value for number, value in sliders.items()}}
    return replace(args, enabled=True, weights=weights)


SESSION = Session()
