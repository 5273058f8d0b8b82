"""The trainer: the same rows for student and teacher, self-merge, exact resume (design laws 6, 8, 9)."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dmm_core.checkpoint import open_checkpoint
from dmm_core.conditioning import Context
from dmm_core.data import LatentData, Pool
from dmm_core.errors import BadInput
from dmm_core.latents import prompts_of
from dmm_core.losses import BlockFeatures, feature_loss, score_loss
from dmm_core.ranks import Alone, Together
from dmm_core.recipe import dump_recipe, load_recipe, recipe_from_dict
from dmm_core.room import prompt_count
from dmm_core.run import open_sources, prepare, ready
from dmm_core.teachers import Teachers
from tests.unit import tiny

SMALL = {"latents_per_teacher": 3, "steps": 1, "cfg_scale": 1.0, "size": 64}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("teachers")
    paths = []
    for seed in (0, 50):
        paths.append(folder / f"teacher {seed}.safetensors")
        tiny.write_tiny(paths[-1], seed=seed)
    return paths


def recipe(out: Path, teachers: list[Path], **train):
    spec = {"steps": 4, "batch": 2, "warmup": 0, "lr": 1e-3, "precision": "fp32", "device": "cpu", "save_every": 1}
    entries = [{"path": str(path), "name": f"style {i}"} for i, path in enumerate(teachers)]
    return recipe_from_dict({"teachers": entries, "out": str(out), "data": SMALL, "train": spec | train})


def built(out: Path, teachers: list[Path], **train):
    made = recipe(out, teachers, **train)
    pool = Pool(torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(3)), torch.arange(5) % 2)
    return ready(made, open_sources(made), LatentData(["a", "b"], [pool], 0.5))


class Pair(Together):
    """Two processes that do the same."""

    def __init__(self) -> None:
        self.rank, self.world = 0, 2

    add = any = lambda self, told, *device: told


@pytest.mark.parametrize("ranks", [Alone, Pair])
@pytest.mark.parametrize("more", [{}, {"micro": 1, "feature": 0.1}, {"blockwise": 0.5}])
def test_gradients_that_stay_where_they_are_change_nothing(tmp_path, teachers, monkeypatch, more, ranks):
    """As recordings of the student's passes want them; test_gpu.py has the recordings."""
    monkeypatch.setattr("dmm_core.passes.Recorded", lambda function, pool, warm: function)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    told = []
    for stay in (False, True):
        run, places = built(tmp_path / "o.safetensors", teachers, **more), set()
        run.ranks = ranks()
        for _ in range(3):
            run.passes.recorded = stay
            run.step()
            places |= {p.grad.data_ptr() for p in run.learned}
        assert len(run.passes.recordings) == stay and (len(places) == len(run.learned) or not stay)
        told.append([p.detach() for p in run.learned])
    assert all(torch.equal(a, b) for a, b in zip(*told, strict=True))


def test_recordings_are_the_first_that_is_given_up(tmp_path, teachers, monkeypatch):
    monkeypatch.setattr("dmm_core.passes.Recorded", lambda function, pool, warm: function)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr("dmm_core.passes.has_room_twice", lambda device: True)
    run, plain = (built(tmp_path / "o.safetensors", teachers) for _ in range(2))
    run.passes.record(True)
    assert not run.step().warnings and run.passes.recorded
    learn, failed = run.passes.learn, []

    def out_of_memory_once(*given):
        if not failed:
            failed.append(1)
            raise torch.cuda.OutOfMemoryError("out of memory")
        return learn(*given)

    monkeypatch.setattr(run.passes, "learn", out_of_memory_once)
    (told,) = run.step().warnings
    run.passes.record(True)
    run.step()
    assert "recorded" in told and not run.economy.steps_down and not run.passes.recorded
    for _ in range(3):
        plain.step()
    assert all(torch.equal(a, b) for a, b in zip(run.learned, plain.learned, strict=True))


