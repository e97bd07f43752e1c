"""The family in the trainer: the gradients are methods.py's, and the comparison loses nothing."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path

import compare_sd35
import family_sd35
import methods
import pytest
import report_sd35
import shapes
import torch
from compare_sd35 import Results
from family_sd35 import Evaluation, Run, World
from report_sd35 import Report, Search

import bench
import cli
import dgpo
import sd35
import train_sd35
from rewards import RewardError

ROOT = Path(__file__).parents[1]
TEXT, P, G = "red diamond", 2, 6


@pytest.fixture(autouse=True)
def keep_signals():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def flags(tiny, **changed):
    """A command line for the tiny pipeline."""
    settings = {
        "model": tiny,
        "train_prompts": f"{tiny}/prompts.jsonl",
        "reward": f"{ROOT}/tests/own_rewards.py:brightness",
        "resolution": shapes.SIDE,
        "max_sequence_length": shapes.TOKENS,
        "num_inference_steps": 4,
        "guidance_scale": 1,
        "eval_inference_steps": 2,
        "train_timesteps": 3,
        "t_min": 0.2,
        "group_size": G,
        "prompts_per_step": P,
        "micro_batch_size": 120,
        "std": "group",
        "beta": 10,
        "kl": 0.1,
        "clip": 0,
        "rank": 4,
        "lora_alpha": 8,
        "old_after": 1000,
        "learning_rate": 1e-2,
        **changed,
    }
    line = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return [*line, "--no_gradient_checkpointing"]


@pytest.fixture
def trainer(tiny):
    """A function that makes a trainer whose theta, theta_old and reference differ."""

    def make(**changed):
        args = train_sd35.parse_args(flags(tiny, **changed), family_sd35.Arguments)
        found, encode = family_sd35.prepare(args)
        found.model.encoded = encode([TEXT], {})
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for values, scale in ((found.model.theta, 0.1), (found.model.old, 0.2)):
                for value in values:
                    value.add_(scale * torch.randn(value.shape, generator=generator))
        return found

    return make


# The gradients.


class Network(torch.nn.Module):
    """The transformer as methods.py sees a network: (x (N, D), t (N,), c (N,)) -> v."""

    def __init__(self, model, who=contextlib.nullcontext):
        super().__init__()
        self.v, self.shape = model.velocity(TEXT, who=who), model.latent_shape

    def forward(self, x, t, c):
        return self.v(x.view(-1, *self.shape), t, c).flatten(1)


def networks(model):
    return methods.Networks(
        Network(model), Network(model, model.reference), Network(model, model.theta_old)
    )


REWARDS = torch.tensor([[0.3, -1.0, 0.9, 0.1, -0.4, 2.0]])

# What the trainer is told, and what methods.py is.
DENOISING = {
    "DGPO": ({}, {"beta": 10}),
    "DGPO with bound": ({"bound": 2, "clip": 1e-3}, {"beta": 10, "bound": 2, "clip": 1e-3}),
    "DiffusionNFT": ({"method": "NFT", "beta": 0.7}, {"method": "NFT", "beta": 0.7}),
}


def of_theta(trainer, work):
    return bench.gradients(trainer, work)


@pytest.mark.parametrize("name", DENOISING)
@pytest.mark.parametrize("update", [0, 1])
def test_the_gradient_at_noise_is_that_of_the_toy(name, update, trainer, monkeypatch):
    told, setting = DENOISING[name]
    made = trainer(**told)
    args, model, K = made.args, made.model, made.args.train_timesteps
    x0 = torch.randn(G, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    advantages = dgpo.group_advantages(REWARDS)[0]
    found = of_theta(made, lambda: made.backward_group(4, 1, TEXT, x0, advantages, update))

    later = (update,) if update else ()
    seed = train_sd35.seeded(args.seed, train_sd35.TIMES, 4, *later)
    t = made.times[torch.randperm(len(made.times), generator=seed)[:K], None]
    eps = [made.noise(train_sd35.TRAINING_NOISE, 4, 1, k, *later) for k in range(K)]
    eps = torch.stack(eps).flatten(1)[:, None]
    rollout = methods.Rollout(torch.zeros(1), x0.flatten(1)[None], REWARDS, None, None)
    setting = methods.Setting("ring-2", **{"method": "DGPO", "kl": args.kl, **setting})
    setting = dataclasses.replace(setting, timesteps=K)
    with monkeypatch.context() as patch:
        patch.setattr(dgpo, "sample_timesteps", lambda *about: t)
        patch.setattr(torch, "randn", lambda *about, **more: eps)
        expected = of_theta(
            made, lambda: methods.backward_denoising(networks(model), setting, rollout, None)
        )
    assert bench.distance(found, [grad / P for grad in expected]) < 1e-4
    if name == "DiffusionNFT":  # which is not DGPO's
        made.args.method, made.args.beta = "DGPO", 10
        other = of_theta(made, lambda: made.backward_group(4, 1, TEXT, x0, advantages, update))
        assert bench.distance(found, other) > 0.1


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_gradient_of_a_trajectory_is_that_of_the_toy(share, trainer):
    """Before and after an update, when the clip has something to do."""
    made = trainer(method="Flow-GRPO", sde_noise=0.7, clip=0.2, trained_share=share)
    args, model = made.args, made.model
    made.rollout(4, 1, TEXT)
    trajectory, advantages = made.trajectories[1], dgpo.group_advantages(REWARDS)[0]
    assert trajectory.shape == (G, 5, *model.latent_shape)
    rollout = methods.Rollout(
        torch.zeros(1), None, REWARDS, trajectory.transpose(0, 1).flatten(2)[:, None], None
    )
    rollout.times = made.sde_times()
    setting = {"kl": args.kl, "clip": 0.2, "sde_noise": 0.7, "trained_share": share}
    setting = methods.Setting("ring-2", "Flow-GRPO", rollout_steps=3, **setting)
    for update in range(2):
        group = 4, 1, TEXT, trajectory, advantages, update
        found = of_theta(made, functools.partial(made.backward_group, *group))
        expected = of_theta(
            made, lambda: methods.backward_flow_grpo(networks(model), setting, rollout)
        )
        assert bench.distance(found, [grad / P for grad in expected]) < 1e-4
        with torch.no_grad():
            for parameter in model.theta:
                parameter.mul_(1.02)


# Rollouts and steps.


def test_dgpo_is_the_trainer_bit_for_bit(tiny, tmp_path, monkeypatch):
    """What a run of the comparison evaluates is the LoRA that train_sd35.py saves."""
    changed = {"max_train_steps": 3, "train_samples": 4, "bound": 2, "updates_per_rollout": 2}
    line = flags(tiny, **changed, ema_steps=2, output_dir=tmp_path, validation_steps=100)
    train_sd35.train(train_sd35.parse_args(line))
    (saved,) = tmp_path.glob("*.safetensors")
    from safetensors.torch import load_file

    trainers, prepare = [], family_sd35.prepare

    def watched(args):
        found = prepare(args)
        trainers.append(found[0])
        return found

    monkeypatch.setattr(family_sd35, "prepare", watched)
    small_world(tiny, monkeypatch, budget=3 * 288, **changed, ema_steps=2)
    found = family_sd35.run_setting("shapes", {}, 0, 3 * 288)
    assert found[-1].cost == 3 * 288
    (trainer,) = trainers
    named = zip(trainer.model.theta, trainer.model.average, strict=True)
    average = {tuple(theta.shape): [] for theta in trainer.model.theta}
    for theta, value in named:
        average[tuple(theta.shape)].append(value.detach())
    kept = list(load_file(saved).values())
    assert len(kept) == len(trainer.model.average) > 10
    assert all(any(torch.equal(a, b) for b in average[tuple(a.shape)]) for a in kept)
    assert any(bool(a.abs().max() > 1e-3) for a in kept)


def small_world(tiny, monkeypatch, budget=8000, goal=2.0, **changed):
    """Makes "shapes" a world of the tiny pipeline and a reward of its own."""
    monkeypatch.setattr(family_sd35, "config", lambda world: flags(tiny, **changed))
    monkeypatch.setitem(family_sd35.WORLDS, "shapes", World("cleanness", goal, goal, budget, 2, 1))


STEPS = {
    "DGPO": {},
    "DGPO with dials": {"train_samples": 2, "bound": 2, "updates_per_rollout": 2},
    "Flow-GRPO": {"method": "Flow-GRPO", "sde_noise": 0.7, "train_samples": 4},
    "noisiest steps": {"method": "Flow-GRPO", "sde_noise": 0.7, "trained_share": 0.5},
    "DiffusionNFT": {"method": "NFT", "updates_per_rollout": 2},
    "SDE rollouts": {"sde_noise": 0.7},
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_costs_what_is_counted(name, trainer, monkeypatch):
    """Every forward of the transformer is counted here, and a backward as two of them."""
    made, counted = trainer(**STEPS[name]), []
    forward = made.model.pipe.transformer.forward

    def watched(*about, **more):
        found = forward(*about, **more)
        counted.append(len(more["hidden_states"]) * (3 if found[0].requires_grad else 1))
        return found

    monkeypatch.setattr(made.model.pipe.transformer, "forward", watched)
    before = [parameter.clone() for parameter in made.model.theta]
    metrics = made.take_step([{"prompt": TEXT}] * P, 0)
    assert sum(counted) == family_sd35.step_cost(made.args)
    assert metrics["grad_norm"] > 0 and math.isfinite(metrics["loss"])
    assert not all(map(torch.equal, before, made.model.theta))


def test_without_noise_the_sde_is_eulers_ode_and_with_it_noise_is_each_samples_own(trainer):
    made = trainer(sde_noise=1e-9)
    noise = torch.stack([made.noise(train_sd35.NOISE, 3, 1, g) for g in range(G)])
    made.model.pipe.scheduler = sd35.make_scheduler("euler", 3.0)
    expected = made.model.sample(TEXT, noise, 4, 1.0)
    # The scheduler's times are rounded down for the network, and not for the sampler.
    assert torch.allclose(made.rollout(3, 1, TEXT), expected, atol=2e-2)

    made.args.sde_noise = 0.7
    first, again = made.rollout(3, 1, TEXT), made.rollout(3, 1, TEXT)
    assert torch.equal(first, again) and (first - expected).abs().mean() > 0.1
    made.args.group_size = 3  # by sample, whatever the group
    assert torch.allclose(made.rollout(3, 1, TEXT), first[:3], atol=1e-5)
    assert not torch.allclose(made.rollout(4, 1, TEXT), first[:3], atol=1e-2)
    with torch.no_grad():
        for parameter in made.model.theta:
            parameter.mul_(2)
    assert not torch.allclose(made.rollout(3, 1, TEXT), first[:3], atol=1e-5)
    made.args.offline = True
    offline = made.rollout(3, 1, TEXT)
    with torch.no_grad():
        for parameter in made.model.theta:
            parameter.mul_(2)
    assert torch.equal(made.rollout(3, 1, TEXT), offline)


# The protocol.


def evaluations(*accuracies, cost=1000):
    return [Evaluation(cost * i, 0.1 * i, a, -0.01) for i, a in enumerate(accuracies)]


@pytest.mark.parametrize("world", family_sd35.WORLDS)
def test_a_world_is_found_from_any_folder(world):
    line = family_sd35.config(world)
    paths = [word.partition("=")[2] or word for word in line if "toy/" in word]
    assert len(paths) >= 5 and all(path.startswith(f"{ROOT}/toy/") for path in paths)


def test_arrival_needs_staying():
    def arrival(*accuracies):
        return family_sd35.arrival(evaluations(*accuracies), 0.9)

    assert arrival(0.4, 0.8, 0.92, 0.95) == 2000
    assert arrival(0.4, 0.8, 0.92) is None  # not for long
    assert arrival(0.4, 0.92, 0.8, 0.95, 0.95) == 3000
    assert arrival(0.4, 0.92, 0.92, 0.92, 0.8) is None
    assert arrival(0.4, 0.92, *[0.95] * 8, 0.8, 0.95) == 1000


def test_a_run_of_a_smaller_budget_is_the_beginning_of_a_longer_one(tiny, monkeypatch):
    small_world(tiny, monkeypatch, budget=2000)
    long, short = (family_sd35.run_setting("shapes", {}, 100, b) for b in (2000, 500))
    begun = Run(2000, long).until(500, 2.0).evaluations
    assert len(short) < len(long)

    def alike(found):
        return [(one.cost, one.accuracy, one.quality) for one in found]

    assert alike(short) == alike(begun) == alike(long)[: len(short)]


def test_a_run_that_has_arrived_ends_and_one_that_blows_up_too(tiny, monkeypatch):
    small_world(tiny, monkeypatch, budget=100_000, goal=0.0)
    found = family_sd35.run_setting("shapes", {}, 0, 100_000)
    assert found[-1].cost < 10_000
    small_world(tiny, monkeypatch, budget=4000, learning_rate=1e30)
    found = family_sd35.run_setting("shapes", {}, 0, 4000)
    assert found[-1].cost < 4000


def test_dials_have_the_same_luck_and_more_settings_are_the_same_and_others():
    for name in compare_sd35.METHODS:
        few, many = compare_sd35.tried(name, 2), compare_sd35.tried(name, 12)
        assert few == many[:2] and len({json.dumps(one) for one in many}) == 12
    one, other = (compare_sd35.tried(name, 12)[2:] for name in ("DGPO", "Flow-GRPO"))
    assert [s["learning_rate"] for s in one] == [s["learning_rate"] for s in other]
    assert all(0.3 <= s["sde_noise"] <= 1 for s in other)
    assert min(compare_sd35.PASSES) == 2 and max(compare_sd35.PASSES) >= 12


class MadeUp(Results):
    """Runs that arrive as a function of the setting and the seed says."""

    def __init__(self, cost_of):
        self.cost_of, self.asked, self.pool = cost_of, [], None

    def run(self, world, setting, seed, budget, base=0):
        self.asked.append((setting, seed, budget))
        cost = self.cost_of(setting, seed)
        rest = [Evaluation(cost * k, 1.0, 0.99, 0.0) for k in (1, 2)] if cost <= budget else []
        end = Evaluation(budget, 1.0, 0.99 if cost <= budget else 0.5 + 1e-9 * (1e6 - cost), 0.0)
        return Run(budget, [Evaluation(0, 0.0, 0.5, 0.0), *rest, end], cost if rest else None)


def test_a_search_halves_and_prefers_what_arrives(monkeypatch):
    rates = sorted(s.get("learning_rate", 0) for s in compare_sd35.tried("DGPO", 12))
    goal = rates[-2]

    def cost(setting, seed):
        return round(30_000 * (1 + 1000 * abs(setting.get("learning_rate", 0) - goal)))

    results = MadeUp(cost)
    monkeypatch.setattr(compare_sd35, "LOWEST", {})
    found = compare_sd35.search(results, "words", "DGPO", 12)
    assert found.best["learning_rate"] == goal and found.tried == 12 and found.work >= 1
    budget = family_sd35.WORLDS["words"].budget
    counted = [sum(asked == budget / of for *_, asked in results.asked) for of in (8, 2, 1)]
    assert counted == [12, 4, 2]
    assert {seed for _, seed, _ in results.asked} == {compare_sd35.TUNING_SEED}
    assert compare_sd35.TUNING_SEED not in compare_sd35.FRESH_SEEDS
    variant = compare_sd35.chosen(results, "words", "DGPO offline", 12)
    assert variant.best == found.best | {"offline": True}

    goal = 1e-4  # of a setting that is among MORE, and tried in the largest search alone
    monkeypatch.setitem(compare_sd35.MORE, ("words", "DGPO"), [{"learning_rate": goal, "beta": 1}])
    found = compare_sd35.search(results, "words", "DGPO", 12)
    assert found.best["learning_rate"] == goal and found.tried == 13
    assert found.edges == ["learning_rate (low)", "beta (low)"]
    assert compare_sd35.search(results, "shapes", "DGPO", 12).tried == 12


def test_where_the_best_is_at_an_edge_the_search_goes_beyond_it(monkeypatch):
    """A best beta at the low end is tried lower; it is at an edge only of what was tried."""
    name, place = "DGPO", 9
    monkeypatch.setattr(compare_sd35, "LOWEST", {("words", name): place})
    twelve, wider = compare_sd35.tried(name, 12), compare_sd35.tried(name, 12, "words")
    best = twelve[place]
    lower = [best | {"beta": beta} for beta in compare_sd35.LOWER_BETAS]
    assert wider == twelve + lower and compare_sd35.tried(name, 6, "words") == twelve[:6]
    assert compare_sd35.at_edges(name, best, twelve) == ["beta (low)"]
    assert compare_sd35.at_edges(name, best, wider) == []
    assert compare_sd35.at_edges(name, lower[-1], wider) == ["beta (low)"]


def test_a_report_is_of_what_a_search_finds_twice(monkeypatch):
    """Runs of another pipeline that a search replaces by longer ones may rank otherwise then."""
    found = iter([{"beta": 1.0}, {"beta": 2.0}, {"beta": 2.0}])
    monkeypatch.setattr(
        compare_sd35, "chosen", lambda *_: Search(next(found, {"beta": 2.0}), 12, 1, [])
    )
    results = MadeUp(lambda *_: 1000)
    results.base = lambda world: 0
    compare_sd35.measure(results, "words", "DGPO", 12)
    assert [setting for setting, *_ in results.asked] == 3 * [{"beta": 2.0}]


def arriving(*costs, budget=400_000):
    return [Run(budget, evaluations(0.5, 0.99, cost=cost or budget), cost) for cost in costs]


def test_a_ratio_says_no_more_than_the_seeds_do():
    one, far = arriving(100, 110, 90), arriving(1000, 1100, 900)
    middle, low, high = map(float, re.findall(r"[\d.]+", report_sd35.ratio(one, far)))
    assert middle == 10 and 4 < low < 8 and 13 < high < 25
    variance = torch.tensor([100.0, 110, 90]).log().var() + math.log(2) ** 2 / 16 / 12
    by_hand = (2 / 3 * variance) ** 0.5  # evaluations are a factor of 2^(1/4) apart
    assert high == pytest.approx(10 * math.exp(4.303 * by_hand), abs=0.06)
    assert report_sd35.ratio(one, arriving(1000, None, 900)).startswith("> ")
    assert report_sd35.ratio(arriving(100, None, 90), far) == "-"
    assert "[" not in report_sd35.ratio(one[:2], far)


def test_the_table_says_how_many_settings_and_seeds(tmp_path):
    about = Search({"beta": 3.0}, 5, 4, ["beta (low)"])
    found = {"DGPO with dials": Report(about, arriving(20_000, 30_000))}
    found["Flow-GRPO"] = Report(about, arriving(200_000, None, 300_000))
    cells = dict(
        zip(report_sd35.HEADER, report_sd35.row(("words", 0), "Flow-GRPO", found), strict=True)
    )
    assert cells["settings tried"] == "5" and cells["that work"] == "4 of 5"
    assert cells["arrived"] == "2 of 3" and cells["cost to arrive"] == "> 300 (200 to 400)"
    assert cells["ratio"].startswith("> ")
    seen = [(0, 0.5), (20_000, 0.92), (100_000, 0.93), (400_000, 0.95)]
    late = Run(400_000, [Evaluation(cost, 0.0, accuracy, 0.0) for cost, accuracy in seen])
    assert report_sd35.cost_cells([late]) == ["0 of 1", "> 400 (400 to 400)"]
    assert report_sd35.cost_cells(report_sd35.nearing("words", [late]))[1] == "20 (20 to 20)"
    places = {("words", 0): found, ("words", 1): {"Flow-GRPO": found["Flow-GRPO"]}}
    report_sd35.plot(tmp_path / "figure.png", places)
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert report_sd35.row(("words", 1), "Flow-GRPO", found)[0] == "words, pipeline 2"
    rows = report_sd35.choices(places)
    assert [row[1] for row in rows] == [*found] and rows[0][-1] == "beta (low)"


# What is kept.


def slow_run(world, setting, seed, budget):
    """In place of a run of training."""
    with (Path(os.environ["RUNS"]) / "log").open("a") as file:
        file.write(f"{setting} {seed}\n")
    time.sleep(float(os.environ.get("SECONDS_OF_A_RUN", 0.2)))
    return [Evaluation(0, 0.0, 0.5, 0.0), Evaluation(budget, 1.0, 0.6, 0.0)]


def comparison(out, line=("--full",), seconds=0.2):
    """A process of its own: three settings and three seeds for each of two methods."""
    os.setsid()
    os.environ["RUNS"] = str(out)
    sys.stdout, sys.stderr = (out / "stdout").open("w"), (out / "stderr").open("w")
    compare_sd35.run_setting = slow_run
    compare_sd35.PASSES = {3: ((1 / 8, 1),)}
    compare_sd35.ORDER = [("shapes", "DGPO"), ("shapes", "Flow-GRPO")]
    compare_sd35.MORE = compare_sd35.LOWEST = {}
    compare_sd35.digest = lambda world: "tiny"
    os.environ["SECONDS_OF_A_RUN"] = str(seconds)
    cli.run("compare_sd35.py", lambda: compare_sd35.main([*line, "--out", str(out)]))


def test_without_flags_it_is_shown_again_beside_what_was_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RUNS", str(tmp_path))
    monkeypatch.setattr(compare_sd35, "run_setting", slow_run)
    monkeypatch.setattr(compare_sd35, "digest", lambda world: "tiny")
    settings = compare_sd35.tried("DGPO", 2)
    kept = {
        json.dumps([setting, seed], sort_keys=True): {
            "budget": 600_000,
            "evaluations": [[0, 0, 0.5, 0], [75_000, 1, share, 0], [600_000, 2, 0.7, 0]],
        }
        for setting, share in zip(settings, (0.66, 0.61), strict=True)
        for seed in (*compare_sd35.FRESH_SEEDS, compare_sd35.TUNING_SEED)
    }
    text = json.dumps({"version": 2, "pipelines": ["tiny"], "runs": kept})
    (tmp_path / "shapes-family.json").write_text(text)
    compare_sd35.main(["--worlds", "shapes", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    shown = {name: reported for name, _, now, reported in rows if now == "0.600"}
    assert shown == {**dict.fromkeys(compare_sd35.MAIN, "-"), "DGPO": "0.660"}
    assert (tmp_path / "shapes-family.json").read_text() == text
    begun = (tmp_path / "log").read_text().splitlines()
    assert len(begun) == 4 and all(line.endswith(" 20") for line in begun)


def at_work(group):
    """Whether a process of the group is there, and not only its name."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, pgrp = status.read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state != "Z":
                return True
    return False


