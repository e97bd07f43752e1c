"""The paper's comparisons in a world small enough to measure: `python toy/compare.py`.

Every method runs in one loop, on one network, with the same groups, rewards and optimiser. For
each, the same number of settings is tried on tuning seeds; the best is run on fresh seeds, and only
these are reported. Finished runs are kept in toy/results, so that a stopped comparison continues.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import baselines
import flow2d
import matplotlib.pyplot as plt
import torch
from flow2d import dgpo
from matplotlib.axes import Axes
from run_2d import BEST, PRETRAINING_STEPS, Parser, check_folder
from torch import Tensor, nn
from tqdm import tqdm

ITERATIONS = 300
ROLLOUT_STEPS = 10
SAMPLES = 250  # points for each condition in an evaluation
EVERY = 10  # iterations between evaluations
WAY = 0.9  # there: this share of the way from the base reward to the best possible ...
ON_MODE = 0.8  # ... with this share of samples on a mode; the reference has about 0.94
VERSION = 1  # of what a cell means; another number makes all results be computed again
BLOWN_UP = -1e9  # the reward of a run that has
TUNING_SEEDS = (100, 101, 102)
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t for 2 to 10 runs

Cell = dict  # "evaluations": [iteration, cost, reward, share on a mode, spread], ..., "seconds"


@dataclasses.dataclass(frozen=True)
class Setting:
    method: str  # DGPO, Diffusion-DPO, GPO or Flow-GRPO
    learning_rate: float = 1.5e-3
    beta: float = 1.0  # DGPO: S a mean over the group; Diffusion-DPO and GPO: as published
    kl: float = 0.01
    t_min: float = 0.2
    trained_steps: int = 10  # Flow-GRPO: so many of the trajectory's steps, the noisiest
    sde_noise: float = 0.0  # a of the SDE that samples; 0 samples by the ODE
    shared_noise: bool = True
    offline: bool = False
    ema: float | None = None
    group_size: int = 24
    prompts: int = 16
    timesteps: int = 2  # each group is trained at


def at_conditions(network: nn.Module, c: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The network as a velocity (x (N, 2), t ()) -> v for samplers, c (N,) being fixed."""
    return lambda x, t: network(x, t.expand(len(x)), c)


def backward_preferences(
    model: nn.Module,
    reference: nn.Module,
    setting: Setting,
    c: Tensor,
    x0: Tensor,
    rewards: Tensor,
    generator: torch.Generator,
) -> int:
    """The gradient of DGPO, Diffusion-DPO or GPO, divided by its beta. Returns samples trained on.

    c: (P,), x0: (P, G, 2), rewards: (P, G). Diffusion-DPO is DGPO on the two ends of each group.
    """
    if setting.method == "Diffusion-DPO":
        x0, rewards = baselines.best_and_worst(x0, rewards)
    K = setting.timesteps
    c, x0, rewards = c.repeat(K), torch.cat([x0] * K), rewards.repeat(K, 1)
    P, G = rewards.shape
    t = dgpo.sample_timesteps((P, 1), setting.t_min, generator)
    eps = torch.randn(P, 1 if setting.shared_noise else G, 2, generator=generator)

    def velocity(network: nn.Module) -> dgpo.Velocity:
        return lambda x, t, p: network(x, t, c[p])

    if setting.method == "GPO":
        x_t, p = dgpo.diffuse(x0, eps, t).flatten(0, 1), torch.arange(P).repeat_interleave(G)
        v, v_ref = (
            velocity(network)(x_t, t.expand(P, G).flatten(), p).view(P, G, 2)
            for network in (model, reference)
        )
        loss, loss_ref = dgpo.dsm_loss(v, x0, eps), dgpo.dsm_loss(v_ref, x0, eps)
        preference = baselines.gpo_loss(loss, loss_ref, rewards, setting.beta) / setting.beta
        (preference + setting.kl * dgpo.kl_penalty(v, v_ref).mean()).backward()
    else:
        dgpo.backward_group_loss(
            velocity(model),
            velocity(reference),
            x0,
            eps,
            t,
            dgpo.group_advantages(rewards),
            setting.beta / (2 if setting.method == "Diffusion-DPO" else G),
            scale=1 / setting.beta,
            kl=setting.kl,
        )
    return P * G