def test_student_and_teacher_see_the_same_rows(tmp_path, teachers, monkeypatch):
    """Law 8: one draw of x_t, t, noise and prompt drop; each side looks the prompt up in its own encoder's table."""
    distillation = built(tmp_path / "o.safetensors", teachers)
    asked, seen, drawn = [], [], []
    predict, forward = distillation.teachers.predict, distillation.student.forward
    bring = distillation.asking.bring
    monkeypatch.setattr(distillation.asking, "bring", lambda batches: drawn.extend(batches) or bring(batches))
    monkeypatch.setattr(
        distillation.teachers, "predict",
        lambda i, x, t, c, *more: asked.append((i, x, t, c)) or predict(i, x, t, c, *more),
    )  # fmt: skip
    monkeypatch.setattr(
        distillation.student, "forward", lambda x, t, c, w: (seen.append((x, t, c)), forward(x, t, c, w))[1]
    )
    for _ in range(3):
        distillation.step()
    for k, (x, t, context) in enumerate(seen):
        mine, prompts = asked[2 * k : 2 * k + 2], [batch.prompt for batch in drawn[2 * k : 2 * k + 2]]
        assert torch.equal(x, torch.cat([a[1] for a in mine]))
        assert torch.equal(t, torch.cat([a[2] for a in mine]))
        assert torch.equal(context.tokens, distillation.context[torch.cat(prompts)].tokens)
        for (teacher, _, _, told), prompt in zip(mine, prompts, strict=True):
            assert torch.equal(told.tokens, distillation.teachers.embeddings(teacher, prompt).tokens)


def test_prompt_drop_is_the_share_asked_for():
    data = LatentData(["a"], [Pool(torch.zeros(1, 4, 1, 1), torch.zeros(1, dtype=torch.long))], 0.1)
    prompts = data.draw(0, 20_000, torch.Generator().manual_seed(0)).prompt
    assert abs((prompts == 1).float().mean().item() - 0.1) < 0.01


def test_one_teacher_with_itself_starts_exact(tmp_path, teachers):
    """Law 9: zero training from a single teacher's own weights is exact, twice the same teacher too."""
    assert built(tmp_path / "a.safetensors", teachers[:1]).step().loss == 0.0
    twice = built(tmp_path / "b.safetensors", [teachers[0], teachers[0]], lr=1e-9)
    assert all(twice.step().loss < 1e-9 for _ in range(3))


def test_training_lowers_the_loss(tmp_path, teachers):
    distillation = built(tmp_path / "o.safetensors", teachers, steps=30, batch=4)
    losses = [result.loss for result in distillation.run()]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert distillation.samples_seen == 30 * 2 * 4


def test_gradient_accumulation_over_teachers_changes_nothing_but_rounding(tmp_path, teachers):
    whole, parts = (built(tmp_path / f"{micro}.safetensors", teachers, micro=micro) for micro in (2, 1))
    for _ in range(2):
        assert whole.step().loss == pytest.approx(parts.step().loss, rel=1e-4)


def test_teachers_take_turns(tmp_path, teachers):
    distillation = built(tmp_path / "o.safetensors", teachers, teachers_per_step=1)
    assert [list(distillation.step().score) for _ in range(3)] == [["style 0"], ["style 1"], ["style 0"]]


def test_residency_drops_the_least_recently_used(tmp_path, teachers):
    distillation = built(tmp_path / "o.safetensors", teachers, resident=1)
    pool = distillation.teachers
    before = pool.loads
    for index in (0, 0, 1, 1, 0):
        pool.unet(index)
    assert pool.loads - before == 3 and len(pool._unets) == 1


def test_each_teacher_has_its_own_text_encoder(tmp_path, teachers):
    pool = built(tmp_path / "o.safetensors", teachers).teachers
    prompts = torch.tensor([0])
    assert not torch.equal(pool.context(0, prompts).tokens, pool.context(1, prompts).tokens)


def test_losses_by_hand():
    a, b = torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor([[1.0, 4.0], [0.0, 5.0]])
    assert torch.equal(score_loss(a, b), torch.tensor([2.0, 4.5]))
    assert torch.equal(feature_loss([a, a], [b, a]), torch.tensor([1.0, 2.25]))
    with pytest.raises(ValueError, match="2 and 1"):
        feature_loss([a, a], [b])


def test_features_are_those_of_all_blocks(tmp_path, teachers):
    """Four down, one mid, four up in SD1.5; two, one, two here."""
    distillation = built(tmp_path / "o.safetensors", teachers, feature=0.1)
    result = distillation.step()
    assert set(result.feature) == {"style 0", "style 1"} and min(result.feature.values()) > 0
    unet = distillation.teachers.unet(0)
    with BlockFeatures(unet) as blocks, torch.no_grad():
        unet(torch.zeros(1, 4, 8, 8), torch.tensor([1]), torch.zeros(1, 77, 64))
    assert len(blocks.take()) == 5


