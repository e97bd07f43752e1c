"""Watch DGPO learn: a 2-D flow and a known reward, in seconds on a laptop's CPU.

`python toy/run_2d.py` pretrains a small flow on a ring of Gaussians, trains it by Algorithm 1,
checks that Z(c) cancels, and writes run_2d.png and run_2d.gif to toy/out.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import flow2d
import matplotlib.pyplot as plt
import numpy as np
import torch
from flow2d import dgpo
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

PRETRAINING_STEPS = 1500
SAMPLES = 400  # points for each condition in the report and in the figures
FRAMES = 40  # stages kept for the GIF
BETA = 1.0  # Eq. 5's, for p* and Z(c). The flag --beta is Eq. 17's, in other units.
COLORS = ("#0b3c6f", "#d55e00", "#009e73", "#cc79a7")  # distinct to the colour-blind and in grey
BEST = 0.0  # the reward at the target itself

Stage = tuple[int, Tensor]  # iteration, samples (CONDITIONS, SAMPLES, 2)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def check_folder(parser: Parser, out: Path) -> None:
    """Ends with the parser's error if nothing can be written to `out`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        parser.error(f"argument --out: cannot write to {out} ({error.strerror})")


def parse_args() -> argparse.Namespace:
    parser = Parser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of everything that is random")
    add("--iterations", type=int, default=300, help="of Algorithm 1")
    add("--prompts", type=int, default=16, help="groups in an iteration, P")
    add("--group-size", type=int, default=24, help="samples of a prompt, G")
    add("--beta", type=float, default=1.0, help="steepness of the gate, S being a group's mean")
    add("--learning-rate", type=float, default=1.5e-3, help="of AdamW")
    add("--t-min", type=float, default=0.2, help="least noise to train at, the timestep clip")
    add("--rollout-steps", type=int, default=10, help="of the ODE solver for a sample")
    add("--train-timesteps", type=int, default=2, help="timesteps a group is trained at")
    add("--kl", type=float, default=0.01, help="weight of the penalty on leaving the reference")
    add("--clip", type=float, help="PPO-style clip of exp(L_old - L_theta); needs --ema")
    add("--ema", type=float, help="decay of theta^-; without it theta^- = theta")
    add("--offline", action="store_true", help="take all samples from the reference")
    add("--out", type=Path, default=Path(__file__).parent / "out", help="folder to write to")
    add("--no-gif", action="store_true", help="write the PNG only, which is quicker")
    add("--show", action="store_true", help="watch in a window as well")
    args = parser.parse_args()

    for flag, fits, needed in (
        ("seed", 0 <= args.seed < 2**63, "in [0, 2^63)"),
        ("iterations", args.iterations >= 1, "at least 1"),
        ("prompts", args.prompts >= 1, "at least 1"),
        ("group-size", args.group_size >= 2, "at least 2"),
        ("beta", 0 < args.beta < math.inf, "positive"),
        ("learning-rate", 0 < args.learning_rate < math.inf, "positive"),
        ("t-min", 0 <= args.t_min < 1, "in [0, 1)"),
        ("rollout-steps", args.rollout_steps >= 1, "at least 1"),
        ("train-timesteps", args.train_timesteps >= 1, "at least 1"),
        ("kl", 0 <= args.kl < math.inf, "at least 0"),
        ("clip", args.clip is None or 0 <= args.clip < math.inf, "at least 0"),
        ("ema", args.ema is None or 0 <= args.ema <= 1, "in [0, 1]"),
    ):
        if not fits:
            given = getattr(args, flag.replace("-", "_"))
            parser.error(f"argument --{flag}: must be {needed}, got {given}")
    if args.clip is not None and args.ema is None:
        parser.error("argument --clip: compares theta with theta^-, which differ only with --ema")
    check_folder(parser, args.out)
    if not args.show:
        plt.switch_backend("agg")
    elif plt.get_backend().lower() == "agg":
        parser.error("argument --show: no window can be opened here; the GIF shows the same")
    return args


def draw(model: nn.Module, seed: int) -> Tensor:
    """SAMPLES points of the model for each condition, from the same noise every time: (C, N, 2)."""
    noise = torch.randn(
        flow2d.CONDITIONS * SAMPLES, 2, generator=torch.Generator().manual_seed(seed)
    )
    c = torch.arange(flow2d.CONDITIONS).repeat_interleave(SAMPLES)
    return flow2d.sample(model, c, noise).view(flow2d.CONDITIONS, SAMPLES, 2)


def mean_reward(x: Tensor) -> float:
    return flow2d.reward(torch.arange(flow2d.CONDITIONS)[:, None], x).mean().item()


def report(name: str, x: Tensor, data: Tensor) -> None:
    share = flow2d.on_mode_share(x.flatten(0, 1))
    distance = sum(map(flow2d.energy_distance, x, data)) / flow2d.CONDITIONS
    print(f"{name:<32}{mean_reward(x):>8.2f}{share:>12.1%}{distance:>18.3f}")


