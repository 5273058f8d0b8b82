"""A job's events as a host shows them: how far it is, in numbers and in words."""

from __future__ import annotations

from dataclasses import dataclass, field

from dmm_core.jobs import Event, Job, JobFailed
from dmm_core.progress import duration

SAVES_WITHIN = 600.0  # seconds that a cancelled merge has for its save


@dataclass
class View:
    """What is known of a job by now. ``doing`` is its stage; ``step`` of ``total`` counts the training's steps."""

    doing: str = "starts"
    done: int = 0
    of: int = 0
    step: int = 0
    total: int = 0
    seconds_left: float | None = None
    losses: dict[str, float] = field(default_factory=dict)
    picture: bytes | None = None  # the last preview, a JPEG
    caption: str = ""
    warnings: list[str] = field(default_factory=list)
    resumed: bool = False
    training: bool = False  # whether the last word was of a step

    def take(self, event: Event) -> None:
        about = event.about
        if event.kind == "started":
            self.resumed = bool(about["resumed"])
        elif event.kind == "stage":
            self.doing, self.done, self.of, self.training = about["what"], about["done"], about["total"], False
        elif event.kind == "progress":
            self.step, self.total, self.training = about["step"], about["total"], True
            self.seconds_left = about["seconds_left"]
            self.losses = {name: loss for name, loss in about["losses"].items() if loss is not None}  # NaN in JSON
        elif event.kind == "preview" and event.picture:
            self.picture, self.caption = event.picture, about["caption"]
        elif event.kind == "warning":
            self.warnings.append(about["line"])
        elif event.kind == "stopped":
            self.step = about["step"]

    @property
    def share(self) -> float | None:
        """How much of the present part is done, 0 to 1; None where nobody knows."""
        done, of = (self.step, self.total) if self.training else (self.done, self.of)
        return done / of if of else None

    def line(self) -> str:
        """e.g. "step 30 of 400, 7 min left", "draws latents: 3 of 8"."""
        if not self.training:
            return self.doing + (f": {self.done} of {self.of}" if self.of else "")
        left = f", {duration(self.seconds_left)} left" if self.seconds_left else ""
        return f"step {self.step} of {self.total}{left}"

    def cancel(self, job: Job, again: str) -> str:
        """Let a job save, then stop; returns what is told. ``again``: what the user does to go on, e.g. "Resume it"."""
        saved = job.finish(SAVES_WITHIN)
        if job.last is not None:
            self.take(job.last)
        return self.ended(saved, again)

    def ended(self, saved: bool, again: str) -> str:
        """What is told once a cancelled job is gone; ``saved``: whether it had the time to."""
        at = f"at step {self.step} of {self.total}" if self.total else "before the first step"
        return f"Stopped {at}. {again} to go on from " + ("there." if saved else "its last save.")


def require_done(job: Job, again: str) -> None:
    """Raises JobFailed for a job that ended otherwise than by making its file."""
    job.require_success()
    if job.last is not None and job.last.kind == "stopped":
        raise JobFailed("the merge was stopped from outside", job.work, f"{again} to go on from there.")
