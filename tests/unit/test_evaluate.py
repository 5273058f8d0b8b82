"""Evaluation on pictures whose distances are known: a tiny extractor stands in for the network."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from dmm_core.commands.evaluate import headline
from dmm_core.errors import BadInput
from dmm_core.evaluate import evaluate_pictures, score_gap, to_report
from dmm_core.features import Extractor
from dmm_core.frechet import frechet
from dmm_core.report.tables import style_numbers

COLORS = {"ink": (30, 30, 40), "clay": (200, 150, 210), "neon": (20, 220, 120)}
N = 24


def mean_colors(pixels, weights):
    return pixels.mean((2, 3)) * weights["scale"]


EXTRACTOR = Extractor("mean colour", "Fréchet distance (mean colour)", 3, mean_colors, {"scale": torch.tensor(10.0)})


def pictures(seed, shift=0.0, colors=COLORS):
    rng = np.random.default_rng(seed)
    subjects = np.random.default_rng(99).normal(0, 12, (N, 3))  # the same subjects in every set
    out = {}
    for name, color in colors.items():
        flat = np.array(color) + shift + subjects + rng.normal(0, 8, (N, 3))
        out[name] = np.broadcast_to(flat[:, None, None].clip(0, 255).astype(np.uint8), (N, 8, 8, 3)).copy()
    return out


@pytest.fixture(scope="module")
def evaluation():
    grey = dict.fromkeys(COLORS, next(iter(pictures(5, colors={"grey": (90, 130, 120)}).values())))
    return evaluate_pictures(pictures(1, shift=6), pictures(2), pictures(3), grey, EXTRACTOR, bootstrap=30)


def test_matrices_are_the_distances_of_the_sets(evaluation):
    student, teachers = pictures(1, shift=6), pictures(2)
    expected = frechet(EXTRACTOR(student["ink"]), EXTRACTOR(teachers["neon"]))
    assert evaluation.styles == tuple(COLORS)
    assert evaluation.matrix[0, 2] == pytest.approx(expected)
    assert evaluation.fid_t == pytest.approx(np.trace(evaluation.matrix))
    assert evaluation.ratio == pytest.approx(evaluation.fid_t / evaluation.fid_t_reference)


def test_shifted_student_is_worse_than_teachers_and_better_than_the_average(evaluation):
    assert 1 < evaluation.ratio < evaluation.average_ratio
    assert evaluation.ratio_error > 0 and evaluation.average_ratio_error > 0
    assert all(evaluation.row_wins) and all(evaluation.column_wins)


def test_the_reference_as_student_has_ratio_one_without_error():
    same = evaluate_pictures(pictures(3), pictures(2), pictures(3), None, EXTRACTOR, bootstrap=10)
    assert same.ratio == 1 and same.ratio_error == 0
    assert same.same_seed["student"]["mean"] == 0 and "average" not in same.same_seed
    assert same.average_ratio is None and same.average_ratio_error is None


def test_swapped_styles_lose_rows_and_columns():
    student = pictures(1)
    student["ink"], student["clay"] = student["clay"], student["ink"]
    swapped = evaluate_pictures(student, pictures(2), pictures(3), None, EXTRACTOR, bootstrap=0)
    assert swapped.row_wins == swapped.column_wins == (False, False, True)
    assert swapped.ratio_error is None


def test_is_repeatable_and_order_of_styles_does_not_matter(evaluation):
    def run(names):
        sets = [{name: pics[name] for name in names} for pics in (pictures(1, shift=6), pictures(2), pictures(3))]
        return evaluate_pictures(*sets, None, EXTRACTOR, bootstrap=30)

    first, again = run(list(COLORS)), run(list(COLORS)[::-1])
    assert first.ratio == pytest.approx(again.ratio) == pytest.approx(evaluation.ratio)
    assert first.ratio_error == pytest.approx(again.ratio_error) == pytest.approx(evaluation.ratio_error)


def test_long_features_have_no_bootstrap_unless_asked_for():
    sets = pictures(1), pictures(2), pictures(3)
    assert evaluate_pictures(*sets, None, replace(EXTRACTOR, dim=3)).bootstrap == 100
    wide = replace(EXTRACTOR, dim=2048, network=lambda x, w: mean_colors(x, w).repeat(1, 683)[:, :2048])
    small = [{"ink": pics["ink"][:4]} for pics in sets]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dmm_core.evaluate.frechet_matrix", lambda a, b: np.eye(len(a)))
        patch.setattr("dmm_core.evaluate.floor", lambda f, seed: 0.0)
        assert evaluate_pictures(*small, None, wide).bootstrap == 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s, b, r: b.pop("clay"), "teachers has 0 pictures of 'clay'"),
        (lambda s, b, r: r.update(neon=r["neon"][:7]), "reference has 7 pictures of 'neon', student has 24"),
        (lambda s, b, r: r.update(ink=b["ink"]), "the two sets of teacher pictures of 'ink' are the same"),
        (lambda s, b, r: s.clear(), "no style"),
    ],
)
def test_unusable_sets_are_named(change, told):
    sets = pictures(1), pictures(2), pictures(3)
    change(*sets)
    with pytest.raises(BadInput, match=told):
        evaluate_pictures(*sets, None, EXTRACTOR)


def test_score_gap():
    gap = score_gap({"ink": 0.1, "clay": 0.3}, {"ink": 0.4, "clay": 0.3})
    assert gap == {"mean": pytest.approx(0.375), "per_style": {"ink": pytest.approx(0.75), "clay": 0.0}}
    assert score_gap({"ink": 0.8}, {"ink": 0.4})["mean"] == -1


def test_styles_whose_teacher_is_the_average_have_no_gap(evaluation):
    gap = score_gap({"ink": 0.1, "clay": 0.3}, {"ink": 0.4, "clay": 0.0})
    assert gap == {"mean": pytest.approx(0.75), "per_style": {"ink": pytest.approx(0.75)}}
    none = score_gap({"ink": 0.1}, {"ink": 0.0})
    assert none == {"mean": None, "per_style": {}}
    told = to_report(evaluation, gap=none)
    assert told["gap_closed"] == none and not any("gap" in line for line in headline(told))
    partly = to_report(evaluation, gap=gap)
    assert "75 %" in style_numbers(partly) and "score gap closed: 75.0%" in "".join(headline(partly))


@pytest.mark.parametrize(("mine", "plain"), [({"a": 1.0}, {"b": 1.0}), ({}, {})])
def test_score_gap_refuses(mine, plain):
    with pytest.raises(BadInput):
        score_gap(mine, plain)


def test_report_has_the_keys_of_the_contract(evaluation):
    gap = {"mean": 0.5, "per_style": dict.fromkeys(COLORS, 0.5)}
    report = to_report(evaluation, gap=gap, seconds=3.5, samples_seen=960, device="cpu", commit="abc", file="x")
    contract = {
        "styles", "extractor", "images_per_style", "matrix", "reference", "fid_t", "fid_t_reference", "ratio",
        "ratio_error", "gap_closed", "weight_average", "seconds", "samples_seen", "device", "commit",
    }  # fmt: skip
    assert contract <= report.keys() and report["file"] == "x"
    assert {"mean", "per_style"} <= report["gap_closed"].keys()
    assert {"ratio", "gap_closed"} <= report["weight_average"].keys()
    assert report["images_per_style"] == N
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_report_takes_the_averages_gap_as_a_number_or_like_a_gap(evaluation):
    given = [
        to_report(evaluation, weight_average_gap=gap)["weight_average"]["gap_closed"] for gap in (0.1, {"mean": 0.2})
    ]
    assert given == [0.1, 0.2]
    assert to_report(evaluation)["weight_average"]["gap_closed"] == 0
