"""The steps of the trainer, on a tiny untrained pipeline of SD3.5's classes."""

import contextlib
import copy
import math
import threading
import time
from concurrent import futures

import pytest
import torch
from diffusers.optimization import get_scheduler
from tiny_run import SAME, bits, flags, metrics, run

import bench
import cli
import records
import train_sd35


def trained(tiny, out, **changed):
    """A trainer with a LoRA that does something, and a group's latents and advantages."""
    return bench.prepare(train_sd35.parse_args(flags(tiny, out, **changed), bench.Arguments))


def theta_gradient(trainer, x0, advantages):
    return bench.gradients(
        trainer, lambda: trainer.backward_group(0, 0, bench.TEXT, x0, advantages)
    )


def test_with_an_ema_reference_the_kl_stays_to_the_frozen_guided_one(tiny, tmp_path):
    """What kl adds to the gradient is the same, whoever is compared with in the gap."""
    added = {}
    for recipe in ("cfg_free", "cfg_free_ema"):
        found = []
        for kl in (0, 0.5):
            settings = {"recipe": recipe, "kl": kl, "beta": 10, "clip": 0}
            found.append(theta_gradient(*trained(tiny, tmp_path, **settings)))
        added[recipe] = [b - a for a, b in zip(*found, strict=True)]
    assert sum(g.abs().sum() for g in added["cfg_free"]) > 1e-3
    assert bench.distance(added["cfg_free_ema"], added["cfg_free"]) < 1e-4


def test_an_ema_reference_costs_no_pass_more(tiny, tmp_path, monkeypatch):
    counted = {}
    for recipe in ("cfg_free", "cfg_free_ema"):
        settings = {"recipe": recipe, "kl": 0.1, "clip": 1e-3, "micro_batch_size": 4}
        trainer, *group = trained(tiny, tmp_path, **settings)
        images, forward = [], trainer.model.pipe.transformer.forward
        monkeypatch.setattr(
            trainer.model.pipe.transformer,
            "forward",
            lambda *a, f=forward, n=images, **k: n.append(len(k["hidden_states"])) or f(*a, **k),
        )
        theta_gradient(trainer, *group)
        counted[recipe] = images
    # At each of two times: the guided reference, theta_old, and theta; in the gap theta_old again.
    assert sorted(counted["cfg_free_ema"]) == sorted(counted["cfg_free"]) == [4, 4, 4, 4, 8, 8]


def test_a_group_of_equal_rewards_keeps_its_kl(tiny, tmp_path, monkeypatch):
    trainer, x0, _ = trained(tiny, tmp_path, kl=0.5, clip=1e-3)
    equal = torch.zeros(len(x0))
    asked = []
    for name in ("reference", "theta_old"):
        who = getattr(trainer.model, name)
        monkeypatch.setattr(
            trainer.model, name, lambda who=who, name=name: asked.append(name) or who()
        )
    found = theta_gradient(trainer, x0, equal)
    assert set(asked) == {"reference"}
    expected = [torch.zeros_like(gradient) for gradient in found]
    model, args, K = trainer.model, trainer.args, trainer.args.train_timesteps
    generator = train_sd35.seeded(args.seed, train_sd35.TIMES, 0)
    for k, i in enumerate(torch.randperm(len(trainer.times), generator=generator)[:K]):
        t = trainer.times[i].expand(len(x0))
        eps = trainer.noise(train_sd35.TRAINING_NOISE, 0, 0, k)
        x_t = (1 - t[0]) * x0 + t[0] * eps
        with torch.no_grad(), model.reference():
            v_ref = model.velocity(bench.TEXT, args.reference_guidance_scale)(x_t, t, t)
        kl = (model.velocity(bench.TEXT)(x_t, t, t) - v_ref).square().mean()
        loss = args.kl * kl / K / args.prompts_per_step
        for total, gradient in zip(expected, torch.autograd.grad(loss, model.theta), strict=True):
            total += gradient
    assert bench.distance(found, expected) < 1e-5


