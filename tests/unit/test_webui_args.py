"""The webui extension's parts that need no webui: args, mixes as text, plans, infotext. The rest: tests/hosts/webui."""

from __future__ import annotations

import ast
import math
import subprocess
import sys

import pytest
import torch

from a1111_extension import infotext
from a1111_extension.args import CONTROLS, SLIDERS, Args, parse, parse_mix, split_batch, write_mix
from a1111_extension.styles import open_book, plan
from dmm_core.errors import StyleError
from tests.unit.tiny import NAMES, write_tiny, write_tiny_dmm


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    return open_book(write_tiny_dmm(tmp_path_factory.mktemp("webui") / "tiny.safetensors", vocab=100))


@pytest.mark.parametrize("mix", [{"ink": 0.7, "clay": 0.3}, {"a, b": 1.0, 'q"u=o;te': -0.5, " x": 2.0}, {"水彩": 1e-5}])
def test_mix_text_round_trip(mix):
    assert parse_mix(write_mix(mix)) == mix
    assert split_batch("; ".join(map(write_mix, (mix, mix)))) == (write_mix(mix),) * 2


@pytest.mark.parametrize("text", ["", " , ", "ink=x", "ink,ink"])
def test_bad_mix_text(text):
    with pytest.raises(StyleError):
        parse_mix(text)


def test_number_of_positional_values():
    values = [True, True, "both", None, "", 0.0, 1.0, "blend", "", *[0.0] * SLIDERS, ""]
    assert len(values) == len(CONTROLS) + SLIDERS + 1
    assert parse(values) == Args()
    values[len(CONTROLS)] = 1
    assert parse(values).weights[0] == 1.0
    with pytest.raises(StyleError, match="expected"):
        parse(values[:-1])
    values[len(CONTROLS)] = math.inf
    with pytest.raises(StyleError, match="slider 1 should be a number"):
        parse(values)


def test_plan_is_the_codebooks(book):
    made = plan(book, Args(weights={"ink": 2.0, "néon": 2.0}, to="水彩", negative="ink"))
    assert made.weights.shape == (2, 2, 1, 3)
    wanted = book.codebook.style({"ink": 0.25, "néon": 0.25, "水彩": 0.5})
    assert torch.allclose(made.vectors(0.5)[0, 0], wanted, atol=1e-5)
    assert torch.allclose(made.vectors(0.0)[1, 0], book.codebook.style({"ink": 1.0}), atol=1e-6)


def test_default_style_adds_nothing_in_our_files(book):
    assert plan(book, Args()).vectors() is None
    assert plan(book, Args(weights=dict.fromkeys(NAMES, 1 / 3))).vectors() is None
    both = plan(book, Args(weights="ink", negative="default")).vectors()
    assert both[0].any() and not both[1].any()


def test_a_style_beyond_the_sliders_is_reached_by_name(tmp_path):
    names = tuple(f"s{i}" for i in range(SLIDERS + 2))
    book = open_book(write_tiny_dmm(tmp_path / "many.safetensors", names=names, vocab=100))
    assert plan(book, Args(weights=names[-1])).weights[0, 0, 0].tolist() == [0.0] * (SLIDERS + 1) + [1.0]
    assert infotext.sliders(f"{names[-1]}=1", book) == ((names[-1],), (1.0,))
    first = names[:SLIDERS]  # as a fresh panel and Reset have them: the default style, though some have no slider
    untouched = [round(book.codebook.default[name], 4) for name in first]
    assert plan(book, Args(weights=tuple(untouched), names=first)).idle
    assert not plan(book, Args(weights=(untouched[0] + 0.01, *untouched[1:]), names=first)).idle
    shown, values = infotext.sliders("default", book)
    assert plan(book, Args(weights=values, names=shown)).idle


def test_ordinary_checkpoint_is_told_apart(tmp_path):
    with pytest.raises(ValueError, match=r"ordinary checkpoint without styles\. Choose a DMM file\."):
        open_book(write_tiny(tmp_path / "plain.safetensors", vocab=100))


@pytest.mark.parametrize("schedule", ["", "blend", "blend a b", "blend 0 1 2"])
def test_infotext_edited_by_hand(schedule):
    told = infotext.read({"DMM weights": "ink=1", "DMM schedule": schedule})
    assert (told["mode"], told["start"], told["end"]) == ("blend", 0.0, 1.0)
    assert infotext.read({}) is None


def test_webui_entry_without_a_webui(root):
    """Neither ComfyUI nor pytest imports it; its pure parts load no gradio and none of the training's packages."""
    code = "import sys; from a1111_extension import args, hook, infotext, styles; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in ast.literal_eval(done.stdout)}
    assert not loaded & {"gradio", "modules", "diffusers", "transformers", "yaml", "PIL"}
