"""What compare_sd35.py shows: its table and its figure, toy/results/sd35.md and sd35.png."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import figures
import torch
from family_sd35 import FOLLOWED, GRID, WORLDS, Run, Setting

SEEDS = 3  # that a report has
WORKS = 0.25  # a setting works if the first rung brings it this share of the way to the goal
T_OF_TWO = 4.303  # the t distribution's 97.5 % point, two degrees of freedom: three seeds


class Search(NamedTuple):
    best: Setting
    tried: int
    work: int  # how many of these work
    of: str | None = None  # the method whose search it was, if another


class Report(NamedTuple):
    search: Search
    runs: list[Run]  # on the fresh seeds, as many as are finished


def ratio(runs: list[Run], other: list[Run]) -> str:
    """The other's mean cost to arrive over the first's, by the mean logarithm, and its interval.

    The interval is Welch's t of the logarithms, with the fewest degrees of freedom. If not all of
    the other's runs arrive, the ratio is a lower bound; if not all of the first's, there is none.
    """
    if any(run.arrived is None for run in runs) or not other:
        return "-"
    logs = [torch.tensor([math.log(run.restricted()) for run in each]) for each in (runs, other)]
    middle = (logs[1].mean() - logs[0].mean()).exp().item()
    if any(run.arrived is None for run in other):
        return f"> {middle:.1f}"
    if len(runs) < SEEDS or len(other) < SEEDS:
        return f"{middle:.1f}"
    rounding = math.log(GRID[1] / GRID[0]) ** 2 / 12  # costs are known up to the next evaluation
    error = sum((each.var() + rounding) / len(each) for each in logs).sqrt().item()
    low, high = (middle * math.exp(sign * T_OF_TWO * error) for sign in (-1, 1))
    return f"{middle:.1f} [{low:.1f}, {high:.1f}]"


HEADER = ["world", "method", "settings tried", "that work", "seeds that arrive"]
HEADER += ["cost, thousands of forwards", "CPU seconds", "accuracy at the end"]
HEADER += ["quality: base, end", "cost over that of DGPO with dials"]


def row(world: str, name: str, found: dict[str, Report]) -> list[str]:
    about, runs = found[name]
    there = [run for run in runs if run.arrived is not None]
    costs = [run.restricted() / 1000 for run in runs]
    seconds = [run.at(run.restricted()).seconds for run in runs]
    mark = "" if len(there) == len(runs) else "> "

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    compared = found["DGPO with dials"].runs if "DGPO with dials" in found else []
    return [
        world,
        name,
        f"as {about.of}" if about.of else str(about.tried),
        "-" if about.of else f"{about.work} of {about.tried}",
        f"{len(there)} of {len(runs)}",
        f"{mark}{mean(costs):.0f} ({min(costs):.0f} to {max(costs):.0f})",
        f"{mark}{mean(seconds):.0f}",
        f"{mean([run.end.accuracy for run in runs]):.3f}",
        f"{runs[0].evaluations[0].quality:.4f}, {mean([run.end.quality for run in runs]):.4f}",
        ratio(compared, runs) if compared and name != "DGPO with dials" else "-",
    ]


STYLES = figures.STYLES | {
    "DGPO offline": ("#0b3c6f", ":", "v"),
    "DGPO, SDE rollouts": ("#009e73", "--", "^"),
    "DGPO, t_min 0": ("#666666", "--", "X"),
    "DGPO, t_min 0.6": ("#666666", ":", "<"),
}


def plot(path: Path, found: dict[str, dict[str, Report]]) -> None:
    """The accuracy of each run against its cost, a panel a world; the dot is where it arrived."""
    figure, axes = figures.panels(list(found), 5)
    for panel, (world, by_method) in zip(axes, found.items(), strict=True):
        for name, (_, runs) in by_method.items():
            color, line, marker = STYLES[name]
            for i, run in enumerate(runs):
                rows = [(one.cost, one.accuracy) for one in run.evaluations[1:]]
                label = None if i else name
                panel.plot(*zip(*rows, strict=True), line, color=color, label=label, lw=1.5)
                if run.arrived is not None:
                    where = run.arrived, run.at(run.arrived).accuracy
                    panel.plot(*where, marker, color=color, markersize=8)
        panel.axhline(WORLDS[world].goal, color="black", lw=1, ls=(0, (1, 3)))
        panel.set_xscale("log")
        panel.grid(alpha=0.3)
    x, y = "cost, forwards of one sample", "accuracy, held out"
    figures.save(figure, path, x, y, max(axes, key=lambda panel: len(panel.lines)))


class Tried(NamedTuple):
    """A setting in the first rung of a search."""

    name: str  # of the method
    setting: Setting
    run: Run


def shown(setting: Setting) -> str:
    changes = ", ".join(f"{dial} {value}" for dial, value in setting.items())
    return changes or "as in the world's .yaml file"


def rung_row(world: str, one: Tried) -> list[str]:
    first, end = one.run.evaluations[0], one.run.end
    accuracy = f"{first.accuracy:.3f}, {end.accuracy:.3f}"
    quality = f"{first.quality:.4f}, {end.quality:.4f}"
    return [world, one.name, accuracy, quality, f"{end.seconds:.0f}", shown(one.setting)]


RUNG_HEADER = ["world", "method", "accuracy: base, end", "quality: base, end", "CPU seconds"]
RUNG_HEADER += ["setting"]


def page(
    out: Path, found: dict[str, dict[str, Report]], rungs: dict[str, list[Tried]], missing: list
) -> str:
    """The tables and their words; draws the figure, if there is anything to show.

    found: by world and method. rungs: by world.
    """
    named = [(world, name) for world, by_method in found.items() for name in by_method]
    parts = [INTRODUCTION]
    if named:
        plot(out / "sd35.png", found)
        rows = [row(world, name, found[world]) for world, name in named]
        chosen = [[*one, shown(found[one[0]][one[1]].search.best)] for one in named]
        parts += ["![accuracy against cost](sd35.png)", figures.table(HEADER, rows)]
        parts += ["## What was chosen", figures.table(["world", "method", "setting"], chosen)]
    rows = [rung_row(world, one) for world, tried in rungs.items() for one in tried]
    if rows:
        parts += ["## The first rung", FIRST_RUNG, figures.table(RUNG_HEADER, rows)]
    if missing:
        parts += ["## Not measured yet", f"`--full` goes on with: {'; '.join(missing)}."]
    return "\n\n".join(parts) + "\n"


FIRST_RUNG = """All settings that were tried, on one seed, after an eighth of the budget. All have
cost the same then, so the accuracy at the end compares them. It is a seed of the search: what it
chooses looks better here than it is."""

INTRODUCTION = f"""# The family on SD3.5's own classes