@pytest.mark.parametrize("extra", [{}, {"ema": 0.9, "feature": 0.01, "blockwise": 0.5, "teachers_per_step": 1}])
def test_resume_equals_uninterrupted(tmp_path, teachers, extra):
    """Law 6: bit for bit, through the file."""
    straight = built(tmp_path / "o.safetensors", teachers, **extra)
    list(straight.run())
    first = built(tmp_path / "o.safetensors", teachers, **extra)
    first.step(), first.step()
    first.save_state(tmp_path / "state.safetensors")
    second = built(tmp_path / "o.safetensors", teachers, **extra)
    second.load_state(tmp_path / "state.safetensors")
    list(second.run())
    (tensors, strings), (expected, told) = second.state(), straight.state()
    assert strings == told and tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)


def test_state_of_another_recipe_is_refused(tmp_path, teachers):
    from dmm_core.errors import BadInput

    state = tmp_path / "state.safetensors"
    built(tmp_path / "o.safetensors", teachers).save_state(state)
    with pytest.raises(BadInput, match="another recipe"):
        built(tmp_path / "o.safetensors", teachers, lr=5e-4).load_state(state)
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(BadInput, match="no saved state"):
        built(tmp_path / "o.safetensors", teachers).load_state(state)


def test_state_of_an_earlier_version_goes_on(tmp_path, teachers):
    """It does not know a setting that came later: 0 is what it did; and with another value it is another recipe."""
    state, first = tmp_path / "state.safetensors", built(tmp_path / "o.safetensors", teachers)
    first.step()
    first.save_state(state)
    with safe_open(str(state), "pt") as file:
        tensors, strings = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    told = json.loads(strings["dmm.run"])
    del told["train"]["blockwise"]
    save_file(tensors, state, {**strings, "dmm.run": json.dumps(told)})
    second = built(tmp_path / "o.safetensors", teachers)
    second.load_state(state)
    assert second.step_count == 1
    with pytest.raises(BadInput, match="another recipe"):
        built(tmp_path / "o.safetensors", teachers, blockwise=4.0).load_state(state)
    save_file(tensors, state, {**strings, "dmm.run": "[]"})
    with pytest.raises(BadInput, match="no saved state"):
        second.load_state(state)


def command(path: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "dmm_core", "distill", str(path), *more]


@pytest.mark.slow
def test_kill_at_ten_random_moments_resumes_exactly(tmp_path, teachers):
    """kill -9 in mid-training and mid-save (every step saves); the end equals an uninterrupted run, no torn file."""
    from dmm_core.recipe import dump_recipe

    whole, broken = (recipe(tmp_path / name / "out.safetensors", teachers, steps=40) for name in ("whole", "broken"))
    for made in (whole, broken):
        dump_recipe(made, made.out.with_suffix(".yaml"))
    subprocess.run(command(whole.out.with_suffix(".yaml")), check=True, capture_output=True)
    state = broken.out.with_name("out.work") / "state.safetensors"
    rng, kills = random.Random(7), 0
    for _ in range(10):
        more = ["--resume"] if state.exists() else []
        child = subprocess.Popen(
            command(broken.out.with_suffix(".yaml"), *more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        started = state.stat().st_mtime_ns if state.exists() else 0
        until = time.monotonic() + 60
        while (
            child.poll() is None
            and time.monotonic() < until
            and (state.stat().st_mtime_ns if state.exists() else 0) == started
        ):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.4))
        child.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
        kills += child.wait() != 0
        if state.exists():
            with safe_open(str(state), "pt") as file:
                assert file.metadata()["dmm.resume"]
    assert kills >= 5
    if not broken.out.exists():
        subprocess.run(command(broken.out.with_suffix(".yaml"), "--resume"), check=True, capture_output=True)
    with safe_open(str(whole.out), "pt") as a, safe_open(str(broken.out), "pt") as b:
        assert all(torch.equal(a.get_tensor(key), b.get_tensor(key)) for key in a.keys())  # noqa: SIM118


def test_stop_saves_and_resume_finishes(tmp_path, teachers):
    made = recipe(tmp_path / "o.safetensors", teachers)
    merge = prepare(made)
    with pytest.raises(KeyboardInterrupt):
        for _ in merge.steps(stop=lambda: merge.distillation.step_count == 2):
            pass
    resumed = prepare(made, resume=True)
    assert resumed.distillation.step_count == 2
    list(resumed.steps())
    assert resumed.save().exists() and not resumed.work.exists()


