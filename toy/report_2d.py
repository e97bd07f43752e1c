"""What a run of run_2d.py shows: two tables, run_2d.png and run_2d.gif."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import dgpo
from toy import flow2d

SAMPLES = 400  # points for each condition in the report and in the figures
TEMPERATURE = 1.0  # the beta of Eq. 5 for p* and Z(c); --beta is that of Eq. 17
COLORS = ("#0b3c6f", "#d55e00", "#009e73", "#cc79a7")  # distinct to the colour-blind and in grey
BEST = 0.0  # the reward at the target itself

Stage = tuple[int, Tensor]  # iteration, samples (CONDITIONS, SAMPLES, 2)
Metrics = dict[str, float]  # of one iteration, from dgpo.train


def write(path: Path, save: Callable[[Path], None]) -> None:
    """Save to a file beside `path` and rename it, so that `path` is never half-written."""
    new = path.with_name("new_" + path.name)
    save(new)
    new.replace(path)
    print(f"wrote {path}")


def draw(model: nn.Module, seed: int) -> Tensor:
    """SAMPLES points of the model for each condition, from the same noise every time: (C, N, 2)."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(flow2d.CONDITIONS * SAMPLES, 2, generator=generator)
    c = torch.arange(flow2d.CONDITIONS).repeat_interleave(SAMPLES)
    return flow2d.sample(model, c, noise).view(flow2d.CONDITIONS, SAMPLES, 2)


def mean_reward(x: Tensor) -> float:
    """The mean reward of samples (C, N, 2)."""
    return flow2d.reward(torch.arange(flow2d.CONDITIONS)[:, None], x).mean().item()


def report(stages: list[Stage], generator: torch.Generator) -> Tensor:
    """Print a table of the first stage, the last stage and p*. Returns samples of p*, (C, N, 2)."""
    c = torch.arange(flow2d.CONDITIONS).repeat_interleave(SAMPLES)
    data = flow2d.sample_ref(c, generator).view_as(stages[0][1])
    optimum = flow2d.sample_optimum(c, TEMPERATURE, generator).view_as(data)
    base, (iterations, trained) = stages[0][1], stages[-1]
    p_star = f"p* of Eq. 5, temperature {TEMPERATURE:g}"
    print(f"{'':28}mean reward   on a mode   energy distance to p_ref")
    rows = {"reference": base, f"after {iterations} iterations": trained, p_star: optimum}
    for name, x in rows.items():
        share = flow2d.on_mode_share(x.flatten(0, 1))
        distance = sum(map(flow2d.energy_distance, x, data)) / flow2d.CONDITIONS
        print(f"{name:<32}{mean_reward(x):>8.2f}{share:>12.1%}{distance:>18.3f}")

    way = (mean_reward(trained) - mean_reward(base)) / (BEST - mean_reward(base))
    print(f"{'best possible':<32}{BEST:>8.2f}  and training went {way:.1%} of the way there")
    print(
        f"Energy distance: estimated from {SAMPLES} points per condition, to about 0.005; it is 0"
    )
    print("for equal densities. Temperature: the beta of Eq. 5, whereas --beta is that of Eq. 17.")
    return optimum


def report_z(group_size: int, generator: torch.Generator) -> None:
    """Print Eq. 11 with and without log Z(c), under Eq. 14's balanced weights and under equal ones.

    theta is p* in closed form, so by Eq. 6 the gap with log Z(c) is the gap of the true rewards.
    """
    c = torch.arange(flow2d.CONDITIONS)
    x = flow2d.sample_ref(c.repeat_interleave(group_size), generator).double()
    x, c = x.view(flow2d.CONDITIONS, group_size, 2), c[:, None]
    log_z = flow2d.log_z(c, TEMPERATURE)
    ratio = flow2d.log_prob_optimum(c, x, TEMPERATURE) - flow2d.log_prob_ref(c, x)
    advantages = dgpo.group_advantages(flow2d.reward(c, x))
    positive, equal = dgpo.partition(advantages), torch.ones_like(advantages)

    print("\nThe gap R(G+) - R(G-) of Eq. 11 at theta = p*, with and without log Z(c)")
    print("weights       c   log Z       with    without  difference   predicted")
    for name, w in (("|A|, Eq. 14", dgpo.weights(advantages)), ("equal", equal)):
        with_z = TEMPERATURE * dgpo.group_gap(ratio + log_z, w, positive)
        without = TEMPERATURE * dgpo.group_gap(ratio, w, positive)
        predicted = TEMPERATURE * log_z[:, 0] * dgpo.group_gap(equal, w, positive)
        columns = torch.stack([log_z[:, 0], with_z, without, with_z - without, predicted], 1)
        for i, row in enumerate(columns.tolist()):
            print("{:<12}{:>3}{:>8.3f}{:>11.4f}{:>11.4f}{:>z12.4f}{:>z12.4f}".format(name, i, *row))


