"""Laws of styles in the double of each webui, on latents; run by test_webui.py with the webuis' own gradio.

DMM_WEBUI_FILES=folder DMM_WEBUI_PROFILES=a1111,reforge .venv-webui-3.41/bin/python -m pytest -m hosts <this file>
"""

from __future__ import annotations

import pytest
import torch

from tests.hosts.webui.driver import Processing
from tests.hosts.webui.inside_tools import apart, baked, draw, reference, vectors_of

pytestmark = pytest.mark.hosts
MIX = {"ink": 0.7, "clay": 0.3}
TOLERANCE = 2e-4


def test_slider_tag_bias_and_generate_agree(host):
    """Hook, tag, bias and ``dmm generate``'s UNet of diffusers: the same vector to the bit, then the same noise."""
    told = reference()
    book = host.session.checkpoint.current()
    x, context = torch.tensor(told["x"]), torch.tensor(told["context"])
    for case in told["cases"]:
        mix = case["mix"]
        plan = host.styles.plan(book, host.args.Args(weights=mix))
        assert torch.equal(plan.vectors()[0, 0], torch.tensor(case["style"])), case["name"]
        host.live.show(host.shared.sd_model, plan)
        with torch.no_grad():
            eps = host.unet(x, torch.full((2,), told["t"]), context=context)
        host.live.end()
        assert apart(eps, torch.tensor(case["eps"])) < TOLERANCE, case["name"]
    names = book.names
    sliders = draw(host, sliders=[0.7, 0.3, 0.0])
    assert apart(sliders, draw(host, {"weights": MIX})) == 0
    assert apart(sliders, draw(host, {"weights": "ink=0.7, clay=0.3"})) == 0
    assert apart(sliders, draw(host, prompt=f"a cat<dmm:{names[0]}:0.7><dmm:clay:0.3>")) == 0
    assert apart(sliders, baked(host, MIX)) < TOLERANCE
    assert apart(sliders, draw(host)) > 0.05


def test_default_style_is_off_to_the_bit(host):
    off = draw(host)
    third = dict.fromkeys(host.session.checkpoint.current().names, 1 / 3)
    assert apart(off, draw(host, {})) == 0
    assert vectors_of(host, {}) == [] != vectors_of(host, {"to": "ink"})
    assert apart(off, draw(host, {"weights": third})) == 0
    assert apart(off, draw(host, {"weights": {n: 1 for n in third}})) == 0


def test_published_layout(host, files):
    """The authors' single file: the style is added to what the file shows, by the same names in order."""
    host.load(files / "authors.safetensors")
    names = host.session.checkpoint.current().names
    assert names == ("style 1", "style 2", "style 3")
    assert apart(draw(host, {"weights": "style 2"}), baked(host, {"style 2": 1.0})) < TOLERANCE


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("cfg", [4.0, 1.0])
def test_batch_rows_keep_their_styles(host, split, cfg):
    """A style an image, in one call and in several, with and without the unconds, over two batches."""
    options = {"batch_size": 2, "n_iter": 2, "split": split, "cfg_scale": cfg}
    rows = draw(host, {"batch": ["ink", "clay", "ink=0.5, clay=0.5"]}, **options)
    for i, style in enumerate(["ink", "clay", "ink=0.5, clay=0.5", "ink"]):
        alone = draw(host, {"weights": style}, **options)
        assert apart(rows[i], alone[i]) < TOLERANCE, (i, style)
    assert apart(rows[1], draw(host, {"weights": "ink"}, **options)[1]) > 0.01


@pytest.mark.parametrize("split", [False, True])
def test_negative_half(host, split):
    """The halves' own vectors, row by row; the same style in both is one style."""
    same = draw(host, {"weights": "ink", "negative": "ink"}, split=split)
    assert apart(same, draw(host, {"weights": "ink"}, split=split)) < TOLERANCE
    seen = vectors_of(host, {"weights": "ink", "negative": "clay"}, batch_size=2, split=split)
    ink, clay = (host.session.checkpoint.current().codebook.style({name: 1.0}) for name in ("ink", "clay"))
    halves = [ink, ink, clay, clay] if host.profile != "forge" else [clay, clay, ink, ink]
    assert len(seen) == 3 * 4
    for i, vector in enumerate(seen):
        assert apart(vector, halves[i % 4]) < 1e-5
    assert apart(same, draw(host, {"weights": "ink", "negative": "clay"}, split=split)) > 0.01


