"""What compare.py shows: its pictures and its tables. Nothing is computed here but summaries."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist

import matplotlib.pyplot as plt
import methods
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from methods import RIGHT, WAY, Run, budget_in, way
from torch import Tensor

import cli
import dgpo

plt.rcdefaults()  # whatever a matplotlibrc says

STYLES = {  # colour, line, marker: distinct to the colour-blind and in grey
    "DGPO": ("#0b3c6f", "-", "o"),
    "DGPO with dials": ("#56b4e9", "-", "*"),
    "Flow-GRPO": ("#cc79a7", "-", "D"),
    "Diffusion-DPO": ("#d55e00", "-", "s"),
    "DiffusionNFT": ("#e69f00", "--", "P"),
    "AWM": ("#666666", "--", "X"),
    "GPO": ("#009e73", ":", "^"),
}
WORLD_STYLES = [("#0b3c6f", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "D")]
CLEAR = 4.0  # a ratio is shown if the ends of its interval differ by less than this factor ...
ENOUGH = 0.8  # ... and this share of both methods' runs arrive
# The 97.5 % point of Student's t, by the number of values.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 10: 2.262}

Worlds = dict[str, dict[str, list[Run]]]  # by world, and there by method or setting
Interval = tuple[float, float, float]  # a mean, and the ends of its 95 % interval


def resampled_means(values: list[float], n: int, seed: int = 0) -> Tensor:
    """The means of 4000 samples of n, drawn from the values with replacement."""
    x, generator = torch.tensor(values, dtype=torch.float64), torch.Generator().manual_seed(seed)
    return x[torch.randint(len(x), (4000, n), generator=generator)].mean(1)


def ends(means: Tensor, n: int) -> list[float]:
    """The 95 % interval of resampled means of n values: the expanded percentile bootstrap.

    The percentiles lie further out than 2.5 and 97.5, as far as Student's interval is wider than
    the resampled means would be if all were normal (Hesterberg, arXiv:1411.5279, section 5). With
    four seeds, these are about the least and the greatest.
    """
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * STUDENT[n])
    return means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()


def interval(values: list[float]) -> Interval:
    """The mean, and its 95 % interval.

    Of costs that count a failure as the whole budget, it is the restricted mean, as the failures
    are resampled with the rest.
    """
    n = len(values)
    return (sum(values) / n, *ends(resampled_means(values, n), n))


def foreseen(runs: list[Run], n: int) -> str:
    """Where the mean cost of n other seeds will lie in 19 of 20 cases, if these runs are typical.

    It is wider than the interval: n seeds have a spread, and the mean of these runs an error.
    """
    costs = [run.restricted() / 1000 for run in runs]
    means = resampled_means(costs, n) + resampled_means(costs, len(costs), seed=1)
    means = (means - sum(costs) / len(costs)).clamp(0, runs[0].budget / 1000)
    low, high = ends(means, len(costs))
    return f"{low:.0f} to {high:.0f}"


def ratio(runs: list[Run], other: list[Run]) -> Interval | None:
    """The other's restricted mean cost over the first's, with its interval; None if not clear."""
    for each in (runs, other):
        if sum(run.arrived is not None for run in each) < ENOUGH * len(each):
            return None
    costs = [[run.restricted() for run in each] for each in (runs, other)]
    first, second = (resampled_means(each, len(each), seed) for seed, each in enumerate(costs))
    first_mean, second_mean = (sum(each) / len(each) for each in costs)
    return (second_mean / first_mean, *ends(second / first, len(runs)))


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


RUN_HEADER = ["arrived", "cost, thousands of forwards", "right", "spread", "way"]


def run_row(world: str, runs: list[Run]) -> list[str]:
    """Under RUN_HEADER: the cost with its interval, and how all runs end, whether there or not."""
    there = sum(run.arrived is not None for run in runs)
    mean, low, high = (cost / 1000 for cost in interval([run.restricted() for run in runs]))
    cost = f"{mean:.0f} [{low:.0f}, {high:.0f}]" if there else "-"
    ends = [
        interval([run.end.right for run in runs])[0],
        interval([run.end.spread for run in runs])[0],
        interval([way(world, run) for run in runs])[0],
    ]
    shown = (f"{value:.2f}" if abs(value) < 1e3 else "blown up" for value in ends)
    return [f"{there} of {len(runs)}", cost, *shown]


def ratio_cell(runs: list[Run], other: list[Run]) -> str:
    found = ratio(runs, other)
    if found is None:
        return "-"
    middle, low, high = found
    return f"{middle:.1f} [{low:.1f}, {high:.1f}]" if high < CLEAR * low else "-"


# Pictures.


def panels(names: list[str], height: float) -> tuple[Figure, list[Axes]]:
    """A panel for each name, at most three to a row, named."""
    rows = math.ceil(len(names) / 3)
    columns, size = math.ceil(len(names) / rows), (13, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for panel, name in zip(axes.flat, names, strict=False):
        panel.set_title(name, fontsize=17)
        panel.tick_params(labelsize=13)
    for panel in axes.flat[len(names) :]:
        panel.axis("off")
    return figure, list(axes.flat[: len(names)])


def save(figure: Figure, path: Path, x: str, y: str, legend: Sequence[Axes] = ()) -> None:
    """legend: the panels whose lines are named above all, each name once."""
    figure.supxlabel(x, fontsize=17)
    figure.supylabel(y, fontsize=17)
    lines = [zip(*panel.get_legend_handles_labels(), strict=True) for panel in legend]
    if named := {label: handle for each in lines for handle, label in each}:
        where = {"loc": "outside upper center", "ncols": 4}
        figure.legend(named.values(), named.keys(), fontsize=14, **where)
    cli.replace_file(path, lambda new: figure.savefig(new, dpi=80))
    plt.close(figure)


def at_costs(world: str, runs: list[Run], costs: Tensor) -> Tensor:
    """How far each run had come at each cost, (runs, costs): its last evaluation until then.

    A run that was followed long enough stays where it ended.
    """
    rows = []
    for run in runs:
        seen = torch.tensor([float(e.cost) for e in run.evaluations])
        ways = torch.tensor([way(world, run, e) for e in run.evaluations])
        rows.append(ways[torch.searchsorted(seen, costs, right=True) - 1])
    return torch.stack(rows)


def plot_speed(path: Path, found: Worlds) -> None:
    """The median way to the best reward against cost, a panel a world; shaded: the quartiles."""
    figure, axes = panels(list(found), 3.8)
    for panel, (world, by_method) in zip(axes, found.items(), strict=True):
        costs = torch.logspace(4, math.log10(budget_in(world)), 80)
        for name, runs in by_method.items():
            color, line, marker = STYLES[name]
            low, median, high = at_costs(world, runs, costs).quantile(
                torch.tensor([0.25, 0.5, 0.75]), 0
            )
            style = {"color": color, "lw": 2, "label": name, "ms": 8}
            panel.plot(costs, median, line + marker, markevery=12, **style)
            panel.fill_between(costs, low, high, color=color, alpha=0.15, lw=0)
        panel.axhline(WAY, color="black", ls="--", lw=1)
        panel.set(xscale="log", xlim=(1e4, budget_in(world)), ylim=(-0.2, 1.3))
    save(figure, path, "cost, forwards of one sample", "way to the best reward", axes[:1])


def plot_cost(path: Path, found: Worlds) -> None:
    """The restricted mean cost of every method with its interval, and the share that arrive."""
    figure, axes = panels(list(found), 3.2)
    for panel, (world, by_method) in zip(axes, found.items(), strict=True):
        for i, (name, runs) in enumerate(by_method.items()):
            mean, low, high = interval([run.restricted() for run in runs])
            color, _, marker = STYLES[name]
            style = {"fmt": marker, "color": color, "ms": 9, "capsize": 4, "lw": 2}
            panel.errorbar(mean, i, xerr=[[mean - low], [high - mean]], **style)
        labels = [
            f"{name}, {sum(run.arrived is not None for run in runs)} of {len(runs)}"
            for name, runs in by_method.items()
        ]
        panel.set_yticks(range(len(by_method)), labels, fontsize=13)
        panel.set(xscale="log", xlim=(1e4, 1.1 * budget_in(world)))
        panel.set_ylim(len(by_method) - 0.5, -0.5)
        panel.grid(axis="x", color="0.9")
    save(figure, path, "cost to arrive, forwards of one sample; a failure counts as all", "")


def plot_search(path: Path, found: Worlds) -> None:
    """Where the settings of the first rung ended: how far they came, and what stayed right."""
    figure, axes = panels(list(found), 3.6)
    for panel, (world, by_method) in zip(axes, found.items(), strict=True):
        for name, runs in by_method.items():
            color, _, marker = STYLES[name]
            x, y = [way(world, run) for run in runs], [run.end.right for run in runs]
            panel.plot(x, y, marker, color=color, ms=7, alpha=0.6, mew=0, label=name)
        panel.axhline(RIGHT, color="black", ls="--", lw=1)
        panel.axvline(WAY, color="black", ls="--", lw=1)
        panel.set(xlim=(-0.5, 1.6), ylim=(-0.03, 1.03))
    x = "way from the base reward (0) to the best data's (1)"
    save(figure, path, x, "share of samples right", axes[:1])


def plot_sweep(path: Path, found: Worlds) -> None:
    """By setting and world: the cost to arrive, the share that do, quality and spread."""
    names = list(dict.fromkeys(name for runs in found.values() for name in runs))
    figure, axes = plt.subplots(
        1, 4, figsize=(14, 1.6 + 0.45 * len(names)), dpi=80, layout="constrained"
    )
    labels = ("cost to arrive,\nthousands of forwards", "share that arrive", "right", "spread")
    for w, (world, by_name) in enumerate(found.items()):
        offset = 0.15 * (2 * w - len(found) + 1)
        color, marker = WORLD_STYLES[w % len(WORLD_STYLES)]
        for name, runs in by_name.items():
            columns = (
                [run.restricted() / 1000 for run in runs],
                [float(run.arrived is not None) for run in runs],
                [run.end.right for run in runs],
                [run.end.spread for run in runs],
            )
            for k, (panel, values) in enumerate(zip(axes, columns, strict=True)):
                mean, low, high = interval(values)
                bars = [[mean - low], [high - mean]] if k != 1 else None
                style = {"fmt": marker, "color": color, "ms": 7, "capsize": 4, "label": world}
                panel.errorbar(mean, names.index(name) + offset, xerr=bars, **style)
    for panel, label, limits in zip(
        axes, labels, ((0, None), (-0.05, 1.05), (0, 1.05), (0, 3)), strict=True
    ):
        panel.set_yticks(range(len(names)), [])
        panel.set(ylim=(len(names) - 0.5, -0.5), xlim=limits)
        panel.locator_params(axis="x", nbins=4)
        panel.set_xlabel(label, fontsize=15)
        panel.tick_params(axis="x", labelsize=13)
        panel.grid(axis="y", color="0.9")
    axes[0].set_yticklabels(names, fontsize=14)
    handles = dict(zip(*reversed(axes[2].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, fontsize=14, loc="outside upper center", ncols=4)
    cli.replace_file(path, figure.savefig)
    plt.close(figure)


def plot_extremes(path: Path, found: Worlds, curves: dict[str, tuple[int, ...]]) -> None:
    """The cost to arrive against m, the samples of a group that are trained on."""
    figure, axes = panels(list(found), 3.6)
    for panel, by_name in zip(axes, found.values(), strict=True):
        for name, values in curves.items():
            color, line, marker = STYLES[name]
            means = [
                interval([r.restricted() for r in by_name[f"{name}, m = {m}"]]) for m in values
            ]
            mean, low, high = (torch.tensor(column) for column in zip(*means, strict=True))
            panel.plot(values, mean, line + marker, color=color, lw=2, ms=8, label=name)
            panel.fill_between(values, low, high, color=color, alpha=0.15, lw=0)
        panel.set(xscale="log", ylim=(0, None))
        panel.set_xticks(values, values)
        panel.minorticks_off()
    save(figure, path, "samples of a group of 24 that are trained on", "cost, forwards", axes[:1])


def plot_noise(path: Path, found: dict[str, dict[int, dict]]) -> None:
    """By group size and t: the gradient's variance with a shared eps over that with one each."""
    figure, axes = panels(list(found), 3.4)
    for panel, by_group in zip(axes, found.values(), strict=True):
        for k, line in enumerate(("-", "--", "-.", ":")):
            t = next(iter(by_group.values()))["ratios"][k]["t"]
            y = [measured["ratios"][k]["gradient"] for measured in by_group.values()]
            color = ("#0b3c6f", "#d55e00", "#009e73", "#cc79a7")[k]
            panel.plot(list(by_group), y, line + "o", color=color, lw=2, label=f"t = {t}")
        panel.axhline(1, color="black", lw=1)
        panel.set(xscale="log", yscale="log")
        panel.set_xticks(list(by_group), list(by_group))
        panel.set_yticks([0.5, 1, 2, 4, 8], ["1/2", "1", "2", "4", "8"])
        panel.minorticks_off()
    save(figure, path, "group size G", "variance ratio", axes[:1])


