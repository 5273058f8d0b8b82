"""One picture's way through the webui: what was asked for, what the prompt's tags say, and what the UNet shows.

The webuis catch what a script raises and go on (``wrap_call`` in modules/scripts.py), so bad input becomes a sentence
in the picture's info and the default style, never a traceback.
"""

from __future__ import annotations

import weakref
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


class Run:
    """One ``process_images``. ``outer``: the run in whose midst this one is drawn, by ADetailer and its like."""

    def __init__(self, p: Any, outer: Run | None) -> None:
        self.args: Args | None = None
        self.tags: dict[str, float] = {}
        self.outer = outer
        self.first = outer.image() if outer else 0  # counted from the picture that it is drawn for
        self.batch = self.first
        self._p = weakref.ref(p)  # p holds latents
        self._job, self._named = _job(), bool(shared.state.job)

    def is_of(self, p: Any) -> bool:
        return self._p() is p

    @property
    def over(self) -> bool:
        """Whether it, or its job, has ended; with an exception that is before ``postprocess`` is called."""
        return self._p() is None or self._job != _job() or (self._named and not shared.state.job)

    def image(self) -> int:
        """The image at hand after sampling, through the whole job; ``batch_index`` in modules/processing.py."""
        return self.batch + int(getattr(self._p(), "batch_index", 0))


def _job() -> tuple[Any, Any]:
    """Which job the webui is at: ``State.begin`` in modules/shared_state.py. The stamp is of seconds."""
    return getattr(shared.state, "job_timestamp", None), getattr(shared.state, "time_start", None)


class Session:
    """The run in progress. There is one, for the webuis draw one job at a time, and perhaps others around it."""

    def __init__(self) -> None:
        self._run: Run | None = None
        self._planned: tuple[Any, Plan] | None = None  # what the plan was made of, and it

    def begin(self, p: Any, values: Sequence[Any]) -> None:
        """``process``: take the panel's, the API's and the XYZ grid's values; write the infotext.

        What is to be shown waits for ``tag``, which the webuis call on every run, and for the sampling.
        """
        LIVE.end()
        self._forget(p)
        for key in (*infotext.KEYS, WARNING):  # the XYZ grid's cells share one mapping: copy(p) in scripts/xyz_grid.py
            p.extra_generation_params.pop(key, None)
        if self._run is not None and self._run.is_of(p):  # it ended in an exception, and is tried again
            self._run = self._run.outer
        run = self._run = Run(p, self._run)
        try:
            run.args = _with_axes(parse(values), getattr(p, "dmm_axes", {}))
        except BadInput as error:
            complain(p, str(error))
            return
        if run.args.enabled and isinstance(book := checkpoint.current(drawing=True), Book):
            with suppress(BadInput):  # ``refresh`` says it, if no tag takes the sliders' place
                self._plan(book, run.args, {})
                p.extra_generation_params.update(infotext.write(run.args, book))

    def _forget(self, p: Any) -> None:
        """A run of a job that has ended has no say in another's; p's own run goes on."""
        if self._run is not None and self._run.over and not self._run.is_of(p):
            self._run = None

    def tag(self, p: Any, tags: Mapping[str, float]) -> None:
        """``ExtraNetwork.activate``: each call replaces the tags of the one before; {} on runs without tags."""
        self._forget(p)
        if tags and isinstance(book := checkpoint.current(drawing=True), Book):
            known = {name: weight for name, weight in tags.items() if name in book.names}
            for name in tags:
                if name not in known:
                    complain(p, f"<dmm:{name}>: there is no such style. The styles are: {', '.join(book.names)}.")
            tags = known
        if self._run is not None:
            self._run.tags = dict(tags)
        self.refresh(p)

    def refresh(self, p: Any) -> None:
        """Bring the UNet to what is asked for now: before each sampling, base or hires pass."""
        run = self._run
        args = run.args if run is not None else None
        if run is not None and args is not None and not args.enabled:
            args = Args() if run.tags else None  # the tags alone: nothing of a closed panel rules them
        if run is None or args is None or not _in_pass(args, p):
            LIVE.hide()
            return
        book = checkpoint.current(drawing=True)
        if not isinstance(book, Book):
            complain(p, book)
            LIVE.hide()
            return
        try:
            made = self._plan(book, args, run.tags)
            if made.idle:
                LIVE.hide()
            else:
                LIVE.first_image = run.batch if run.is_of(p) else run.image()  # else: another's, for the image at hand
                LIVE.show(shared.sd_model, made)
        except BadInput as error:
            complain(p, f"{book.path.name}: {error}")
            LIVE.hide()

    def _plan(self, book: Book, args: Args, tags: dict[str, float]) -> Plan:
        """The plan for these args and tags; the last one is kept, from picture to picture too."""
        key = (args, tuple(tags.items()), book)
        if self._planned is None or self._planned[0] != key:
            self._planned = (key, plan(book, args, tags))
        return self._planned[1]

    def batch(self, number: int, size: int) -> None:
        """``before_process_batch``: images are counted through the whole job."""
        if self._run is not None:
            self._run.batch = self._run.first + number * size

    def end(self) -> None:
        """``postprocess``: no hook stays behind; a run around this one goes on."""
        LIVE.end()
        self._run = self._run.outer if self._run is not None else None


def step(params: Any) -> None:
    """``on_cfg_denoiser``; a refiner may have put another checkpoint in place in mid-sampling."""
    if LIVE.plan is None:
        return
    if checkpoint.current_path(drawing=True) != LIVE.plan.book.path:
        LIVE.hide()
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
