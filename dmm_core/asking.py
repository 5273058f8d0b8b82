"""Asking the teachers: a step's batches on the device, and what their teachers say of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dmm_core.between import blended, weights_of
from dmm_core.conditioning import Context
from dmm_core.data import Batch, LatentData
from dmm_core.fewstep import path_end
from dmm_core.recipe import TrainSpec
from dmm_core.speed import to_device
from dmm_core.teachers import Teachers


@dataclass(eq=False)
class Given:
    """A batch whose rows are on the device, and so are its prompts as its teacher and as the student know them.

    For rows that are between two styles: their weight (m,) there, their prompts as the other teacher knows them, and
    what it said, once it has. ``also`` are the batches of whose rows this one's teacher is the other.
    """

    batch: Batch
    theirs: Context
    ours: Context
    weight: Tensor
    others: Context | None
    also: list[Given] = field(default_factory=list)
    said: list[Tensor] = field(default_factory=list)

    @property
    def pure(self) -> slice:
        """The rows of one style."""
        return slice(len(self.weight), None)

    def between(self) -> tuple[Tensor, Tensor, Context]:
        """x_t, t and prompts of the rows that another teacher is asked of as well."""
        assert self.others is not None
        return self.batch.x_t[: len(self.weight)], self.batch.t[: len(self.weight)], self.others


@dataclass(frozen=True)
class Target:
    """A batch and what its teacher said of it; for few steps, where its path ends. ``styles``: weights (B, N).

    ``maps``: of the teacher's layers (``blockwise.LayerCalls``) where they are wanted, of the rows of one style alone.
    """

    given: Given
    styles: Tensor
    said: Tensor
    features: list[Tensor]
    maps: list[Tensor] = field(default_factory=list)


class Asking:
    """Brings batches to the device and asks their teachers.

    Args:
        context: the student's own embeddings of all prompts.
        one_hot: style weights of the pure styles (N, N), on the device.
    """

    def __init__(
        self, teachers: Teachers, data: LatentData, context: Context, spec: TrainSpec, one_hot: Tensor
    ) -> None:
        self.teachers, self.data, self.context, self.spec, self.one_hot = teachers, data, context, spec, one_hot

    def bring(self, batches: Sequence[Batch]) -> list[Given]:
        """Batches on the device, in one copy."""
        rows = [list(self._parts(batch)) for batch in batches]
        there = iter(to_device([part for parts in rows for part in parts], self.one_hot.device))
        given = [self._given(batch, there) for batch in batches]
        for place, later in enumerate(given):
            if between := later.batch.between:
                before = (g for g in reversed(given[:place]) if g.batch.teacher == between.teacher)
                if asked := next(before, None):
                    asked.also.append(later)
        return given

    def _parts(self, batch: Batch) -> Iterator[Tensor]:
        yield from (batch.x_t, batch.t, *(batch.again or ()))
        yield from self.teachers.embeddings(batch.teacher, batch.prompt).parts
        yield from self.context[batch.prompt].parts
        if between := batch.between:
            yield between.weight
            yield from self.teachers.embeddings(between.teacher, batch.prompt[: len(between)]).parts

    def _given(self, batch: Batch, there: Iterator[Tensor]) -> Given:
        def context() -> Context:
            return Context(*(next(there) for _ in self.context.parts))

        x_t, t, *again = (next(there) for _ in range(2 + len(batch.again or ())))
        here = replace(batch, x_t=x_t, t=t, again=tuple(again) or None)
        theirs, ours = context(), context()
        if not batch.between:
            return Given(here, theirs, ours, x_t.new_empty(0), None)
        return Given(here, theirs, ours, next(there), context())

    def ask(self, given: Given, layers: bool = False) -> Target:
        """Let a batch's teacher predict; ``layers``: keep its maps, if it predicts what the student does."""
        batch = given.batch
        layers = layers and self.teachers.says_the_same(batch.teacher) and len(given.weight) < len(batch.t)
        styles = self.one_hot[batch.teacher].expand(len(batch.t), -1)
        if self.spec.few_step:
            nothing = len(self.data.prompts) - 1
            end = path_end(self.teachers, batch, batch.x_t, batch.t, nothing, self.spec.few_step)
            return Target(given, styles, end, [])
        if batch.between and not given.said:  # in this process, no batch before was its other teacher's
            given.said, _ = self._predict(batch.between.teacher, *given.between())
        mine, maps = self._answers(given, layers)
        if batch.between:
            styles = weights_of(styles, self.one_hot[batch.between.teacher], given.weight)
            mine = [blended(a, b, given.weight) for a, b in zip(mine, given.said, strict=True)]
            given.said = []
        said, *features = mine
        return Target(given, styles, said, features, [part[given.pure] for part in maps])

    def _answers(self, given: Given, layers: bool) -> tuple[list[Tensor], list[Tensor]]:
        """What its teacher says of a batch, and in the same pass of the rows that are on the way to its style."""
        asked = [(given.batch.x_t, given.batch.t, given.theirs), *(later.between() for later in given.also)]
        x_t, t, prompts = zip(*asked, strict=True)
        rows = [len(x) for x in x_t]
        told, maps = self._predict(given.batch.teacher, torch.cat(x_t), torch.cat(t), Context.cat(prompts), layers)
        mine, *answers = zip(*(part.split(rows) for part in told), strict=True)
        for later, answer in zip(given.also, answers, strict=True):
            later.said = list(answer)
        return list(mine), [part[: rows[0]] for part in maps]

    def _predict(
        self, teacher: int, x_t: Tensor, t: Tensor, prompts: Context, layers: bool = False
    ) -> tuple[list[Tensor], list[Tensor]]:
        """ε, and the blocks' outputs where they count; the layers' maps."""
        features = self.spec.feature > 0
        eps, blocks, maps = self.teachers.predict(teacher, x_t, t, prompts, features, layers)
        return [eps, *blocks], maps

    def order(self, batches: Sequence[Batch]) -> Iterator[int]:
        """The teachers in the order in which ``ask`` will need them."""
        for place, batch in enumerate(batches):
            other = batch.between.teacher if batch.between else None
            if other is not None and all(before.teacher != other for before in batches[:place]):
                yield other
            yield batch.teacher