def backward_flow_grpo(
    model: nn.Module,
    reference: nn.Module,
    setting: Setting,
    c: Tensor,
    trajectory: Tensor,
    times: Tensor,
    rewards: Tensor,
) -> int:
    """Flow-GRPO's gradient, the mean over the trained steps. Returns samples trained on.

    c: (P * G,), trajectory: (steps + 1, P * G, 2), rewards: (P, G).
    """
    (P, G), steps = rewards.shape, setting.trained_steps
    advantages = dgpo.group_advantages(rewards)
    for k in range(steps):
        step = trajectory[k], times[k], times[k + 1], setting.sde_noise
        mean, std = baselines.sde_step(at_conditions(model, c), *step)
        with torch.no_grad():
            mean_ref, _ = baselines.sde_step(at_conditions(reference, c), *step)
        x_next = trajectory[k + 1].view(P, G, 2)
        log_prob = baselines.gaussian_log_prob(x_next, mean.view(P, G, 2), std)
        loss = baselines.flow_grpo_loss(log_prob, log_prob.detach(), advantages, clip=0.2)
        penalty = ((mean - mean_ref) ** 2 / (2 * std**2)).sum(1).mean()
        ((loss + setting.kl * penalty) / steps).backward()
    return steps * P * G


def learn(
    model: nn.Module, setting: Setting, iterations: int, generator: torch.Generator
) -> Iterator[int]:
    """Train `model` in place; yields what each iteration cost, in forwards of one sample."""
    P, G = setting.prompts, setting.group_size
    reference = copy.deepcopy(model).requires_grad_(False)
    old = model if setting.ema is None else copy.deepcopy(reference)
    optimizer = torch.optim.AdamW(model.parameters(), setting.learning_rate, weight_decay=0.0)

    for _ in range(iterations):
        c = flow2d.sample_conditions(P, generator)
        each_c = c.repeat_interleave(G)
        noise = torch.randn(P * G, 2, generator=generator)
        actor = at_conditions(reference if setting.offline else old, each_c)
        if setting.sde_noise:
            trajectory, times = baselines.sample_sde(
                actor, noise, ROLLOUT_STEPS, generator, setting.sde_noise
            )
            x0 = trajectory[-1].view(P, G, 2)
        else:
            x0 = dgpo.sample_ode(actor, noise, ROLLOUT_STEPS).view(P, G, 2)
        rewards = flow2d.reward(c[:, None], x0)

        optimizer.zero_grad()
        networks = model, reference, setting
        if setting.method == "Flow-GRPO":
            trained = backward_flow_grpo(*networks, each_c, trajectory, times, rewards)
        else:
            trained = backward_preferences(*networks, c, x0, rewards, generator)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if setting.ema is not None:
            dgpo.ema_update(old.parameters(), model.parameters(), setting.ema)
        yield ROLLOUT_STEPS * P * G + 4 * trained  # forward, backward (2) and reference


