"""Algorithm 1 on a tiny untrained pipeline of SD3.5's classes: the step, and whole runs."""

import math
import re
import shutil
import threading
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import numpy as np
import own_rewards
import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from tiny_run import (
    REWARD,
    TEXT,
    bits,
    difference,
    flags,
    lora,
    metrics,
    on_two_processes,
    perturb,
    run,
    settings,
)

import dgpo
import train_sd35
from sd35 import model as sd35
from sd35.run import Clock, Interrupts, checkpoints, fit_micro_batch, run_script
from sd35.settings import Settings, UserError, learning_rate_at, parse
from tiny_sd35 import shapes

OTHER = "green square"  # with an even number of letters, which TEXT has not


def build(tiny, out, **changed):
    """A trainer whose theta, theta_old and saved average differ."""
    chosen = settings(tiny, out, **changed)
    pipe = sd35.load_pipeline(str(tiny), torch.float32, chosen.quantize)
    trainer = train_sd35.Trainer(chosen, Accelerator(cpu=True), pipe, Interrupts().held)
    trainer.model.encoded = trainer.encoder([TEXT, OTHER], {})
    perturb(trainer.model)
    return trainer


# The step


def scores_of(trainer, x0):
    """The rewards' weights and scores (P, G) of latents (P, G, ...), from their functions."""
    scores = {}
    for spec in trainer.settings.reward:
        name, _, weight = spec.partition("=")
        reward = getattr(own_rewards, name.rpartition(":")[2])
        images = [trainer.model.decode(group) for group in x0]
        rows = [reward(x, [text] * len(x)) for x, text in zip(images, (TEXT, OTHER), strict=True)]
        rows = [[math.nan if x is None else float(x) for x in row] for row in rows]
        scores[name] = float(weight or 1), torch.tensor(rows)
    return scores


