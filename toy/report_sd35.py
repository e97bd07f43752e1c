"""What compare_sd35.py shows: its table and its figure, toy/results/sd35.md and sd35.png."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import figures
import torch
from family_sd35 import FOLLOWED, GRID, WORLDS, Run, Setting, arrival

SEEDS = 3  # that a report has
WORKS = 0.25  # a setting works if the first rung brings it this share of the way to the goal
T_OF_TWO = 4.303  # the t distribution's 97.5 % point, two degrees of freedom: three seeds


class Search(NamedTuple):
    best: Setting
    tried: int
    work: int  # how many of these work
    edges: list[str]  # the dials of the best at an end of their range
    of: str | None = None  # the method whose search it was, if another


class Report(NamedTuple):
    search: Search
    runs: list[Run]  # on the fresh seeds, as many as are finished


def ratio(runs: list[Run], other: list[Run]) -> str:
    """The other's mean cost to arrive over the first's, by the mean logarithm, and its interval.

    The interval is Welch's t of the logarithms, with the fewest degrees of freedom. If not all of
    the other's runs arrive, the ratio is a lower bound; if not all of the first's, there is none.
    """
    if any(run.arrived is None for run in runs) or not runs:
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


HEADER = ["world", "method", "settings tried", "that work"]
HEADER += ["arrived", "cost to arrive", "CPU seconds", "ratio"]
HEADER += ["came near", "cost to come near", "ratio, near"]
HEADER += ["accuracy at the end", "quality: base, end"]


Place = tuple[str, int]  # a world, and the number of the pipeline that runs began with


def named(place: Place) -> str:
    world, base = place
    return f"{world}, pipeline {base + 1}" if base else world


def row(place: Place, name: str, found: dict[str, Report]) -> list[str]:
    world = place[0]
    about, runs = found[name]
    compared = found["DGPO with dials"].runs if "DGPO with dials" in found else []
    near, compared_near = (nearing(world, each) for each in (runs, compared))
    mark = "" if all(run.arrived is not None for run in runs) else "> "
    return [
        named(place),
        name,
        f"as {about.of}" if about.of else str(about.tried),
        "-" if about.of else f"{about.work} of {about.tried}",
        *cost_cells(runs),
        f"{mark}{mean([run.at(run.restricted()).seconds for run in runs]):.0f}",
        ratio(compared, runs) if compared is not runs else "1",
        *cost_cells(near),
        ratio(compared_near, near) if compared is not runs else "1",
        f"{mean([run.end.accuracy for run in runs]):.3f}",
        f"{runs[0].evaluations[0].quality:.4f}, {mean([run.end.quality for run in runs]):.4f}",
    ]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def nearing(world: str, runs: list[Run]) -> list[Run]:
    """The same runs, which arrive where they come near."""
    near = WORLDS[world].near
    return [Run(run.budget, run.evaluations, arrival(run.evaluations, near)) for run in runs]


def cost_cells(runs: list[Run]) -> list[str]:
    """How many arrive, and at what cost: the mean, the least and the most, in thousands."""
    there = sum(run.arrived is not None for run in runs)
    costs = [run.restricted() / 1000 for run in runs]
    mark = "" if there == len(runs) else "> "
    shown = f"{mark}{mean(costs):.0f} ({min(costs):.0f} to {max(costs):.0f})"
    return [f"{there} of {len(runs)}", shown]


STYLES = figures.STYLES | {
    "DGPO offline": ("#0b3c6f", ":", "v"),
    "DGPO, SDE rollouts": ("#009e73", "--", "^"),
    "DGPO, t_min 0": ("#666666", "--", "X"),
    "DGPO, bounded pairs": ("#d55e00", ":", "D"),
}


def plot(path: Path, found: dict[Place, dict[str, Report]]) -> None:
    """The accuracy of each run against its cost, a panel a world; the dot is where it arrived."""
    figure, axes = figures.panels([named(place) for place in found], 5)
    for panel, ((world, _), by_method) in zip(axes, found.items(), strict=True):
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
    figures.save(figure, path, x, y, axes)


CHOSEN = ["world", "method", "setting", "at an edge"]


def choices(found: dict[Place, dict[str, Report]]) -> list[tuple[str, ...]]:
    """Rows of what was chosen, once for all pipelines of a world."""
    rows = {}
    for (world, _), by_method in found.items():
        for name, (about, _) in by_method.items():
            edges = ", ".join(about.edges) or "-"
            rows[world, name] = (world, name, shown(about.best), edges)
    return list(rows.values())


class Tried(NamedTuple):
    """A setting that was tried, and its run."""

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
    out: Path,
    found: dict[Place, dict[str, Report]],
    rungs: dict[str, list[Tried]],
    afterwards: list[tuple[str, Tried]],
    missing: list[str],
) -> str:
    """The tables and their words; draws the figure, if there is anything to show.

    found: by place and method. rungs: by world. afterwards: what the search has chosen, and others.
    """
    parts = [INTRODUCTION]
    if found:
        plot(out / "sd35.png", found)
        each = [(place, name) for place, by_method in found.items() for name in by_method]
        rows = [row(place, name, found[place]) for place, name in each]
        parts += ["![accuracy against cost](sd35.png)", figures.table(HEADER, rows)]
        parts += ["## What was chosen", figures.table(CHOSEN, list(map(list, choices(found))))]
    rows = [rung_row(world, one) for world, tried in rungs.items() for one in tried]
    if rows:
        parts += ["## The first rung", FIRST_RUNG, figures.table(RUNG_HEADER, rows)]
    if afterwards:
        rows = [afterwards_row(world, one) for world, one in afterwards]
        parts += ["## Tried afterwards", AFTERWARDS, figures.table(AFTERWARDS_HEADER, rows)]
    if missing:
        parts += ["## Not measured yet", f"`--full` goes on with: {'; '.join(missing)}."]
    return "\n\n".join(parts) + "\n"


AFTERWARDS_HEADER = ["world", "method", "ran for, thousands", "near at", "accuracy: base, end"]
AFTERWARDS_HEADER += ["setting"]


def afterwards_row(world: str, one: Tried) -> list[str]:
    seen = one.run.evaluations
    there = arrival(seen, WORLDS[world].near)
    near = "-" if there is None else f"{there / 1000:.0f}"
    accuracy = f"{seen[0].accuracy:.3f}, {seen[-1].accuracy:.3f}"
    return [world, one.name, f"{seen[-1].cost / 1000:.0f}", near, accuracy, shown(one.setting)]


AFTERWARDS = """To see whether a verdict holds, after the report and on the search's seed: the
chosen setting, first, and what else was tried near it and longer than the first rung. It chooses
nothing. *Near* needs the run to be followed for a while."""

FIRST_RUNG = """All settings that were tried, on one seed, after an eighth of the budget. All have
cost the same then, so how far each has come compares them; another base is another pipeline's. It
is a seed of the search: what it chooses looks better here than it is."""

INTRODUCTION = f"""# The family on SD3.5's own classes

