"""The figures of lab/results/README.md. Nothing is computed here but summaries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import dgpo
from lab import methods
from lab.methods import METHODS, VARIANTS, Setting
from lab.protocol import Goal, Run
from sd35.run import replace_file

# Distinct to the colour-blind, and in grey by line and marker.
COLORS = ("#0b3c6f", "#56b4e9", "#cc79a7", "#e69f00", "#d55e00", "#666666", "#009e73", "#000000")
LINES, MARKERS = ("-", "--", ":"), "o*DPsX^v"

ByMethod = dict[str, list[Run]]
Reports = dict[str, ByMethod]  # by world


def style(method: str) -> dict[str, Any]:
    """The look of a method's line, the same in all figures."""
    i = [*METHODS, *VARIANTS].index(method)
    look = {"color": COLORS[i % 8], "ls": LINES[i % 3], "marker": MARKERS[i % 8]}
    return {**look, "lw": 2, "ms": 8, "markevery": 12}


def panels(names: Sequence[str], height: float) -> tuple[Figure, list[Axes]]:
    """A named panel for each name, at most three to a row."""
    rows = math.ceil(len(names) / 3)
    columns = math.ceil(len(names) / rows)
    figure = Figure(figsize=(13, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, name in zip(axes, names, strict=False):
        panel.set_title(name, fontsize=17)
        panel.tick_params(labelsize=13)
    for panel in axes[len(names) :]:
        panel.axis("off")
    return figure, axes[: len(names)]


def save(figure: Figure, path: Path, x: str, y: str, axes: Sequence[Axes]) -> None:
    """axes: the panels, whose lines are named above all, each name once."""
    figure.supxlabel(x, fontsize=17)
    figure.supylabel(y, fontsize=17)
    lines = {line.get_label(): line for panel in axes for line in panel.get_lines()}
    named = {label: line for label, line in lines.items() if label[0] != "_"}
    where = {"loc": "outside upper center", "ncols": 3, "fontsize": 13}
    figure.legend(named.values(), named.keys(), **where)

    def write(file: Path) -> None:
        figure.savefig(file, dpi=80)
        picture = Image.open(file).convert("RGB").quantize(64, dither=Image.Dither.NONE)
        picture.save(file, optimize=True)  # a third of the size

    replace_file(path, write)


def plot_curves(path: Path, reports: Reports, goals: dict[str, Goal]) -> None:
    """The median progress against cost, a panel a world; shaded: the quartiles."""
    figure, axes = panels(list(reports), 4.2)
    for panel, (world, by_method) in zip(axes, reports.items(), strict=True):
        budget, goal = next(iter(by_method.values()))[0].budget, goals[world]
        costs = torch.logspace(math.log10(budget / 150), math.log10(budget), 80).tolist()
        for method, runs in by_method.items():
            progress = [[goal.progress_of(run, run.at(cost)) for cost in costs] for run in runs]
            quartiles = torch.tensor([0.25, 0.5, 0.75])
            low, median, high = torch.tensor(progress).quantile(quartiles, 0)
            (line,) = panel.plot(costs, median, label=method, **style(method))
            panel.fill_between(costs, low, high, color=line.get_color(), alpha=0.15, lw=0)
        panel.axhline(goal.progress, color="black", ls="--", lw=1)
        panel.set(xscale="log", xlim=(costs[0], budget), ylim=(-0.2, 1.3))
    save(figure, path, "cost, forwards of one sample", "progress", axes)


FAMILY = {
    "AWM": "AWM: A times a parabola",
    "DGPO": "DGPO, DPO, GPO: in a gate (beta 1)",
    "Bounded DGPO": "Bounded DGPO (2), without its gate",
    "DiffusionNFT": "DiffusionNFT (b = 0.4), undivided",
    "Flow-GRPO": "Flow-GRPO: A times a ratio",
}


def loss_of_one(method: str, v: float, advantage: float) -> float:
    """The loss of one sample against its velocity, by the functions that train, less that at v_old.

    v_old = 0 and v* = 1; scaled so that all methods have one slope at v_old.
    """
    v_old, v_star, A = torch.zeros(1, 1, 1), torch.ones(1, 1, 1), torch.full((1, 1), advantage)

    def loss(v: Tensor) -> Tensor:
        batch = methods.Batch(v, v_old, v_old, v_star, torch.ones(1, 1), A, A)
        if method == "DGPO":
            return 2 * dgpo.dgpo_loss(batch.loss, batch.loss_ref, A, beta=1.0)
        if method == "Bounded DGPO":
            bad = (-A).clamp(min=0)
            return methods.awm(batch, Setting()) + 2 * (bad * dgpo.mean_square(v, v_old)).mean()
        if method == "DiffusionNFT":  # a huge floor makes its division one by a constant
            return 1e6 * methods.nft(batch, Setting(beta=0.4), eps=1e6)
        if method == "Flow-GRPO":
            return methods.flow_grpo_loss(-batch.loss, -batch.loss_ref, A, None)
        return methods.METHODS[method].loss(batch, Setting())

    return (loss(torch.full((1, 1, 1), float(v))) - loss(v_old)).item()


def plot_family(path: Path) -> None:
    """What each method makes of a good and of a bad sample, as v moves away from v_old."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    axes = figure.subplots(1, 2)
    line = torch.linspace(-3.5, 3.5, 141).tolist()
    for panel, name, advantage in zip(axes, ("good", "bad"), (1.0, -1.0), strict=True):
        for method, label in FAMILY.items():
            values = [loss_of_one(method, v, advantage) for v in line]
            panel.plot(line, values, label=label, **style(method))
        for v, ls, mark in ((0, "-", "v_old"), (1, "--", "v*")):
            panel.axvline(v, color="black", lw=1, ls=ls)
            panel.text(v + 0.05, -4.8, mark, fontsize=14)
        panel.set_title(f"a {name} sample, A = {advantage:g}", fontsize=17)
        panel.set(ylim=(-5, 5), xlim=(-3.5, 3.5))
    x = "v, along the line through v_old and v*"
    save(figure, path, x, "loss, less its value at v_old", axes[:1])