def training_set(trainer, x0):
    """By hand: the latents to train on, their advantages, and which groups have scores."""
    chosen, scores = trainer.settings, scores_of(trainer, x0)
    if chosen.combine == "rewards":
        scores = {"sum": (1.0, sum(weight * values for weight, values in scores.values()))}
    if m := chosen.train_samples:
        ((_, values),) = scores.values()
        order = values.argsort(1)
        kept = torch.cat([order[:, : m // 2], order[:, -(m // 2) :]], 1)
        x0 = torch.stack([group[rows] for group, rows in zip(x0, kept, strict=True)])
        scores = {"kept": (1.0, values.gather(1, kept))}
    finite = sum(values for _, values in scores.values()).isfinite().all(1)
    advantages = torch.zeros(x0.shape[:2])
    for weight, values in scores.values():
        parts = dgpo.group_advantages(values[finite], chosen.std, eps=1e-4, clamp=5.0)
        advantages[finite] += weight * parts
    return x0, advantages, finite


def by_autograd(trainer, x0, advantages, finite, update):
    """The gradient of Eq. 17, KL and bound at theta, through whole groups at once."""
    chosen, model, K = trainer.settings, trainer.model, trainer.settings.train_timesteps
    later = (update,) if update else ()
    generator = sd35.seeded(chosen.seed, sd35.TIMES, 0, *later)
    times, total = trainer.times[torch.randperm(len(trainer.times), generator=generator)], 0
    for p, k in [(p, k) for p in range(len(x0)) if finite[p] for k in range(K)]:
        group, A, t = x0[p][None], advantages[p][None], times[k].view(1, 1)
        eps = trainer.noise(sd35.TRAINING_NOISE, 0, p, k, *later)[None, None]
        x_t, t = dgpo.diffuse(group, eps, t)[0], t[0].expand(A.shape[1])
        networks = [("theta", nullcontext, 1), ("old", model.theta_old, 1)]
        networks.append(("reference", model.reference, chosen.reference_guidance_scale))
        v = {
            name: model.velocity((TEXT, OTHER)[p], guidance, network)(x_t, t, t)[None]
            for name, network, guidance in networks
        }
        goal = v["old" if chosen.ema_reference else "reference"].detach()
        losses = dgpo.dsm_loss(v["theta"], group, eps), dgpo.dsm_loss(goal, group, eps), A
        beta = chosen.beta / A.shape[1]
        total = total + dgpo.dgpo_loss(*losses, beta) / chosen.beta
        total = total + chosen.kl * dgpo.mean_square(v["theta"], v["reference"].detach()).mean()
        bad = -dgpo.group_gradient(*losses, beta)[0].clamp(max=0)
        bound = bad * dgpo.mean_square(v["theta"], v["old"].detach())
        total = total + chosen.bound * bound.mean()
    return torch.autograd.grad(total / K / chosen.prompts_per_step, model.theta)


BOTH = [f"{REWARD}:brightness=2", f"{REWARD}:darkness=0.5"]
STEPS = {
    "guided": {"micro_batch_size": 3},
    "a guided reference": {"recipe": "cfg_free", "micro_batch_size": 8},
    "an EMA reference": {"recipe": "cfg_free_ema", "micro_batch_size": 1},
    "std of the group": {"std": "group"},
    "extremes": {"group_size": 6, "train_samples": 4},
    "bound": {"bound": 2},
    "two updates": {"updates_per_rollout": 2},
    "two rewards, their advantages": {"reward": BOTH},
    "two rewards, their sum": {"reward": BOTH, "combine": "rewards"},
    "a group with a NaN": {"reward": f"{REWARD}:nan_for_some"},
    "a group of equal rewards": {"reward": f"{REWARD}:constant_for_some"},
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_plain_autograd_through_eq_17(name, tiny, tmp_path, monkeypatch):
    fixed = {"prompts_per_step": 2, "beta": 10, "kl": 0.1, "clip": 0, "learning_rate": 1e-2}
    trainer = build(tiny, tmp_path, **fixed, **STEPS[name])
    x0 = torch.stack([trainer.rollout(0, p, text) for p, text in enumerate((TEXT, OTHER))])
    batch, update, norms = training_set(trainer, x0), trainer.update, []

    def watched(trained):
        expected = by_autograd(trainer, *batch, update=len(norms))
        expected = torch.cat([g.flatten() for g in expected])
        gradient = torch.cat([p.grad.flatten() for p in trainer.model.theta])
        assert (gradient - expected).norm() < 1e-4 * expected.norm()
        norms.append(expected.norm())
        return update(trained)

    monkeypatch.setattr(trainer, "update", watched)
    before = [p.detach().clone() for p in trainer.model.theta]
    line = trainer.take_step([{"prompt": TEXT}, {"prompt": OTHER}], 0)
    assert len(norms) == trainer.settings.updates_per_rollout
    assert line["grad_norm"] == pytest.approx(sum(norms).item() / len(norms), rel=1e-4)
    assert line["groups_not_finite"] == 0.5 * (name == "a group with a NaN")
    assert line["equal_groups"] == 0.5 * (name == "a group of equal rewards")
    assert all((p != q).any() for p, q in zip(before, trainer.model.theta, strict=True))


def test_compiled_blocks_have_the_same_rollout_and_gradient(tmp_path, monkeypatch):
    """theta_old draws. A run takes more graphs than torch's limit, which is 2 here."""
    tiny = tmp_path / "of one block"
    shapes.build(width=32, layers=1).save_pretrained(tiny)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = partial(train_sd35.lora.compile_blocks, backend="eager")  # needs no C++ compiler
    monkeypatch.setattr(train_sd35.lora, "compile_blocks", compiled)

    def rollout_and_gradient(compile):
        few = {"train_timesteps": 1, "num_inference_steps": 1, "kl": 0.0, "micro_batch_size": 4}
        trainer = build(tiny, tmp_path, compile=compile, **few)
        latents = trainer.rollout(999, 0, TEXT)
        trainer.backward_group(0, 0, 0, TEXT, latents, torch.tensor([-1.5, -0.5, 0.5, 1.5]))
        return latents, torch.cat([p.grad.flatten() for p in trainer.model.theta])

    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        plain, compiled = rollout_and_gradient(False), rollout_and_gradient(True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 2
    for one, two in zip(plain, compiled, strict=True):
        assert (one - two).norm() < 1e-5 * one.norm()


def test_rollouts_are_by_theta_then_by_theta_old_or_offline_by_the_reference(tiny, tmp_path):
    trainer = build(tiny, tmp_path, old_after=3)
    model, noise = trainer.model, [trainer.noise(sd35.NOISE, 4, 0, g) for g in range(4)]

    def sample(network):
        with network():
            return model.sample(TEXT, torch.stack(noise), 4, 4.5)

    assert torch.equal(trainer.rollout(4, 0, TEXT), sample(model.theta_old))
    trainer.settings.old_after = 4
    assert torch.equal(trainer.rollout(4, 0, TEXT), sample(nullcontext))
    trainer.settings.offline = True
    assert torch.equal(trainer.rollout(4, 0, TEXT), sample(model.reference))


@pytest.mark.parametrize(("reward", "updates"), [("ocr", 2), ("pickscore", 4)])
@torch.no_grad()
def test_the_saved_average_follows_as_in_the_released_trainer(reward, updates, tiny, tmp_path):
    """It is updated after 7, 15, ... steps; first it is all ones here, and theta all zeros."""
    trainer = build(tiny, tmp_path, ema_steps=8)
    trainer.settings.ema_updates = parse(Settings, ["--reward", reward]).ema_updates
    for first, theta in zip(trainer.model.average, trainer.model.theta, strict=True):
        first.fill_(1.0)
        theta.fill_(0.0)
    average = []
    for step in range(50):
        trainer.follow(step)
        average.append(trainer.model.average[0].mean().item())
    factors = [((1 + n) / (10 + n)) ** updates for n in (7, 15, 23, 31, 39, 47)]
    assert average[5:7] == [1.0, pytest.approx(factors[0])]
    assert average[-1] == pytest.approx(math.prod(factors), rel=1e-4)


@torch.no_grad()
def test_theta_old_follows_at_a_decay_that_rises_to_0_3(tiny, tmp_path):
    trainer = build(tiny, tmp_path)
    old, theta = trainer.model.old[0], trainer.model.theta[0]
    theta.fill_(0.0)
    for step, decay in ((0, 0), (100, 0.1), (299, 0.299), (500, 0.3)):
        old.fill_(1.0)
        trainer.follow(step)
        assert old.mean().item() == pytest.approx(decay)


def test_a_group_is_scored_while_the_next_is_drawn(tiny, tmp_path, monkeypatch):
    trainer, begun = build(tiny, tmp_path), [threading.Event() for _ in range(4)]
    begun[3].set()  # after the last group

    def reward(images, prompts, metadata):
        assert begun[metadata[0]["i"] + 1].wait(60)
        return images.mean((1, 2, 3))

    def rollout(step, p, text):
        begun[p].set()
        return torch.full((4, *trainer.model.latent_shape), 0.1 * p)

    monkeypatch.setattr(trainer, "rollout", rollout)
    trainer.rewards = {"a": (1.0, reward)}
    chosen = [{"prompt": TEXT, "i": i} for i in range(3)]
    latents, scores, _ = trainer.draw_and_score(chosen, 0, Clock(trainer.device))
    expected = torch.stack([trainer.model.decode(latents[p]).mean((1, 2, 3)) for p in range(3)])
    assert torch.equal(scores["a"][1], expected) and expected.unique().numel() == 3


def test_a_gradient_that_is_not_finite_is_no_update(tiny, tmp_path):
    trainer = build(tiny, tmp_path)
    before = [p.detach().clone() for p in trainer.model.theta]
    for parameter in trainer.model.theta:
        parameter.grad = torch.ones_like(parameter)
    trainer.model.theta[0].grad[0] = math.nan
    assert trainer.update(True) is None
    assert all(torch.equal(*pair) for pair in zip(before, trainer.model.theta, strict=True))


def test_nothing_follows_a_step_without_an_update(tiny, tmp_path, monkeypatch):
    trainer = build(tiny, tmp_path, prompts_per_step=1)
    before = [value.clone() for value in [*trainer.model.old, *trainer.model.average]]
    monkeypatch.setattr(trainer, "update", lambda trained: None)
    assert trainer.take_step([{"prompt": TEXT}], 0)["grad_norm"] is None
    after = [*trainer.model.old, *trainer.model.average]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_no_finite_score_is_one_sentence(tiny, tmp_path):
    trainer = build(tiny, tmp_path, reward=f"{REWARD}:nan_for_all")
    with pytest.raises(UserError, match="step 1: no group of this step has finite rewards; fix"):
        trainer.take_step([{"prompt": TEXT}], 0)


class Device(str):
    """The CPU, which is taken for a GPU."""

    type = "cuda"


WHOLE = [(0, 10), (0, 5), (1 / 2, 5), (1, 5)]  # both times of a group, one
PARTS = [(0, 3), (0, 2), (0, 1), (1, 3), (1, 2), (1, 1)]


@pytest.mark.parametrize(
    ("checkpointing", "memory", "tried"),
    [
        (None, 10, WHOLE[:1]),
        (None, 5, WHOLE[:2]),
        (None, 3, WHOLE[:3]),
        (None, 1, WHOLE),
        (None, 0.5, WHOLE + PARTS[:5]),
        (None, 0, WHOLE + PARTS),
        (False, 3, [*WHOLE[:2], (0, 3)]),
        (True, 1, [(1, 10), (1, 5)]),
    ],
)
def test_auto_takes_what_fits_in_memory(checkpointing, memory, tried, tiny, tmp_path, monkeypatch):
    """An image takes 1 without recomputation, and 0.2 if all blocks are recomputed."""
    attempts, shares, decode = [], [], sd35.decode

    def small_memory(vae, latents):
        attempts.append((shares[-1], len(latents)))
        if len(latents) * (1 - 0.8 * shares[-1]) > memory + 1e-6:
            raise torch.OutOfMemoryError
        return decode(vae, latents)

    trainer = build(tiny, tmp_path, group_size=5, gradient_checkpointing=checkpointing)
    model = trainer.model
    monkeypatch.setattr(sd35, "decode", small_memory)
    monkeypatch.setattr("sd35.run.recompute", lambda _, share: shares.append(share))
    monkeypatch.setattr(sd35.Model, "device", Device("cpu"))
    with nullcontext() if memory else pytest.raises(torch.OutOfMemoryError):
        assert fit_micro_batch(model, trainer.settings) == tried[-1][1] == model.images_per_pass
    assert attempts == tried
    assert all(parameter.grad is None for parameter in model.theta)


# Prompts and settings


def test_a_part_of_the_training_prompts_is_held_out_for_validation(monkeypatch):
    names, lines = [], [{"prompt": f'a sign "{i}"'} for i in range(20)]
    monkeypatch.setattr(train_sd35.prompts, "load", lambda name: names.append(name) or lines)
    training, validation = train_sd35.read_prompts(parse(Settings, ["--reward", "ocr"]))
    assert training + validation == lines and len(validation) == 2
    training, validation = train_sd35.read_prompts(Settings(validation_prompts="own.txt"))
    assert training == validation == lines
    assert names == ["ocr", "pickscore", "own.txt"]
    del lines[3:]
    training, validation = train_sd35.read_prompts(Settings())
    assert training == lines and validation == lines[:1]  # too few to hold one out


MISTAKES = {
    "--reward magic": "no reward 'magic'",
    "--eval_reward nowhere.py:f": "there is no file nowhere.py",
    "--train_prompts nowhere.txt": "cannot read nowhere.txt",
    "--reward ocr --validation_prompts fit.txt": "ocr cannot score prompt 1",
    "--eval_reward ocr --validation_prompts unfit.txt": "ocr cannot score prompt 2",
    "--reward_model http://localhost": "--reward_model takes ",
    "--reward ocr --eval_reward pickscore --reward_model picscore=mine": "got picscore=mine",
    "--init_lora nowhere": "--init_lora must be a folder with pytorch_lora_weights.safetensors or",
    "--report_to paper": "--report_to paper: give none or one of",
    "--push_to_hub": "--push_to_hub needs a token; run `hf auth login`, or set HF_TOKEN",
    "--t_min 0.99": "--train_timesteps 2: only 1 of the rollout's 4 times",
    "--resume_from_checkpoint checkpoint-1": "checkpoint-1 is not a checkpoint",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_before_the_model_is_loaded(
    mistake, tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(train_sd35.huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(sd35, "load_pipeline", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fit.txt").write_text('a sign "YES"')
    (tmp_path / "unfit.txt").write_text('a sign "YES"\na sign')
    line = [*flags(tiny, tmp_path / "run"), *mistake.split()]
    monkeypatch.setattr("sys.argv", ["train_sd35.py", *line])
    with pytest.raises(SystemExit) as end:
        run_script(train_sd35.main)
    *_, sentence = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and sentence.startswith("train_sd35.py: ")
    assert MISTAKES[mistake] in sentence and not (tmp_path / "run").exists()


def test_processes_wait_long_for_the_one_that_validates(monkeypatch):
    asked = {}
    monkeypatch.setattr(train_sd35, "Accelerator", lambda **more: asked.update(more))
    train_sd35.make_accelerator(Settings())
    (patience,) = asked["kwargs_handlers"]
    assert patience.timeout >= timedelta(hours=12)


# Runs


def test_a_run_leaves_what_a_person_wants_to_see(plain):
    lines, name = metrics(plain), f"{REWARD}:brightness"
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert 0 < line["reward"] < 1 and line["reward"] == line[f"reward/{name}"]
        assert line["reward_std"] > 0 and line["equal_groups"] == 0 and line["kl"] >= 0
        assert 0.4 < line["gate"] < 0.6 and 0 <= line["clipped"] <= 1 and line["grad_norm"] > 0
        parts = [line[f"seconds/{phase}"] for phase in ("rollout", "decode", "wait", "train")]
        assert line["seconds/reward"] > 0
        assert 0.5 * line["seconds"] < sum(parts) <= line["seconds"]
        assert line["images_per_second"] == pytest.approx(12 / line["seconds"])
    assert lines[0]["gate"] == 0.5 and lines[0]["kl"] == 0  # theta is still the reference
    assert {f"eval/{name}", f"eval_base/{name}"} <= lines[-1].keys()
    for file in ("curves.png", "validation/step-000003.png", "README.md", "settings.yaml"):
        assert (plain / file).stat().st_size > 100
    assert not list(plain.glob(".*"))  # nothing half-written is left


def test_the_lora_draws_the_validation_image_in_diffusers(plain, tiny):
    chosen = Settings(**yaml.safe_load((plain / "settings.yaml").read_text()))
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny, dtype=torch.float32)
    pipe.scheduler = sd35.make_scheduler(chosen.sampler, chosen.flow_shift)
    noise = torch.randn(1, 3, 8, 8, generator=sd35.seeded(chosen.seed, sd35.VALIDATION, 0))

    def draw():
        output = pipe(
            train_sd35.read_prompts(chosen)[1][0]["prompt"],
            latents=noise,
            num_inference_steps=chosen.eval_inference_steps,
            guidance_scale=chosen.guidance_scale,
            height=shapes.SIDE,
            width=shapes.SIDE,
            max_sequence_length=chosen.max_sequence_length,
        )
        return np.asarray(output.images[0])

    sheet = np.asarray(Image.open(plain / "validation" / "step-000003.png"))
    base, now = (sheet[22:214:12, x : x + 192 : 12] for x in (0, 192))
    assert np.array_equal(draw(), base)
    pipe.load_lora_weights(plain, weight_name="pytorch_lora_weights.safetensors")
    assert np.array_equal(draw(), now) and not np.array_equal(now, base)


def test_auto_and_gradient_checkpointing_change_no_step(plain, tiny, tmp_path, capsys):
    changed = run(tiny, tmp_path, micro_batch_size="auto", gradient_checkpointing=True)
    assert "--micro_batch_size auto: 4" in capsys.readouterr().out
    assert difference(lora(plain), changed) < 1e-5


def test_two_processes_take_the_same_steps(plain, tiny, tmp_path):
    """Three prompts on two processes: one has two groups, the other one."""
    assert on_two_processes(lambda: train_sd35.train(settings(tiny, tmp_path))) == [0, 0]
    assert difference(lora(plain), lora(tmp_path)) < 1e-5
    one, two = metrics(plain), metrics(tmp_path)
    for key in ("reward", "reward_std", "gate", "gap", "kl", "grad_norm", *one[-1].keys() - one[0]):
        pairs = [[line[key] for line in lines if key in line] for lines in (one, two)]
        assert pairs[0] == pytest.approx(pairs[1], rel=1e-3, abs=2e-6)


def test_the_thread_of_the_rewards_works_on_the_models_gpu(monkeypatch):
    """accelerate names a single GPU "cuda", and torch.cuda.set_device needs its number."""
    chosen, model = [], SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for device in ("cuda", "cpu"):
        trainer = SimpleNamespace(device=torch.device(device), model=model)
        train_sd35.Trainer.on_device(trainer)
    assert chosen == [torch.device("cuda", 0)]


def test_a_reward_is_loaded_once_and_watched_by_the_main_process_alone(tiny, tmp_path, monkeypatch):
    load, loaded = train_sd35.rewards.load, []
    monkeypatch.setattr(train_sd35.rewards, "load", lambda *a: loaded.append(a[0]) or load(*a))
    both = [f"{REWARD}:brightness", f"{REWARD}:darkness"]
    trainer = build(tiny, tmp_path, eval_reward=both)
    assert list(trainer.rewards) == both[:1] and list(trainer.watched) == loaded == both
    monkeypatch.setattr(Accelerator, "is_main_process", False)
    assert list(build(tiny, tmp_path, eval_reward=both).watched) == both[:1]


def test_validation_images_without_a_score_are_left_out(tiny, tmp_path):
    """nan_for_some has none for the last of a batch whose first prompt is odd in length."""
    (tmp_path / "odd.txt").write_text("blue disc\nred square\ngreen disc")
    name, lists = f"{REWARD}:nan_for_some", {"validation_prompts": tmp_path / "odd.txt"}
    trainer = build(tiny, tmp_path, eval_reward=name, **lists)
    watched = train_sd35.prompts.load(trainer.settings.validation_prompts)
    trainer.model.encoded = trainer.encoder([line["prompt"] for line in watched], {})
    how = trainer.watched, trainer.reward_thread
    watch = train_sd35.report.Validation(trainer.settings, trainer.model, watched, *how)
    means, _ = watch(1)
    with trainer.model.saved_average():
        now = watch.draw()
    expected = {"eval_base": watch.base[:2].mean(), "eval": now[:2].mean()}
    for kind, mean in expected.items():
        assert means[f"{kind}/{name}"] == pytest.approx(mean.item(), abs=1e-6)


def test_a_reward_that_is_only_watched_changes_no_step(plain, tiny, tmp_path):
    run(tiny, tmp_path, eval_reward=f"{REWARD}:darkness", validation_steps=2)
    assert bits(tmp_path) == bits(plain)
    shown = [line for line in metrics(tmp_path) if f"eval/{REWARD}:darkness" in line]
    assert [line["step"] for line in shown] == [2, 3]
    for line in shown:
        for kind in ("eval", "eval_base"):
            both = line[f"{kind}/{REWARD}:darkness"] + line[f"{kind}/{REWARD}:brightness"]
            assert both == pytest.approx(1)


CACHED = """
import threading
cache = threading.local()
cache.calls = []  # which only the thread that loads this file has

def reward(images, prompts, metadata):
    cache.calls.append(prompts)
    return images.mean((1, 2, 3)), {"words": len(metadata[0]["prompt"].split())}
"""


def test_rewards_are_loaded_and_called_in_one_thread_and_their_info_is_logged(tiny, tmp_path):
    (tmp_path / "cached.py").write_text(CACHED)
    small = {"max_train_steps": 1, "prompts_per_step": 1}
    run(tiny, tmp_path / "run", reward=f"{tmp_path}/cached.py:reward", **small)
    (line,) = metrics(tmp_path / "run")
    assert line[f"info/{tmp_path}/cached.py:reward/words"] in (2, 3, 5)


def test_a_finished_run_does_nothing_unless_it_is_to_be_pushed(
    plain, tiny, tmp_path, monkeypatch, capsys
):
    shutil.copytree(plain, tmp_path / "run")
    again = {"resume_from_checkpoint": "latest"}
    run(tiny, tmp_path / "run", **again)
    assert "nothing to do: the run in" in capsys.readouterr().out
    uploaded = []
    monkeypatch.setattr(train_sd35.huggingface_hub, "get_token", lambda: "token")
    monkeypatch.setattr(train_sd35.report, "make_repository", lambda settings: None)
    monkeypatch.setattr(train_sd35.report, "upload", lambda s: uploaded.append(s.output_dir))
    run(tiny, tmp_path / "run", push_to_hub=True, **again)
    assert uploaded == [str(tmp_path / "run")] and bits(tmp_path / "run") == bits(plain)


def test_prompts_that_are_truncated_are_announced(tiny, tmp_path, capsys):
    run(tiny, tmp_path, max_sequence_length=4, max_train_steps=1, prompts_per_step=1)
    said = r"\d prompts are longer than the text encoders read, such as 'red square on the left'"
    assert re.search(said, capsys.readouterr().out)


def test_whatever_ends_a_run_its_steps_are_saved(tiny, tmp_path, monkeypatch):
    decode, calls = sd35.decode, []

    def full(vae, latents):
        calls.append(len(latents))
        if len(calls) == 5:  # in the second step
            raise torch.OutOfMemoryError
        return decode(vae, latents)

    monkeypatch.setattr(sd35, "decode", full)
    said = "out of memory after 1 steps; continue .*; lower --micro_batch_size or quantize"
    with pytest.raises(UserError, match=said):
        run(tiny, tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1"]


def test_five_steps_without_a_finite_gradient_end_the_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train_sd35.Trainer, "update", lambda trainer, trained: None)
    small = {"prompts_per_step": 1, "group_size": 2, "num_inference_steps": 2, "t_min": 0}
    with pytest.raises(UserError, match="5 steps in a row had no finite gradient; lower --learn"):
        run(tiny, tmp_path, max_train_steps=9, **small)
    assert [line["grad_norm"] for line in metrics(tmp_path)] == [None] * 5


def test_an_exact_reward_rises_under_the_learning_rate_of_each_step(tiny, tmp_path):
    """The background is bright, so that there is room for darkness."""
    chosen = {"max_train_steps": 10, "learning_rate": 3e-2, "lr_warmup_steps": 2, "group_size": 8}
    chosen |= {"prompts_per_step": 2, "num_inference_steps": 3, "micro_batch_size": 16}
    chosen |= {"guidance_scale": 1, "old_after": 100, "clip": 0, "kl": 0, "beta": 1}
    run(tiny, tmp_path, reward=f"{REWARD}:darkness", **chosen)
    lines = metrics(tmp_path)
    rewards = [line["reward"] for line in lines]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 3 * np.std(rewards[:3])
    schedule = parse(Settings, flags(tiny, tmp_path, **chosen))
    rates = [learning_rate_at(schedule, step) for step in range(10)]
    assert [line["learning_rate"] for line in lines] == rates