Written by `python toy/compare_sd35.py --table` from the runs kept beside this file; do not edit.

- **Worlds**: [words](../words.py), read by a real OCR network, and [shapes](../shapes.py), with an
  exact checker. Accuracy is the reward that is trained on, of the validation prompts, drawn by the
  saved average from noise that no run trains on. Quality is rewarded in no run.
- **Methods**: the trainer of train_sd35.py, with another rollout or gradient where the method has
  one. Cost is in forwards of one sample; a backward counts two. CPU seconds are those of the
  training, rewards included.
- **Arrived**: at the goal, {", ".join(f"{w.goal:g} in {name}" for name, w in WORLDS.items())}, for
  nine of ten evaluations until {FOLLOWED:g} times the cost. *Near* is the same for a lower goal,
  {", ".join(f"{w.near:g} in {name}" for name, w in WORLDS.items())}. Costs are in thousands of
  forwards, in brackets those of the cheapest and the dearest seed. A run that does not arrive
  counts as the whole budget of {" and ".join(f"{w.budget:,}" for w in WORLDS.values())}, and the
  mean is then a lower bound (>).
- **Pipelines**: no two machines pretrain the same one to the bit. Methods are compared on one, and
  "pipeline 2" is another; a search may have begun on the one and gone on on the other.
- **Search**: as many settings as the table says, by successive halving on one seed that is not
  reported. A setting works if the first rung, an eighth of the budget, brings it {WORKS:.0%} of the
  way to the goal.
- **Ratio**: the cost over that of DGPO with dials, by geometric means, with Welch's 95 % interval
  over the logarithms of the seeds' costs, widened by the distance of evaluations, which are
  {GRID[1] / GRID[0] - 1:.0%} of the cost apart, and with two degrees of freedom, as there are three
  seeds."""
