"""Watch DGPO learn: a 2-D flow and a known reward, in seconds on a laptop's CPU.

`python toy/run_2d.py` pretrains a small flow on a ring of Gaussians, trains it by Algorithm 1,
checks that Z(c) cancels, and writes run_2d.png and run_2d.gif to toy/out.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])  # also for `python -m` and links
import cli  # noqa: E402
from cli import Fault, make_folder, make_place, option, parse, replace_file, run  # noqa: E402

MOST = 1_000_000  # samples times timesteps in an iteration: 2.4 GB
FRAMES = 40  # stages kept for the GIF
FILES = ("run_2d.png", "run_2d.gif")


@dataclass
class Arguments:
    """Watch DGPO learn: a 2-D flow and a known reward, in seconds on a laptop's CPU."""

    seed: int = option(0, "Another seed is another run.", at_least=0, below=2**63)
    iterations: int = option(300, "Iterations of Algorithm 1.", at_least=1, at_most=MOST)
    prompts: int = option(16, "P: groups in an iteration.", at_least=1, at_most=MOST)
    group_size: int = option(24, "G: samples in a group.", at_least=2, at_most=MOST)
    beta: float = option(
        1.0,
        "The beta of Eq. 17 for a gap that is a group's mean: the gate closes by it.",
        above=1e-30,
        at_most=1e30,
    )
    learning_rate: float = option(
        1.5e-3,
        "AdamW's learning rate. If the reward swings or falls, lower it.",
        above=0,
        at_most=1e30,
    )
    t_min: float = option(
        0.2, "Timestep clip: the least time to train at; 1 is pure noise.", at_least=0, below=1
    )
    rollout_steps: int = option(
        10, "Steps of the ODE solver that draws a sample.", at_least=1, at_most=1000
    )
    train_timesteps: int = option(
        2, "K: timesteps that a group is trained at in an iteration.", at_least=1, at_most=1000
    )
    kl: float = option(
        0.01,
        "Weight of the distance to the reference. Raise it to stay near.",
        at_least=0,
        at_most=1e30,
    )
    clip: float | None = option(
        None, "PPO-style clip of exp(L_old - L_theta). It needs --ema.", above=0
    )
    ema: float | None = option(
        None, "Decay of theta_old. Without it theta_old is theta.", at_least=0, at_most=1
    )
    offline: bool = option(False, "Draw all samples from the reference (Section 4.3).")
    out: str = option(
        str(Path(__file__).parent / "out"), "The folder to write to.", shown="toy/out"
    )
    gif: bool = option(True, "Write the GIF, too. A run without it is quicker.")
    show: bool = option(False, "Watch in a window as well.")


def parse_args(argv: list[str] | None = None) -> Arguments:
    """Raises Fault, before anything heavy is imported."""
    args = parse(Arguments, sys.argv[1:] if argv is None else argv)
    if args.clip is not None and args.ema is None:
        raise Fault("argument --clip: compares theta with theta_old, which differ only with --ema")
    samples = args.prompts * args.group_size * args.train_timesteps
    if samples > MOST:
        raise Fault(
            "argument --group_size: prompts, group_size and train_timesteps multiply to at most "
            f"{MOST}, which is what memory holds, got {samples}"
        )
    folder = make_folder(args.out, "out")
    for name in FILES[: 1 + args.gif]:
        make_place(str(folder / name), "out", (".png", ".gif"))
    return args


def main() -> None:
    args = parse_args()
    if not args.show:
        os.environ["MPLBACKEND"] = "agg"  # no window, and whatever the environment asks for
    # Imported here, so that a bad flag is answered at once, and Ctrl-C meanwhile in one line.
    import flow2d
    import matplotlib.pyplot as plt
    import report_2d
    import torch
    from tqdm import tqdm

    import dgpo

    if args.show and not report_2d.has_windows():
        raise Fault("argument --show: no window can be opened here; the GIF shows the same")
    torch.set_num_threads(1)  # matrices this small gain nothing from a second core
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    clock = [time.perf_counter()]

    model = flow2d.VelocityNet()
    pretraining = flow2d.pretrain(model, flow2d.PRETRAINING_STEPS, generator)
    for _ in tqdm(pretraining, "pretraining", flow2d.PRETRAINING_STEPS):
        pass
    clock.append(time.perf_counter())

    stages = [(0, report_2d.draw(model, args.seed))]
    base = report_2d.mean_reward(stages[0][1])
    window = report_2d.moving_picture(base, args.iterations)[1] if args.show else None
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
                stages.append((n, report_2d.draw(model, args.seed)))
                if window:
                    window(*stages[-1], [metrics["reward"] for metrics in history])
                    plt.pause(0.01)
    except ValueError as error:  # rewards that are no longer finite
        progress.close()
        where = f"of iteration {len(history) + 1}"
        raise Fault(f"{error} {where}; lower --learning_rate?") from None
    except KeyboardInterrupt:
        if not history:
            raise
        progress.close()
        stages.append((len(history), report_2d.draw(model, args.seed)))
    clock.append(time.perf_counter())

    optimum = report_2d.report(stages, generator)
    report_2d.report_z(args.group_size, generator)

    written = [Path(args.out) / FILES[0]]
    replace_file(written[0], lambda new: report_2d.save_png(new, stages, optimum, history))
    if args.gif:
        written.append(Path(args.out) / FILES[1])
        rewards = [metrics["reward"] for metrics in history]
        replace_file(written[1], lambda new: report_2d.save_gif(new, stages, rewards))
    clock.append(time.perf_counter())
    phases = zip(("pretraining", "DGPO", "report and figures"), clock, clock[1:], strict=False)
    print("\nseconds: " + ", ".join(f"{name} {end - start:.1f}" for name, start, end in phases))
    print("wrote " + " and ".join(map(str, written)))
    if len(history) < args.iterations:
        raise cli.Stopped(f"stopped after {len(history)} iterations; this is what was learnt")
    if window:
        plt.show()


if __name__ == "__main__":
    run("run_2d.py", main)
