"""Style-separation score and mixing table: on features whose answers are known, and from end to end."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from dmm_core.cli import main
from dmm_core.commands.evaluate import headline
from dmm_core.features import appeal
from dmm_core.mixing import curve
from dmm_core.separation import StyleClassifier, separation
from tests.unit import tiny


def styles(seed: int, spread: float = 1.0, apart: float = 6.0, n: int = 60) -> list[np.ndarray]:
    """Three clouds; along the first axis all vary much, which tells nothing of the style."""
    rng = np.random.default_rng(seed)
    clouds = []
    for i in range(3):
        noise = rng.normal(0, spread, (n, 4))
        noise[:, 0] *= 30
        clouds.append(noise + apart * np.eye(4)[i + 1])
    return clouds


def test_a_student_like_its_teachers_is_recognised():
    told = separation(styles(1), styles(2), styles(3))
    assert told["student"] > 0.97 and told["teachers"] > 0.97 and told["chance"] == pytest.approx(1 / 3)
    assert len(told["per_style"]) == 3


def test_one_picture_for_all_styles_gets_chance_exactly():
    same = styles(1)[0]
    assert separation([same] * 3, styles(2), styles(3))["student"] == pytest.approx(1 / 3)


def test_styles_run_into_each_other_and_swapped_ones_are_not_recognised():
    middle = np.mean([c.mean(0) for c in styles(2)], 0)
    blurred = [0.5 * (c - c.mean(0)) + 0.9 * middle + 0.1 * c.mean(0) for c in styles(1)]
    assert separation(blurred, styles(2), styles(3))["student"] < 0.9
    assert separation([styles(1)[i] for i in (1, 2, 0)], styles(2), styles(3))["student"] < 0.03


def test_one_style_has_no_score():
    assert separation(styles(1)[:1], styles(2)[:1], styles(3)[:1]) is None


def test_boundary_between_two_round_classes_is_half_way():
    classify = StyleClassifier(
        [np.array([[-1.0, 1.0], [-1, -1], [-3, 1], [-3, -1]]), np.array([[1.0, 1], [1, -1], [3, 1], [3, -1]])]
    )
    assert classify(np.array([[-0.1, 5.0], [0.1, -5.0]])).tolist() == [0, 1]


def test_curves():
    steady = curve([0, 1, 3], [3, 2, 0])
    assert steady["monotone"] and steady["against"] == 0
    assert steady["largest"] == pytest.approx(2 / 3) and curve([0, 1, 2], [2, 1, 0])["largest"] == pytest.approx(0.5)
    assert curve([1, 1], [1, 1])["largest"] == 0, "two styles that draw the same"
    crooked = curve([0, 2, 1], [3, 2, 0])  # ways 2 + 1 + 1 + 2, one of which leads back
    assert not crooked["monotone"] and crooked["against"] == pytest.approx(1 / 6)


def test_evaluate_with_all_that_can_be_set_beside(tmp_path: Path, capsys, monkeypatch):
    """A mix in tenths, another model without styles, and the CLIP score of this machine."""
    for name in (appeal.PICK[0], appeal.AESTHETIC):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(appeal, "_cached", lambda name: False)
    monkeypatch.setenv(appeal.CLIP[0], str(tiny.write_clip(tmp_path / "clip")))
    names = ("ink", "néon")
    file = tiny.write_tiny_dmm(tmp_path / "dmm.safetensors", names)
    teachers = [str(tiny.write_tiny(tmp_path / f"{i}.safetensors", seed=40 * i)) for i in range(2)]
    line = ["evaluate", str(file), "--teacher", *teachers, "--images", "4", "--steps", "1", "--cfg", "1"]
    line += ["--out", str(tmp_path / "report"), "--beside", teachers[0], "--mix", *names]
    assert main([*line, "--json"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    counts = dict(re.findall(r"(draws pictures to \w+): (\d+/\d+), .*took", printed.err))
    # compared: nine sets of four, and eleven mixes of styles and of weights; shown: five sets, a strip, an average
    assert counts == {"draws pictures to compare": "124/124", "draws pictures to show": "56/56"}
    (beside,) = report["baselines"]  # a teacher: as near to its own pictures as with other seeds, and no error there
    assert beside["name"] == "0" and beside["distances"][0] == pytest.approx(report["reference"][0][0], rel=1e-4)
    assert beside["ratio"] == pytest.approx(sum(beside["distances"]) / report["fid_t_reference"])
    # what it closes of the second style's gap is negative, since the average is nearer to that teacher; of its own, all
    assert beside["ratio_error"] > 0 and -10 < 2 * beside["gap_closed"] - 1 < 0
    (mixing,) = report["mixing"]
    assert mixing["amounts"] == [i / 10 for i in range(11)] and len(mixing["average"]["to_second"]) == 11
    # at 0 and 1 the mix is the style itself: the matrix's own figures
    ends = (mixing["student"]["to_first"][0], mixing["student"]["to_second"][-1])
    assert ends == pytest.approx((report["matrix"][0][0], report["matrix"][1][1]), rel=1e-4)
    assert 0 <= report["separation"]["student"] <= 1 and report["separation"]["chance"] == 0.5
    alike = {name: told["mean"] for name, told in report["same_seed"].items()}
    assert min(alike.values()) > 0 and any(f"{alike['student']:.3f} ±" in line for line in headline(report))
    (liked,) = report["appeal"]
    assert liked["score"] == "CLIP score" and len(set(liked["means"].values())) == 4
    assert list(liked["means"]) == ["equal mix", "weight average", "each style", "teachers"]
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "Prompts and taste" in page and f"{liked['means']['equal mix']:.2f}" in page
    assert (
        "Mixes in figures" in page
        and "this merge" in page
        and "weight of néon" in page
        and "Style recognised" in page
        and "Picture by picture" in page
    )
    assert main([*line[:-2], "ink", "nobody"]) == 2 and "no style 'nobody'" in capsys.readouterr().err