def world_axes(axes: plt.Axes, title: str) -> None:
    """Draw the modes in grey and, for each condition, its target ringed in its colour."""
    limit = flow2d.RADIUS + 1.3
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
    axes.set_title(title, fontsize=16)
    for center in flow2d.mode_centers().tolist():
        axes.add_patch(plt.Circle(center, 3 * flow2d.STD, color="0.9", zorder=0))
    for c, color in enumerate(COLORS):
        x, y = flow2d.target(torch.tensor(c)).tolist()
        axes.add_patch(plt.Circle((x, y), 3 * flow2d.STD, fill=False, color=color, lw=2))
        axes.text(0.42 * x, 0.42 * y, f"c={c}", color=color, fontsize=13, ha="center", va="center")


def scatter(axes: plt.Axes, x: Tensor) -> list[plt.Line2D]:
    style = {"ls": "", "marker": ".", "ms": 5, "mew": 0, "alpha": 0.5}
    pairs = zip(x.numpy(), COLORS, strict=True)
    return [axes.plot(*points.T, color=color, **style)[0] for points, color in pairs]


def curve_axes(axes: plt.Axes, label: str, iterations: int, low: float, high: float) -> None:
    axes.set(xlim=(0, iterations), ylim=(low, high))
    axes.set_xlabel("iteration", fontsize=15)
    axes.set_ylabel(label, fontsize=15)
    axes.tick_params(labelsize=13)


def reward_axes(axes: plt.Axes, reference: Tensor, iterations: int) -> None:
    base = mean_reward(reference)
    curve_axes(axes, "mean reward", iterations, 1.15 * base, -0.15 * base)
    axes.axhline(BEST, color="black", ls="--", lw=1.5)
    axes.text(0.99 * iterations, BEST, "best possible", ha="right", va="bottom", fontsize=14)


def moving_picture(reference: Tensor, iterations: int) -> tuple[plt.Figure, Callable]:
    """A figure for the GIF or the window, and a function that shows a stage in it (see below)."""
    figure, (world, curve) = plt.subplots(1, 2, figsize=(8, 4), dpi=80, layout="constrained")
    world_axes(world, " ")
    reward_axes(curve, reference, iterations)
    points = scatter(world, torch.zeros(flow2d.CONDITIONS, 1, 2))
    (line,) = curve.plot([], [], color="0.2", lw=2)

    def update(n: int, x: Tensor, history: list[Metrics]) -> list[plt.Artist]:
        """Show samples x after n iterations. Returns what changed in the figure."""
        world.title.set_text(f"iteration {n}")
        for artist, xy in zip(points, x.numpy(), strict=True):
            artist.set_data(*xy.T)
        line.set_data(range(1, n + 1), [metrics["reward"] for metrics in history[:n]])
        return [world.title, line, *points]

    return figure, update


def save_gif(path: Path, stages: list[Stage], history: list[Metrics]) -> None:
    """Draw the axes once, and at every stage only what changed."""
    figure, update = moving_picture(stages[0][1], len(history))
    for artist in update(*stages[0], history):
        artist.set_animated(True)
    figure.canvas.draw()
    still = figure.canvas.copy_from_bbox(figure.bbox)

    frames = []
    for stage in stages:
        figure.canvas.restore_region(still)
        for artist in update(*stage, history):
            figure.draw_artist(artist)
        frames.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB"))

    palette = frames[0].quantize(64)  # the reference's samples have all colours
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [800, *[120] * (len(frames) - 2), 2000]  # ms
    options = {"append_images": frames[1:], "duration": durations, "loop": 0}
    write(path, lambda new: frames[0].save(new, save_all=True, **options))
    plt.close(figure)


def save_png(path: Path, stages: list[Stage], optimum: Tensor, history: list[Metrics]) -> None:
    """Samples on the way from the reference, p*, and below them the reward and the gate."""
    n = len(history)
    figure = plt.figure(figsize=(12, 5.4), dpi=100, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    panels = [("reference", stages[0][1])]
    for share in (0.1, 0.25, 1):
        i, x = min(stages, key=lambda stage: abs(stage[0] - share * n))
        panels.append((f"iteration {i}", x))
    panels.append(("p* of Eq. 5", optimum))
    for axes, (title, x) in zip(above.subplots(1, 5), panels, strict=True):
        world_axes(axes, title)
        scatter(axes, x)

    reward, gate = below.subplots(1, 2, width_ratios=(3, 2))
    reward_axes(reward, stages[0][1], n)
    curve_axes(gate, "gate σ(−β gap)", n, 0, 1)
    for axes, name in ((reward, "reward"), (gate, "gate")):
        axes.plot(range(1, n + 1), [metrics[name] for metrics in history], color="0.2", lw=2)
    write(path, figure.savefig)
    plt.close(figure)