def test_a_killed_comparison_goes_on(tmp_path):
    """Killed, then interrupted, then finished."""

    def kept():
        path = tmp_path / "shapes-family.json"
        return json.loads(path.read_text())["runs"] if path.exists() else {}

    def child(wanted, number):
        """Starts it, and sends a signal as soon as so many runs are kept."""
        process = multiprocessing.get_context("fork").Process(target=comparison, args=(tmp_path,))
        process.start()
        end = time.time() + 60
        while len(kept()) < wanted and process.is_alive() and time.time() < end:
            time.sleep(0.02)
        if number == signal.SIGKILL:  # of which those that work for it hear nothing
            os.kill(process.pid, number)
        elif number:  # as a terminal sends it
            os.killpg(process.pid, number)
        process.join(60)
        while at_work(process.pid):
            assert time.time() < end + 60
            time.sleep(0.02)
        return process.exitcode, kept()

    _, first = child(1, signal.SIGKILL)
    assert 0 < len(first) < 12
    code, second = child(len(first) + 2, signal.SIGINT)
    assert code == 130
    assert (tmp_path / "stderr").read_text().splitlines()[-1] == "compare_sd35.py: stopped"
    assert len(first) < len(second) < 12
    assert "Not measured yet" in (tmp_path / "sd35.md").read_text()
    code, last = child(12, None)
    assert code == 0, (tmp_path / "stderr").read_text()
    assert len(last) == 12 and {**last, **second} == last and {**second, **first} == second
    said = (tmp_path / "stdout").read_text()
    assert "Not measured yet" not in said and said.count("0 of 3") == 4  # there and near
    begun = (tmp_path / "log").read_text().splitlines()
    assert len(begun) <= 12 + 2 * len(os.sched_getaffinity(0)) * 2  # what was at work, or waited


