"""Layers that learn on their teacher's own input: what their gradients are, and what they are not."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmm_core.blockwise import LAYERS, LayerCalls, layers
from dmm_core.checkpoint import open_checkpoint
from dmm_core.errors import RecipeError
from dmm_core.extension import style_teachers
from dmm_core.speed import quicken
from dmm_core.teachers import Teachers
from tests.unit import tiny
from tests.unit.merges import after, built, furthest, recipe, tiny_teachers

ALONE = {"score": 1e-30, "blockwise": 1.0}  # nothing but the layers learns


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def paths(tmp_path_factory, request):
    return tiny_teachers(tmp_path_factory.mktemp(request.param), 2, request.param)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return tiny_teachers(tmp_path_factory.mktemp("two"), 2)


def watched(run) -> list[tuple]:
    """What a distillation's layers are given to learn, a pass."""
    seen, imitate = [], run.passes.imitate
    run.passes.imitate = lambda share, *given: seen.append(given) or imitate(share, *given)
    return seen


def gradients(distillation) -> dict[str, torch.Tensor]:
    distillation.accumulate()
    return {name: p.grad.clone() for name, p in distillation.student.named_parameters() if p.grad is not None}


def test_layers_are_all_but_the_first_and_last_convolutions(two):
    """And what is collected of them can be put together again: what goes in comes from layers before."""
    unet = Teachers([open_checkpoint(path) for path in two]).unet(0)
    inside = {id(p) for layer in layers(unet) for p in layer.parameters()}
    outside = {name.split(".")[0] for name, p in unet.named_parameters() if id(p) not in inside}
    assert outside == {"conv_in", "time_embedding", "conv_norm_out", "conv_out"}
    assert {type(layer).__name__ for layer in layers(unet)} == set(LAYERS)
    with LayerCalls(unet) as calls, torch.no_grad():
        said = unet(torch.randn(1, 4, 8, 8), torch.tensor([1]), torch.zeros(1, 77, 64)).sample
    maps = calls.take()
    assert len(maps) == 2 * len(layers(unet)) and not calls.maps
    by_layer = dict(zip(layers(unet), zip(maps[::2], maps[1::2], strict=True), strict=True))
    last = by_layer[unet.up_blocks[-1].attentions[-1]][1]
    assert torch.equal(unet.conv_out(unet.conv_act(unet.conv_norm_out(last))), said)
    attention, resnet = unet.down_blocks[0].attentions[0], unet.down_blocks[0].resnets[0]
    assert torch.equal(by_layer[attention][0], by_layer[resnet][1])
    with torch.no_grad():
        unet(torch.randn(1, 4, 8, 8), torch.tensor([1]), torch.zeros(1, 77, 64))
    assert not calls.maps  # once left, nothing is collected


def test_compiled_layers_show_the_same(two):
    """Also where they were compiled unwatched; and once left, nothing is collected."""
    plain, fast = (Teachers([open_checkpoint(two[0])]).unet(0) for _ in range(2))
    quicken(fast, False, True, backend="eager")
    asked = torch.randn(2, 4, 8, 8), torch.tensor([1]), torch.ones(2, 77, 64)
    told = []
    with torch.no_grad():
        for unet in (fast, plain, fast):
            unet(*asked)
            with LayerCalls(unet) as calls:
                unet(*asked)
            told.append(calls.take())
            unet(*asked)
            assert not calls.maps
    assert all(torch.allclose(a, b, atol=1e-6) for one in told[1:] for a, b in zip(told[0], one, strict=True))


