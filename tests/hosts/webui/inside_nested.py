"""Pictures within pictures, other checkpoints in mid-batch, jobs that end in an exception; run by test_webui.py."""

from __future__ import annotations

import pytest

from tests.hosts.webui.driver import Processing
from tests.hosts.webui.inside_tools import apart, draw, job, vectors_of

pytestmark = pytest.mark.hosts
ROWS = {"batch": ["ink", "clay"]}
BOTH = [{"batch_size": 2}, {"n_iter": 2}]


def crash(host, args, after: int = 0, **options) -> None:
    """A job that ends in an exception after so many steps."""
    left = [None] * after

    def fail(params):
        if not left:
            raise RuntimeError("CUDA out of memory")
        left.pop()

    host.callbacks.registered["cfg_denoiser"].append(fail)
    with pytest.raises(RuntimeError):
        job(host, args, **options)
    host.callbacks.registered["cfg_denoiser"].pop()


@pytest.mark.parametrize("begun", [True, False])
def test_a_crashed_job_leaves_no_style_to_others(host, begun):
    """Memory runs out, and ``postprocess`` is never called; the next picture is one without scripts."""
    plain = draw(host)
    crash(host, {"weights": "ink"})
    if begun:
        host.shared.state.begin("another")
    try:
        assert apart(host.bare(Processing()), plain) == 0
    finally:
        host.shared.state.end()


def test_a_crash_within_a_job_that_goes_on(host):
    """As in scripts that draw one picture after another: the next one is whole, and nothing stays behind."""
    rows = draw(host, ROWS, batch_size=2)
    host.shared.state.begin("many")
    try:
        crash(host, ROWS, after=4, n_iter=2)
        assert apart(draw(host, ROWS, batch_size=2), rows) == 0
    finally:
        host.shared.state.end()
    assert apart(host.bare(Processing()), draw(host)) == 0


@pytest.mark.parametrize("more", BOTH)
def test_a_picture_within_has_the_style_of_its_image(host, more):
    """ADetailer draws without our script while the job's is still at work."""
    seen = []
    told = job(host, ROWS, postprocess_image=lambda p: seen.append(host.bare(Processing("a face"))), **more)
    assert apart(told.latents, draw(host, ROWS, **more)) == 0
    assert len(seen) == 2
    for latents, style in zip(seen, ROWS["batch"], strict=True):
        wanted = []
        job(host, {"weights": style}, postprocess_image=lambda p: wanted.append(host.bare(Processing("a face"))))  # noqa: B023
        assert apart(latents, wanted[0]) < 2e-4, style


@pytest.mark.parametrize("more", BOTH)
def test_a_picture_within_that_has_our_script(host, more):
    """Its end is not the end of the job around it, and its image is the one that it is drawn for."""
    seen = []

    def inner(p):
        seen.append(host.process(Processing("a face", script_args=p.script_args)).latents)

    told = job(host, ROWS, postprocess_image=inner, **more)
    assert apart(told.latents, draw(host, ROWS, **more)) == 0
    for latents, style in zip(seen, ROWS["batch"], strict=True):
        assert apart(latents, draw(host, {"weights": style}, prompt="a face")) < 2e-4, style


def test_refiner_does_not_forget_which_image_it_is(host, files, monkeypatch):
    """A1111 tells nobody when it takes a checkpoint that is still in memory; the hires pass has the first one again."""

    def take(name):
        with monkeypatch.context() as patch:
            patch.setitem(host.callbacks.registered, "model_loaded", [])
            host.load(files / f"{name}.safetensors")

    def switch(params):
        if params.denoiser.step == 1 and params.sigma > 3:
            take("other")

    hires = host.hires
    monkeypatch.setattr(host, "hires", lambda *given: (take("dmm"), hires(*given))[1])
    host.callbacks.registered["cfg_denoiser"].insert(0, switch)
    try:
        seen = vectors_of(host, ROWS, n_iter=2, enable_hr=True, cfg_scale=1.0, steps=4)
    finally:
        host.callbacks.registered["cfg_denoiser"].remove(switch)
    ink, clay = (host.session.checkpoint.current().codebook.style({name: 1.0}) for name in ROWS["batch"])
    assert len(seen) == 2 * (1 + 4)
    for i, vector in enumerate(seen):
        assert apart(vector, ink if i < 5 else clay) < 1e-4, i