Written by `python toy/compare_sd35.py --table` from the runs kept beside this file; do not edit.

- **Worlds**: [words](../words.py), read by a real OCR network, and [shapes](../shapes.py), with an
  exact checker. Accuracy is the reward that is trained on, of the validation prompts, drawn by the
  saved average from noise that no run trains on. Quality is rewarded in no run.
- **Methods**: the trainer of train_sd35.py, with another rollout or gradient where the method has
  one. Cost is in forwards of one sample; a backward counts two. CPU seconds are those of the
  training, rewards included.
- **Arrived**: at the goal, {", ".join(f"{w.goal:g} in {name}" for name, w in WORLDS.items())}, for
  nine of ten evaluations until {FOLLOWED:g} times the cost. A run that does not arrive counts as
  the whole budget of {" and ".join(f"{w.budget:,}" for w in WORLDS.values())} forwards, and the
  cost is then a lower bound (>). In brackets: the cheapest and the dearest seed.
- **Search**: as many settings as the table says, by successive halving on one seed that is not
  reported. A setting works if the first rung, an eighth of the budget, brings it {WORKS:.0%} of the
  way to the goal.
- **Ratio**: of the geometric means, with Welch's 95 % interval over the logarithms of the seeds'
  costs, widened by the distance of evaluations, which are {GRID[1] / GRID[0] - 1:.0%} of the cost
  apart, and two degrees of freedom, as there are three seeds."""