def test_the_trained_times_are_the_schedulers_integers():
    args = train_sd35.parse_args(["--reward", "ocr"])
    times = train_sd35.trained_times(args)
    assert times.tolist() == pytest.approx([t / 1000 for t in (999, 963, 922, 874, 817, 749, 666)])
    assert (1000 * times).tolist() == [999, 963, 922, 874, 817, 749, 666]  # what the model is told


def test_rollouts_come_from_theta_old_after_old_after_not_at_it(tiny, tmp_path, monkeypatch):
    trainer, *_ = trained(tiny, tmp_path, old_after=3)
    asked, old = [], trainer.model.theta_old
    monkeypatch.setattr(trainer.model, "theta_old", lambda: asked.append(step) or old())
    for step in range(1, 6):
        trainer.rollout(step, 0, bench.TEXT)
    assert asked == [4, 5]


@pytest.mark.parametrize(("reward", "left"), [("ocr", 0.0138), ("pickscore", 0.00019)])
def test_the_saved_average_forgets_the_first_lora_as_released(reward, left, tiny, tmp_path):
    """After 50 steps: the product of ((1 + n) / (10 + n)) ** updates, n = 7, 15, ... 47."""
    args = train_sd35.parse_args(flags(tiny, tmp_path, reward=reward), bench.Arguments)
    trainer, *_ = bench.prepare(args)
    for first, theta in zip(trainer.model.average, trainer.model.theta, strict=True):
        first.fill_(1.0)
        theta.data.fill_(0.0)
    weights = []
    for step in range(50):
        trainer.follow(step)
        weights.append(trainer.model.average[0].flatten()[0].item())
    updates = {"ocr": 2, "pickscore": 4}[reward]
    expected = math.prod(((1 + n) / (10 + n)) ** updates for n in (7, 15, 23, 31, 39, 47))
    assert weights[-1] == pytest.approx(expected, rel=1e-4)
    assert weights[-1] == pytest.approx(left, rel=0.02)
    assert weights[5] == 1.0 and weights[6] == pytest.approx((8 / 17) ** updates)


def scored(args, **scores):
    """group_advantages of the trainer for rewards of these scores, each with its weight."""
    found = {name: (w, torch.tensor(values)) for name, (w, values) in scores.items()}
    return train_sd35.group_advantages(args, found)


def test_one_bad_sample_of_128_does_not_outweigh_the_batch():
    scores = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)) * 0.01
    scores[2, 3] = -9
    args = train_sd35.parse_args(["--reward", "ocr"])
    found = scored(args, ocr=(1.0, scores.tolist()))
    assert found.min() == found[2, 3] and -5.5 < found[2, 3] < -5  # without the clamp, -10.6
    assert found.sum(1).abs().max() < 1e-5


ONE, OTHER = [[0.0, 1.0, 2.0, 3.0]], [[0.3, 0.1, 0.1, 0.1]]


def test_rewards_of_other_units_count_alike_as_advantages():
    """PickScore moves by ones and OCR by tenths: a plain sum is decided by the former."""
    line = ["--reward", "pickscore", "ocr", "--std", "group"]
    both = {"one": (1.0, ONE), "other": (1.0, OTHER)}
    args = train_sd35.parse_args(line)
    assert args.combine == "advantages"
    found = scored(args, **both)
    one, other = (scored(args, only=(1.0, values)) for values in (ONE, OTHER))
    assert torch.allclose(found, one + other)
    larger = {"one": (1.0, [[10 * v for v in ONE[0]]]), "other": (1.0, OTHER)}
    assert torch.allclose(scored(args, **larger), found, atol=1e-3)
    assert torch.allclose(scored(args, one=(2.0, ONE), other=(0.5, OTHER)), 2 * one + 0.5 * other)
    summed = train_sd35.parse_args([*line, "--combine", "rewards"])
    expected = scored(summed, sum=(1.0, [[a + b for a, b in zip(ONE[0], OTHER[0], strict=True)]]))
    assert torch.allclose(scored(summed, **both), expected)
    assert not torch.allclose(scored(summed, **larger), expected, atol=1e-3)
    assert train_sd35.parse_args(["--reward", "ocr=3"]).combine == "rewards"  # its weight is none