@pytest.mark.parametrize("line", [("--full",), ("--worlds", "shapes")])
def test_a_kill_does_not_wait_for_what_is_computing(line, tmp_path):
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=comparison, args=(tmp_path, line, 300))
    process.start()
    end = time.time() + 60
    while not (tmp_path / "log").exists() and time.time() < end:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    while at_work(process.pid) and time.time() < end + 60:
        time.sleep(0.02)
    assert process.exitcode == 130 and not at_work(process.pid)
    assert (tmp_path / "stderr").read_text() == "compare_sd35.py: stopped\n"


def test_faults_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_sd35, "ROOT", tmp_path)
    kept = tmp_path / "shapes-family.json"

    def fault(**changed):
        kept.write_text(json.dumps({"version": 2, "pipelines": [], "runs": {}, **changed}))
        with pytest.raises(cli.Fault) as error:
            Results(tmp_path).run("shapes", {}, 0, 1000)
        return str(error.value)

    assert "run `python toy/shapes.py` first" in fault()
    with pytest.raises(cli.Fault, match="run `python toy/shapes.py` first"):  # at once
        compare_sd35.main(["--full", "--worlds", "shapes", "--out", str(tmp_path)])
    (tmp_path / "toy/out/shapes/transformer").mkdir(parents=True)
    (tmp_path / "toy/out/shapes/transformer/x.safetensors").write_bytes(b"x")
    assert "another version" in fault(version=1) and str(kept) in fault(version=1)
    assert "damaged" in fault(pipelines="x") and "damaged" in fault(runs=[])
    for run in ({}, [], {"budget": 1}, {"budget": 1, "evaluations": [[0, 0.0, "0.5", 0.0]]}):
        assert "damaged" in fault(runs={"a": run})
    assert "damaged" in fault(pipelines=[7])
    assert "damaged" in fault(runs={"a": {"budget": math.nan, "evaluations": [[0, 0.0, 0.5, 0]]}})
    for rows in ([], [[0, 0.0, 0.5]], 7, [[0, 0.0, 0.5, 0.0]] * 2):
        assert "damaged" in fault(runs={"a": {"budget": 1, "evaluations": rows}})
    assert "damaged" in fault(runs={"a": {"budget": -1, "evaluations": [[0, 0.0, 0.5, 0.0]]}})
    with pytest.raises(cli.Fault, match="argument --worlds: goes without --table"):
        compare_sd35.parse_args(["--table", "--worlds", "words", "--out", str(tmp_path)])
    kept.write_text("half of")
    with pytest.raises(cli.Fault, match="cannot read"):
        Results(tmp_path).run("shapes", {}, 0, 1000)
    kept.unlink()
    with pytest.raises(compare_sd35.Missing, match="not finished yet"):
        Results(tmp_path, compute=False).run("shapes", {}, 0, 1000)


