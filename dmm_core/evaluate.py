"""How near a student comes to its teachers: the Fréchet matrices, their ratio, error bars, and the score gap.

Works on pictures and on numbers, not on models. DMM (arXiv:2504.12364) §4.1: M(i, j) is the distance of the student's
pictures in style i from teacher j's; the reference matrix puts teacher i, with other seeds, in the student's place.
FIDt is the trace (the sum, as the paper reports it) and ratio = student / reference: at 1 as many
pictures cannot tell the student from its teachers. The reference is chance and shrinks with more of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmm_core.errors import BadInput
from dmm_core.features import Extractor
from dmm_core.frechet import Gaussian, bootstrap_distances, floor, frechet, frechet_matrix, kid_matrix, ratio_errors
from dmm_core.likeness import unlikeness
from dmm_core.separation import separation

Pictures = Mapping[str, np.ndarray]  # style → (n, H, W, 3) uint8
MAX_BOOTSTRAP_DIM = 512  # above it one distance takes seconds


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What :func:`evaluate_pictures` measured. Matrices are (N, N): row = whose pictures, column = teacher (seeds B).

    ``average_row`` (N,) holds the weight average's distance from each teacher, ``before_row`` an earlier student's;
    ``others`` what other models without styles make of it: ``name``, ``distances``, ``ratio`` and ``ratio_error``.
    ``separation`` is what ``separation.separation`` says, ``same_seed`` what ``likeness.unlikeness`` says of the
    ``student`` and, where there is one, of the weight ``average``. Errors are one standard deviation over ``bootstrap``
    resamples, None without any.
    """

    styles: tuple[str, ...]
    extractor: str
    metric: str
    images_per_style: int
    matrix: np.ndarray
    reference: np.ndarray
    kid: np.ndarray
    kid_reference: np.ndarray
    floors: np.ndarray
    average_row: np.ndarray | None
    bootstrap: int
    ratio_error: float | None
    average_ratio_error: float | None
    style_ratio_errors: tuple[float | None, ...]
    before_row: np.ndarray | None = None
    others: tuple[dict[str, Any], ...] = ()
    separation: dict[str, Any] | None = None
    same_seed: dict[str, Any] | None = None

    @property
    def fid_t(self) -> float:
        return float(np.trace(self.matrix))

    @property
    def fid_t_reference(self) -> float:
        return float(np.trace(self.reference))

    @property
    def ratio(self) -> float:
        """FIDt of the student over that of the reference."""
        return self.fid_t / self.fid_t_reference

    @property
    def average_ratio(self) -> float | None:
        """The same of the plain weight average."""
        return None if self.average_row is None else float(self.average_row.sum()) / self.fid_t_reference

    @property
    def row_wins(self) -> tuple[bool, ...]:
        """Does style i of the student lie nearer to its own teacher than to every other?"""
        return tuple(bool(i == m) for i, m in enumerate(self.matrix.argmin(1)))

    @property
    def column_wins(self) -> tuple[bool, ...]:
        """Is style j, of all the student's styles, the nearest to teacher j?"""
        return tuple(bool(j == m) for j, m in enumerate(self.matrix.argmin(0)))

    def rows(self) -> list[dict[str, Any]]:
        """One entry a style: distances of student, reference and weight average, their ratio, the floor, the wins."""
        return [
            {
                "style": name,
                "student": float(self.matrix[i, i]),
                "reference": float(self.reference[i, i]),
                "ratio": float(self.matrix[i, i] / self.reference[i, i]),
                "ratio_error": self.style_ratio_errors[i],
                "before": None if self.before_row is None else float(self.before_row[i]),
                "weight_average": None if self.average_row is None else float(self.average_row[i]),
                "floor": float(self.floors[i]),
                "nearest_own_teacher": self.row_wins[i],
                "nearest_of_all_styles": self.column_wins[i],
            }
            for i, name in enumerate(self.styles)
        ]