def test_timestep_weights_are_the_paper_s_at_0_and_x0_s_at_1():
    from dmm_core.diffusion import add_noise, alphas_cumprod, predict_x0
    from dmm_core.losses import MAX_WEIGHT, timestep_weights

    assert torch.equal(timestep_weights(0.0), torch.ones(1000))
    a, weights = alphas_cumprod(), timestep_weights(1.0)
    free = ((1 - a) / a > 1.01 / MAX_WEIGHT) & ((1 - a) / a < 0.99 * MAX_WEIGHT)
    t = torch.arange(1000)[free][::50]
    x0, noise, wrong = torch.randn(3, len(t), 4, 2, 2)
    x_t = add_noise(x0, noise, t)
    error = (predict_x0(x_t, noise + wrong, t) - x0).square().flatten(1).mean(1)  # what it costs in x̂0
    ratio = error / score_loss(noise + wrong, noise) / weights[t]
    assert len(t) > 5 and torch.allclose(ratio, ratio[:1], rtol=1e-3)
    assert (
        timestep_weights(0.5).mean() == pytest.approx(1) and timestep_weights(0.5)[900] > 10 * timestep_weights(0.5)[9]
    )


@pytest.mark.parametrize("more", [{}, {"mixed": 0.4}])
def test_two_processes_do_what_one_does(tmp_path, teachers, more):
    """Three teachers over two processes: the same samples, the same student to rounding."""
    three = [*teachers, tmp_path / "third.safetensors"]
    tiny.write_tiny(three[-1], seed=99)
    students, losses = [], []
    for processes in (1, 2):
        merge = prepare(recipe(tmp_path / f"{processes}.safetensors", three, processes=processes, steps=3, **more))
        losses.append([result.score for result in merge.steps()])
        students.append({k: v.clone() for k, v in merge.distillation.student.state_dict().items()})
    for one, two in zip(*losses, strict=True):
        assert one == pytest.approx(two, rel=1e-3)
    for key, tensor in students[0].items():
        assert torch.allclose(tensor, students[1][key], atol=2e-4), key


def test_processes_meet_wherever_temporary_files_lie(tmp_path, teachers, monkeypatch):
    folder = tmp_path / "my tmp ü"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    merge = prepare(recipe(tmp_path / "o.safetensors", teachers, processes=2, steps=1))
    assert len(list(merge.steps())) == 1


class Idle(Alone):
    """A third process where two teachers teach."""

    def __init__(self) -> None:
        self.rank, self.world = 2, 3

    def add_gradients(self, parameters):
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_process_without_a_teacher(tmp_path, teachers, precision):
    """It has no loss to scale, and takes the others' step all the same."""
    run = built(tmp_path / "o.safetensors", teachers, precision=precision)
    assert next(run.run(Idle())).step == 1