def test_what_is_tried_afterwards_chooses_nothing_and_is_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS", str(tmp_path))
    monkeypatch.setattr(compare_sd35, "run_setting", slow_run)
    monkeypatch.setattr(compare_sd35, "digest", lambda world: "one")
    monkeypatch.setattr(compare_sd35, "PASSES", {2: ((1 / 8, 1),)})
    monkeypatch.setattr(compare_sd35, "LOWEST", {})
    monkeypatch.setattr(compare_sd35, "ORDER", [("shapes", "DGPO")])
    later = {"beta": 77.0}
    monkeypatch.setattr(compare_sd35, "AFTERWARDS", {("shapes", "DGPO"): [later]})
    results = Results(tmp_path)
    found = compare_sd35.chosen(results, "shapes", "DGPO", 2)
    for setting in (found.best, later):
        results.run(
            "shapes", setting, compare_sd35.TUNING_SEED, family_sd35.WORLDS["shapes"].budget
        )
    assert found.best != later and compare_sd35.chosen(results, "shapes", "DGPO", 2) == found
    shown = compare_sd35.tried_afterwards(results, "shapes")
    assert [one.setting for _, one in shown] == [found.best, later]
    assert report_sd35.afterwards_row(*shown[1])[:2] == ["shapes", "DGPO"]
    compare_sd35.main(["--table", "--out", str(tmp_path)])
    assert "beta 77.0" in (tmp_path / "sd35.md").read_text().split("## Tried afterwards")[1]


