"""Styles beside what changes attention (IP-Adapter's kind) and beside a Control-LoRA, through /prompt."""

from __future__ import annotations

import pytest

from tests.hosts.comfyui.graphs import node, style
from tests.hosts.comfyui.other_files import CONTROL_LORA
from tests.hosts.comfyui.test_nodes import apart
from tests.hosts.comfyui.test_with_others import apply, control, show

pytestmark = pytest.mark.hosts
INK, CLAY = style("ink"), style("clay")


def adapter(of: str, how: str, weight: float = 1.0) -> dict:
    return node("AttentionAdapter", model=[of, 0], weight=weight, how=how)


@pytest.mark.parametrize("kind", ["replace", "patch"])
def test_attention_patch_and_style(server, kind):
    """It acts as on baked weights, before the style or after it, and neither takes anything from the other."""
    after = show(server, "adapter", style=INK, apply=apply("load"), adapter=adapter("apply", kind))
    before = show(server, "apply", style=INK, adapter=adapter("load", kind), apply=apply("adapter"))
    baked = show(server, "adapter", style=INK, bake=apply("load", "BakeStyle"), adapter=adapter("bake", kind))
    assert apart(after, before) == 0
    assert apart(after, baked) <= 1
    alone = show(server, "apply", style=INK, apply=apply("load"))
    assert apart(after, alone) > 20, "the patch does something"
    assert apart(after, show(server, "adapter", adapter=adapter("load", kind))) > 20, "and so does the style"
    assert apart(after, show(server, "adapter", style=CLAY, apply=apply("load"), adapter=adapter("apply", kind))) > 20
    none = show(server, "adapter", style=INK, apply=apply("load"), adapter=adapter("apply", kind, 0.0))
    assert apart(none, alone) <= 1, "the patch at weight 0"


@pytest.mark.parametrize("kind", ["replace", "patch"])
def test_attention_patch_and_every_style_in_a_batch(server, kind):
    parts = {"apply": apply("load"), "adapter": adapter("apply", kind)}
    rows = show(server, "adapter", ["style", 1], style=node("StyleBatch", codebook=["load", 3]), **parts)
    for i, name in enumerate(("ink", "clay", "neon")):
        assert apart(rows[i], show(server, "adapter", 3, style=style(name), **parts)[i]) <= 1, name


def test_attention_patch_and_conditioning_style(server):
    """Each half of the guidance keeps its own style, and the patch still knows which half is which."""
    parts = {"style": INK, "adapter": adapter("load", "replace"),
             "one": node("ConditioningStyle", conditioning=["prompt", 0], style=["style", 0]),
             "two": node("ConditioningStyle", conditioning=["empty", 0], style=["style", 0])}  # fmt: skip
    both = show(server, "adapter", positive=["one", 0], negative=["two", 0], **parts)
    model = show(server, "adapter", style=INK, apply=apply("load"), adapter=adapter("apply", "replace"))
    assert apart(both, model) <= 1
    assert apart(both, show(server, "adapter", positive=["one", 0], **parts)) > 5


def test_control_lora_sees_a_baked_style_alone(server):
    """A Control-LoRA is made of the model's weights when sampling starts, so a baked style is in it, a live one not."""
    parts = {**control(), "net": node("ControlNetLoader", control_net_name=CONTROL_LORA)}
    live = show(server, "apply", style=INK, apply=apply("load"), **parts)
    assert apart(live, show(server, "apply", style=INK, apply=apply("load"))) > 20, "it does something"
    assert apart(live, show(server, "apply", style=CLAY, apply=apply("load"), **parts)) > 20, "and so does the style"
    assert apart(live, show(server, "apply", style=INK, apply=apply("load"), **{**parts, **control(0.0)})) > 20
    baked = show(server, "bake", style=INK, bake=apply("load", "BakeStyle"), **parts)
    assert apart(live, baked) > 1
    plain = {**parts, "net": control()["net"]}  # a ControlNet has weights of its own
    whole = show(server, "apply", style=INK, apply=apply("load"), **plain)
    assert apart(whole, show(server, "bake", style=INK, bake=apply("load", "BakeStyle"), **plain)) <= 1
