"""Report files: complete, escaped, self-contained, and drawn where they should be."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dmm_core import present, shell
from dmm_core.report import Grids, MixStrip, StyleGrid, draw_matrices, draw_mix, draw_styles, write_json, write_report
from dmm_core.report.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, axis, mixing_chart, points
from dmm_core.report.draw import RAMP, cell_side, font_for, ramp_color, shorten, text_width, wrap
from dmm_core.report.page import duration
from dmm_core.report.pictures import short_number

NASTY = '<script>alert("x")</script>'


def flat(color, count=3, side=64):
    return np.full((count, side, side, 3), color, np.uint8)


def make_report(styles=("ink", "neon")):
    n = len(styles)
    matrix = (np.ones((n, n)) * 9 - np.eye(n) * 8.5).tolist()
    rows = [
        {
            "style": name, "student": 0.5, "reference": 0.4, "ratio": 1.25, "ratio_error": 0.1, "weight_average": None,
            "floor": 0.6, "nearest_own_teacher": True, "nearest_of_all_styles": True,
        }
        for name in styles
    ]  # fmt: skip
    return {
        "styles": list(styles), "extractor": "MobileNetV2-96", "metric": "Fréchet distance (MobileNetV2-96)",
        "images_per_style": 96, "matrix": matrix, "reference": matrix, "fid_t": 1.0, "fid_t_reference": 0.8,
        "ratio": 1.25, "ratio_error": 0.07, "gap_closed": {"mean": 0.72, "per_style": dict.fromkeys(styles, 0.72)},
        "weight_average": {"ratio": 35.8, "ratio_error": 1.8, "gap_closed": 0.0}, "per_style": rows, "kid": matrix,
        "floors": dict.fromkeys(styles, 0.6), "bootstrap": 100, "seconds": 1287.3, "samples_seen": 9600,
        "device": "cpu", "commit": "abc123",
    }  # fmt: skip


def make_grids(styles=("ink", "neon"), side=64):
    teachers = {name: flat((200, 20 * k, 0), side=side) for k, name in enumerate(styles)}
    students = {name: flat((0, 20 * k, 200), side=side) for k, name in enumerate(styles)}
    grid = StyleGrid(["cat", "dragon face", "house"], teachers, students, flat((90, 90, 90), side=side))
    strip = MixStrip("cat", styles[0], styles[-1], flat((7, 8, 9), 11, side), flat((90, 90, 90), 1, side)[0])
    return Grids(grid, [strip])


class Checker(HTMLParser):
    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self):
        super().__init__()
        self.open, self.images, self.tags = [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check(html):
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    return checker


def test_writes_all_files(tmp_path):
    written = write_report(tmp_path / "new folder é", make_report(), make_grids(), "A merge")
    assert {path.name for path in written} == {"styles.png", "mix.png", "fid.png", "report.html", "report.json"}
    assert sorted(path.name for path in written[0].parent.iterdir()) == sorted(path.name for path in written)
    assert json.loads(written[-1].read_text(encoding="utf-8"))["ratio"] == 1.25


def test_page_is_whole_and_loads_nothing(tmp_path):
    write_report(tmp_path, make_report(), make_grids(), "A merge")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    checker = check(html)
    assert len(checker.images) == (2 * 2 + 1) * 3 + 12
    assert all(image["src"].startswith("data:image/") and image["alt"] for image in checker.images)
    assert not {"script", "link", "iframe"} & checker.tags
    assert not re.search(r"https?://|url\(|@import", html)
    assert "prefers-color-scheme: dark" in html and "width=device-width" in html
    for told in ("1.25", "± 0.07", "72 %", "35.80", "2 of 2", "21 min 27 s", "9,600", "abc123", "MobileNetV2-96"):
        assert told in html, told


def test_curves_of_a_mix():
    """Corners by hand: from the left margin to the right one, 0 at the bottom and the axis' last number at the top."""
    assert axis(10.3) == [0, 2.5, 5, 7.5, 10, 12.5] and axis(4) == [0, 1, 2, 3, 4]
    for largest in (0.003, 0.71, 2.4, 9.99, 47, 1e5):
        ticks = axis(largest)
        assert ticks[-2] < largest <= ticks[-1] and 3 <= len(ticks) <= 6
    x = (LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT)
    y = (HEIGHT - BOTTOM, (HEIGHT - BOTTOM + TOP) / 2, TOP)
    assert points([0, 0.5, 1], [0, 4, 8], 8.0) == " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    way = {"to_first": [0, 4.0, 8.0], "to_second": [8.0, 4.0, 0], "monotone": True, "against": 0}
    mixing = {"first": NASTY, "second": "b&w", "amounts": [0, 0.5, 1], "student": way, "average": None}
    html = mixing_chart(mixing)
    assert check(html).tags == {"figure", "svg", "polyline", "line", "text", "figcaption", "span"}
    assert points([0, 0.5, 1], [8, 4, 0], 8.0) in html and "student to b&amp;w" in html and "average" not in html
    assert 'class="average second"' in mixing_chart(mixing | {"average": way})


