"""Students for few steps: the loss, the guidance that becomes theirs, the stage, sampling, what the file says."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from dmm_core import preview
from dmm_core.checkpoint import open_checkpoint
from dmm_core.cli import main
from dmm_core.commands import distill
from dmm_core.data import Batch
from dmm_core.diffusion import TIMESTEPS, add_noise, alphas_cumprod
from dmm_core.errors import RecipeError
from dmm_core.fewstep import INSIDE, STRIDE, guided, path_end, path_loss, stops
from dmm_core.models import load_pipeline
from dmm_core.recipe import recipe_from_dict
from dmm_core.run import prepare
from dmm_core.sample import initial_noise, sample_latents
from dmm_core.stages import stage_recipe
from tests.unit.merges import SMALL, TRAIN, after, built, furthest, tiny_teachers


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> list[Path]:
    return tiny_teachers(tmp_path_factory.mktemp("teachers"), 2)


def towards(point: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """ε that leads from x_t to one point, whatever x_t and t."""
    a = alphas_cumprod()[t].view(-1, 1, 1, 1)
    return (x_t - a.sqrt() * point) / (1 - a).sqrt()


def noised(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    point, noise = torch.randn(1, 4, 8, 8, generator=rng), torch.randn(4, 4, 8, 8, generator=rng)
    t = torch.tensor([0, STRIDE - 1, STRIDE, TIMESTEPS - 1])
    return point, add_noise(point.expand(4, -1, -1, -1), noise, t), t


class Teaching:
    """A teacher whose predictions are known; it counts how often it is asked, and when."""

    prediction_type = "epsilon"

    def __init__(self, say):
        self.say, self.asked = say, []

    def predict(self, teacher, x_t, t, prompt):
        self.asked.append(t.tolist())
        return self.say(x_t, t), []


def end_of(teacher: Teaching, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    batch = Batch(0, x_t, t, torch.zeros_like(x_t), torch.zeros(len(t), dtype=torch.long))
    return path_end(teacher, batch, x_t, t, 1, 1.0)


def test_four_steps_lead_to_the_clean_latents():
    t = torch.tensor([TIMESTEPS - 1])
    for expected in (749, 499, 249, -1):
        *_, t = stops(t)
        assert t.item() == expected
    assert torch.stack(list(stops(torch.tensor([0, 3, 999]))), 1).tolist() == [
        [0, 0, 0, -1], [2, 1, 0, -1], [937, 874, 812, 749],
    ]  # fmt: skip


def test_no_loss_on_a_straight_path():
    """A teacher that says one point from everywhere arrives where one step of the same prediction does."""
    point, x_t, t = noised()
    teacher = Teaching(lambda x, at: towards(point, x, at))
    end = end_of(teacher, x_t, t)
    assert torch.allclose(end[:2], point.expand(2, -1, -1, -1), atol=1e-4), "from below the stride the path ends clean"
    assert torch.allclose(end[2:], add_noise(point.expand(2, -1, -1, -1), towards(point, x_t, t)[2:], t[2:] - STRIDE),
                          atol=1e-3)  # fmt: skip
    assert path_loss(towards(point, x_t, t), end, x_t, t, "epsilon").max() < 1e-6
    assert len(teacher.asked) == INSIDE and [at[-1] for at in teacher.asked] == [999, 937, 874, 812]


def test_the_loss_is_the_distance_between_the_ends():
    """Where the path bends, the student is to say what leads to its end; v and ε alike."""
    point, x_t, t = noised()
    end = end_of(Teaching(lambda x, at: towards(point + at.view(-1, 1, 1, 1) / 1000, x, at)), x_t, t)
    a, b = (alphas_cumprod()[at].view(-1, 1, 1, 1) for at in (t, (t - STRIDE).clamp(min=0)))
    b[:2] = 1.0
    eps = (end - (b / a).sqrt() * x_t) / ((1 - b).sqrt() - (b * (1 - a) / a).sqrt())
    assert path_loss(eps, end, x_t, t, "epsilon").max() < 1e-6
    assert path_loss(towards(point, x_t, t), end, x_t, t, "epsilon").min() >= 0
    assert path_loss(towards(point, x_t, t), end, x_t, t, "epsilon")[-1] > 0.01
    v = (eps - (1 - a).sqrt() * x_t) / a.sqrt()
    assert path_loss(v, end, x_t, t, "v_prediction").max() < 1e-6
    assert torch.allclose(path_loss(eps, end + 0.3, x_t, t, "epsilon"), torch.tensor(0.09), atol=1e-3)


def test_guidance(tmp_path, teachers):
    made = built(tmp_path / "o.safetensors", teachers)
    batch = made.data.draw(1, 3, torch.Generator().manual_seed(1))
    nothing = len(made.data.prompts) - 1
    empty = torch.full_like(batch.prompt, nothing)
    cond, uncond = (made.teachers.predict(1, batch.x_t, batch.t, which)[0] for which in (batch.prompt, empty))
    told = guided(made.teachers, batch, batch.x_t, batch.t, nothing, 3.0)
    assert torch.allclose(told, uncond + 3 * (cond - uncond), atol=1e-4)
    assert torch.equal(guided(made.teachers, batch, batch.x_t, batch.t, nothing, 1.0), cond)


def test_training_brings_the_ends_nearer(tmp_path, teachers):
    made = built(tmp_path / "o.safetensors", teachers, few_step=2.0, steps=40, lr=1e-3)
    losses = [result.loss for result in made.run()]
    assert sum(losses[-8:]) < 0.7 * sum(losses[:8])


def test_a_rotating_teacher_is_brought_once_a_step(tmp_path, teachers):
    made = built(tmp_path / "o.safetensors", teachers, few_step=2.0, resident=1)
    after(made, 1)
    loads = made.teachers.loads
    after(made, 3)
    assert made.teachers.loads - loads <= 3 * len(teachers)


def test_exact_resume(tmp_path, teachers):
    through = after(built(tmp_path / "a.safetensors", teachers, few_step=2.0), 4)
    first = built(tmp_path / "b.safetensors", teachers, few_step=2.0)
    after(first, 2)
    first.save_state(tmp_path / "state.safetensors")
    second = built(tmp_path / "b.safetensors", teachers, few_step=2.0)
    second.load_state(tmp_path / "state.safetensors")
    assert furthest(through, after(second, 2)) == 0


def recipe(out: Path, teachers: list[Path], train=(), **data):
    spec = {"teachers": [str(path) for path in teachers], "out": str(out), "data": SMALL | data}
    train = TRAIN | {"steps": 4, "save_every": 0} | dict(train)
    return recipe_from_dict(spec | {"stages": ["distil", "few_step"], "train": train})


def test_the_stage(tmp_path, teachers):
    """Half of the steps, on the same latents, with the guidance that these were drawn with."""
    first, second = (stage_recipe(recipe(tmp_path / "o.safetensors", teachers, cfg_scale=3.0), i) for i in (0, 1))
    assert (first.train.few_step, first.train.steps) == (0, 4)
    assert (second.train.few_step, second.train.steps) == (3.0, 2)
    assert first.work == second.work


@pytest.mark.parametrize("loss", ["feature", "adversarial"])
def test_other_losses_have_no_place_in_it(tmp_path, teachers, loss):
    with pytest.raises(RecipeError, match=rf"train\.{loss}: expected 0 with few_step"):
        built(tmp_path / "o.safetensors", teachers, few_step=2.0, **{loss: 0.1})
    made = recipe(tmp_path / "o.safetensors", teachers, {loss: 0.1})
    assert [getattr(stage_recipe(made, i).train, loss) for i in (0, 1)] == [0.1, 0.0], "the stage leaves it out"


@pytest.fixture(scope="module")
def student(tmp_path_factory, teachers) -> Path:
    merge = prepare(recipe(tmp_path_factory.mktemp("student") / "few.safetensors", teachers))
    for _ in merge.steps():
        pass
    return merge.save()


def test_the_file_says_so_and_is_drawn_so(tmp_path, student, capsys):
    made = open_checkpoint(student)
    assert made.few_step == 1.0 and load_pipeline(student).few_step == 1.0
    assert "4 to 8" in made.usage == made.metadata["modelspec.usage_hint"]
    assert main(["generate", str(student), "--prompt", "a", "--out", str(tmp_path / "p.png"), "--json"]) == 0
    assert '"steps": 4' in (said := capsys.readouterr().out) and '"cfg": 1.0' in said


def test_a_picture_does_not_depend_on_the_others(student):
    pipe = load_pipeline(student)
    from dmm_core.conditioning import encode_prompts

    context, noise = encode_prompts(pipe.text_encoders, ["a", "b", "c"]), initial_noise([1, 2, 3])
    style = pipe.codebook.default_style()
    together = sample_latents(pipe.unet, context, noise, steps=3, style=style, few_step=True)
    alone = sample_latents(pipe.unet, context[1:2], noise[1:2], steps=3, style=style, few_step=True)
    assert torch.allclose(together[1:2], alone, atol=1e-4)
    assert not torch.allclose(together, sample_latents(pipe.unet, context, noise, steps=3, style=style), atol=0.1)


@pytest.mark.slow
def test_an_evaluation_draws_the_student_in_few_steps(tmp_path, student, teachers, capsys):
    line = ["evaluate", str(student), "--teacher", *map(str, teachers), "--images", "4", "--steps", "2"]
    assert main([*line, "--few-steps", "3", "--out", str(tmp_path / "e"), "--json"]) == 0
    said = capsys.readouterr().out
    assert json.loads(said)["same_seed"]["student"]["mean"] > 0
    assert "Euler in 3 steps" in said and (tmp_path / "e" / "report.html").exists()


@pytest.fixture(scope="module")
def slow_student(tmp_path_factory, teachers) -> Path:
    path = tmp_path_factory.mktemp("slow") / "slow.safetensors"
    merge = prepare(recipe_from_dict({"teachers": [str(t) for t in teachers], "out": str(path), "data": SMALL,
                                      "default_style": {"teacher 0": 0.8, "teacher 1": 0.2},
                                      "train": TRAIN | {"steps": 1, "save_every": 0}}))  # fmt: skip
    for _ in merge.steps():
        pass
    return merge.save()


def few_step(*arguments: str | Path) -> int:
    return main(["distill", "--few-step", *map(str, arguments)])


def test_of_a_file_without_its_teachers(tmp_path, slow_student):
    """The styles teach themselves: names, order and default style stay, and the file is drawn in few steps."""
    out = tmp_path / "few.safetensors"
    said = recipe_from_dict({"student": str(slow_student), "teachers": [], "out": str(out), "data": SMALL,
                             "train": TRAIN | {"few_step": 3.0, "steps": 2}})  # fmt: skip
    merge = prepare(said)
    assert [merge.distillation.turn(step) for step in (0, 1)] == [[0, 1], [0, 1]]
    assert len(merge.distillation.data.pools) == 2, "each style draws latents of its own"
    for _ in merge.steps():
        pass
    before, after = open_checkpoint(slow_student), open_checkpoint(merge.save())
    assert after.few_step == 3.0 and after.styles == before.styles
    assert after.style_info[0]["sha256"] == before.style_info[0]["sha256"]
    assert after.codebook().default == before.codebook().default == pytest.approx({"teacher 0": 0.8, "teacher 1": 0.2})
    moved = after.codebook().model_embedding.weight - before.codebook().model_embedding.weight
    assert 0 < moved.abs().max() < 0.1


def test_baked_it_is_drawn_in_few_steps_still(tmp_path, student):
    out = tmp_path / "baked.safetensors"
    assert main(["mix", str(student), "--style", "teacher 0", "--bake", "--out", str(out)]) == 0
    baked = open_checkpoint(out)
    assert baked.dmm is None and baked.few_step == open_checkpoint(student).few_step > 0
    assert load_pipeline(out).few_step > 0


def of_itself(folder: Path, student: Path, **more):
    return recipe_from_dict({"student": str(student), "teachers": [], "out": str(folder / "few.safetensors"),
                             "data": SMALL, "train": TRAIN | {"few_step": 3.0, "steps": 1} | more})  # fmt: skip


def test_its_own_styles_draw_whatever_is_said_of_old_ones(tmp_path, slow_student):
    merge = prepare(of_itself(tmp_path, slow_student, regularize=0))
    assert len(merge.distillation.data.pools) == 2 and len(list(merge.steps())) == 1


def test_previews_draw_each_as_it_is_drawn(tmp_path, slow_student, monkeypatch):
    """The student in few steps, with its guidance in it; its teachers in many, with that guidance beside."""
    seen = []

    def noted(*given, **how):
        seen.append((how["steps"], how["cfg_scale"], how.get("few_step", False)))
        return sample_latents(*given, **how)

    monkeypatch.setattr(preview, "sample_latents", noted)
    preview.Preview(prepare(of_itself(tmp_path, slow_student))).draw([])
    assert seen == [(8, 3.0, False)] * 2 + [(4, 1.0, True)] * 2


def test_the_command_for_a_file(tmp_path, slow_student):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\n", encoding="utf-8")
    args = command_line("--few-step", str(slow_student), "--out", str(tmp_path / "o.safetensors"),
                        "--guidance", "4", "--prompts", str(prompts), "--preset", "mini", "--steps", "7")  # fmt: skip
    made = distill.recipe_of(args)
    assert (made.train.few_step, made.data.cfg_scale, made.train.steps) == (4.0, 4.0, 7)
    assert (made.train.snr_power, made.train.teachers_per_step, made.train.batch) == (0.0, 4, 6)
    assert recipe_from_dict(made.to_dict()).train == made.train, "it is read back as it was written"
    args.guidance = None
    assert distill.recipe_of(args).train.few_step == 5.0


def command_line(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    distill.add_arguments(parser)
    return parser.parse_args(arguments)


def test_a_file_for_few_steps_is_not_trained_again(tmp_path, student, capsys):
    assert few_step(student, "--out", tmp_path / "o.safetensors") == 2
    assert "samples in few steps" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_either_teachers_or_a_file(tmp_path, student, teachers, capsys):
    assert few_step(student, "--teacher", teachers[0], "--out", tmp_path / "o.safetensors") == 2
    assert "not both" in capsys.readouterr().err
