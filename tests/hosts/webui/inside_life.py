"""What a webui does around a picture: order of events, other checkpoints, errors, memory; run by test_webui.py."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from copy import copy
from pathlib import Path

import pytest
import torch

from tests.hosts.webui.driver import ROOT, Processing
from tests.hosts.webui.inside_tools import apart, draw, job

pytestmark = pytest.mark.hosts
INK = {"weights": "ink"}


def hooks(unet) -> int:
    return len(unet._forward_pre_hooks) + len(unet.time_embed._forward_hooks)


def watch(host, args, **options) -> list[int]:
    """How many hooks the UNet has at each step of a job."""
    seen = []
    host.callbacks.registered["cfg_denoiser"].append(lambda params: seen.append(hooks(host.unet)))
    try:
        job(host, args, **options)
    finally:
        host.callbacks.registered["cfg_denoiser"].pop()
    return seen


def test_hooks_last_as_long_as_the_picture(host):
    """One pair while sampling, also after Forge's double call; none before, none after, none with the script off."""
    assert hooks(host.unet) == 0
    assert watch(host, INK, enable_hr=True, n_iter=2) == [2] * 12
    assert hooks(host.unet) == 0
    assert watch(host, None) == watch(host, {**INK, "enabled": False}) == [0] * 3
    assert watch(host, None, prompt="a cat<dmm:ink:1>") == [2] * 3
    assert hooks(host.unet) == 0 and host.live.plan is None


def test_loading_needs_the_clone_only_then(host):
    assert (str(ROOT) in sys.path) == (host.profile != "a1111")


def test_other_checkpoint_leaves_no_style_behind(host, files):
    first, unet = draw(host, INK), host.unet
    host.load(files / "other.safetensors")
    assert (host.unet is unet) == (host.profile == "a1111")
    plain, neon = draw(host), draw(host, {"weights": "neon"})
    assert apart(plain, neon) > 0.01
    told = job(host, INK)
    assert told.comments == ["DMM: other.safetensors: there is no style 'ink' here. The styles are: neon, pixel."]
    assert apart(told.latents, plain) == 0
    assert hooks(unet) == 0
    host.load(files / "dmm.safetensors")
    assert apart(first, draw(host, INK)) == 0


def test_refiner_in_mid_sampling(host, files):
    """Another checkpoint from the second step on: its steps have no style of the first."""

    def switch(params):
        if params.denoiser.step == 1:
            host.refine(files / "other.safetensors")

    def refined(args):
        host.load(files / "dmm.safetensors")
        host.callbacks.registered["cfg_denoiser"].insert(0, switch)
        seen = []
        host.callbacks.registered["cfg_denoiser"].append(lambda params: seen.append(hooks(host.unet)))
        try:
            return draw(host, args), seen
        finally:
            del host.callbacks.registered["cfg_denoiser"][0], host.callbacks.registered["cfg_denoiser"][-1]

    styled, seen = refined(INK)
    assert seen == [2, 0, 0]
    assert apart(styled, refined(None)[0]) > 0.001  # the first step had it
    assert apart(styled, draw(host)) > 0.001


@pytest.mark.parametrize(("first", "second"), [("dmm", "plain"), ("plain", "dmm")])
def test_another_checkpoint_in_the_hires_pass(host, files, first, second):
    """Each pass has the style if its own checkpoint does, also where Forge tells of the first one's all the time."""
    more = {"enable_hr": True, "hr_checkpoint": files / f"{second}.safetensors"}

    def seen(args):
        host.load(files / f"{first}.safetensors")
        return watch(host, args, **more)

    assert seen(INK) == ([2] * 3 + [0] * 3 if first == "dmm" else [0] * 3 + [2] * 3)
    host.load(files / f"{first}.safetensors")
    told = job(host, INK, **more)
    assert list(told.comments) == [
        "DMM: Off: plain.safetensors is an ordinary checkpoint without styles. Choose a DMM file."
    ]


def test_another_choice_while_a_picture_is_drawn(host, files):
    """In Forge it is loaded with the next one: the present one keeps its style."""
    if host.profile != "forge":
        pytest.skip("the others load at once, between pictures")
    host.load(files / "dmm.safetensors")
    host.callbacks.registered["cfg_denoiser"].insert(0, lambda params: host.choose(files / "plain.safetensors"))
    try:
        assert watch(host, INK) == [2] * 3
    finally:
        del host.callbacks.registered["cfg_denoiser"][0]
    assert watch(host, INK) == [0] * 3


