"""Watch DGPO learn: a 2-D flow and a known reward, in seconds on a laptop's CPU.

`python toy/run_2d.py` pretrains a small flow on a ring of Gaussians, trains it by Algorithm 1,
checks that Z(c) cancels, and writes run_2d.png and run_2d.gif to toy/out.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that dgpo.py and toy/ can be imported

import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

import dgpo
from toy import flow2d, report_2d

PRETRAINING_STEPS, PEAK_RATE = 500, 4e-2  # flow2d's defaults are 1500 and 1e-2, for longer runs
FRAMES = 25  # stages drawn for the GIF


NUMBERS = (  # flag, least value (whose type is the flag's), default, help
    ("seed", 0, 0, "the seed of everything random"),
    ("iterations", 1, 200, "iterations of Algorithm 1"),
    ("prompts", 1, 16, "P: groups in an iteration"),
    ("group_size", 2, 24, "G: samples in a group"),
    ("beta", 0.0, 1.0, "beta of Eq. 17; a larger one closes the gate sooner"),
    ("learning_rate", 0.0, 2.5e-3, "learning rate of AdamW; lower it if the reward swings"),
    ("t_min", 0.0, 0.2, "least timestep to train at; 1 is pure noise"),
    ("rollout_steps", 1, 10, "steps of the ODE solver that draws a sample"),
    ("train_timesteps", 1, 3, "K: timesteps to train each group at, in an iteration"),
    ("ema", 0.0, None, "decay of theta_old, best below 0.5; without it, theta_old is theta"),
)


def parse_args(argv: list[str]) -> argparse.Namespace:
    """An impossible flag ends the process with one sentence and exit code 2."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=formatter)
    for name, least, default, remark in NUMBERS:
        parser.add_argument(f"--{name}", type=type(least), default=default, help=remark)
    add, folder = parser.add_argument, Path(__file__).parent / "out"
    add("--offline", action="store_true", help="draw samples from the reference (Section 4.3)")
    add("--out", type=Path, default=folder, help="folder to write to")
    add("--no_gif", action="store_true", help="write no GIF, which is faster")
    add("--show", action="store_true", help="show the training in a window, too")

    # --group-size is --group_size, too.
    argv = [re.sub(r"^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), a) for a in argv]
    args = parser.parse_args(argv)
    for name, least, default, _ in NUMBERS:
        value = getattr(args, name)
        if value != default and not value >= least:
            parser.error(f"argument --{name}: must be at least {least}, got {value}")

    if not args.show:
        plt.switch_backend("agg")  # which draws to files
    elif plt.get_backend().lower() == "agg":
        parser.error("argument --show: no window can be opened here; the GIF shows the same")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    return args


def main(argv: list[str]) -> int:
    """Train, report, and write the figures; returns the exit code."""
    args = vars(parse_args(argv))
    seed, out, no_gif, show = (args.pop(name) for name in ("seed", "out", "no_gif", "show"))
    iterations = args["iterations"]
    torch.set_num_threads(1)  # matrices this small gain nothing from a second core
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    clock = [time.perf_counter()]

    model = flow2d.VelocityNet()
    pretraining = flow2d.pretrain(model, PRETRAINING_STEPS, generator, peak=PEAK_RATE)
    for _ in tqdm(pretraining, "pretraining", PRETRAINING_STEPS):
        pass
    clock.append(time.perf_counter())

    stages = [(0, report_2d.draw(model, seed))]
    history: list[report_2d.Metrics] = []
    if show:
        _, update = report_2d.moving_picture(stages[0][1], iterations)
    world = flow2d.reward, flow2d.sample_conditions, (2,)
    progress = tqdm(dgpo.train(model, *world, generator, **args), "DGPO", iterations)
    try:
        for n, metrics in enumerate(progress, 1):
            history.append(metrics)
            names = "reward", "loss", "gate"
            progress.set_postfix({name: f"{metrics[name]:.3f}" for name in names}, False)
            if n % max(1, iterations // FRAMES) == 0 or n == iterations:
                stages.append((n, report_2d.draw(model, seed)))
                if show:
                    update(*stages[-1], history)
                    plt.pause(0.01)
    except ValueError as error:  # a flag that dgpo.py refuses, or rewards that are no longer finite
        progress.close()
        advice = f" in iteration {n + 1}; lower --learning_rate?" if history else ""
        print(f"run_2d.py: {error}{advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        progress.close()
        if not history:
            raise
        stages.append((len(history), report_2d.draw(model, seed)))
    clock.append(time.perf_counter())

    generator.manual_seed(seed)  # p* and the groups below are then the same at any settings
    optimum = report_2d.report(stages, generator)
    report_2d.report_z(args["group_size"], generator)
    report_2d.save_png(out / "run_2d.png", stages, optimum, history)
    if not no_gif:
        report_2d.save_gif(out / "run_2d.gif", stages, history)
    clock.append(time.perf_counter())
    phases = zip(("pretraining", "DGPO", "report and figures"), clock, clock[1:], strict=False)
    print("seconds: " + ", ".join(f"{name} {end - start:.1f}" for name, start, end in phases))
    if show:
        plt.show()
    return 0 if len(history) == iterations else 130  # Ctrl-C


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