@pytest.mark.parametrize("split", [False, True])
def test_and_prompts(host, split):
    """Parts of an image share its style; images may have several."""
    prompt = "a cat AND a dog :0.4"
    options = {"prompt": prompt, "split": split, "batch_size": 2}
    assert apart(draw(host, {"weights": MIX}, **options), baked(host, MIX, **options)) < TOLERANCE
    rows = draw(host, {"batch": ["ink", "clay"], "negative": "default"}, **options)
    for i, style in enumerate(["ink", "clay"]):
        alone = draw(host, {"weights": style, "negative": "default"}, **options)
        assert apart(rows[i], alone[i]) < TOLERANCE


def test_and_prompts_of_unequal_length(host):
    """A1111 alone lines up images with different numbers of parts."""
    if host.profile != "a1111":
        pytest.skip("the forks' chunks are whole batches")
    options = {"prompt": ["a cat", "a dog AND a hat :0.5"], "batch_size": 2}
    rows = draw(host, {"batch": ["ink", "clay"]}, **options)
    assert apart(rows[0], draw(host, {"weights": "ink"}, **options)[0]) < TOLERANCE
    assert apart(rows[1], draw(host, {"weights": "clay"}, **options)[1]) < TOLERANCE


def test_schedule(host):
    """Mixed in codebook space: the first style at the first step, the last at the last, half-way between."""
    codebook = host.session.checkpoint.current().codebook
    seen = vectors_of(host, {"weights": "ink", "to": "clay"}, steps=5, cfg_scale=1.0)
    assert len(seen) == 5
    for i, vector in enumerate(seen):
        wanted = codebook.style({"ink": 1 - i / 4, "clay": i / 4})
        assert apart(vector, wanted) < 1e-4
    seen = vectors_of(host, {"weights": "ink", "to": "clay", "mode": "switch", "start": 0.5}, steps=5, cfg_scale=1.0)
    wanted = [codebook.style({name: 1.0}) for name in ("ink", "ink", "ink", "clay", "clay")]
    assert all(apart(a, b) < 1e-4 for a, b in zip(seen, wanted, strict=True))


def test_hires_passes(host):
    """Both passes, one of them, and tags of the hires prompt."""
    options = {"enable_hr": True}
    off, both = draw(host, **options), draw(host, {"weights": "ink"}, **options)
    assert apart(both, baked(host, {"ink": 1.0}, **options)) < TOLERANCE
    base = draw(host, {"weights": "ink", "apply_to": "base"}, **options)
    hires = draw(host, {"weights": "ink", "apply_to": "hires"}, **options)
    for a, b in [(off, both), (off, base), (off, hires), (both, base), (both, hires), (base, hires)]:
        assert apart(a, b) > 0.01
    seen = vectors_of(host, {"weights": "ink", "apply_to": "hires"}, cfg_scale=1.0, **options)
    assert len(seen) == 3  # of six steps
    rows = vectors_of(host, {"batch": ["ink", "clay"], "apply_to": "hires"}, cfg_scale=1.0, n_iter=2, **options)
    assert apart(rows[0], rows[3]) > 0.1  # the second batch's image has the second style
    tags = {"prompt": "a cat<dmm:ink:1>", "hr_prompt": "a cat<dmm:clay:1>", "cfg_scale": 1.0, **options}
    seen = vectors_of(host, None, **tags)
    assert len(seen) == 6
    assert apart(seen[0], seen[5]) > 0.1
    assert max(apart(seen[0], seen[2]), apart(seen[3], seen[5])) < 1e-5


def test_a_closed_panel_does_not_rule_tags(host):
    values = host.values()
    values[host.args.CONTROLS.index("apply_to")] = "hires"
    told = host.process(Processing("a cat<dmm:ink:1>", script_args=values))
    assert apart(told.latents, draw(host, {"weights": "ink"})) == 0
    values[0] = True
    told = host.process(Processing("a cat<dmm:ink:1>", script_args=values))
    assert apart(told.latents, draw(host)) == 0


def test_infotext_of_warning_and_tag(host):
    told = host.process(Processing("a cat<dmm:ink:0.5><dmm:pastel:1>"))
    assert told.comments == ["DMM: <dmm:pastel>: there is no such style. The styles are: ink, clay, 水彩, wet."]
    assert "pastel" in told.params[0][1]["DMM warning"]
    assert apart(told.latents, draw(host, {"weights": "ink"})) == 0
    for wrong in ("<dmm:ink:much>", "<dmm:ink:1:2>", "<dmm:ink:nan>"):
        told = host.process(Processing(f"a cat{wrong}"))
        assert "expected <dmm:name:weight>" in told.comments[0]
        assert apart(told.latents, draw(host)) == 0
