"""How a method's setting is found: what is drawn, how it is halved, and what an edge does.

A search draws settings at random, and halves: all of them run on one seed for two fifths of what is
reported, the best of these on three seeds and as long as what is reported, and the best of these on
twelve. Beside those drawn there are two for every method: the default of the repository's scripts,
which goes all the way, and the same with what makes a step cheap. What earlier versions of this
comparison chose is tried, too, and what was chosen for the method in other worlds; DGPO with dials
begins with what plain DGPO chose, as well. Then twice more with settings around the best, among all
that went before; and once again if the best is at an edge.

Best is the least mean cost to arrive over seeds, a failure counting as two budgets: PAR2, as it is
called where algorithms are configured. With one budget, a fast setting that fails on one seed in
eight was chosen before a slower one that never did, and failed on five fresh seeds of ten.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from methods import RIGHT, WAY, Run, Setting, way

TUNING_SEEDS = tuple(range(100, 112))
DRAWN = 31  # at random
AROUND = 12
RUNGS = ((1, 0.4, 8), (3, 1.0, 3), (12, 1.0, 1))  # seeds, share of the budget, how many go on
ROUNDS, MOST_ROUNDS = 3, 4
PENALTY = 2  # a run that does not arrive counts as this many budgets, so that staying is prized
NEAR, REDRAWN = 0.15, 0.25  # of a range, to either side; and the chance of another choice


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers between two ends, uniform in their logarithm, or as they are if the low end is 0.

    An end at 0 is a natural one: a setting there is at no edge.
    """

    low: float
    high: float

    def at(self, u: float) -> float:
        """The number at a share u of the way."""
        if self.low == 0:
            return round(u * self.high, 3)
        return float(f"{self.low * (self.high / self.low) ** u:.3g}")

    def share(self, value: float) -> float:
        if self.low == 0:
            return value / self.high
        return math.log(value / self.low) / math.log(self.high / self.low)

    def edge(self, value: float) -> str | None:
        """Which outer tenth of the range a value is in."""
        share = self.share(value)
        if share < 0.1 and self.low > 0:
            return "low"
        return "high" if share > 0.9 else None

    def widened(self, edge: str) -> Range:
        """Threefold on one side; of t_min, half of what is left below 1."""
        if self.low == 0:
            return Range(0, (1 + self.high) / 2)
        return Range(self.low / 3, self.high) if edge == "low" else Range(self.low, 3 * self.high)


Dial = Range | tuple

# What the trainers of all methods have. The KLs differ in unit, see Setting.
COMMON: dict[str, Dial] = {
    "learning_rate": Range(3e-4, 1e-2),
    "decay": (None, 100_000, 300_000, 1_000_000),
    "average": (None, 0.9, 0.97),
    "kl": Range(1e-3, 0.3),
    "ema": (None, 0.5, 0.8, 0.9, 0.95),
    "prompts": (4, 8, 16),
    "rollout_steps": (3, 5, 10),
    "updates": (1, 2, 4),
}
DENOISING: dict[str, Dial] = {**COMMON, "t_min": Range(0, 0.6), "timesteps": (1, 2, 4)}
EXTREMES: dict[str, Dial] = {"samples": (2, 4, 8, None)}
LAGGING: dict[str, Dial] = {"ema": (0.5, 0.7, 0.8, 0.9, 0.95)}


CHEAP = {  # few samples, cheaply drawn, each put to more use
    "prompts": 4,
    "rollout_steps": 5,
    "samples": 4,
    "timesteps": 1,
    "updates": 4,
    "ema": 0.8,
    "average": 0.9,
}


# What earlier versions of this comparison chose, so that nothing that was found is lost: by world
# and method, what is not at its default.
EARLIER = json.loads((Path(__file__).parent / "earlier.json").read_text("utf-8"))


def earlier(world: str, name: str) -> list[Setting]:
    chosen = EARLIER.get(world, {}).get(name, [])
    return [Setting(world, METHODS[name].name, **changed) for changed in chosen]


@dataclasses.dataclass(frozen=True)
class Method:
    name: str  # of Setting
    dials: dict[str, Dial]
    fixed: dict[str, float] = dataclasses.field(default_factory=dict)  # in the scripts' defaults


BETA = {"beta": Range(0.1, 100)}
METHODS = {
    "DGPO": Method("DGPO", DENOISING | BETA),
    "DGPO with dials": Method(
        "DGPO",
        DENOISING | BETA | EXTREMES | LAGGING | {"bound": (1.0, 2.0, 4.0)},
        {"bound": 2.0, "ema": 0.9, "samples": 4},
    ),
    "Flow-GRPO": Method(
        "Flow-GRPO",
        COMMON
        | EXTREMES
        | {"sde_noise": Range(0.3, 1.2), "trained_share": (0.5, 1.0), "clip": (0.05, 0.2, 1.0)},
        {"sde_noise": 0.7, "clip": 0.2},
    ),
    "Diffusion-DPO": Method("Diffusion-DPO", DENOISING | BETA),
    "DiffusionNFT": Method(
        "NFT", DENOISING | EXTREMES | LAGGING | {"beta": Range(0.1, 10)}, {"ema": 0.9}
    ),
    "AWM": Method("AWM", DENOISING | EXTREMES),
    "GPO": Method("GPO", DENOISING | BETA | EXTREMES),
}


