"""The paper's comparisons in worlds small enough to measure: `python toy/compare.py`.

Every method runs in one loop, on one network, with the same groups, rewards and optimiser. In each
world and for each method the same number of settings is tried on tuning seeds. The best is run on
fresh seeds, and only these are reported. Finished runs are kept in toy/results/<world>.json, so
that a stopped comparison continues.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

import baselines
import flow2d
import matplotlib.pyplot as plt
import torch
import worlds
from flow2d import dgpo
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from run_2d import PRETRAINING_STEPS, Parser, check_folder
from torch import Tensor, nn
from tqdm import tqdm

EVALUATION_STEPS = 20  # of the ODE solver; rollouts take 10 or fewer, as the paper's do
SAMPLES = 125  # points for each condition in an evaluation
EVERY = 10  # iterations between evaluations
BUDGET = 3_000_000  # forwards of a run that is reported; tuning runs have 300 iterations
WAY = 0.9  # there: this share of the way from the base reward to the best data's ...
RIGHT = 0.8  # ... with this share of samples right, as the world's judge has it
VERSION = 2  # of what a cell means; another number makes all results be computed again
BLOWN_UP = -1e9  # the reward of a run that has
TUNING_SEEDS = (100, 101)
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t for 2 to 10 runs

# "evaluations": [iteration, cost, reward, share right, spread, distance], ..., "seconds"
Cell = dict


@dataclasses.dataclass(frozen=True)
class Setting:
    world: str
    method: str  # DGPO, Diffusion-DPO, GPO or Flow-GRPO
    learning_rate: float = 1.5e-3
    beta: float = 1.0  # DGPO: S a mean over the group; Diffusion-DPO and GPO: as published
    kl: float = 0.01
    t_min: float = 0.2
    trained_steps: int = 10  # Flow-GRPO: so many of the trajectory's steps, the noisiest
    clip: float = 0.2  # Flow-GRPO's
    sde_noise: float = 0.0  # a of the SDE that samples; 0 samples by the ODE
    rollout_steps: int = 10
    shared_noise: bool = True
    offline: bool = False
    ema: float | None = None  # decay of theta^-
    ema_reference: bool = False  # theta^- is the reference, too
    group_size: int = 24
    prompts: int = 8
    timesteps: int = 4  # each group is trained at
    updates: int = 1  # optimiser steps from each rollout
    iterations: int = 300
    budgets: float = 1.0  # the iterations of a reported run, in units of BUDGET


def at_conditions(network: nn.Module, c: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The network as a velocity (x (N, D), t ()) -> v for samplers, c (N,) being fixed."""
    return lambda x, t: network(x, t.expand(len(x)), c)


def backward_preferences(
    model: nn.Module,
    reference: nn.Module,
    setting: Setting,
    c: Tensor,
    x0: Tensor,
    rewards: Tensor,
    generator: torch.Generator,
) -> None:
    """The gradient of DGPO, Diffusion-DPO or GPO, divided by its beta.

    c: (P,), x0: (P, G, D), rewards: (P, G). Diffusion-DPO is DGPO on the two ends of each group.
    """
    if setting.method == "Diffusion-DPO":
        x0, rewards = baselines.best_and_worst(x0, rewards)
    K = setting.timesteps
    c, x0, rewards = c.repeat(K), torch.cat([x0] * K), rewards.repeat(K, 1)
    P, G = rewards.shape
    t = dgpo.sample_timesteps((P, 1), setting.t_min, generator)
    eps = torch.randn(P, 1 if setting.shared_noise else G, x0.shape[2], generator=generator)

    def velocity(network: nn.Module) -> dgpo.Velocity:
        return lambda x, t, p: network(x, t, c[p])

    if setting.method == "GPO":
        x_t, p = dgpo.diffuse(x0, eps, t).flatten(0, 1), torch.arange(P).repeat_interleave(G)
        v, v_ref = (
            velocity(network)(x_t, t.expand(P, G).flatten(), p).view_as(x0)
            for network in (model, reference)
        )
        loss, loss_ref = dgpo.dsm_loss(v, x0, eps), dgpo.dsm_loss(v_ref, x0, eps)
        preference = baselines.gpo_loss(loss, loss_ref, rewards, setting.beta) / setting.beta
        (preference + setting.kl * dgpo.mean_square(v, v_ref).mean()).backward()
    else:
        dgpo.backward_group_loss(
            velocity(model),
            velocity(reference),
            x0,
            eps,
            t,
            dgpo.group_advantages(rewards),
            setting.beta,
            kl=setting.kl,
        )


def backward_flow_grpo(
    model: nn.Module,
    reference: nn.Module,
    setting: Setting,
    c: Tensor,
    trajectory: Tensor,
    times: Tensor,
    rewards: Tensor,
    log_prob_old: Tensor | None,
) -> Tensor:
    """Flow-GRPO's gradient, the mean over the trained steps, all of them in one pass.

    c: (P,), trajectory: (steps + 1, P * G, D), times: (steps + 1,), rewards: (P, G).
    log_prob_old: what the first update from these samples returned, or None for that one.
    """
    (P, G), K = rewards.shape, setting.trained_steps
    x, x_next = (part.view(K * P, G, -1) for part in (trajectory[:K], trajectory[1 : K + 1]))
    t, s = (part.repeat_interleave(P)[:, None, None] for part in (times[:K], times[1 : K + 1]))
    each_c = c.repeat_interleave(G).repeat(K)

    def step(network: nn.Module) -> tuple[Tensor, Tensor]:
        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return network(x.flatten(0, 1), t.expand(-1, G, 1).flatten(), each_c).view_as(x)

        return baselines.sde_step(velocity, x, t, s, setting.sde_noise)

    mean, std = step(model)
    with torch.no_grad():
        mean_ref, _ = step(reference)
    log_prob = baselines.gaussian_log_prob(x_next, mean, std)
    log_prob_old = log_prob.detach() if log_prob_old is None else log_prob_old
    advantages = dgpo.group_advantages(rewards).repeat(K, 1)
    loss = baselines.flow_grpo_loss(log_prob, log_prob_old, advantages, setting.clip)
    penalty = ((mean - mean_ref) ** 2 / (2 * std**2)).sum(2).mean()
    (loss + setting.kl * penalty).backward()
    return log_prob_old