def test_page_escapes_everything(tmp_path):
    styles = (NASTY, "b&w")
    report = make_report(styles) | {
        "merged": [{"name": NASTY, "teacher": NASTY, "sha256": NASTY}], "device": NASTY, "commit": NASTY,
        "file": f"{NASTY}.safetensors", "recipe": {NASTY: NASTY}, "sampler": {NASTY: NASTY}, "metric": NASTY,
    }  # fmt: skip
    grids = make_grids(styles)
    grids = Grids(StyleGrid([NASTY] * 3, grids.styles.teachers, grids.styles.students), grids.mixes)
    write_report(tmp_path, report, grids, NASTY)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "script" not in check(html).tags
    assert "b&amp;w" in html and "b&w" not in html


def words_of(html, tmp_path):
    """The page's commands, as the shell splits them."""
    lines = unescape(html[html.rindex("<pre>") :].split("</code>")[0].split("<code>")[1])
    shown = subprocess.run(
        ["sh", "-c", lines.replace(shell.command(), 'printf "%s\\0" ""')], capture_output=True, text=True, cwd=tmp_path
    )
    return [command.split("\0") for command in shown.stdout.removesuffix("\0").removeprefix("\0").split("\0\0")]


@pytest.mark.skipif(os.name == "nt", reason="asks sh")
def test_commands_of_the_page_are_whole_words(tmp_path):
    """The prompt as it was drawn, the file with its path, and nothing that the shell makes something else of."""
    styles, prompt = ("b&w; touch x", "it's $HOME"), 'a picture of a "cat" & `touch y`\\'
    file = tmp_path / "my $(touch z) merge.safetensors"
    grids = replace(make_grids(styles), prompt=prompt, file=file)
    write_report(tmp_path / "out", make_report(styles) | {"file": file.name}, grids)
    draw, mix, bake = words_of((tmp_path / "out" / "report.html").read_text(encoding="utf-8"), tmp_path)
    assert draw == ["generate", str(file), "--prompt", prompt, "--style", f"{styles[0]}=1"]
    assert mix[:5] == ["mix", str(file), "--style", f"{styles[0]}=0.7", f"{styles[1]}=0.3"]
    assert bake == [*mix[:-1], "checkpoint.safetensors", "--bake"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_shown_prompt_is_the_drawn_one(tmp_path, monkeypatch):
    """Columns are called by their subject; what was drawn is the whole prompt."""
    drawn = np.zeros((1, 64, 64, 3), np.uint8)
    bench = SimpleNamespace(
        names=("ink",), prompts=["a picture of a cat face"], student=SimpleNamespace(vae=None),
        of_teacher=lambda i, seeds: drawn, of_student=lambda style: drawn, of_average=lambda: drawn,
    )  # fmt: skip
    monkeypatch.setattr(present, "decode", lambda vae, latents: latents)
    monkeypatch.chdir(tmp_path)
    present.present(tmp_path, SimpleNamespace(report=make_report(("ink",))), bench, Path("m.safetensors"))
    html = unescape((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert '"a picture of a cat face"' in html and ">cat face<" in html
    assert f"generate {shell.quoted(str(tmp_path / 'm.safetensors'))} --prompt" in html


def test_words_for_each_shell():
    assert [shell.quoted(word) for word in ("ink=1", "my file", "")] == ["ink=1", '"my file"', '""']
    assert shell.quoted('say "$x"', "posix") == "'say \"$x\"'"
    assert shell.quoted("C:\\a b\\", "nt") == '"C:\\a b\\\\"' and shell.quoted("C:\\a", "nt") == "C:\\a"
    assert shell.quoted('say "x" & y', "nt") == '"say \\"x\\" & y"'


def test_dmm_is_told_by_its_name_only_where_that_finds_it(tmp_path, monkeypatch):
    scripts, path = tmp_path / "my bin", tmp_path / "links"
    monkeypatch.setattr(shell.sysconfig, "get_path", lambda name: str(scripts))
    monkeypatch.setenv("PATH", str(path))
    assert shell.program() == [sys.executable, "-m", "dmm_core"]
    for folder in (scripts, path):
        folder.mkdir()
        (folder / ("dmm.exe" if os.name == "nt" else "dmm")).touch(0o755)
    assert shell.program() == [shutil.which("dmm", path=str(scripts))], "that on the path is another program"
    monkeypatch.setenv("PATH", str(scripts))
    assert shell.program() == ["dmm"]


def test_report_without_pictures_average_or_gap(tmp_path):
    report = make_report(("only",)) | {
        "gap_closed": {"mean": None, "per_style": {}}, "ratio_error": None, "seconds": None, "samples_seen": None,
        "weight_average": {"ratio": None, "ratio_error": None, "gap_closed": None},
    }  # fmt: skip
    written = write_report(tmp_path, report)
    assert {path.name for path in written} == {"fid.png", "report.html", "report.json"}
    html = written[1].read_text(encoding="utf-8")
    check(html)
    assert "None" not in html and "nan" not in html


def test_json_is_strict(tmp_path):
    value = {"a": np.float64("nan"), "b": np.arange(2), "c": (tmp_path, np.int64(3)), "ü": True}
    text = write_json(tmp_path / "r.json", value).read_text(encoding="utf-8")
    assert json.loads(text) == {"a": None, "b": [0, 1], "c": [str(tmp_path), 3], "ü": True}


@pytest.mark.parametrize("side", [64, 512])
def test_styles_picture_has_every_picture_once(side):
    grids = make_grids(side=side)
    image = np.asarray(draw_styles(grids.styles))
    shown = cell_side(flat((0, 0, 0), 1, side)[0])
    for color, count in (((200, 0, 0), 3), ((200, 20, 0), 3), ((0, 0, 200), 3), ((0, 20, 200), 3), ((90, 90, 90), 3)):
        assert (image == color).all(2).sum() >= count * shown * shown


def test_mix_picture_has_a_column_for_every_weight():
    image = np.asarray(draw_mix(make_grids().mixes))
    assert (image == (7, 8, 9)).all(2).sum() == 11 * 128 * 128
    assert (image == (90, 90, 90)).all(2).sum() >= 128 * 128


def test_pictures_that_are_not_square_keep_their_shape():
    wide = np.full((1, 32, 64, 3), (200, 20, 0), np.uint8)
    image = np.asarray(draw_styles(StyleGrid(["sea"], {"ink": wide}, {"ink": wide})))
    assert (image == (200, 20, 0)).all(2).sum() == 2 * 128 * 64


@pytest.mark.parametrize("count", [1, 4, 8])
def test_matrices_fit_whatever_the_names(count):
    styles = [f"majicmixRealistic_v{k} 水墨 of a very long name" for k in range(count)]
    image = draw_matrices(make_report(styles))
    edge = np.asarray(image)
    assert isinstance(image, Image.Image)
    for side in (edge[:4], edge[-4:], edge[:, :4], edge[:, -4:]):
        assert (side == 255).all()  # nothing runs out of the picture


def test_ramp_runs_from_dark_to_light():
    assert ramp_color(0, 5) == tuple(int(RAMP[0][i : i + 2], 16) for i in (1, 3, 5))
    light = [np.dot(ramp_color(v, 9), (0.2126, 0.7152, 0.0722)) for v in np.linspace(0, 9, 40)]
    assert np.all(np.diff(light) > 0)
    assert ramp_color(1, 0) == ramp_color(0, 0)


def test_text_is_cut_and_wrapped():
    assert shorten("ink", 20, 400) == "ink"
    cut = shorten("a very long style name", 20, 90)
    assert cut.endswith("…") and text_width(cut, 20) <= 90
    assert wrap("dragon face", 17, 80) == ["dragon", "face"]
    assert len(wrap("one two three four five six", 17, 60)) == 2
    assert font_for("水墨", 20) is not None


@pytest.mark.parametrize(("value", "told"), [(0.2761, "0.276"), (5.06, "5.06"), (10.34, "10.3"), (191.2, "191")])
def test_short_numbers(value, told):
    assert short_number(value) == told


@pytest.mark.parametrize(("seconds", "told"), [(9.6, "10 s"), (1287.3, "21 min 27 s"), (7260, "2 h 1 min")])
def test_duration(seconds, told):
    assert duration(seconds) == told