def test_pictures_of_a_grid_share_what_they_write(host, files):
    """``copy(p)`` in scripts/xyz_grid.py: what one cell says is not the next one's."""
    p = Processing(script_args=host.api(INK))
    for name in ("dmm", "plain", "dmm"):
        host.load(files / f"{name}.safetensors")
        written = host.process(copy(p)).params[0][1]
        expected = "DMM warning" if name == "plain" else "DMM weights"
        assert [key for key in written if key.startswith("DMM")] == [expected]


def test_reload_of_the_page(host):
    """Everything is registered again, and once."""
    before = draw(host, INK)
    host.callbacks.call("script_unloaded")
    host.start()
    assert len(host.callbacks.registered["cfg_denoiser"]) == 1
    assert apart(before, draw(host, INK)) == 0
    labels = [option.label for option in host.grid.axis_options]
    assert len(labels) == len(set(labels))


def test_an_interrupted_picture_is_cleaned_up_by_the_next(host):
    def fail(params):
        raise RuntimeError("interrupted")

    host.callbacks.registered["cfg_denoiser"].append(fail)
    with pytest.raises(RuntimeError):
        job(host, INK)
    host.callbacks.registered["cfg_denoiser"].pop()
    assert hooks(host.unet) == 2
    assert watch(host, None) == [0] * 3


def test_plain_and_deleted_files(host, files, tmp_path):
    host.load(files / "plain.safetensors")
    told = job(host, INK)
    assert told.comments == ["DMM: Off: plain.safetensors is an ordinary checkpoint without styles. Choose a DMM file."]
    assert apart(told.latents, draw(host)) == 0
    assert job(host).comments == []
    copy = Path(shutil.copy(files / "dmm.safetensors", tmp_path / "gone.safetensors"))
    host.load(copy)
    copy.unlink()
    told = job(host, INK)
    assert told.comments == ["DMM: Off: gone.safetensors is gone from the disk."]
    assert "DMM weights" not in told.params[0][1]


def rewrite(host, files, folder) -> Path:
    """A file that is loaded as dmm.safetensors and has become other.safetensors since."""
    copy = Path(shutil.copy(files / "dmm.safetensors", folder / "file.safetensors"))
    host.load(copy)
    assert "ink" in host.session.checkpoint.current().names
    shutil.copy(files / "other.safetensors", copy)
    os.utime(copy, (1, 1))
    return copy


def test_a_rewritten_file_is_not_drawn_with(host, files, tmp_path):
    """The UNet in memory and the styles on the disk are of different files: off, until it is loaded again.

    Forge loads it again with the next picture.
    """
    host.load(files / "other.safetensors")
    neon, plain = draw(host, {"weights": "neon"}), draw(host)
    copy = rewrite(host, files, tmp_path)
    if host.profile == "forge":
        assert host.session.checkpoint.current().names == ("neon", "pixel")
    else:
        off = draw(host)
        told = job(host, {"weights": "neon"})
        sentence = "Off: file.safetensors was rewritten after it was loaded; load it again (choose another checkpoint,"
        assert len(told.comments) == 1 and sentence in told.comments[0] and sentence in host.ui.fill("")[0]["value"]
        assert apart(told.latents, off) == 0 and "DMM weights" not in told.params[0][1]
        assert apart(off, plain) > 0.001
        host.load(files / "dmm.safetensors")
        host.load(copy)
    told = job(host, {"weights": "neon"})
    assert told.comments == [] and apart(told.latents, neon) == 0


def test_forge_without_a_load_says_that_the_file_was_rewritten(host, files, tmp_path, monkeypatch):
    """Its button for hires draws with the model that is there."""
    if host.profile != "forge":
        pytest.skip("the others say it in any case")
    rewrite(host, files, tmp_path)
    monkeypatch.setattr(host.sd_models, "forge_model_reload", lambda: None)
    assert "was rewritten after it was loaded" in job(host, INK).comments[0]
    assert host.sd_models.model_data.forge_hash == ""  # the next picture loads it


def test_a_rewritten_file_where_no_load_was_told(host, files, tmp_path):
    """The extension came after the model: it is read again."""
    rewrite(host, files, tmp_path)
    delattr(host.shared.sd_model, host.session.checkpoint.LOADED)
    assert host.session.checkpoint.current(drawing=True).names == ("neon", "pixel")