@pytest.mark.parametrize("std", ["group", "batch"])
def test_advantages_of_several_rewards_balance_so_that_z_cancels(std):
    """log Z(c) has the coefficient sum A in the gap: zero in every group, also beside a NaN."""
    args = train_sd35.parse_args(["--reward", "pickscore", "ocr", "--std", std])
    generator = torch.Generator().manual_seed(0)
    one, other = (scale * torch.randn(6, 16, generator=generator) for scale in (1.0, 0.1))
    one[2], other[3, 4] = 7.0, math.nan
    one[5], other[5] = 1.0, 0.0
    found = scored(args, one=(1.0, one.tolist()), other=(2.0, other.tolist()))
    assert found.sum(1).abs().max() < 1e-4 and found.isfinite().all()
    assert [(row != 0).any().item() for row in found] == [True, True, True, False, True, False]


def test_the_learning_rate_depends_on_the_step_alone():
    args = train_sd35.Arguments(learning_rate=2.0, max_train_steps=4, lr_scheduler="cosine")
    rates = [train_sd35.learning_rate(args, step) for step in range(4)]
    assert rates == pytest.approx([2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5])
    args.lr_scheduler = "constant"
    assert {train_sd35.learning_rate(args, step) for step in range(9)} == {2.0}


@pytest.mark.parametrize("name", ["constant_with_warmup", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3, 12])
def test_the_warm_up_is_the_one_of_diffusers(name, warmup):
    theta = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([theta], 2.0)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=10)
    schedule = {"lr_scheduler": name.split("_")[0], "lr_warmup_steps": warmup}
    args = train_sd35.Arguments(learning_rate=2.0, max_train_steps=10, **schedule)
    for step in range(10):
        assert train_sd35.learning_rate(args, step) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_training_on_as_many_samples_as_a_group_has_is_the_default(plain, tiny, tmp_path):
    run(tiny, tmp_path / "run", train_samples=4, updates_per_rollout=1)
    assert bits(tmp_path / "run") == bits(plain)


@pytest.mark.parametrize("std", ["group", "batch"])
@pytest.mark.parametrize("combine", ["rewards", "advantages"])
def test_the_extremes_are_those_of_what_is_trained_on(combine, std):
    """One has the extremes 0 and 5, the other 2 and 3, and a smaller unit that advantages undo."""
    one = [[0.0, 1.0, 1.0, 1.0, 1.0, 2.0], [3.0, 3.0, math.nan, 3.0, 3.0, 3.0]]
    other = [[0.0, 0.0, -0.3, 0.3, 0.0, 0.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]]
    line = f"--reward pickscore ocr --std {std} --combine {combine} --group_size 6"
    args = train_sd35.parse_args([*line.split(), "--train_samples", "2"])
    scores = {
        "one": (1.0, torch.tensor(one, dtype=torch.float64)),
        "other": (20.0, torch.tensor(other, dtype=torch.float64)),
    }
    assert train_sd35.trained_samples(args, scores)[0].tolist() == [2, 3]
    scores["other"] = 2.0, scores["other"][1]
    samples = train_sd35.trained_samples(args, scores)
    assert samples[0].tolist() == ([0, 5] if combine == "rewards" else [2, 3])
    found = train_sd35.group_advantages(args, scores, samples)
    assert found.shape == (2, 2) and found[0, 0] < 0 < found[0, 1]
    assert found.sum(1).abs().max() < 1e-6
    assert (found[1] == 0).all()  # a sample of the group is NaN, though neither of these two


