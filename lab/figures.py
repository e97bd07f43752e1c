"""The figures of lab/results/README.md. Nothing is computed here but summaries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from lab import methods
from lab.methods import METHODS, Setting
from lab.protocol import Goal, Run
from sd35.run import replace_file

# Distinct to the colour-blind, and in grey by line and marker.
COLORS = ("#0b3c6f", "#56b4e9", "#cc79a7", "#e69f00", "#d55e00", "#666666", "#009e73", "#000000")
LINES, MARKERS = ("-", "--", ":"), "o*DPsX^v"

ByMethod = dict[str, list[Run]]
Reports = dict[str, ByMethod]  # by world


def style(method: str) -> dict[str, Any]:
    """The look of a method's line, the same in all figures."""
    i = list(METHODS).index(method)
    look = {"color": COLORS[i % 8], "ls": LINES[i % 3], "marker": MARKERS[(i + 3 * (i // 8)) % 8]}
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
    """Write the figure with one legend for the lines of all `axes`, each label once."""
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


def plot_curves(path: Path, plotted: list[tuple[str, Goal, ByMethod]]) -> None:
    """The median progress against cost, with the quartiles shaded.

    plotted: of each panel, the title, the world's goal, and the runs by method.
    """
    figure, axes = panels([title for title, _, _ in plotted], 3.8)
    for panel, (_, goal, by_method) in zip(axes, plotted, strict=True):
        budget = next(iter(by_method.values()))[0].budget
        costs = np.geomspace(budget / 150, budget, 80)
        for method, runs in by_method.items():
            progress = []
            for run in runs:
                points = [(one.cost, goal.progress_of(run, one)) for one in run.evaluations]
                progress.append(np.interp(costs, *zip(*points, strict=True)))
            low, median, high = np.quantile(progress, [0.25, 0.5, 0.75], 0)
            (line,) = panel.plot(costs, median, label=method, **style(method))
            panel.fill_between(costs, low, high, color=line.get_color(), alpha=0.15, lw=0)
        panel.axhline(goal.progress, color="black", ls="--", lw=1)
        panel.set(xscale="log", xlim=(costs[0], budget), ylim=(-0.2, 1.75))
    save(figure, path, "cost, forward passes of one sample", "progress", axes)


FAMILY = {
    "AWM": "AWM; RVM and RAM with a KL",
    "DGPO": "DGPO, Diffusion-DPO, GPO",
    "Bounded DGPO": "Bounded DGPO (2)",
    "DiffusionNFT": "DiffusionNFT",
    "Linear-DPO": "Linear-DPO",
    "ThermoDPO": "ThermoDPO (t = 0.5)",
    "CRD": "CRD",
    "PAR": "PAR, PEPG",
    "V-GRPO": "V-GRPO, EPG, Flow-GRPO (no clip)",
}


def loss_of_one(method: str, line: Tensor, advantage: float) -> Tensor:
    """The loss of one sample at velocities (N,) that increase, less its value at v_old = 0.

    It is the integral of the training gradient, scaled so that all methods have one slope at
    v_old. The sample is one of a pair, A = -1 and 1, the other of which stays at v_old. v* = 1.
    """
    N, moved = len(line), int(advantage > 0)
    line, order = torch.cat([line, line.new_zeros(1)]).sort(stable=True)  # with v_old itself
    v = line.new_zeros(N + 1, 2, 1).index_fill(1, torch.tensor(moved), 1) * line[:, None, None]
    v.requires_grad_()

    def fixed(x_t: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return torch.zeros_like(x_t)

    networks = (lambda x_t, t, rows: v.flatten(0, 1)), fixed, fixed
    A = torch.tensor([-1.0, 1.0], dtype=line.dtype).expand(N + 1, 2)
    x0, eps, t = -torch.ones_like(v), v.new_zeros(N + 1, 1, 1), v.new_full((N + 1, 1), 0.5)
    setting = Setting(method, beta=2.0, kl=0.0, bound=2.0 * (method == "Bounded DGPO"))
    methods.backward(networks, setting, x0, eps, t, A, A)

    at_old = order.argmax()
    slope = v.grad[:, moved, 0]
    slope = slope * (-2 * advantage / slope[at_old])
    area = F.pad(((slope[1:] + slope[:-1]) / 2 * line.diff()).cumsum(0), (1, 0))
    return (area - area[at_old])[order != N]


def plot_family(path: Path) -> None:
    """Each method's loss of a good and of a bad sample, as v moves away from v_old."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    axes = figure.subplots(1, 2)
    line = torch.linspace(-3.5, 3.5, 1401)
    for panel, name, advantage in zip(axes, ("good", "bad"), (1.0, -1.0), strict=True):
        for method, label in FAMILY.items():
            values = loss_of_one(method, line, advantage)
            panel.plot(line, values, label=label, **style(method) | {"markevery": 120})
        for v, ls, mark in ((0, "-", "v_old"), (1, "--", "v*")):
            panel.axvline(v, color="black", lw=1, ls=ls)
            panel.text(v + 0.05, -4.8, mark, fontsize=14)
        panel.set_title(f"a {name} sample, A = {advantage:g}", fontsize=17)
        panel.set(ylim=(-5, 5), xlim=(-3.5, 3.5))
    x = "v, along the line through v_old and v*"
    save(figure, path, x, "loss, less its value at v_old", axes[:1])