def iteration_cost(setting: Setting) -> int:
    """In forwards of one sample: the rollout, and for each trained sample 4.

    These are its forward, its backward, which counts 2, and the reference's forward.
    """
    P, G, K = setting.prompts, setting.group_size, setting.timesteps
    trained = {"Flow-GRPO": setting.trained_steps * P * G, "Diffusion-DPO": K * P * 2}
    trained = trained.get(setting.method, K * P * G)
    return setting.rollout_steps * P * G + setting.updates * 4 * trained


def learn(model: nn.Module, setting: Setting, generator: torch.Generator) -> Iterator[int]:
    """Train `model` in place; yields what each iteration cost, in forwards of one sample."""
    P, G, world = setting.prompts, setting.group_size, worlds.make(setting.world)
    reference = copy.deepcopy(model).requires_grad_(False)
    old = model if setting.ema is None else copy.deepcopy(reference)
    networks = model, old if setting.ema_reference else reference, setting
    optimizer = torch.optim.AdamW(model.parameters(), setting.learning_rate, weight_decay=0.0)

    for _ in range(setting.iterations):
        c = flow2d.sample_conditions(P, generator)
        noise = torch.randn(P * G, world.dims, generator=generator)
        actor = at_conditions(reference if setting.offline else old, c.repeat_interleave(G))
        if setting.sde_noise:
            trajectory, times = baselines.sample_sde(
                actor, noise, setting.rollout_steps, generator, setting.sde_noise
            )
            x0 = trajectory[-1].view(P, G, -1)
        else:
            x0 = dgpo.sample_ode(actor, noise, setting.rollout_steps).view(P, G, -1)
        rewards = world.reward(c[:, None], x0)
        log_prob_old = None
        for _ in range(setting.updates):
            optimizer.zero_grad()
            if setting.method == "Flow-GRPO":
                log_prob_old = backward_flow_grpo(
                    *networks, c, trajectory, times, rewards, log_prob_old
                )
            else:
                backward_preferences(*networks, c, x0, rewards, generator)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if setting.ema is not None:
            dgpo.ema_update(old.parameters(), model.parameters(), setting.ema)
        yield iteration_cost(setting)


Reference = tuple[nn.Module, Tensor]


def pretrained(world: str, seed: int) -> Reference:
    """The reference of a seed, and the generator's state after it."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = worlds.make(world).network()
    sample_data = worlds.make(world).sample_data
    for _ in flow2d.pretrain(model, PRETRAINING_STEPS, generator, sample_data):
        pass
    return model, generator.get_state()


def starting_from(reference: Reference) -> tuple[nn.Module, torch.Generator]:
    generator = torch.Generator()
    generator.set_state(reference[1])
    return copy.deepcopy(reference[0]), generator


def with_budget(setting: Setting) -> Setting:
    """The setting with as many iterations as its share of BUDGET buys."""
    iterations = int(setting.budgets * BUDGET / iteration_cost(setting))
    return dataclasses.replace(setting, iterations=iterations // EVERY * EVERY)


def run_cell(reference: Reference, seed: int, setting: Setting) -> Cell:
    """One training run: what it cost and what it had reached at every evaluation."""
    torch.set_num_threads(1)
    world = worlds.make(setting.world)
    model, generator = starting_from(reference)
    c = torch.arange(flow2d.CONDITIONS).repeat_interleave(SAMPLES)
    noise = torch.randn(len(c), world.dims, generator=torch.Generator().manual_seed(seed))

    def evaluate(iteration: int, cost: int) -> list[float]:
        x = flow2d.sample(model, c, noise, EVALUATION_STEPS)
        right, distance, position = world.judge(c, x)
        spread = position.view(flow2d.CONDITIONS, SAMPLES, 2).std(1).mean() / world.spread
        row = [world.reward(c, x).mean(), right.float().mean(), spread, distance.mean()]
        if not all(torch.isfinite(value) for value in row):
            row = [BLOWN_UP, 0.0, -BLOWN_UP, -BLOWN_UP]
        return [iteration, cost, *(float(f"{float(value):.4g}") for value in row)]

    cost, seconds, evaluations, start = 0, 0.0, [evaluate(0, 0)], time.perf_counter()
    try:
        for i, evaluated in enumerate(learn(model, setting, generator), 1):
            cost += evaluated
            if i % EVERY == 0:
                seconds += time.perf_counter() - start
                evaluations.append(evaluate(i, cost))
                start = time.perf_counter()
    except ValueError:  # rewards no longer finite
        evaluations.append([setting.iterations, cost, BLOWN_UP, 0.0, -BLOWN_UP, -BLOWN_UP])
    return {"evaluations": evaluations, "seconds": round(seconds, 2)}


def end_of(cell: Cell) -> list[float]:
    return cell["evaluations"][-1]


def way(setting: Setting, cell: Cell) -> float:
    """How far a run came from its base reward (0) to the best data's (1)."""
    base, best = cell["evaluations"][0][2], worlds.make(setting.world).best
    return (end_of(cell)[2] - base) / (best - base)