def test_gradients_are_those_of_the_formula(tmp_path, paths):
    """All layers in one graph, written out by hand, against one layer after the other."""
    run = built(tmp_path / "o.safetensors", paths, **ALONE)
    seen = watched(run)
    told = gradients(run)
    ((x, t, context, styles, weights, maps),) = seen
    assert len(x) == len(t) == len(weights) == 4 and len(maps) == 2 * len(layers(run.student.unet))
    assert torch.equal(weights, run.weights[t])
    tokens, unet, emb = context.tokens, run.student.unet, []
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(len(t), -1)
    added = None if context.pooled is None else {"text_embeds": context.pooled, "time_ids": sizes}
    resnet = unet.down_blocks[0].resnets[0]
    handle = resnet.register_forward_pre_hook(lambda module, inputs: emb.append(inputs[1]))
    unet(x, t, tokens, class_labels=run.student.codebook(styles), added_cond_kwargs=added)
    handle.remove()
    total = 0.0
    for layer, given_map, wanted in zip(layers(unet), maps[::2], maps[1::2], strict=True):
        kind = type(layer).__name__
        said = layer(given_map, emb[0]) if kind == "ResnetBlock2D" else (
            layer(given_map, encoder_hidden_states=tokens)[0] if kind == "Transformer2DModel" else layer(given_map)
        )  # fmt: skip
        total = total + ((said - wanted) ** 2).mean((1, 2, 3)) / (wanted**2).mean((1, 2, 3)) / len(layers(unet))
    run.optimizer.zero_grad()
    (total * weights).mean().backward()
    expected = {name: p.grad for name, p in run.student.named_parameters() if p.grad is not None}
    missing = {name.split(".")[1] for name in told.keys() - expected.keys()}
    assert missing <= {"conv_in", "conv_norm_out", "conv_out"}  # the score loss is all but off
    assert any("codebook" in name for name in expected) and any("time_embedding" in name for name in expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(told[name], gradient, rtol=1e-3, atol=1e-6 * gradient.abs().max().item() + 1e-9)


def test_a_layer_learns_nothing_of_the_others(tmp_path, two):
    """Another layer of the student may be anything: a layer's gradient is the same."""
    told = []
    for spoil in (False, True):
        run = built(tmp_path / "o.safetensors", two, **ALONE)
        if spoil:
            with torch.no_grad():
                run.student.unet.down_blocks[0].resnets[0].conv1.weight.mul_(3)
        told.append(gradients(run))
    spoilt, kept = "unet.down_blocks.0.resnets.0.", "unet.up_blocks.1.resnets.0.conv1.weight"
    assert torch.allclose(told[0][kept], told[1][kept], rtol=1e-4, atol=1e-9) and told[0][kept].abs().max() > 1e-6
    assert not torch.allclose(told[0][spoilt + "conv2.weight"], told[1][spoilt + "conv2.weight"], rtol=0.1)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path, two):
    """Rounding is not blown up, also where a layer's error is nothing but rounding."""
    told = gradients(built(tmp_path / "o.safetensors", [two[0], two[0]], blockwise=1.0))
    assert max(gradient.abs().max().item() for gradient in told.values()) < 1e-6


def test_old_styles_are_imitated_too(tmp_path):
    """A DMM file's style is a teacher like any other: the file itself has no error."""
    file = open_checkpoint(tiny.write_tiny_dmm(tmp_path / "dmm.safetensors"))
    teachers = Teachers(style_teachers(file))
    teachers.embed(["a", ""])
    x, t, prompts = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.tensor([0])
    maps = [teachers.predict(i, x, t, prompts, layers=True)[2] for i in (0, 1)]
    assert not torch.equal(maps[0][-1], maps[1][-1]) and len(maps[0]) == 2 * len(layers(teachers.unet(0)))


def test_it_teaches_faster(tmp_path, two):
    """The same steps on the same rows: the student knows more, also long after the layers' part."""
    like, cousin = load_file(two[0]), tmp_path / "cousin.safetensors"  # teachers that are fine-tunes of one base
    generator = torch.Generator().manual_seed(0)
    changed = {
        key: value + 0.3 * value.std() * torch.randn(value.shape, generator=generator)
        if key.startswith("model.") and value.ndim > 1 else value
        for key, value in like.items()
    }  # fmt: skip
    save_file({key: value.to(like[key].dtype) for key, value in changed.items()}, cousin)
    score = []
    for more in ({}, {"blockwise": 10.0}):
        run = built(tmp_path / "o.safetensors", [two[0], cousin], steps=60, batch=4, lr=2e-3, **more)
        results = [result.score for result in run.run()]
        score.append(sum(sum(scores.values()) for scores in results[-10:]))
    assert score[1] < 0.85 * score[0]