@functools.cache
def pretrained(seed: int) -> tuple[nn.Module, Tensor]:
    """The reference of a seed, and the generator's state after it."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = flow2d.VelocityNet()
    for _ in flow2d.pretrain(model, PRETRAINING_STEPS, generator):
        pass
    return model, generator.get_state()


def run_cell(setting: Setting, seed: int, iterations: int) -> Cell:
    """One training run: what it cost and what it had reached at every evaluation."""
    torch.set_num_threads(1)
    reference, state = pretrained(seed)
    model, generator = copy.deepcopy(reference), torch.Generator()
    generator.set_state(state)
    c = torch.arange(flow2d.CONDITIONS).repeat_interleave(SAMPLES)
    noise = torch.randn(len(c), 2, generator=torch.Generator().manual_seed(seed))

    def evaluate(iteration: int, cost: int) -> list[float]:
        x = flow2d.sample(model, c, noise, ROLLOUT_STEPS)
        reward = flow2d.reward(c, x).mean().item()
        spread = x.view(flow2d.CONDITIONS, SAMPLES, 2).std(1).mean().item() / flow2d.STD
        if not math.isfinite(reward + spread):
            reward, spread = BLOWN_UP, -BLOWN_UP
        row = (iteration, cost, reward, flow2d.on_mode_share(x), spread)
        return [float(f"{value:.5g}") for value in row]

    cost, evaluations, start = 0, [evaluate(0, 0)], time.perf_counter()
    try:
        for i, evaluated in enumerate(learn(model, setting, iterations, generator), 1):
            cost += evaluated
            if i % EVERY == 0:
                evaluations.append(evaluate(i, cost))
    except ValueError:  # rewards no longer finite
        evaluations.append([iterations, cost, BLOWN_UP, 0.0, -BLOWN_UP])
    return {"evaluations": evaluations, "seconds": time.perf_counter() - start}


def arrival(cell: Cell) -> list[float] | None:
    """The evaluation from which on a run is there: at the end, and nine times in ten until then."""
    base = cell["evaluations"][0][2]
    there = [
        reward >= base + WAY * (BEST - base) and on_mode >= ON_MODE
        for _, _, reward, on_mode, _ in cell["evaluations"]
    ]
    if not there[-1]:
        return None
    settled = (k for k in range(len(there)) if there[k] and sum(there[k:]) >= 0.9 * len(there[k:]))
    return cell["evaluations"][next(settled)]


# Twenty-four settings for each method, over one range of learning rates and from no KL to one that
# binds. The KLs differ in unit: velocity error for the preference methods, nats of a step for
# Flow-GRPO. As each rollout is used for one optimiser step, Flow-GRPO's clip never acts; its noise
# a is swept instead.

RATES = (1e-3, 2e-3, 4e-3, 8e-3)


def grid(method: str, betas: tuple[float, ...], **fixed) -> list[Setting]:
    return [
        Setting(method, learning_rate=rate, beta=beta, kl=kl, **fixed)
        for rate, beta, kl in itertools.product(RATES, betas, (0.0, 0.01, 0.1))
    ]


def grpo_grid(trained_steps: int) -> list[Setting]:
    return [
        Setting("Flow-GRPO", rate, kl=kl, sde_noise=a, trained_steps=trained_steps)
        for rate, a, kl in itertools.product(RATES, (0.4, 0.7), (0.0, 0.1, 0.3))
    ]


METHODS = {
    "DGPO": grid("DGPO", (1.0, 3.0)),
    "Diffusion-DPO": grid("Diffusion-DPO", (0.3, 1.0)),
    "GPO": grid("GPO", (0.3, 1.0)),
    "Flow-GRPO": grpo_grid(10),
    "Flow-GRPO, noisiest 6 steps": grpo_grid(6),
    "DGPO, offline": grid("DGPO", (1.0, 3.0), offline=True),
    "Diffusion-DPO, offline": grid("Diffusion-DPO", (0.3, 1.0), offline=True),
}
STYLES = {  # colour, line, marker: distinct to the colour-blind and in grey
    "DGPO": ("#0b3c6f", "-", "o"),
    "Diffusion-DPO": ("#d55e00", "-", "s"),
    "GPO": ("#009e73", "-", "^"),
    "Flow-GRPO": ("#cc79a7", "-", "D"),
    "Flow-GRPO, noisiest 6 steps": ("#cc79a7", ":", "v"),
    "DGPO, offline": ("#0b3c6f", "--", "P"),
    "Diffusion-DPO, offline": ("#d55e00", "--", "X"),
}


class Results:
    """Finished runs in one JSON file, written aside and renamed after every run."""

    def __init__(self, folder: Path):
        self.path = folder / "ring-2d.json"
        self.cells = self.load()
        self.pool = ProcessPoolExecutor(os.cpu_count())

    def load(self) -> dict[str, Cell]:
        if not self.path.exists():
            return {}
        try:
            stored = json.loads(self.path.read_text())
            if stored["version"] == VERSION:
                return stored["cells"]
            reason = f"of version {stored['version']}, not {VERSION}"
        except (ValueError, KeyError, TypeError):
            reason = "damaged"
        aside = self.path.with_suffix(f".{time.time_ns()}.json")
        os.replace(self.path, aside)
        print(f"{self.path.name} is {reason}: moved to {aside.name}, and computed again")
        return {}

    def add(self, key: str, cell: Cell) -> None:
        self.cells = {**self.load(), **self.cells, key: cell}  # another run may have written, too
        new = self.path.with_suffix(f".{os.getpid()}.new")
        new.write_text(json.dumps({"version": VERSION, "cells": self.cells}))
        os.replace(new, self.path)

    def run(self, name: str, wanted: list[tuple[Setting, int, int]]) -> list[Cell]:
        """The cells of (setting, seed, iterations). What is missing is computed, a core a run."""
        keys = [json.dumps([dataclasses.asdict(s), *rest]) for s, *rest in wanted]
        missing = {
            key: cell for key, cell in zip(keys, wanted, strict=True) if key not in self.cells
        }
        futures = {self.pool.submit(run_cell, *cell): key for key, cell in missing.items()}
        try:
            for future in tqdm(as_completed(futures), name, len(futures), disable=not futures):
                self.add(futures[future], future.result())
        except KeyboardInterrupt:
            self.pool.shutdown(cancel_futures=True)
            raise
        return [self.cells[key] for key in keys]


def tune(results: Results, name: str, settings: list[Setting]) -> Setting:
    """The setting with the fewest failures on the tuning seeds, then with the least mean cost."""
    wanted = [(s, seed, ITERATIONS) for s in settings for seed in TUNING_SEEDS]
    cells = results.run(f"tuning {name}", wanted)
    scores = []
    for i, setting in enumerate(settings):
        costs = [arrival(cell) for cell in cells[i * len(TUNING_SEEDS) :][: len(TUNING_SEEDS)]]
        arrived = [found[1] for found in costs if found is not None]
        mean = sum(arrived) / len(arrived) if arrived else math.inf
        scores.append((len(costs) - len(arrived), mean, setting))
    return min(scores, key=lambda score: score[:2])[2]


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval."""
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), T95[len(x) - 2] * x.std().item() / math.sqrt(len(x))