def arrival(setting: Setting, cell: Cell) -> list[float] | None:
    """The evaluation from which on a run is there: at the end, and nine times in ten until then."""
    base, best = cell["evaluations"][0][2], worlds.make(setting.world).best
    there = [
        reward >= base + WAY * (best - base) and right >= RIGHT
        for _, _, reward, right, _, _ in cell["evaluations"]
    ]
    if not there[-1]:
        return None
    settled = (k for k in range(len(there)) if there[k] and sum(there[k:]) >= 0.9 * len(there[k:]))
    return cell["evaluations"][next(settled)]


# Twenty-four settings for each method in each world. The KLs differ in unit: velocity error for the
# preference methods, nats of a step for Flow-GRPO. Each rollout is used for one optimiser step, so
# that Flow-GRPO's clip never acts; the experiment "variants" has more updates, where it does.


def preferences(world: str, method: str, **fixed) -> list[Setting]:
    return [
        Setting(world, method, learning_rate=rate, beta=beta, t_min=t_min, kl=kl, **fixed)
        for rate in (5e-4, 1e-3, 3e-3)
        for beta in (1.0, 10.0)
        for t_min in (0.3, 0.1)
        for kl in (0.01, 0.1)
    ]


def flow_grpo(world: str, trained_steps: int) -> list[Setting]:
    fixed = {"trained_steps": trained_steps}
    return [
        Setting(world, "Flow-GRPO", learning_rate=rate, sde_noise=a, kl=kl, **fixed)
        for rate in (3e-4, 1e-3, 3e-3, 6e-3, 1e-2, 2e-2)
        for a in (0.4, 0.7)
        for kl in (0.01, 0.1)
    ]


METHODS: dict[str, Callable[[str], list[Setting]]] = {
    "DGPO": lambda world: preferences(world, "DGPO"),
    "Flow-GRPO": lambda world: flow_grpo(world, 10),
    "Flow-GRPO, noisiest 5 steps": lambda world: flow_grpo(world, 5),
    "Diffusion-DPO": lambda world: preferences(world, "Diffusion-DPO"),
    "Diffusion-DPO, offline": lambda world: preferences(world, "Diffusion-DPO", offline=True),
    "DGPO, offline": lambda world: preferences(world, "DGPO", offline=True),
    "GPO": lambda world: preferences(world, "GPO"),
}
STYLES = {  # colour, line, marker: distinct to the colour-blind and in grey
    "DGPO": ("#0b3c6f", "-", "o"),
    "Flow-GRPO": ("#cc79a7", "-", "D"),
    "Flow-GRPO, noisiest 5 steps": ("#cc79a7", ":", "v"),
    "Diffusion-DPO": ("#d55e00", "-", "s"),
    "Diffusion-DPO, offline": ("#d55e00", "--", "X"),
    "DGPO, offline": ("#0b3c6f", "--", "P"),
    "GPO": ("#009e73", "-", "^"),
}
SWEPT = ("learning_rate", "beta", "t_min", "kl", "sde_noise")


# Sweeps around DGPO's tuned setting. The experiment "variants" has its own function, below.


def clips(tuned: Setting) -> dict[str, Setting]:
    """Fig. 4, where rollouts have artefacts: with half the steps."""
    return {
        f"t_min {t:g}": dataclasses.replace(tuned, t_min=t, rollout_steps=5)
        for t in (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7)
    }


def betas(tuned: Setting) -> dict[str, Setting]:
    """Appendix D. Three times as long, as over-optimisation shows late."""
    return {
        f"beta {beta:g}": dataclasses.replace(tuned, beta=beta, budgets=3.0)
        for beta in (0.1, 1.0, 10.0, 100.0)
    }