def test_rows_between_styles_are_left_out(tmp_path, two):
    """No teacher has layers that are on the way."""
    run = built(tmp_path / "o.safetensors", two, batch=4, mixed=0.5, blockwise=1.0)
    seen = watched(run)
    run.accumulate()
    ((x, _, context, styles, _, maps),) = seen
    assert [len(part) for part in (x, context.tokens, styles, *maps)] == [4] * (3 + len(maps))
    assert styles.tolist() == [[1.0, 0.0]] * 4 or styles.tolist() == [[0.0, 1.0]] * 4
    run = built(tmp_path / "o.safetensors", two, batch=4, mixed=0.125, blockwise=1.0)
    seen = watched(run)
    run.accumulate()
    ((x, _, _, styles, _, maps),) = seen
    assert len(x) == len(maps[0]) == 7 and styles.max(1).values.tolist() == [1.0] * 7


def test_in_the_first_part_of_a_stage_alone(tmp_path, two):
    run = built(tmp_path / "o.safetensors", two, steps=10, blockwise=1.0)
    seen = watched(run)
    asked = []
    predict = run.teachers.predict
    run.teachers.predict = lambda *given: asked.append(given[-1]) or predict(*given)
    for step in range(10):
        run.step()
        assert len(seen) == min(step + 1, 3)
    assert asked == [True] * 6 + [False] * 14


@pytest.mark.parametrize("more", [{}, {"student": "lora", "rank": 2}, {"adversarial": 0.1}, {"feature": 0.1},
                                  {"mixed": 0.25, "batch": 4}])  # fmt: skip
def test_how_the_rows_are_cut_changes_nothing_but_rounding(tmp_path, two, more):
    whole, parts = (built(tmp_path / "o.safetensors", two, blockwise=0.5, micro=micro, **more) for micro in (2, 1))
    parts.economy.rows = 1
    told = [gradients(run) for run in (whole, parts)]
    assert furthest(*told) < 1e-4 * max(gradient.abs().max().item() for gradient in told[0].values())


@pytest.mark.parametrize("more", [{}, {"student": "lora", "rank": 2}])
def test_narrow_weights(tmp_path, paths, more):
    """bfloat16 weights, which a plan takes on small cards: nothing casts their inputs for them there."""
    run = built(tmp_path / "o.safetensors", paths, weights="bf16", precision="bf16", blockwise=4.0, **more)
    seen, before = watched(run), {key: value.clone() for key, value in run.student.learned().items()}
    learned = after(run, 2)
    assert len(seen) == 2 and furthest(learned, before) > 0
    assert all(torch.isfinite(value).all() for value in learned.values())


def test_channels_last_on_a_cpu(tmp_path, two):
    """What goes into a layer needs no gradient there, of which torch's own GroupNorm made a crash."""
    told = [gradients(built(tmp_path / "o.safetensors", two, blockwise=1.0, batch=4, channels_last=last))
            for last in (False, True)]  # fmt: skip
    assert furthest(*told) < 1e-4 * max(gradient.abs().max().item() for gradient in told[0].values())


def test_teachers_of_another_prediction_type_are_left_out(tmp_path, two):
    """Their layers lead up to v; a student of ε cannot say it."""
    v = tmp_path / "v.safetensors"
    save_file(load_file(two[1]) | {"v_pred": torch.zeros(0)}, v)
    run = built(tmp_path / "o.safetensors", [*two, v], **ALONE)
    assert run.teachers.prediction_type == "epsilon"
    seen = watched(run)
    assert gradients(run)["unet.up_blocks.1.resnets.0.conv1.weight"].abs().max() > 1e-6
    assert seen[0][3].argmax(1).tolist() == [0, 0, 1, 1]  # styles


def test_sizes_that_halve_unevenly(tmp_path, two):
    """A map of 9 rows becomes 5 and then 9 again, and not 10."""
    from dmm_core.data import LatentData, Pool

    run = built(tmp_path / "o.safetensors", two, blockwise=1.0)
    run.data = LatentData(["a", "b"], [Pool(torch.randn(5, 4, 9, 7), torch.arange(5) % 2)], 0.5)
    assert all(torch.isfinite(value).all() for value in after(run, 1).values())


@pytest.mark.parametrize("more", [{"few_step": 2.0, "snr_power": 0.0}, {"fused_backward": True}])
def test_what_does_not_go_together_is_told(tmp_path, two, more):
    with pytest.raises(RecipeError, match=r"train\.blockwise: expected"):
        recipe(tmp_path / "o.safetensors", two, blockwise=1.0, **more)