# Sweeps around DGPO's tuned setting, and what the paper says of each.


def sweeps(tuned: Setting) -> dict[str, dict[str, Setting]]:
    def change(**fields) -> Setting:
        return dataclasses.replace(tuned, **fields)

    return {
        "variants": {  # Fig. 5, Section 3.2, and what the released trainer adds
            "DGPO": tuned,
            "SDE rollouts": change(sde_noise=0.7),
            "independent noise": change(shared_noise=False),
            "theta^- an EMA of decay 0.5": change(ema=0.5),
            "no KL": change(kl=0.0),
        },
        "clip": {f"t_min {t:g}": change(t_min=t) for t in (0, 0.1, 0.2, 0.3, 0.4, 0.6)},  # Fig. 4
        "beta": {f"beta {b:g}": change(beta=b) for b in (0.1, 0.3, 1.0, 3.0, 10.0)},  # App. D
        "groups": {  # G at equal samples an iteration: what a group knows that pairs do not
            f"G = {G}": change(group_size=G, prompts=384 // G) for G in (2, 4, 8, 24, 64)
        },
    }


HEADER = """\
| | arrived | cost, thousands of forwards | iterations | reward at the end | on a mode | spread |
|---|---|---|---|---|---|---|"""


SPREAD_HEADER = """\
| spread of the tuning runs that arrived, median | no KL | weaker KL | stronger KL |
|---|---|---|---|"""


def row(name: str, cells: list[Cell]) -> str:
    """A line of the table. Cost and iterations are of the runs that arrived, the rest of all."""
    arrived = [found for found in map(arrival, cells) if found is not None]

    def show(values: list[float], form: str) -> str:
        mean, half = interval(values)
        return f"{mean:{form}} ± {half:{form}}"

    enough = len(arrived) > 1
    cost = show([found[1] / 1000 for found in arrived], ".0f") if enough else "-"
    iterations = show([found[0] for found in arrived], ".0f") if enough else "-"
    ends = list(zip(*(cell["evaluations"][-1] for cell in cells), strict=True))
    reward, on_mode, spread = (show(list(ends[i]), ".2f") for i in (2, 3, 4))
    share = f"{len(arrived)} of {len(cells)}"
    return f"| {name} | {share} | {cost} | {iterations} | {reward} | {on_mode} | {spread} |"


def spread_by_kl(settings: list[Setting], tried: list[Cell]) -> list[str]:
    """By KL, weakest first: median spread of the tuning runs that arrived, and their number."""
    columns = []
    for kl in sorted({setting.kl for setting in settings}):
        chosen = [s for s in settings for _ in TUNING_SEEDS]
        cells = [cell for s, cell in zip(chosen, tried, strict=True) if s.kl == kl]
        spreads = torch.tensor([cell["evaluations"][-1][4] for cell in cells if arrival(cell)])
        median = f"{spreads.median():.2f}, " if len(spreads) else ""
        columns.append(f"{median}{len(spreads)} of {len(cells)}")
    return columns


def band(cells: list[Cell], column: int) -> tuple[list[float], list[float], list[float]]:
    """Cost, mean and half-interval of a column at every evaluation that all runs have."""
    n = min(len(cell["evaluations"]) for cell in cells)
    cost = [evaluation[1] for evaluation in cells[0]["evaluations"][:n]]
    found = [interval([cell["evaluations"][i][column] for cell in cells]) for i in range(n)]
    return cost, [mean for mean, _ in found], [half for _, half in found]


def plot_speed(path: Path, runs: dict[str, list[Cell]], tried: dict[str, list[Cell]]) -> None:
    """Reward against cost of the tuned settings; spread against cost to arrive, of all settings."""
    figure, (curves, ends) = plt.subplots(1, 2, figsize=(12, 5), dpi=100, layout="constrained")
    for name, (color, line, marker) in STYLES.items():
        cost, mean, half = (torch.tensor(column) for column in band(runs[name], 2))
        curves.plot(cost / 1e6, mean, line + marker, markevery=7, color=color, lw=2, label=name)
        curves.fill_between(cost / 1e6, mean - half, mean + half, color=color, alpha=0.15, lw=0)
        for cells, size, alpha in ((tried[name], 5, 0.5), (runs[name], 10, 1.0)):
            arrived = [cell for cell in cells if arrival(cell)]
            cost = [arrival(cell)[1] / 1e6 for cell in arrived]
            spread = [cell["evaluations"][-1][4] for cell in arrived]
            ends.plot(cost, spread, marker, color=color, ms=size, alpha=alpha, mew=0)
    curves.axhline(BEST, color="black", ls="--", lw=1)
    curves.set(xlim=(0, 2), ylim=(-8.5, 0.5), ylabel="mean reward")
    curves.legend(fontsize=12, loc="lower right", frameon=False)
    ends.axhline(1, color="black", ls="--", lw=1)
    ends.text(2.95, 1.01, "spread of a mode of the data", ha="right", va="bottom", fontsize=12)
    ends.set(xlim=(0, 3), ylim=(0, 1.4), ylabel="spread of the samples at the end")
    for axes, label in ((curves, "cost"), (ends, "cost to arrive")):
        axes.set_xlabel(f"{label}, millions of forwards", fontsize=14)
        axes.yaxis.label.set_size(14)
        axes.tick_params(labelsize=12)
    figure.savefig(path)
    plt.close(figure)


def plot_sweep(path: Path, runs: dict[str, list[Cell]]) -> None:
    """By setting: the cost to arrive, and at the end the reward, share on a mode and spread."""
    figure, panels = plt.subplots(1, 4, figsize=(14, 3.6), dpi=90, layout="constrained")

    def draw(axes: Axes, label: str, values: list[list[float]]) -> None:
        for i, found in enumerate(values):
            if len(found) > 1:
                mean, half = interval(found)
                axes.errorbar(mean, i, xerr=half, fmt="o", color="0.2", ms=7, capsize=4)
        axes.set_yticks(range(len(values)), [])
        axes.set_ylim(len(values) - 0.5, -0.5)
        axes.locator_params(axis="x", nbins=4)
        axes.set_xlabel(label, fontsize=15)
        axes.tick_params(axis="x", labelsize=13)

    costs = [[arrival(cell)[1] / 1e6 for cell in cells if arrival(cell)] for cells in runs.values()]
    draw(panels[0], "cost to arrive, millions", costs)
    panels[0].set_yticklabels(list(runs), fontsize=14)
    ends = ((2, "reward at the end"), (3, "share on a mode"), (4, "spread"))
    for axes, (column, label) in zip(panels[1:], ends, strict=True):
        values = [[cell["evaluations"][-1][column] for cell in cells] for cells in runs.values()]
        draw(axes, label, values)
    figure.savefig(path)
    plt.close(figure)


EXPERIMENTS = ("speed", "variants", "clip", "beta", "groups")


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--only", choices=EXPERIMENTS, help="one experiment, and the tuning it rests on")
    add("--seeds", type=int, default=5, help="fresh seeds, 2 to 10 (default: 5)")
    add("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    args = parser.parse_args()
    if not 2 <= args.seeds <= 10:
        parser.error(f"argument --seeds: must be from 2 to 10, got {args.seeds}")
    check_folder(parser, args.out)
    plt.switch_backend("agg")
    return args


def main() -> None:
    args = parse_args()
    results, seeds = Results(args.out), range(args.seeds)

    def fresh(name: str, setting: Setting, iterations: int = ITERATIONS) -> list[Cell]:
        return results.run(name, [(setting, seed, iterations) for seed in seeds])

    wanted = [args.only] if args.only else EXPERIMENTS
    methods = METHODS if "speed" in wanted else {"DGPO": METHODS["DGPO"]}
    tuned = {name: tune(results, name, settings) for name, settings in methods.items()}
    tables = {}
    for experiment in wanted:
        if experiment == "speed":
            runs = {name: fresh(name, setting) for name, setting in tuned.items()}
            tried = {
                name: results.run(
                    name, [(s, seed, ITERATIONS) for s in settings for seed in TUNING_SEEDS]
                )
                for name, settings in METHODS.items()
            }
            plot_speed(args.out / "speed.png", runs, tried)
            kls = {name: spread_by_kl(METHODS[name], cells) for name, cells in tried.items()}
            tables["spread by KL"] = [SPREAD_HEADER] + [
                f"| {name} | {' | '.join(columns)} |" for name, columns in kls.items()
            ]
        else:
            longer = 3 if experiment == "beta" else 1  # over-optimisation shows late, App. D
            runs = {
                name: fresh(name, setting, longer * ITERATIONS)
                for name, setting in sweeps(tuned["DGPO"])[experiment].items()
            }
            plot_sweep(args.out / f"{experiment}.png", runs)
        tables[experiment] = [HEADER] + [row(name, cells) for name, cells in runs.items()]
    for name, lines in tables.items():
        print(f"\n{name}", *lines, sep="\n")
    print("\nchosen on the tuning seeds:")
    for name, setting in tuned.items():
        fields = dataclasses.asdict(setting).items()
        swept = [
            f"{k} {v:g}" for k, v in fields if k in ("learning_rate", "beta", "kl", "sde_noise")
        ]
        print(f"  {name}: {', '.join(swept)}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