def by_hand(trainer, x0, scores, m, update=0):
    """The gradient of a step of one group, from the formulas alone."""
    args, model, K = trainer.args, trainer.model, trainer.args.train_timesteps
    order = scores.argsort().tolist()
    kept = torch.tensor(order[: m // 2] + order[len(order) - m // 2 :])
    x0, scores = x0[kept], scores[kept]
    advantages = (scores - scores.mean()) / (scores.std(correction=0) + 1e-4)
    seed = (args.seed, train_sd35.TIMES, 0, update)
    order, total = torch.randperm(len(trainer.times), generator=train_sd35.seeded(*seed)), 0
    for k in range(K):
        key = (train_sd35.TRAINING_NOISE, 0, 0, k) + ((update,) if update else ())
        t, eps = trainer.times[order[k]].expand(m), trainer.noise(*key)
        x_t, goal = (1 - t[0]) * x0 + t[0] * eps, eps - x0
        with torch.no_grad():
            reference = model.velocity(bench.TEXT, who=model.reference)(x_t, t, t)
            old = model.velocity(bench.TEXT, who=model.theta_old)(x_t, t, t)
        v = model.velocity(bench.TEXT)(x_t, t, t)

        def far(a, b):
            return (a - b).square().mean((1, 2, 3))

        gap = (advantages * (far(reference, goal) - far(v.detach(), goal))).mean()
        weight = torch.sigmoid(-args.beta * gap) * advantages
        total = total + (weight * far(v, goal) + args.kl * far(v, reference)).mean() / K
        total = total + args.bound * (-weight.clamp(max=0) * far(v, old)).mean() / K
    return torch.autograd.grad(total, model.theta)


BEYOND = {"group_size": 6, "train_samples": 4, "bound": 2, "clip": 0, "kl": 0.1, "std": "group"}
BEYOND |= {"prompts_per_step": 1, "micro_batch_size": 3}


def step_of(tiny, out, monkeypatch, **changed):
    """A trainer whose rollout is known, its latents and scores, and the gradients of its step."""
    trainer, x0, scores = trained(tiny, out, **{**BEYOND, **changed})
    trainer.trained_on = {"known": (1.0, lambda images, prompts: scores)}
    gradients, update = [], trainer.update
    monkeypatch.setattr(trainer, "rollout", lambda *about: x0)

    def watched(trained):
        gradients.append([parameter.grad.clone() for parameter in trainer.model.theta])
        return update(trained)

    monkeypatch.setattr(trainer, "update", watched)
    return trainer, x0, scores, gradients


@pytest.mark.parametrize("bound", [0, 2])
def test_a_step_on_extremes_is_that_of_the_formulas(bound, tiny, tmp_path, monkeypatch):
    trainer, x0, scores, found = step_of(tiny, tmp_path, monkeypatch, bound=bound)
    with torch.no_grad():
        for old in trainer.model.old:  # far behind
            old.mul_(0.5)
    expected, of_all = (by_hand(trainer, x0, scores, m) for m in (4, 6))
    trainer.args.bound = 2 - bound
    bounded_otherwise = by_hand(trainer, x0, scores, 4)
    trainer.args.bound = bound
    metrics = trainer.take_step([{"prompt": bench.TEXT}], 0)
    assert bench.distance(found[0], expected) < 1e-4
    assert min(bench.distance(found[0], other) for other in (of_all, bounded_otherwise)) > 1e-2
    assert metrics["images_per_second"] == pytest.approx(6 / metrics["seconds"])


def test_each_update_from_a_rollout_has_its_own_times_and_noise(tiny, tmp_path, monkeypatch):
    trainer, x0, scores, found = step_of(tiny, tmp_path, monkeypatch, updates_per_rollout=2)
    theta, expected = [[p.detach().clone() for p in trainer.model.theta]], []
    learn = trainer.update

    def one_by_one(trained):
        expected.append(by_hand(trainer, x0, scores, 4, update=len(expected)))
        norm = learn(trained)
        theta.append([p.detach().clone() for p in trainer.model.theta])
        return norm

    monkeypatch.setattr(trainer, "update", one_by_one)
    metrics = trainer.take_step([{"prompt": bench.TEXT}], 0)
    assert len(found) == 2 and metrics["step"] == 1
    for gradient, formula in zip(found, expected, strict=True):
        assert bench.distance(gradient, formula) < 1e-4
    norms = [torch.cat([g.flatten() for g in gradient]).norm().item() for gradient in found]
    assert metrics["grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-5)
    assert all(bench.distance(a, b) > 1e-4 for a, b in zip(theta, theta[1:], strict=False))


@pytest.mark.parametrize("end", [cli.Stopped, torch.OutOfMemoryError, None])
def test_a_step_whose_updates_are_not_all_done_is_undone(end, tiny, tmp_path, monkeypatch):
    """Ended by a signal or a full memory, or with one of them not finite."""
    trainer, *_ = step_of(tiny, tmp_path, monkeypatch, updates_per_rollout=3)
    chosen = [{"prompt": bench.TEXT}]
    trainer.take_step(chosen, 0)
    before = copy.deepcopy([trainer.model.theta, trainer.optimizer.state_dict()])
    backward, asked = trainer.backward_group, []

    def stopped(*about):
        asked.append(about)
        if len(asked) == 3 and end:
            raise end
        found = backward(*about)
        if len(asked) == 3:
            trainer.model.theta[0].grad[0] = float("nan")
        return found

    monkeypatch.setattr(trainer, "backward_group", stopped)
    with pytest.raises(end) if end else contextlib.nullcontext():
        assert trainer.take_step(chosen, 1)["grad_norm"] is None
    assert len(asked) == 3
    assert all(torch.equal(*pair) for pair in zip(trainer.model.theta, before[0], strict=True))
    state = trainer.optimizer.state_dict()["state"]
    for i, kept in before[1]["state"].items():
        assert kept["step"] == 3 and all(torch.equal(state[i][name], kept[name]) for name in kept)


class AtOnce(futures.Executor):
    """An executor without a thread."""

    def __init__(self, *about):
        pass

    def submit(self, work, *args):
        future = futures.Future()
        future.set_result(work(*args))
        return future


def test_scores_beside_the_rollout_take_the_same_steps_to_the_bit(
    plain, tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_sd35.futures, "ThreadPoolExecutor", AtOnce)
    run(tiny, tmp_path / "run")
    assert bits(tmp_path / "run") == bits(plain)
    one, other = metrics(tmp_path / "run"), metrics(plain)
    assert [[a[k] for k in SAME] for a in one] == [[b[k] for k in SAME] for b in other]


@pytest.mark.parametrize("beside", [True, False])
def test_a_group_is_scored_while_the_next_is_drawn(beside, tiny, tmp_path, monkeypatch):
    """Both sleep 0.3 s a group, of which there are three: together 1.2 s, else 1.8 s."""
    trainer, x0, _ = trained(tiny, tmp_path)
    working, order = threading.Lock(), []

    def sleepy(images, prompts):
        assert working.acquire(blocking=False)  # one at a time
        order.append((prompts[0]["i"], threading.current_thread() is threading.main_thread()))
        time.sleep(0.3)
        working.release()
        return images.mean((1, 2, 3))

    def rollout(step, p, text):
        time.sleep(0.3)
        return x0 + 0.1 * p

    if not beside:
        monkeypatch.setattr(train_sd35.futures, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(trainer, "rollout", rollout)
    trainer.trained_on = {"sleepy": (1.0, sleepy)}
    clock = records.Clock(trainer.device)
    chosen = [{"prompt": bench.TEXT, "i": i} for i in range(3)]
    latents, scores = trainer.draw_and_score(chosen, 0, clock)
    assert order == [(i, not beside) for i in range(3)] and list(latents) == [0, 1, 2]
    expected = torch.stack([trainer.model.decode(latents[p]).mean((1, 2, 3)) for p in range(3)])
    assert torch.equal(scores["sleepy"][1], expected) and expected.unique().numel() == 12
    found = clock.metrics(12)
    assert found["seconds/reward"] >= 0.9 and found["seconds/rollout"] >= 0.9
    both = found["seconds/rollout"] + found["seconds/decode"] + found["seconds/reward"]
    assert (found["seconds"] < both - 0.4) == beside
    assert found["seconds/wait"] < (0.85 if beside else 0.3)