def test_another_pipeline_goes_on_with_the_search_and_has_reports_of_its_own(
    tmp_path, monkeypatch, capsys
):
    """As on another machine: the chosen setting is reported once more, beside what was reported."""
    monkeypatch.setenv("RUNS", str(tmp_path))
    monkeypatch.setattr(compare_sd35, "run_setting", slow_run)
    monkeypatch.setattr(compare_sd35, "PASSES", {2: ((1 / 8, 1),)})
    monkeypatch.setattr(compare_sd35, "LOWEST", {})
    monkeypatch.setattr(compare_sd35, "ORDER", [("shapes", "DGPO")])
    begun = []
    for pipeline in ("one", "another", "one"):
        monkeypatch.setattr(compare_sd35, "digest", lambda world, now=pipeline: now)
        compare_sd35.main(["--full", "--worlds", "shapes", "--out", str(tmp_path)])
        begun.append(len((tmp_path / "log").read_text().splitlines()))
    assert begun == [2 + 3, 2 + 3 + 3, 2 + 3 + 3]  # two settings are searched, three seeds reported
    kept = json.loads((tmp_path / "shapes-family.json").read_text())
    assert kept["pipelines"] == ["one", "another"] and len(kept["runs"]) == 8
    text = (tmp_path / "sd35.md").read_text()
    assert "| shapes | DGPO | 2 |" in text and "| shapes, pipeline 2 | DGPO | 2 |" in text
    assert "Not measured yet" not in text