def group_sizes(tuned: Setting) -> dict[str, Setting]:
    """G at equal samples an iteration: what a group knows that pairs do not."""
    return {
        f"G = {G}": dataclasses.replace(tuned, group_size=G, prompts=192 // G)
        for G in (2, 4, 8, 24, 64)
    }


# What a group's shared noise does to the estimate, and how much signal an iteration has.


def partly_trained(reference: Reference, world: str, iterations: int) -> nn.Module:
    """The reference after so many iterations of DGPO, at a setting that is gentle in all worlds."""
    model, generator = starting_from(reference)
    gentle = {"learning_rate": 1e-3, "beta": 10.0, "kl": 0.1, "t_min": 0.1}
    for _ in learn(model, Setting(world, "DGPO", iterations=iterations, **gentle), generator):
        pass
    return model


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def total_variance(draws: list[Tensor]) -> float:
    """The sum over coordinates of the variance, from draws of one shape."""
    return torch.stack(draws).var(0).sum().item()


def noise_cell(reference: Reference, seed: int, world_name: str, group_size: int) -> Cell:
    """Variance over eps with a shared eps over that with one each, of S and of its gradient.

    "ratios": [t, ratio for S, ratio for the gradient], ... for fixed samples, the mean over groups.
    """
    torch.set_num_threads(1)
    world, model = worlds.make(world_name), partly_trained(reference, world_name, 30)
    generator = torch.Generator().manual_seed(seed)
    P, G, ratios = 8, group_size, []
    c = torch.arange(P) % flow2d.CONDITIONS
    noise = torch.randn(P * G, world.dims, generator=generator)
    x0 = dgpo.sample_ode(at_conditions(model, c.repeat_interleave(G)), noise, 10).view(P, G, -1)
    advantages = dgpo.group_advantages(world.reward(c[:, None], x0))
    for time_ in (0.3, 0.5, 0.7, 0.9):
        t = torch.full((1, 1), time_)
        variances = torch.zeros(2, 2)  # shared or not, S or gradient
        for p, shared in itertools.product(range(P), (True, False)):
            A, x, gaps, gradients = advantages[p : p + 1], x0[p : p + 1], [], []
            for _ in range(64):
                eps = torch.randn(1, 1 if shared else G, world.dims, generator=generator)
                x_t = dgpo.diffuse(x, eps, t)[0]
                loss, loss_ref = (
                    dgpo.dsm_loss(at_conditions(m, c[p].expand(G))(x_t, t[0, 0])[None], x, eps)
                    for m in (model, reference[0])
                )
                gap = dgpo.preference_gap(loss, loss_ref, A)
                model.zero_grad()
                gap.sum().backward()
                gaps.append(gap.detach())
                gradients.append(gradient(model))
            found = [total_variance(gaps), total_variance(gradients)]
            variances[int(shared)] += torch.tensor(found)
        ratios.append([time_, *(float(f"{r:.4g}") for r in variances[1] / variances[0])])
    return {"ratios": ratios}


def signal_cell(reference: Reference, seed: int, setting: Setting, iterations: int) -> Cell:
    """|E g|^2 over the total variance of an iteration's gradient g, for every million forwards.

    setting: with learning rate 0, so that all gradients are of one model: the reference after
    `iterations` of DGPO. "spread": of its samples.
    """
    torch.set_num_threads(1)
    world, model = worlds.make(setting.world), partly_trained(reference, setting.world, iterations)
    c = torch.arange(flow2d.CONDITIONS).repeat_interleave(SAMPLES)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(c), world.dims, generator=generator)
    position = world.judge(c, flow2d.sample(model, c, noise))[2]
    spread = position.view(flow2d.CONDITIONS, SAMPLES, 2).std(1).mean() / world.spread
    draws = []
    for cost in learn(model, setting, generator):  # noqa: B007, the last one is used below
        draws.append(gradient(model))
    noise_power = total_variance(draws)
    signal = torch.stack(draws).mean(0).square().sum().item() - noise_power / len(draws)
    return {"snr": float(f"{signal / noise_power / cost * 1e6:.4g}"), "spread": spread.item()}


class Results:
    """Finished runs, one JSON file a world, written aside and renamed after every run."""

    def __init__(self, folder: Path, compute: bool = True):
        self.folder, self.compute = folder, compute
        self.cells: dict[str, dict[str, Cell]] = {}
        self.references: dict[tuple[str, int], Future] = {}
        self.pool = ProcessPoolExecutor(os.cpu_count())

    def load(self, world: str) -> dict[str, Cell]:
        path = self.folder / f"{world}.json"
        if not path.exists():
            return {}
        try:
            stored = json.loads(path.read_text())
            if stored["version"] == VERSION:
                return stored["cells"]
            reason = f"of version {stored['version']}, not {VERSION}"
        except (ValueError, KeyError, TypeError):
            reason = "damaged"
        aside = path.with_suffix(f".{time.time_ns()}.json")
        os.replace(path, aside)
        print(f"{path.name} is {reason}: moved to {aside.name}, and computed again")
        return {}

    def add(self, world: str, key: str, cell: Cell) -> None:
        # Another comparison may have written to the file since it was read.
        self.cells[world] = {**self.load(world), **self.cells[world], key: cell}
        new = self.folder / f"{world}.{os.getpid()}.new"
        stored = {"version": VERSION, "cells": self.cells[world]}
        new.write_text(json.dumps(stored, separators=(",", ":")))
        os.replace(new, self.folder / f"{world}.json")

    def run(self, name: str, world: str, tasks: list[tuple]) -> list[Cell]:
        """The cells of tasks (function, seed, ...). What is missing is computed, a core a run.

        A task is called as function(reference, seed, ...).
        """
        if world not in self.cells:
            self.cells[world] = self.load(world)
        keys = [json.dumps([task[0].__name__, *task[1:]], default=changed_fields) for task in tasks]
        cells = self.cells[world]
        missing = {key: task for key, task in zip(keys, tasks, strict=True) if key not in cells}
        if missing and not self.compute:
            raise LookupError(f"{len(missing)} runs of {name} in {world}")
        for seed in {seed for _, seed, *_ in missing.values()}:
            if (world, seed) not in self.references:
                self.references[world, seed] = self.pool.submit(pretrained, world, seed)
        progress = tqdm(desc=f"{world}: {name}", total=len(missing), disable=not missing)
        try:
            futures = {}
            for key, (function, seed, *rest) in missing.items():
                reference = self.references[world, seed].result()
                futures[self.pool.submit(function, reference, seed, *rest)] = key
            for future in as_completed(futures):
                self.add(world, futures[future], future.result())
                progress.update()
        except KeyboardInterrupt:
            self.pool.shutdown(cancel_futures=True)
            raise
        progress.close()
        return [self.cells[world][key] for key in keys]


def changed_fields(setting: Setting) -> dict:
    """What is not at its default: the name of a setting in the kept results."""
    defaults = dataclasses.asdict(Setting("", ""))
    return {k: v for k, v in dataclasses.asdict(setting).items() if v != defaults[k]}