def drawn(name: str, world: str, dials: dict[str, Dial], n: int) -> list[Setting]:
    """n settings at random. Each dial is cut in n equal parts, and each part is met once.

    A dial has the same numbers for every method and in every world, so that luck is shared.
    """
    columns = {}
    for dial, among in dials.items():
        rng = random.Random(f"first {dial}")
        shares = [(i + rng.random()) / n for i in rng.sample(range(n), n)]
        if isinstance(among, Range):
            columns[dial] = [among.at(u) for u in shares]
        else:
            columns[dial] = [among[int(u * len(among))] for u in shares]
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    return [Setting(world, METHODS[name].name, **row) for row in rows]


def around(best: Setting, dials: dict[str, Dial], n: int, round_: int) -> list[Setting]:
    """n settings near one, on both sides of it, in the ranges given."""
    settings = []
    for i in range(n):
        row = {}
        for dial, among in dials.items():
            rng, value = random.Random(f"round {round_} {i} {dial}"), getattr(best, dial)
            if isinstance(among, Range):
                share = among.share(value) + rng.uniform(-NEAR, NEAR)
                row[dial] = among.at(min(max(share, 0.0), 1.0))
            elif rng.random() < REDRAWN:
                row[dial] = rng.choice(among)
        settings.append(dataclasses.replace(best, **row))
    return settings


class Scored(NamedTuple):
    """How good a setting is: by its cost, then by how far it ended, less being better."""

    cost: float  # mean over seeds of the cost to arrive, a failure counting as PENALTY budgets
    far: float  # how far from the goal the runs end, where none arrives
    setting: Setting
    runs: list[Run]

    def order(self) -> tuple[float, float]:
        return self.cost, self.far


def scored(setting: Setting, runs: list[Run]) -> Scored:
    world, n = setting.world, len(runs)
    close = sum(min(way(world, run), WAY) + min(run.end.right, RIGHT) for run in runs) / n
    costs = [PENALTY * run.budget if run.arrived is None else run.arrived for run in runs]
    return Scored(sum(costs) / n, -close, setting, runs)


# title, settings, seeds, share of the budget -> the runs, by setting and seed
Runner = Callable[[str, list[Setting], tuple[int, ...], float], list[list[Run]]]


@dataclasses.dataclass
class Search:
    best: Setting
    drawn: list[Run]  # of the settings that were drawn at random, in the first rung
    tried: list[Setting]  # all of them, the scripts' default first
    spent: float  # in forwards
    widened: list[str]  # what was widened, in words
    edges: list[str]  # the dials that are still at an edge


Rung = list[Scored]  # best first


def halve(runs_of: Runner, name: str, settings: list[Setting]) -> list[Rung]:
    """The rungs of a search. The first of the settings is in all of them."""
    default, rungs = settings[0], []
    for seeds, share, go_on in RUNGS:
        found = runs_of(f"search, {name}", settings, TUNING_SEEDS[:seeds], share)
        pairs = zip(settings, found, strict=True)
        rung = sorted((scored(*pair) for pair in pairs), key=Scored.order)
        best = [one.setting for one in rung[:go_on]]
        settings = best if default in best else [default, *best]
        rungs.append(rung)
    return rungs


def at_edges(setting: Setting, dials: dict[str, Dial]) -> dict[str, str]:
    """The dials in an outer tenth of their range, and which."""
    ranges = {dial: among for dial, among in dials.items() if isinstance(among, Range)}
    edges = {dial: among.edge(getattr(setting, dial)) for dial, among in ranges.items()}
    return {dial: edge for dial, edge in edges.items() if edge}


def search(runs_of: Runner, world: str, name: str, elsewhere: list[Setting]) -> Search:
    """The two of every method, those of other worlds, and those drawn; then more near the best.

    A range in whose outer tenth the best lies is widened before settings are drawn around it.
    """
    method = METHODS[name]
    dials, widened, spent, rungs, finalists = dict(method.dials), [], {}, [], {}
    default = Setting(world, method.name, **method.fixed)
    cheap = {dial: value for dial, value in CHEAP.items() if dial in dials}
    at_random = drawn(name, world, dials, DRAWN)
    settings = [default, dataclasses.replace(default, **cheap), *at_random]
    settings += [dataclasses.replace(setting, world=world) for setting in elsewhere]
    settings += earlier(world, name)
    for round_ in range(1, MOST_ROUNDS + 1):
        rungs.append(halve(runs_of, name, settings))
        for rung, (_, share, _) in zip(rungs[-1], RUNGS, strict=True):
            for one in rung:
                spent |= {
                    (one.setting, share, seed): run.end.cost for seed, run in enumerate(one.runs)
                }
        # The best of an earlier round stays the best until another beats it on all seeds.
        finalists |= {one.setting: one for one in rungs[-1][-1]}
        best = min(finalists.values(), key=Scored.order).setting
        edges = at_edges(best, dials)
        if round_ == MOST_ROUNDS or (round_ >= ROUNDS and not edges):
            break
        for dial, edge in edges.items():
            dials[dial] = dials[dial].widened(edge)
            end = dials[dial].low if edge == "low" else dials[dial].high
            widened.append(f"{dial} to {end:.3g}")
        settings = settings + around(best, dials, AROUND, round_)
    runs = [one.runs[0] for one in rungs[0][0] if one.setting in at_random]
    return Search(best, runs, settings, sum(spent.values()), widened, list(edges))