def evaluate_pictures(
    student: Pictures,
    teachers: Pictures,
    reference: Pictures,
    average: Pictures | None = None,
    extractor: Extractor | None = None,
    *,
    before: Pictures | None = None,
    others: Pictures | None = None,
    bootstrap: int | None = None,
    seed: int = 0,
    on_progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Measure a student against its teachers. All sets: style → RGB pictures (n, H, W, 3) uint8, one n for all.

    Args:
        student: the student in each style, with seeds A.
        teachers: each teacher with seeds B; picture k of every set belongs to prompt k.
        reference: each teacher with seeds A: the prompts and seeds of ``student``.
        average: the plain average of the teachers' weights, sampled like the student.
        extractor: what measures; the best of this machine if left out.
        before: an earlier student, which may not have all of the styles, sampled like the student.
        others: models without styles (name → pictures), sampled like the weight average.
        bootstrap: resamples for the error bars; left out: 100, or none where features are too long for it.
        seed: of the resampling and of the halves that the floor compares.
        on_progress: told what is being done, in a few words.

    Raises:
        BadInput: a style without pictures in one of the sets, or sets of different size.
    """
    sets = {"student": student, "teachers": teachers, "reference": reference}
    more = {"weight average": average, "earlier student": before}
    more |= {name: dict.fromkeys(student, pictures) for name, pictures in (others or {}).items()}
    styles, count = _check({**sets, **{what: pictures for what, pictures in more.items() if pictures is not None}})
    tell = on_progress or (lambda _: None)
    network = extractor or Extractor.find()
    resamples = bootstrap if bootstrap is not None else 100 if network.dim <= MAX_BOOTSTRAP_DIM else 0

    def features(what: str, pictures: Pictures) -> list[np.ndarray]:
        tell(f"features of the {what}")
        distinct = {id(pictures[name]): pictures[name] for name in styles}  # the weight average has one set for all
        known = {key: network(rows) for key, rows in distinct.items()}
        return [known[id(pictures[name])] for name in styles]

    s, b, r = features("student", student), features("teachers", teachers), features("reference", reference)
    w = features("weight average", average) if average is not None else None
    tell("distances")
    gauss_b = [Gaussian.of(f) for f in b]
    matrix, own = (frechet_matrix([Gaussian.of(f) for f in rows], gauss_b) for rows in (s, r))
    earlier = features("earlier student", before) if before is not None else None
    further = {name: [network(pictures)] * len(b) for name, pictures in (others or {}).items()}
    tell("error bars")
    plain = [w] if w else []
    errors, style_errors = ratio_errors(bootstrap_distances([s, r, *plain, *further.values()], b, resamples, seed))
    beside = tuple(
        {"name": name, "distances": (way := _distances(rows, gauss_b)), "ratio": sum(way) / float(np.trace(own)),
         "ratio_error": error}
        for (name, rows), error in zip(further.items(), errors[2 + len(plain) :], strict=True)
    )  # fmt: skip
    return Evaluation(
        styles=styles,
        extractor=network.name,
        metric=network.metric,
        images_per_style=count,
        matrix=matrix,
        reference=own,
        kid=kid_matrix(s, b),
        kid_reference=kid_matrix(r, b),
        floors=np.array([floor(f, seed) for f in b]),
        average_row=np.array(_distances(w, gauss_b)) if w else None,
        bootstrap=resamples,
        ratio_error=errors[0],
        average_ratio_error=errors[2] if w else None,
        style_ratio_errors=style_errors,
        before_row=np.array(_distances(earlier, gauss_b)) if earlier else None,
        others=beside,
        separation=separation(s, b, r),
        same_seed={name: unlikeness(rows, r, b, seed) for name, rows in (("student", s), ("average", w)) if rows},
    )


def _distances(features: Sequence[np.ndarray], goals: Sequence[Gaussian]) -> list[float]:
    """Of a style's features (n, d) from its goal, a style at a time."""
    return [frechet(Gaussian.of(rows), goal) for rows, goal in zip(features, goals, strict=True)]


def _check(sets: Mapping[str, Pictures]) -> tuple[tuple[str, ...], int]:
    """The style names and the one number of pictures of all sets."""
    student = sets["student"]
    styles = tuple(student)
    if not styles:
        raise BadInput("there is no style to evaluate")
    count = len(student[styles[0]])
    for what, pictures in sets.items():
        for name in styles:
            found = len(pictures[name]) if name in pictures else 0
            if found != count or found < 4:
                raise BadInput(
                    f"{what} has {found} pictures of {name!r}, student has {count} of {styles[0]!r}",
                    hint="Distances are comparable only between equal counts, of at least 4.",
                )
    for name in styles:
        if np.array_equal(sets["reference"][name], sets["teachers"][name]):
            raise BadInput(
                f"the two sets of teacher pictures of {name!r} are the same",
                hint="The reference needs the teachers sampled with other seeds.",
            )
    return styles, count


def score_gap(student_mse: Mapping[str, float], average_mse: Mapping[str, float]) -> dict[str, Any]:
    """How much of the weight average's error the student has closed: 1 - student / average per style, and the mean.

    Both are mean squared errors against teacher i's prediction on held-out (x_t, t, prompt): of the student in style
    i, and of the plain average of the teachers' weights. 1 = predicts what the teacher does, 0 = no better than the
    average, below 0 = worse. The average itself scores 0. Styles whose teacher is the average, as the only one of the
    student's kind of prediction is, have none and are left out; where all are, the mean is None.

    Raises:
        BadInput: different styles in the two.
    """
    if set(student_mse) != set(average_mse) or not student_mse:
        raise BadInput(f"score gap of styles {sorted(student_mse)} against those of {sorted(average_mse)}")
    per_style = {
        name: 1 - float(mse) / float(average_mse[name]) for name, mse in student_mse.items() if average_mse[name] != 0
    }
    return {"mean": float(np.mean(list(per_style.values()))) if per_style else None, "per_style": per_style}


def to_report(
    evaluation: Evaluation,
    *,
    gap: Mapping[str, Any] | None = None,
    weight_average_gap: Mapping[str, Any] | float = 0.0,
    seconds: float | None = None,
    samples_seen: int | None = None,
    device: str = "",
    commit: str = "",
    **more: Any,
) -> dict[str, Any]:
    """The content of report.json. Plain numbers, strings, lists and dicts; what was not measured is None.

    ``gap`` comes from :func:`score_gap`. The weight average's own gap is 0 by definition; another may be given, as a
    number or like ``gap``. ``more`` is added as it is.
    """
    e = evaluation
    average_gap = weight_average_gap if isinstance(weight_average_gap, Mapping) else {"mean": weight_average_gap}
    return {
        "styles": list(e.styles),
        "extractor": e.extractor,
        "metric": e.metric,
        "images_per_style": e.images_per_style,
        "matrix": e.matrix.tolist(),
        "reference": e.reference.tolist(),
        "fid_t": e.fid_t,
        "fid_t_reference": e.fid_t_reference,
        "ratio": e.ratio,
        "ratio_error": e.ratio_error,
        "gap_closed": dict(gap) if gap else {"mean": None, "per_style": {}},
        "weight_average": {
            "ratio": e.average_ratio,
            "ratio_error": e.average_ratio_error,
            "gap_closed": average_gap["mean"],
            "distances": None if e.average_row is None else e.average_row.tolist(),
        },
        "baselines": [dict(other) for other in e.others],
        "per_style": e.rows(),
        "kid": e.kid.tolist(),
        "kid_reference": e.kid_reference.tolist(),
        "floors": dict(zip(e.styles, e.floors.tolist(), strict=True)),
        "separation": e.separation,
        "same_seed": e.same_seed,
        "bootstrap": e.bootstrap,
        "seconds": seconds,
        "samples_seen": samples_seen,
        "device": device,
        "commit": commit,
        **more,
    }
