"""What a training under way shows: losses that outlive a stop, and the picture that is drawn of them."""

from __future__ import annotations

import numpy as np

from dmm_core.history import POINTS, Losses
from dmm_core.preview import COLOURS, grid

NAMES = ("ink", "水彩", "a name that is far too long for its column and is cut")


def test_losses_are_smoothed_thinned_and_kept(tmp_path):
    losses = Losses(tmp_path / "losses.json", 0)
    for step in range(1, 3 * POINTS):
        losses.add(step, {"a": 1.0 if step == 1 else 0.5})
    assert len(losses.points) <= POINTS and losses.points[-1][0] > 3 * POINTS - 2 * losses.every
    assert losses.points[0][1]["a"] > losses.points[-1][1]["a"] and abs(losses.now["a"] - 0.5) < 1e-6
    losses.add(step + 1, {"a": float("nan")})
    assert abs(losses.now["a"] - 0.5) < 1e-6, "one such step is not the mean of all that follow"
    losses.save()
    again = Losses(tmp_path / "losses.json", 600)
    assert again.points == [point for point in losses.points if point[0] <= 600] and again.every == losses.every
    (tmp_path / "losses.json").write_text("{", encoding="utf-8")
    assert Losses(tmp_path / "losses.json", 9).points == []


def test_the_picture_has_a_column_and_a_line_for_each_style():
    teachers = [np.full((1, 64, 64, 3), 40 * k, np.uint8) for k in range(3)]
    students = [np.full((1, 64, 64, 3), 40 * k + 20, np.uint8) for k in range(3)]
    points = [(step, {name: 0.1 / step * (k + 1) for k, name in enumerate(NAMES)}) for step in range(1, 30)]
    empty, full = (np.asarray(grid(NAMES, teachers, students, some)) for some in ([], points))
    for k in range(3):
        for value in (40 * k, 40 * k + 20):
            assert (full == value).all(2).sum() >= 0.9 * 128**2, "every picture is in it, twice as large"
        colour = tuple(int(COLOURS[k][i : i + 2], 16) for i in (1, 3, 5))
        count = lambda picture, colour=colour: int((picture == colour).all(2).sum())  # noqa: E731
        assert count(full) > count(empty) + 100, "a line as wide as the picture"
    assert grid(NAMES[:2], teachers[:2], students[:2], [(5, {"ink": 0.0})]).size == (76 + 2 * 134, 26 + 2 * 134 + 90)
