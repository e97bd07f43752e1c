"""What a run of run_2d.py shows: the table, Z(c) with and without, run_2d.png and run_2d.gif."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import flow2d
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from torch import Tensor, nn

import dgpo  # flow2d has made it findable

SAMPLES = 400  # points for each condition in the report and in the figures
TEMPERATURE = 1.0  # the beta of Eq. 5 for p* and Z(c), which is not the beta of Eq. 17, the gate's
COLORS = ("#0b3c6f", "#d55e00", "#009e73", "#cc79a7")  # distinct to the colour-blind and in grey
BEST = 0.0  # the reward at the target itself

Stage = tuple[int, Tensor]  # iteration, samples (CONDITIONS, SAMPLES, 2)

plt.rcdefaults()  # whatever a matplotlibrc says


def has_windows() -> bool:
    """Whether matplotlib can open a window here."""
    try:
        figure = plt.figure()
    except Exception:  # each kind of window has its own errors
        return False
    plt.close(figure)
    return figure.canvas.required_interactive_framework is not None


def draw(model: nn.Module, seed: int) -> Tensor:
    """SAMPLES points of the model for each condition, from the same noise every time: (C, N, 2)."""
    noise = torch.randn(
        flow2d.CONDITIONS * SAMPLES, 2, generator=torch.Generator().manual_seed(seed)
    )
    c = torch.arange(flow2d.CONDITIONS).repeat_interleave(SAMPLES)
    return flow2d.sample(model, c, noise).view(flow2d.CONDITIONS, SAMPLES, 2)


def mean_reward(x: Tensor) -> float:
    return flow2d.reward(torch.arange(flow2d.CONDITIONS)[:, None], x).mean().item()


def report(stages: list[Stage], generator: torch.Generator) -> Tensor:
    """Prints what the samples of the first and the last stage are like, and those of the optimum.

    Returns samples of the optimum, (CONDITIONS, SAMPLES, 2).
    """
    c = torch.arange(flow2d.CONDITIONS).repeat_interleave(SAMPLES)
    data = flow2d.sample_ref(c, generator).view_as(stages[0][1])
    optimum = flow2d.sample_optimum(c, TEMPERATURE, generator).view_as(data)
    base, (iterations, trained) = stages[0][1], stages[-1]
    print(f"{'':28}mean reward   on a mode   energy distance to p_ref")
    for name, x in (
        ("reference", base),
        (f"after {iterations} iterations", trained),
        (f"p* of Eq. 5, temperature {TEMPERATURE:g}", optimum),
    ):
        share = flow2d.on_mode_share(x.flatten(0, 1))
        distance = sum(map(flow2d.energy_distance, x, data)) / flow2d.CONDITIONS
        print(f"{name:<32}{mean_reward(x):>8.2f}{share:>12.1%}{distance:>18.3f}")
    way = (mean_reward(trained) - mean_reward(base)) / (BEST - mean_reward(base))
    print(f"{'best possible':<32}{BEST:>8.2f}  and training went {way:.1%} of the way there")
    print(
        f"Energy distance: estimated from {SAMPLES} points of each condition, to about 0.005; for "
        "the same\ndistribution it is about 0, perhaps below. Temperature: the beta of Eq. 5; "
        "--beta is that of Eq. 17."
    )
    return optimum


def report_z(group_size: int, generator: torch.Generator) -> None:
    """Eq. 11 with and without log Z(c): the same under Eq. 14's weights, not under equal ones.

    r_theta is exact here, since theta = p* in closed form, so that by Eq. 6 the gap that includes
    log Z(c) must be the gap of the true rewards.
    """
    c = torch.arange(flow2d.CONDITIONS)
    x = flow2d.sample_ref(c.repeat_interleave(group_size), generator).double()
    x, c = x.view(flow2d.CONDITIONS, group_size, 2), c[:, None]
    log_z = flow2d.log_z(c, TEMPERATURE)
    ratio = TEMPERATURE * (flow2d.log_prob_optimum(c, x, TEMPERATURE) - flow2d.log_prob_ref(c, x))
    rewards = flow2d.reward(c, x)
    advantages = dgpo.group_advantages(rewards)
    positive = dgpo.partition(advantages)

    def gaps(w: Tensor) -> list[Tensor]:
        with_z = dgpo.group_gap(ratio + TEMPERATURE * log_z, w, positive)
        without = dgpo.group_gap(ratio, w, positive)
        return [with_z, without, with_z - without]

    equal = torch.ones_like(advantages)
    unbalanced = TEMPERATURE * log_z[:, 0] * dgpo.group_gap(equal, equal, positive)
    columns = [log_z[:, 0], *gaps(dgpo.weights(advantages)), *gaps(equal), unbalanced]
    print(
        f"\nThe gap R(G+) - R(G-) of Eq. 11 at theta = p*, with and without log Z(c)\n"
        f"{'':12}{'weights |A|, Eq. 14':^30}   {'equal weights':^42}\n"
        " c   log Z      with   without     diff         with   without      diff  predicted"
    )
    layout = "{:>2}{:8.3f}{:>10.4f}{:>10.4f}{:>9.0e}   {:>10.4f}{:>10.4f}{:>10.4f}{:>11.4f}"
    for i, row in enumerate(torch.stack(columns, 1).tolist()):
        print(layout.format(i, *row))


def world_axes(axes: Axes, title: str) -> None:
    """The modes in grey and, for each condition, its target ringed in its colour and named."""
    limit = flow2d.RADIUS + 0.9
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
    axes.set_title(title, fontsize=16)
    for center in flow2d.mode_centers():
        axes.add_patch(plt.Circle(center, 3 * flow2d.STD, color="0.9", zorder=0))
    for c, color in enumerate(COLORS):
        center = flow2d.target(torch.tensor(c))
        axes.add_patch(plt.Circle(center, 3 * flow2d.STD, fill=False, color=color, lw=2))
        axes.text(*(0.42 * center), f"c={c}", color=color, fontsize=13, ha="center", va="center")


def scatter(axes: Axes, x: Tensor) -> list[Line2D]:
    style = {"ls": "", "marker": ".", "ms": 5, "mew": 0, "alpha": 0.5}
    return [axes.plot(*p.T, color=color, **style)[0] for p, color in zip(x, COLORS, strict=True)]


def reward_axes(axes: Axes, base: float, iterations: int) -> None:
    axes.axhline(BEST, color="black", ls="--", lw=1.5)
    axes.text(0.99 * iterations, BEST, "best possible", ha="right", va="bottom", fontsize=14)
    axes.set(xlim=(0, iterations), ylim=(1.15 * base, -0.15 * base))
    axes.set_xlabel("iteration", fontsize=15)
    axes.set_ylabel("mean reward", fontsize=15)
    axes.tick_params(labelsize=13)


def moving_picture(base: float, iterations: int) -> tuple[Figure, Callable[..., list[Artist]]]:
    """A figure for the GIF or the window, and what brings it to a stage and lists what moved."""
    figure, (world, curve) = plt.subplots(1, 2, figsize=(8, 4), dpi=80, layout="constrained")
    world_axes(world, " ")
    reward_axes(curve, base, iterations)
    points = scatter(world, torch.zeros(flow2d.CONDITIONS, 1, 2))
    (line,) = curve.plot([], [], color="0.2", lw=2)

    def show(n: int, x: Tensor, rewards: list[float]) -> list[Artist]:
        world.title.set_text(f"iteration {n}")
        for artist, xy in zip(points, x, strict=True):
            artist.set_data(*xy.T)
        line.set_data(range(1, n + 1), rewards[:n])
        return [world.title, line, *points]

    return figure, show


def save_gif(path: Path, stages: list[Stage], rewards: list[float]) -> None:
    figure, show = moving_picture(rewards[0], len(rewards))
    for artist in show(*stages[0], rewards):
        artist.set_animated(True)  # so that the axes are drawn once and only these at every stage
    figure.canvas.draw()
    still = figure.canvas.copy_from_bbox(figure.bbox)
    frames = []
    for stage in stages:
        figure.canvas.restore_region(still)
        for artist in show(*stage, rewards):
            figure.draw_artist(artist)
        rgb = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])
        frames.append(rgb.quantize(64))
    durations = [800, *[100] * (len(frames) - 2), 2000][-len(frames) :]  # ms
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)
    plt.close(figure)


def save_png(
    path: Path, stages: list[Stage], optimum: Tensor, history: list[dict[str, float]]
) -> None:
    n = len(history)
    picture = plt.figure(figsize=(12, 6), dpi=100, layout="constrained")
    above, below = picture.subfigures(2, 1, height_ratios=(1.2, 1))
    shown = [
        min(stages, key=lambda stage: abs(stage[0] - share * n)) for share in (0, 0.1, 0.25, 1)
    ]
    panels = [("reference", shown[0][1])]
    panels += [(f"iteration {i}", x) for i, x in shown[1:]]
    panels += [("p* of Eq. 5", optimum)]
    for axes, (title, x) in zip(above.subplots(1, 5), panels, strict=True):
        world_axes(axes, title)
        scatter(axes, x)
    reward, gate = below.subplots(1, 2, width_ratios=(3, 2))
    reward_axes(reward, history[0]["reward"], n)
    reward.plot(range(1, n + 1), [metrics["reward"] for metrics in history], color="0.2", lw=2)
    gate.plot(range(1, n + 1), [metrics["gate"] for metrics in history], color="0.2", lw=2)
    gate.set(xlim=(0, n), ylim=(0, 1))
    gate.set_xlabel("iteration", fontsize=15)
    gate.set_ylabel("gate $\\sigma(-\\beta\\,gap)$", fontsize=15)
    gate.tick_params(labelsize=13)
    picture.savefig(path)
    plt.close(picture)