V_OLD, V_STAR = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)


def _square(v: Tensor) -> Tensor:
    return dgpo.dsm_loss(v, -V_STAR, V_OLD)  # v* = eps - x0, with eps = 0


def _bounded(v: Tensor, A: Tensor) -> Tensor:
    bad = (-A).clamp(min=0)
    return methods.awm_loss(_square(v), A) + 2 * (bad * dgpo.mean_square(v, V_OLD)).mean()


# The loss of one sample with advantage A (1, 1) against v (1, 1, 1), where v_old = 0 and v* = 1, by
# the functions that train. All have one slope at v_old, so they differ in what becomes of it.
FAMILY: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "AWM: A times a parabola": ("AWM", lambda v, A: methods.awm_loss(_square(v), A)),
    "DGPO, DPO, GPO: within a gate (beta 1)": (
        "DGPO",
        lambda v, A: 2 * dgpo.dgpo_loss(_square(v), _square(V_OLD), A, beta=1.0),
    ),
    "DGPO, bad samples bounded (2)": ("DGPO with dials", _bounded),
    "DiffusionNFT (b = 0.4), undivided": (
        "DiffusionNFT",
        lambda v, A: 1e6 * methods.nft_loss(v, V_OLD, V_STAR, torch.ones(1, 1), A, 0.4, eps=1e6),
    ),
    "Flow-GRPO: A times a ratio, unclipped": (
        "Flow-GRPO",
        lambda v, A: methods.flow_grpo_loss(-_square(v), -_square(V_OLD), A, math.inf),
    ),
}