def test_a_page_that_is_not_its_own_is_kept(tmp_path):
    assert report_sd35.INTRODUCTION.startswith(compare_sd35.TITLE)
    (tmp_path / "sd35.md").write_text("mine")
    with pytest.raises(cli.Fault, match="sd35.md is another's; give a new folder"):
        compare_sd35.parse_args(["--table", "--out", str(tmp_path)])


def killed(world, setting, seed, budget):
    """In place of a run of training: memory is full."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_that_the_system_ends_is_no_ctrl_c(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_sd35, "run_setting", killed)
    monkeypatch.setattr(compare_sd35, "digest", lambda world: "tiny")
    with pytest.raises(cli.Fault, match="was ended, perhaps as memory was full; what is finished"):
        compare_sd35.main(["--full", "--worlds", "shapes", "--out", str(tmp_path)])


def without_a_package(world, setting, seed, budget):
    """In place of a run of training."""
    raise RewardError("it needs `pip install what is missing`")


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_sd35, "run_setting", without_a_package)
    monkeypatch.setattr(compare_sd35, "digest", lambda world: "tiny")
    for line in (["--full"], []):
        with pytest.raises(cli.Fault, match="^it needs `pip install what is missing`$"):
            compare_sd35.main([*line, "--worlds", "words", "--out", str(tmp_path)])


@pytest.mark.parametrize("line", [["--table"], ["--full", "--table"]])
def test_the_table_of_nothing_says_so(line, tmp_path, capsys):
    compare_sd35.main([*line, "--out", str(tmp_path)])
    text = (tmp_path / "sd35.md").read_text()
    assert "Not measured yet" in text and "Flow-GRPO in words" in text
    assert capsys.readouterr().out.strip() == text.strip()


def test_only_what_a_method_has_is_changed():
    """Each world's file is read as the trainer reads it, and DGPO's default is that file."""
    assert compare_sd35.METHODS["DGPO"].fixed == {}
    names = {field.name for field in dataclasses.fields(family_sd35.Arguments)}
    for fixed, dials in compare_sd35.METHODS.values():
        assert {*fixed, *dials} <= names
    assert {world for world, _ in compare_sd35.ORDER} == {*family_sd35.WORLDS}
    styles = itertools.chain(compare_sd35.METHODS, compare_sd35.VARIANTS)
    assert {*styles} <= {*report_sd35.STYLES}