@dataclasses.dataclass
class Tuning:
    best: Setting
    settings: list[Setting]  # one for each of the cells
    cells: list[Cell]

    def arrived(self) -> float:
        pairs = zip(self.settings, self.cells, strict=True)
        return sum(arrival(*pair) is not None for pair in pairs) / len(self.cells)


def tune(results: Results, name: str, settings: list[Setting], seeds: tuple[int, ...]) -> Tuning:
    """The setting with the fewest failures on the tuning seeds, then with the least mean cost.

    Where no run arrives, the one that ends closest: by the way to the best reward and the share of
    samples right, neither of which counts for more than what is asked.
    """
    world = settings[0].world
    tasks = [(run_cell, seed, setting) for setting in settings for seed in seeds]
    cells = results.run(f"tuning {name}", world, tasks)
    scores = []
    for i, setting in enumerate(settings):
        runs = cells[i * len(seeds) :][: len(seeds)]
        costs = [found[1] for found in (arrival(setting, cell) for cell in runs) if found]
        mean = sum(costs) / len(costs) if costs else math.inf
        close = sum(min(way(setting, cell), WAY) + min(end_of(cell)[3], RIGHT) for cell in runs)
        scores.append((len(runs) - len(costs), mean, -close, setting))
    best = min(scores, key=lambda score: score[:3])[3]
    return Tuning(best, [setting for _, _, setting in tasks], cells)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval."""
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), T95[len(x) - 2] * x.std().item() / math.sqrt(len(x))


Runs = dict[str, list[Cell]]  # of each method in one world
Ratio = tuple[float, float, float]


def cost_ratio(tunings: dict[str, Tuning], runs: Runs, name: str) -> tuple[Ratio | None, str]:
    """Cost to arrive over the first method's, seeds paired: geometric mean, 95 % interval.

    The three numbers (None under two seeds on which both arrive), and how to show them.
    """
    first, other = (
        [arrival(tunings[method].best, cell) for cell in runs[method]]
        for method in (next(iter(runs)), name)
    )
    logs = [math.log(b[1] / a[1]) for a, b in zip(first, other, strict=True) if a and b]
    seeds = f"({len(logs)} of {len(first)} seeds)"
    if len(logs) < 2:
        return None, f"- {seeds}"
    mean, half = interval(logs)
    low, middle, high = (math.exp(mean + sign * half) for sign in (-1, 0, 1))
    return (middle, low, high), f"{middle:.2f} [{low:.2f}, {high:.2f}] {seeds}"


HEADER = (
    "arrived | cost, thousands of forwards | iterations | seconds | reward | right | spread |"
    " distance |"
)


def row(name: str, setting: Setting, cells: list[Cell]) -> str:
    """A line of a table. Cost, iterations and seconds are of the runs that arrived."""
    found = [(arrival(setting, cell), cell["seconds"] / end_of(cell)[0]) for cell in cells]
    found = [(*evaluation[:2], evaluation[0] * each) for evaluation, each in found if evaluation]

    def show(values: tuple[float, ...], form: str) -> str:
        mean, half = interval(values)
        return f"{mean:{form}} ± {half:{form}}"

    columns = [name, f"{len(found)} of {len(cells)}"]
    if len(found) > 1:
        iterations, cost, seconds = zip(*found, strict=True)
        columns += [show([c / 1000 for c in cost], ".0f"), show(iterations, ".0f")]
        columns += [show(seconds, ".1f")]
    else:
        columns += ["-"] * 3
    ends = zip(*(end_of(cell)[2:] for cell in cells), strict=True)
    columns += [show(values, ".2f") if abs(values[0]) < 1e3 else "blown up" for values in ends]
    return f"| {' | '.join(columns)} |"


def table(title: str, header: str, rows: list[str]) -> str:
    names = f"| {title} | {header}"
    return "\n".join([names, "|" + "---|" * (names.count("|") - 1), *rows])


def band(cells: list[Cell], column: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cost, and the quartiles of a column, at every evaluation that all runs have.

    Quartiles, because the mean of a few runs is that of the one that leaves for a moment.
    """
    n = min(len(cell["evaluations"]) for cell in cells)
    cost = torch.tensor([evaluation[1] for evaluation in cells[0]["evaluations"][:n]])
    values = torch.tensor([[row[column] for row in cell["evaluations"][:n]] for cell in cells])
    return cost, *values.quantile(torch.tensor([0.25, 0.5, 0.75]), 0)


def panels(names: list[str], height: float) -> tuple[Figure, list[Axes]]:
    """A panel for each name, three to a row, named."""
    rows = math.ceil(len(names) / 3)
    figure, axes = plt.subplots(
        rows, min(3, len(names)), figsize=(13, height * rows), squeeze=False, layout="constrained"
    )
    for panel, name in zip(axes.flat, names, strict=False):
        panel.set_title(name, fontsize=17)
        panel.tick_params(labelsize=13)
    for panel in axes.flat[len(names) :]:
        panel.axis("off")
    return figure, list(axes.flat[: len(names)])