def plot_family(path: Path) -> None:
    """What each method makes of a good and of a bad sample, as v moves away from v_old."""
    names = ["a good sample, A = 1", "a bad sample, A = -1"]
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    line = torch.linspace(-3.5, 3.5, 141)
    for panel, name, advantage in zip(axes, names, (1.0, -1.0), strict=True):
        A = torch.full((1, 1), advantage)
        for label, (style, loss) in FAMILY.items():
            start = loss(V_OLD, A)
            values = torch.stack([loss(v.view(1, 1, 1), A) - start for v in line])
            color, dashes, _ = STYLES[style]
            panel.plot(line, values, dashes, color=color, lw=3, label=label)
        panel.axvline(0, color="black", lw=1)
        panel.axvline(1, color="black", lw=1, ls="--")
        panel.text(0.05, -4.8, "v_old", fontsize=14)
        panel.text(1.05, -4.8, "v*", fontsize=14)
        panel.set_title(name, fontsize=17)
        panel.set(ylim=(-5, 5), xlim=(-3.5, 3.5))
        panel.tick_params(labelsize=13)
    figure.supxlabel("v, along the line through v_old and v*", fontsize=17)
    figure.supylabel("loss, from its value at v_old", fontsize=17)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=13, loc="outside upper center", ncols=3)
    cli.replace_file(path, lambda new: figure.savefig(new, dpi=80))
    plt.close(figure)