def report_z(group_size: int, generator: torch.Generator) -> None:
    """Eq. 11 with and without log Z(c): the same under Eq. 14's weights, not under equal ones.

    r_theta is exact here, since theta = p* in closed form, so that by Eq. 6 the gap that includes
    log Z(c) must be the gap of the true rewards.
    """
    c = torch.arange(flow2d.CONDITIONS)
    x = flow2d.sample_ref(c.repeat_interleave(group_size), generator).double()
    x, c = x.view(flow2d.CONDITIONS, group_size, 2), c[:, None]
    log_z = flow2d.log_z(c, BETA)
    ratio = BETA * (flow2d.log_prob_optimum(c, x, BETA) - flow2d.log_prob_ref(c, x))
    rewards = flow2d.reward(c, x)
    advantages = dgpo.group_advantages(rewards)
    positive = dgpo.partition(advantages)

    def gaps(w: Tensor) -> list[Tensor]:
        with_z = dgpo.group_gap(ratio + BETA * log_z, w, positive)
        without = dgpo.group_gap(ratio, w, positive)
        return [with_z, without, with_z - without]

    equal = torch.ones_like(advantages)
    unbalanced = BETA * log_z[:, 0] * dgpo.group_gap(equal, equal, positive)
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
    gate.set_ylabel("gate $\\sigma(\\beta S)$", fontsize=15)
    gate.tick_params(labelsize=13)
    picture.savefig(path)
    plt.close(picture)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)  # matrices this small gain nothing from a second core
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    clock = [time.perf_counter()]

    model = flow2d.VelocityNet()
    pretraining = flow2d.pretrain(model, PRETRAINING_STEPS, generator)
    for _ in tqdm(pretraining, "pretraining", PRETRAINING_STEPS):
        pass
    clock.append(time.perf_counter())

    stages = [(0, draw(model, args.seed))]
    base = mean_reward(stages[0][1])
    window = moving_picture(base, args.iterations)[1] if args.show else None
    history: list[dict[str, float]] = []
    training = dgpo.train(
        model,
        flow2d.reward,
        flow2d.sample_conditions,
        (2,),
        generator,
        iterations=args.iterations,
        prompts=args.prompts,
        group_size=args.group_size,
        beta=args.beta,
        learning_rate=args.learning_rate,
        t_min=args.t_min,
        rollout_steps=args.rollout_steps,
        train_timesteps=args.train_timesteps,
        kl=args.kl,
        clip=args.clip,
        ema=args.ema,
        offline=args.offline,
    )
    progress = tqdm(training, "DGPO", args.iterations)
    try:
        for n, metrics in enumerate(progress, 1):
            history.append(metrics)
            progress.set_postfix(
                {k: f"{metrics[k]:.3f}" for k in ("reward", "loss", "gate")}, False
            )
            if n % max(1, args.iterations // FRAMES) == 0 or n == args.iterations:
                stages.append((n, draw(model, args.seed)))
                if window:
                    window(*stages[-1], [metrics["reward"] for metrics in history])
                    plt.pause(0.01)
    except ValueError as error:  # rewards that are no longer finite
        progress.close()
        sys.exit(f"run_2d.py: {error} of iteration {len(history) + 1}; lower --learning-rate?")
    except KeyboardInterrupt:
        if not history:
            raise
        progress.close()
        print(f"stopped after {len(history)} iterations, and this is what was learnt")
        stages.append((len(history), draw(model, args.seed)))
    clock.append(time.perf_counter())

    c = torch.arange(flow2d.CONDITIONS).repeat_interleave(SAMPLES)
    data = flow2d.sample_ref(c, generator).view_as(stages[0][1])
    optimum = flow2d.sample_optimum(c, BETA, generator).view_as(data)
    iterations, trained = stages[-1]
    print(f"{'':28}mean reward   on a mode   distance to p_ref's data")
    report("reference", stages[0][1], data)
    report(f"after {iterations} iterations", trained, data)
    report(f"optimum p* of Eq. 5, beta {BETA:g}", optimum, data)
    way = (mean_reward(trained) - base) / (BEST - base)
    print(f"{'best possible':<32}{BEST:>8.2f}  and training went {way:.1%} of the way there")
    report_z(args.group_size, generator)

    written = [args.out / "run_2d.png"]
    save_png(written[0], stages, optimum, history)
    if not args.no_gif:
        written.append(args.out / "run_2d.gif")
        save_gif(written[1], stages, [metrics["reward"] for metrics in history])
    clock.append(time.perf_counter())
    phases = zip(("pretraining", "DGPO", "report and figures"), clock, clock[1:], strict=False)
    print("\nseconds: " + ", ".join(f"{name} {end - start:.1f}" for name, start, end in phases))
    print("wrote " + " and ".join(map(os.path.relpath, written)))
    if window:
        plt.show()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
