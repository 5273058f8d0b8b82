"""Laws of styles, checked on latents in ComfyUI's own process; run by test_laws.py with ComfyUI's Python.

DMM_COMFYUI=… DMM_COMFYUI_PYTHON=… "$DMM_COMFYUI_PYTHON" -m pytest -m hosts tests/hosts/comfyui/inside_styles.py
"""

from __future__ import annotations

import pytest
import torch

from tests.hosts.comfyui.harness import NAMES
from tests.hosts.comfyui.inside_tools import (
    STEPS,
    apart,
    counted,
    encode,
    sample,
    style,
)

pytestmark = pytest.mark.hosts


def test_regions_and_negative_in_one_call(pack, loaded):
    """Two masked regions with two styles, the negative with a third: one call a step, composed as by hand."""
    import node_helpers

    model, clip = loaded[:2]
    left = torch.zeros(1, 8, 8)
    left[..., :4] = 1
    text, empty = encode(clip, "a cat"), encode(clip, "")

    def region(mask, name):
        masked = node_helpers.conditioning_set_values(
            text, {"mask": mask, "mask_strength": 1.0, "set_area_to_bounds": False}
        )
        return pack.host.condition(masked, style(pack, loaded, name))

    positive = region(left, "ink") + region(1 - left, "clay")
    negative = pack.host.condition(empty, style(pack, loaded, "neon"))
    clone, calls = counted(model)
    together = sample(clone, positive, negative)
    assert calls == [3] * STEPS

    def by_hand(args):
        """CFG of three separate predictions, each of a whole picture with a style of the model's own."""
        import comfy.samplers

        parts = []
        for name, cond in (("ink", text), ("clay", text), ("neon", empty)):
            alone = pack.host.apply(model, style(pack, loaded, name))
            options = {
                **args["model_options"],
                "transformer_options": {
                    **args["model_options"]["transformer_options"],
                    "dmm": alone.model_options["transformer_options"]["dmm"],
                },
            }
            index = 1 if cond is empty else 0
            plain = [{k: v for k, v in args["conds"][index][0].items() if k not in ("mask", "mask_strength")}]
            plain[0]["model_conds"] = {k: v for k, v in plain[0]["model_conds"].items() if k != "dmm_style"}
            parts.append(
                comfy.samplers.calc_cond_batch(args["model"], [plain], args["input"], args["sigma"], options)[0]
            )
        return [parts[0] * left + parts[1] * (1 - left), parts[2]]

    hand = model.clone()
    hand.model_options["sampler_calc_cond_batch_function"] = by_hand
    assert apart(together, sample(hand, positive, negative)) < 2e-4


def test_conditioning_without_style_takes_the_models(pack, loaded):
    """Only the positive has a style: still one call a step, and the negative as the model has it."""
    model, clip = loaded[:2]
    text, empty = encode(clip, "a cat"), encode(clip, "")
    clone, calls = counted(pack.host.apply(model, style(pack, loaded, "clay")))
    mixed = sample(clone, pack.host.condition(text, style(pack, loaded, "ink")), empty)
    assert calls == [2] * STEPS
    said = sample(
        model, pack.host.condition(text, style(pack, loaded, "ink")),
        pack.host.condition(empty, style(pack, loaded, "clay")),
    )  # fmt: skip
    assert apart(mixed, said) == 0


def test_batch_rows_keep_their_styles(pack, loaded):
    model, clip = loaded[:2]
    text, empty = encode(clip, "a cat"), encode(clip, "")
    clone, calls = counted(pack.host.apply(model, pack.values.every(loaded[3])))
    rows = sample(clone, text, empty, batch=3)
    assert calls == [6] * STEPS
    for i, name in enumerate(NAMES):
        alone = sample(pack.host.apply(model, style(pack, loaded, name)), text, empty, batch=3)
        # Beside other rows the same row is rounded otherwise, in proportion to its values (15 and more, untrained).
        assert apart(rows[i], alone[i]) < 2e-5 * alone[i].abs().max(), name


def test_styles_reach_the_unet_to_the_bit(pack, loaded):
    """What the time embedding gains in every step: the codebook's vector, and the schedule's in between."""
    from comfy.patcher_extension import WrappersMP

    model, clip = loaded[:2]
    text = encode(clip, "a cat")
    seen = []

    def see(executor, x, *args, **kwargs):
        options = args[-1]
        seen.append(options["patches"]["emb_patch"][0](torch.zeros(len(x), 256), 64, options)[0].clone())
        return executor(x, *args, **kwargs)

    ink, neon = style(pack, loaded, "ink"), style(pack, loaded, "neon")
    for scheduled, steps in ((ink, 4), (pack.values.scheduled([ink, neon], "blend", 0.0, 1.0), 5)):
        clone = pack.host.apply(model, scheduled)
        clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "see", see)
        seen.clear()
        sample(clone, text, text, steps=steps, cfg=1.0)
        assert len(seen) == steps
        for i, vector in enumerate(seen):
            wanted = scheduled.vectors(i / (steps - 1))[0]
            assert apart(vector, wanted) < 1e-4 if scheduled.scheduled else torch.equal(vector, wanted)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "dpm_2", "euler_ancestral"])
def test_live_is_bake(pack, loaded, sampler):
    model, clip = loaded[:2]
    text, empty = encode(clip, "a cat"), encode(clip, "")
    one = style(pack, loaded, "neon", 1.3)
    live = sample(pack.host.apply(model, one), text, empty, sampler=sampler)
    assert apart(live, sample(pack.host.bake(model, one), text, empty, sampler=sampler)) < 2e-4
    assert apart(live, sample(model, text, empty, sampler=sampler)) > 0.05, "the model is as it was"


def test_200_changes_leave_nothing_behind(pack, loaded):
    """Clones by the hundred share the loaded weights, and the first style still gives what it gave."""
    import resource

    model, clip = loaded[:2]
    text, empty = encode(clip, "a cat"), encode(clip, "")
    first = sample(pack.host.apply(model, style(pack, loaded, "ink")), text, empty, steps=1)
    for _ in range(20):
        sample(pack.host.apply(model, style(pack, loaded, "clay")), text, empty, steps=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(200):
        sample(pack.host.apply(model, pack.values.mixed(loaded[3], [1 - i / 200, i / 200], True)), text, empty, steps=1)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after <= 1.02 * before, f"peak RSS went from {before} to {after} KiB"
    again = sample(pack.host.apply(model, style(pack, loaded, "ink")), text, empty, steps=1)
    assert apart(first, again) == 0