def test_of_many_prompts_only_those_that_are_drawn_are_embedded(tmp_path, teachers):
    prompts = [f"thing {i}" for i in range(7)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    made = recipe(tmp_path / "o.safetensors", teachers)
    made = replace(made, data=replace(made.data, prompts=tmp_path / "prompts.txt"))
    run = prepare(made).distillation
    drawn = sorted({7919 * i % 7 for i in range(3)})
    assert run.data.prompts == (*(prompts[i] for i in drawn), "") and len(run.context) == 4
    assert prompt_count(made) == 3
    expected = [drawn.index(7919 * i % 7) for i in range(3)]
    assert [pool.prompt.tolist() for (pool,) in run.data.pools] == [expected] * 2
    assert prompts_of(3, 2 * 7919).unique().numel() == 3 and prompts_of(5, 3).tolist() == [0, 1, 2, 0, 1]


def test_a_seed_as_long_as_hosts_have(tmp_path, teachers):
    for seed in (1234567890123456, 2**63 - 1):
        assert prepare(recipe(tmp_path / f"{seed}.safetensors", teachers, seed=seed)).distillation.data.pools
    with pytest.raises(BadInput, match=r"train\.seed"):
        recipe(tmp_path / "o.safetensors", teachers, seed=2**63)


def test_a_training_that_diverges_is_told_as_such(tmp_path, teachers):
    merge = prepare(recipe(tmp_path / "o.safetensors", teachers))
    steps = merge.steps()
    for _ in range(2):  # the second is asked for when the first is saved
        next(steps)
    saved = merge.state_file.read_bytes()
    with torch.no_grad():
        merge.distillation.learned[0].fill_(float("nan"))
    with pytest.raises(BadInput, match=r"the training diverged before step 2: .* lower train\.lr"):
        next(steps)
    assert merge.state_file.read_bytes() == saved


@pytest.mark.parametrize(("more", "told"), [({"optimizer": "adamw8bit"}, "needs bitsandbytes"),
                                            ({"fused_backward": True}, "needs bf16 or fp32")])  # fmt: skip
def test_what_is_missing_is_told_before_teachers_draw(tmp_path, teachers, monkeypatch, more, told):
    monkeypatch.setattr("dmm_core.optim.has_eight_bit", lambda: False)
    monkeypatch.setattr("dmm_core.run.choose_precision", lambda *given: "fp16")
    with pytest.raises(BadInput, match=told):
        prepare(recipe(tmp_path / "o.safetensors", teachers, precision="auto", **more))
    assert not list(tmp_path.rglob("latents*"))


def test_the_users_words_stay_where_the_recipe_would_be_written(tmp_path, teachers):
    out = tmp_path / "o.safetensors"
    mine = recipe(out, teachers, steps=1)
    kept = tmp_path / "o.recipe.yaml"
    dump_recipe(mine, kept)
    kept.write_text("# mine\n" + kept.read_text(encoding="utf-8"), encoding="utf-8")
    for made, stays in ((load_recipe(kept), True), (recipe(out, teachers, steps=2), False)):
        merge = prepare(made)
        list(merge.steps())
        merge.save()
        assert kept.read_text(encoding="utf-8").startswith("# mine") == stays
        assert load_recipe(kept) == made


def test_a_finished_training_is_saved_before_what_follows_it(tmp_path, teachers):
    """Ctrl-C in the evaluation, after the last step, loses no training."""
    made = recipe(tmp_path / "o.safetensors", teachers, save_every=100)
    trained = prepare(made)
    assert len(list(trained.steps())) == 4
    again = prepare(made, resume=True)
    assert list(again.steps()) == []
    for key, tensor in trained.distillation.student.state_dict().items():
        assert torch.equal(tensor, again.distillation.student.state_dict()[key]), key


def test_an_interruption_loses_no_teacher_s_finished_latents(tmp_path, teachers):
    """Stopped while the second teacher draws: the first one's are taken up, and the data is the same in every bit."""
    from dmm_core.run import load_teachers, make_data

    def run(name, notify):
        made = recipe(tmp_path / name / "o.safetensors", teachers)
        sources = open_sources(made)
        return make_data(made, sources, load_teachers(made, sources), notify)

    told = []

    def break_off(what, done, total):
        if done > total / 2:
            raise KeyboardInterrupt
        told.append(done)

    whole = run("whole", lambda *progress: None)
    with pytest.raises(KeyboardInterrupt):
        run("broken", break_off)
    assert told and (tmp_path / "broken" / "o.work" / "latents-0.safetensors").exists()
    again = []
    resumed = run("broken", lambda what, done, total: again.append(done))
    assert min(again) > max(told), "the first teacher did not draw again"
    for (one,), (two,) in zip(whole[1], resumed[1], strict=True):
        assert torch.equal(one.latents, two.latents) and torch.equal(one.prompt, two.prompt)
    assert [p.name for p in (tmp_path / "broken" / "o.work").glob("latents*")] == ["latents.safetensors"]


def test_latents_of_an_edited_prompt_file_are_not_taken_up(tmp_path, teachers):
    """They are kept with numbers of prompts, which would point at other lines."""
    (tmp_path / "prompts.txt").write_text("cat\ndog\nbird\n")

    def start(notify=lambda *_: None, prompts="prompts.txt"):
        made = recipe(tmp_path / "o.safetensors", teachers)
        return prepare(replace(made, data=replace(made.data, prompts=tmp_path / prompts)), notify=notify)

    def break_off(what, done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(break_off)
    (tmp_path / "prompts.txt").write_text("a red house\ncat\ndog\nbird\n")
    with pytest.raises(BadInput, match="made with other settings"):
        start()
    (tmp_path / "moved.txt").write_text("cat\ndog\nbird\n")  # the same lines in another place are the same
    assert start(prompts="moved.txt").distillation.data.prompts[:3] == ("cat", "dog", "bird")


def test_encoders_are_told_apart_on_the_cpu(teachers, monkeypatch):
    """In float64, which some devices lack (MPS): nothing but the encoding is asked of the device."""
    import dmm_core.teachers as module

    asked = []
    monkeypatch.setattr(module, "_fingerprint", lambda encoders: asked.append(next(encoders.parameters()).device.type))
    monkeypatch.setattr(module, "encode_prompts", lambda encoders, prompts, **more: Context(torch.zeros(1, 1, 1)))
    pool = Teachers([open_checkpoint(path) for path in teachers[:1]])
    pool.device = torch.device("meta")
    pool.embed(["a"])
    assert asked == ["cpu"]