def test_grid_axes(host):
    wanted = {name: draw(host, {"weights": name}) for name in ("ink", "clay")}
    option = next(option for option in host.grid.axis_options if option.label == "[DMM] style")
    assert option.choices()[:2] == ["ink", "clay"]
    made = host.grid.run(Processing(), "[DMM] style", ["ink", "clay"], host.process)
    assert [apart(one.latents, wanted[name]) for one, name in zip(made, wanted, strict=True)] == [0, 0]
    assert made[1].params[0][1]["DMM weights"] == "clay"
    mix = host.grid.run(Processing(), "[DMM] mix", ["ink=0.5, clay=0.5"], host.process)[0]
    assert apart(mix.latents, draw(host, {"weights": "ink=0.5, clay=0.5"})) == 0
    p = Processing(script_args=host.api({"weights": {"clay": 1.0, "ink": 0.0}}))
    made = host.grid.run(p, "[DMM] slider 1", ["0", "0.5"], host.process)
    assert apart(made[0].latents, wanted["clay"]) == 0
    assert apart(made[1].latents, draw(host, {"weights": {"ink": 0.5, "clay": 1.0}})) == 0
    slider = next(option for option in host.grid.axis_options if option.label == "[DMM] slider 1")
    assert slider.format_value(p, slider, 0.5) == "ink: 0.5"
    with pytest.raises(RuntimeError, match="there is no style 'oil' here"):
        host.grid.run(Processing(), "[DMM] style", ["oil"], host.process)
    beyond = host.grid.run(Processing(), "[DMM] slider 9", ["1"], host.process)[0]
    assert beyond.comments == ["DMM: dmm.safetensors: there is no style number 9. It has 3."]


BAD = [
    ({"weights": {"ink": 0.0}}, "dmm.safetensors: the style weights sum to 0. Raise at least one, or turn"),
    ({"weights": {"ink": 1.0, "clay": -1.0}}, "sum to 0"),
    ({"weights": {"oil": 1.0}}, "there is no style 'oil' here. The styles are: ink, clay, 水彩, wet."),
    ({"weights": {"ink": float("nan")}}, "the weight of ink should be a number, got nan"),
    ({"weights": {"ink": "much"}}, "the weight of ink should be a number, got 'much'"),
    ({"weights": 3}, "weights should be text or weights by name, got 3"),
    ({"weights": "ink=x"}, "'x' in 'ink=x' is no number"),
    ({"wieghts": {"ink": 1}}, "there is no argument 'wieghts'. The arguments are: enabled, weights, "),
    ({"apply_to": "second"}, "there is no pass 'second'. apply_to is one of: both, base, hires."),
    ({"normalise": "yes"}, "normalise should be true or false, got 'yes'"),
    ({"start": 2}, "start is 2; it is a share of the steps, from 0 to 1"),
    ({"to": "clay", "start": 0.8, "end": 0.2}, "the schedule ends at 0.2, before it starts at 0.8"),
    ({"to": "clay", "mode": "jump"}, "there is no mode 'jump'. The modes are: blend, switch."),
    ({"negative": "oil"}, "there is no style 'oil' here"),
    ({"batch": 7}, "batch should be a list of styles, got 7"),
    ({"batch": [7]}, "a style should be text or weights by name, got 7"),
]  # fmt: skip


def test_bad_input_is_one_sentence(host):
    """Said under the picture and in its infotext; the picture is drawn as with the script off."""
    plain = draw(host, steps=1)
    for args, sentence in BAD:
        told = job(host, args, steps=1)
        assert len(told.comments) == 1 and sentence in told.comments[0], (args, told.comments)
        assert "\n" not in told.comments[0]
        assert told.params[0][1]["DMM warning"] in told.comments[0]
        assert "DMM weights" not in told.params[0][1], args
        assert apart(told.latents, plain) == 0
    told = host.process(Processing(steps=1, script_args=[True, 3]))
    assert "expected 26 values, got 2" in told.comments[0]


def test_200_pictures_with_changing_sliders(host):
    """Resident memory after 20 against after 220, and the first style still gives what it gave."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("memory is read from /proc, which this system has not")

    def resident() -> int:
        gc.collect()
        return int(statm.read_text(encoding="ascii").split()[1])

    first = draw(host, INK, steps=1, cfg_scale=1.0)
    for i in range(20):
        draw(host, sliders=[i / 20, 1 - i / 20, 0.1], steps=1, cfg_scale=1.0)
    before = resident()
    for i in range(200):
        draw(host, sliders=[i / 200, 1 - i / 200, 0.1], steps=1, cfg_scale=1.0)
    growth = resident() / before - 1
    print(f"growth {growth:.2%} of {before * os.sysconf('SC_PAGE_SIZE') / 2**20:.0f} MiB")
    assert growth <= 0.02
    assert torch.equal(first, draw(host, INK, steps=1, cfg_scale=1.0))
    assert hooks(host.unet) == 0