def save(figure: Figure, path: Path, x: str, y: str, legend: Axes | None = None) -> None:
    figure.supxlabel(x, fontsize=17)
    figure.supylabel(y, fontsize=17)
    if legend:
        handles, labels = legend.get_legend_handles_labels()
        figure.legend(handles, labels, fontsize=14, loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def plot_speed(path: Path, runs: dict[str, dict[str, list[Cell]]]) -> None:
    """Median reward against cost of the tuned settings, a panel a world; shaded: quartiles."""
    figure, axes = panels(list(runs), 3.6)
    for panel, (world, methods) in zip(axes, runs.items(), strict=True):
        best = worlds.make(world).best
        base = min(cells[0]["evaluations"][0][2] for cells in methods.values())
        for name, cells in methods.items():
            color, line, marker = STYLES[name]
            cost, low, median, high = band(cells, 2)
            style = {"color": color, "lw": 2, "label": name}
            panel.plot(cost / 1e6, median, line + marker, markevery=0.15, **style)
            panel.fill_between(cost / 1e6, low, high, color=color, alpha=0.2, lw=0)
        panel.axhline(best, color="black", ls="--", lw=1)
        top = max(best, *(cell["evaluations"][-1][2] for cell in methods["DGPO"]))
        panel.set(
            xlim=(0, BUDGET / 1e6), ylim=(base - 0.05 * (top - base), top + 0.1 * (top - base))
        )
    save(figure, path, "cost, millions of forwards", "mean reward", axes[0])


def plot_pareto(path: Path, tunings: dict[str, dict[str, Tuning]]) -> None:
    """Where every setting of the grid ended: how far it came, and what it left of the data."""
    figure, axes = panels(list(tunings), 3.6)
    for panel, methods in zip(axes, tunings.values(), strict=True):
        for name, tuning in methods.items():
            color, _, marker = STYLES[name]
            x = [way(*pair) for pair in zip(tuning.settings, tuning.cells, strict=True)]
            y = [end_of(cell)[3] for cell in tuning.cells]
            panel.plot(x, y, marker, color=color, ms=6, alpha=0.6, mew=0, label=name)
        panel.axhline(RIGHT, color="black", ls="--", lw=1)
        panel.axvline(WAY, color="black", ls="--", lw=1)
        panel.set(xlim=(-0.3, 1.6), ylim=(-0.03, 1.03))
    x = "way from the base reward (0) to the best data's (1)"
    save(figure, path, x, "share of samples right", axes[0])


def plot_ratio(path: Path, compared: dict[str, dict[str, tuple[Ratio | None, str]]]) -> None:
    """Cost over DGPO's in each world, with 95 % intervals; none where too few runs arrive."""
    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    names = list(next(iter(compared.values())))
    for i, name in enumerate(names):
        color, _, marker = STYLES[name]
        style = {"color": color, "ms": 8, "capsize": 4, "lw": 2, "label": name}
        for x, ratios in enumerate(compared.values()):
            if ratios[name][0]:
                middle, low, high = ratios[name][0]
                place = x + 0.12 * (i - (len(names) - 1) / 2)
                bars = [[middle - low], [high - middle]]
                axes.errorbar([place], [middle], bars, fmt=marker, **style)
                style.pop("label", None)
    axes.axhline(1, color="black", ls="--", lw=1)
    axes.set_yscale("log")
    axes.set_ylim(0.05, 20)
    axes.set_xlim(-0.5, len(compared) - 0.5)
    axes.set_xticks(range(len(compared)), list(compared), fontsize=14)
    axes.tick_params(labelsize=14)
    axes.set_yticks([0.05, 0.2, 1, 5, 20], ["0.05", "0.2", "1", "5", "20"])
    for x, ratios in enumerate(compared.values()):
        if not any(ratio for ratio, _ in ratios.values()):
            axes.text(x, 1.2, "too few\nruns arrive", ha="center", va="bottom", fontsize=12)
    save(figure, path, "", "cost, over DGPO's", axes)


def plot_sweep(path: Path, runs: dict[str, dict[str, tuple[Setting, list[Cell]]]]) -> None:
    """By setting and world: the cost to arrive, and reward, quality and spread at the end."""
    names = list(next(iter(runs.values())))
    height = 1.6 + 0.5 * len(names)
    figure, axes = plt.subplots(1, 4, figsize=(14, height), dpi=90, layout="constrained")
    labels = ("cost to arrive,\nmillions of forwards", "way to the best", "share right", "spread")
    for w, (world, found) in enumerate(runs.items()):
        offset = 0.15 * (2 * w - len(runs) + 1)
        color, _, marker = list(STYLES.values())[(0, 3, 1, 6, 2, 4)[w % 6]]
        for i, (setting, cells) in enumerate(found.values()):
            costs = [arrived[1] / 1e6 for cell in cells if (arrived := arrival(setting, cell))]
            ways = [way(setting, cell) for cell in cells]
            right, spread = ([end_of(cell)[i] for cell in cells] for i in (3, 4))
            columns = (costs, ways, right, spread)
            for panel, values in zip(axes, columns, strict=True):
                if len(values) < 2 or abs(values[0]) > 1e3:
                    continue
                mean, half = interval(values)
                style = {"fmt": marker, "color": color, "ms": 7, "capsize": 4}
                panel.errorbar(mean, i + offset, xerr=half, label=world, **style)
    for panel, label, limits in zip(
        axes, labels, ((0, None), (-0.2, 1.6), (0, 1.05), (0, 3)), strict=True
    ):
        panel.set_yticks(range(len(names)), [])
        panel.set(ylim=(len(names) - 0.5, -0.5), xlim=limits)
        panel.locator_params(axis="x", nbins=4)
        panel.set_xlabel(label, fontsize=15)
        panel.tick_params(axis="x", labelsize=13)
        panel.grid(axis="y", color="0.9")
    axes[0].set_yticklabels(names, fontsize=14)
    handles = dict(zip(*reversed(axes[2].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, fontsize=14, loc="outside upper center", ncols=2)
    figure.savefig(path)
    plt.close(figure)


def plot_noise(path: Path, found: dict[str, dict[int, Cell]]) -> None:
    figure, axes = panels(list(found), 3.4)
    for panel, by_group in zip(axes, found.values(), strict=True):
        for k, (t, line) in enumerate(
            zip((0.3, 0.5, 0.7, 0.9), ("-", "--", "-.", ":"), strict=True)
        ):
            y = [cell["ratios"][k][2] for cell in by_group.values()]
            color = ("#0b3c6f", "#d55e00", "#009e73", "#cc79a7")[k]
            panel.plot(list(by_group), y, line + "o", color=color, lw=2, label=f"t = {t}")
        panel.axhline(1, color="black", lw=1)
        panel.set(xscale="log", yscale="log")
        panel.set_xticks(list(by_group), list(by_group))
        panel.set_yticks([0.5, 1, 2, 4, 8], ["1/2", "1", "2", "4", "8"])
        panel.minorticks_off()
    save(figure, path, "group size G", "gradient's variance, shared / independent", axes[0])


EXPERIMENTS = ("speed", "variants", "clip", "beta", "noise", "groups")


def known_world(name: str) -> str:
    ring = name.removeprefix("ring-")
    if name != "blobs" and not (ring != name and ring.isdigit() and int(ring) >= 2):
        raise argparse.ArgumentTypeError(f"must be blobs or ring-D with D >= 2, got {name!r}")
    return name


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--full", action="store_true", help="whole grids, all worlds, five seeds: more than an hour"
    )
    add("--only", choices=EXPERIMENTS, help="one experiment, and the tuning it rests on")
    add("--worlds", type=known_world, nargs="+", help="ring-D or blobs")
    add("--dims", type=int, nargs="+", help="the same as --worlds ring-D for each, and blobs")
    add("--methods", nargs="+", choices=METHODS, help="for the experiment speed; DGPO always runs")
    add("--seeds", type=int, help="fresh seeds, 2 to 10 (default: 3, with --full 5)")
    add("--table", action="store_true", help="print the tables of finished runs, compute nothing")
    add("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    args = parser.parse_args()
    args.seeds = args.seeds if args.seeds is not None else 5 if args.full else 3
    if not 2 <= args.seeds <= 10:
        parser.error(f"argument --seeds: must be from 2 to 10, got {args.seeds}")
    if args.dims and args.worlds:
        parser.error("argument --dims: not allowed with --worlds")
    if min(args.dims or [2]) < 2:
        parser.error(f"argument --dims: must be at least 2, got {min(args.dims)}")
    dims = args.dims or ((2, 8, 32, 128, 512) if args.full else (2,))
    args.sweep_worlds = args.worlds or (["ring-2", "blobs"] if args.full else ["ring-2"])
    args.worlds = args.worlds or [*(f"ring-{D}" for D in dims), "blobs"]
    others = args.methods or list(METHODS)[1 : 5 if args.full else 3]
    args.methods = ["DGPO", *(name for name in others if name != "DGPO")]
    check_folder(parser, args.out)
    plt.switch_backend("agg")
    return args


Table = tuple[str, str]  # title and text


class Comparison:
    """The experiments, each of which yields its tables and writes its figure."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.results = Results(args.out, compute=not args.table)
        self.tunings: dict[tuple[str, str], Tuning] = {}

    def tuned(self, world: str, method: str) -> Tuning:
        if (world, method) not in self.tunings:
            settings, seeds = METHODS[method](world), TUNING_SEEDS
            if not self.args.full:
                settings, seeds = settings[2::6], seeds[:1]
            self.tunings[world, method] = tune(self.results, method, settings, seeds)
        return self.tunings[world, method]

    def fresh(self, name: str, world: str, settings: dict[str, Setting]) -> dict[str, list[Cell]]:
        """Runs of equal cost on fresh seeds, for each setting. All in one go: no core waits."""
        tasks, seeds = [], self.args.seeds
        for setting in settings.values():
            if not self.args.full:
                setting = dataclasses.replace(setting, budgets=setting.budgets / 2)
            tasks += [(run_cell, seed, with_budget(setting)) for seed in range(seeds)]
        cells = self.results.run(name, world, tasks)
        return {name: cells[seeds * i :][:seeds] for i, name in enumerate(settings)}

    def speed(self) -> Iterator[Table]:
        """Figs. 1 and 3: what it costs to arrive, how many settings do, and what is kept."""
        methods, runs, rows, ratios, chosen = self.args.methods, {}, [], [], []
        compared: dict[str, dict[str, tuple[Ratio | None, str]]] = {}
        tunings = {
            world: {name: self.tuned(world, name) for name in methods} for world in self.args.worlds
        }
        for world, found in tunings.items():
            best = {name: tuning.best for name, tuning in found.items()}
            runs[world] = self.fresh("speed", world, best)
            for name, tuning in found.items():
                line = row(f"{world} | {name}", tuning.best, runs[world][name])
                rows.append(f"{line} {tuning.arrived():.0%} |")
                swept = [f"{getattr(tuning.best, field):g}" for field in SWEPT]
                chosen.append(f"| {world} | {name} | {' | '.join(swept)} |")
            compared[world] = {name: cost_ratio(found, runs[world], name) for name in methods[1:]}
            columns = [shown for _, shown in compared[world].values()]
            ratios.append(f"| {world} | {' | '.join(columns)} |")
        yield "speed", table("world | method", f"{HEADER} tuning runs that arrived |", rows)
        header = " | ".join(methods[1:]) + " |"
        yield f"cost to arrive, over {methods[0]}'s", table("world", header, ratios)
        header = " | ".join(SWEPT) + " |"
        yield "settings chosen on the tuning seeds", table("world | method", header, chosen)
        plot_speed(self.args.out / "speed.png", runs)
        plot_pareto(self.args.out / "pareto.png", tunings)
        plot_ratio(self.args.out / "ratio.png", compared)

    def sweep(self, experiment: str) -> Iterator[Table]:
        """Figs. 4 and 5, Appendix D, and group size: one thing changed in tuned settings."""
        found = {}
        for world in self.args.sweep_worlds:
            changes = {
                "variants": self.variants,
                "clip": clips,
                "beta": betas,
                "groups": group_sizes,
            }[experiment]
            settings = changes(self.tuned(world, "DGPO").best)
            if not self.args.full and experiment != "variants":
                settings = dict(list(settings.items())[::2])  # every other value
            cells = self.fresh(experiment, world, settings)
            found[world] = {name: (setting, cells[name]) for name, setting in settings.items()}
            rows = [row(name, *runs) for name, runs in found[world].items()]
            yield f"{experiment} in {world}", table(world, HEADER, rows)
        plot_sweep(self.args.out / f"{experiment}.png", found)

    def variants(self, tuned: Setting) -> dict[str, Setting]:
        """Fig. 5, Section 3.2, and what released trainers have; the names with a + are tuned."""
        replace, world = dataclasses.replace, tuned.world
        flow_grpo = self.tuned(world, "Flow-GRPO").best
        # Four updates of a quarter of the learning rate, so that the clip has something to do.
        updates = replace(flow_grpo, updates=4, learning_rate=flow_grpo.learning_rate / 4)
        return {
            "DGPO +": tuned,
            "offline +": self.tuned(world, "DGPO, offline").best,
            "SDE rollouts": replace(tuned, sde_noise=0.7),
            "independent noise": replace(tuned, shared_noise=False),
            "theta^- an EMA, 0.5": replace(tuned, ema=0.5),
            "reference an EMA, 0.98": replace(tuned, ema=0.98, ema_reference=True),
            "no KL": replace(tuned, kl=0.0),
            "GPO +": self.tuned(world, "GPO").best,
            "Diffusion-DPO +": self.tuned(world, "Diffusion-DPO").best,
            "Diffusion-DPO, offline +": self.tuned(world, "Diffusion-DPO, offline").best,
            "Flow-GRPO +": flow_grpo,
            "Flow-GRPO, no KL": replace(flow_grpo, kl=0.0),
            **{
                f"Flow-GRPO, 4 updates, clip {clip:g}": replace(updates, clip=clip)
                for clip in (0.05, 0.2, 1.0)
            },
        }

    def noise(self) -> Iterator[Table]:
        """Variance ratios over G, t and world, and each gradient's signal-to-noise ratio."""
        groups = (2, 4, 8, 24, 64) if self.args.full else (2, 8, 24)
        found, rows, signals = {}, [], []
        for world in self.args.worlds if self.args.full else self.args.sweep_worlds:
            tasks = [(noise_cell, 0, world, G) for G in groups]
            found[world] = dict(zip(groups, self.results.run("noise", world, tasks), strict=True))
            for G, cell in found[world].items():
                columns = [f"{gap:.2f}, {gradient:.2f}" for _, gap, gradient in cell["ratios"]]
                rows.append(f"| {world}, G = {G} | {' | '.join(columns)} |")
            frozen = {"learning_rate": 0.0, "kl": 0.0, "iterations": 64}
            settings = [
                Setting(world, "DGPO", **frozen),
                Setting(world, "DGPO", shared_noise=False, **frozen),
                Setting(world, "Flow-GRPO", sde_noise=0.7, **frozen),
                Setting(world, "Flow-GRPO", sde_noise=0.7, trained_steps=5, **frozen),
            ]
            for iterations in (0, 100):
                tasks = [(signal_cell, 0, setting, iterations) for setting in settings]
                cells = self.results.run("signal", world, tasks)
                columns = [f"{cells[0]['spread']:.1f}", *(f"{cell['snr']:.3g}" for cell in cells)]
                signals.append(f"| {world}, {iterations} | {' | '.join(columns)} |")
        header = "t = 0.3 | t = 0.5 | t = 0.7 | t = 0.9 |"
        yield "variance, shared / independent: of S, of the gradient", table("", header, rows)
        header = "spread | DGPO | independent noise | Flow-GRPO | noisiest 5 steps |"
        title = "signal-to-noise ratio of the gradient, for a million forwards"
        yield title, table("world, iterations of DGPO", header, signals)
        plot_noise(self.args.out / "noise.png", found)


def main() -> None:
    args = parse_args()
    comparison = Comparison(args)
    try:
        for experiment in [args.only] if args.only else EXPERIMENTS:
            own = {"speed": comparison.speed, "noise": comparison.noise}
            tables = own[experiment]() if experiment in own else comparison.sweep(experiment)
            for title, text in tables:
                print(f"\n{title}\n\n{text}", flush=True)
    except LookupError as missing:
        sys.stderr.write(f"compare.py: not finished yet: {missing}; run it without --table\n")
        sys.exit(2)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
