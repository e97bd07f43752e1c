"""The protocol of the comparison, the same for the 2-D worlds and for the tiny SD3.5.

Runs: cost is counted in forward passes of one sample, and a run succeeds if it reaches its goal and
holds it. Search: every method's hyperparameters are chosen alike, on seeds that are never reported.
Results: the saved files. Intervals: how certain a number is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import multiprocessing
import random
import signal
from collections.abc import Callable, Iterator
from multiprocessing.pool import Pool
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from sd35.run import replace_file
from sd35.settings import UserError

# Runs


class Evaluation(NamedTuple):
    cost: int  # of the training so far, in forward passes of one sample; a backward counts two
    reward: float  # the mean of what is trained on
    quality: float | None = None  # by a judge that no run trains on
    spread: float | None = None  # diversity: the std of samples over the data's


@dataclasses.dataclass(frozen=True)
class Goal:
    """When an evaluation meets a world's goal, and for how long a run must hold it."""

    best: float  # the reward that counts as a progress of 1; a run's first evaluation has 0
    progress: float = 1.0
    quality: float = -math.inf
    hold: float = 1.2  # a run must go on until this many times the cost at which it first met it

    def progress_of(self, run: Run, evaluation: Evaluation | None = None) -> float:
        base = run.evaluations[0].reward
        return ((evaluation or run.end).reward - base) / (self.best - base)

    def cost_to_reach(self, run: Run) -> float | None:
        """The cost from which on the goal is met in nine of ten evaluations, and in the last."""
        met = [
            self.progress_of(run, e) >= self.progress
            and (e.quality is None or e.quality >= self.quality)
            for e in run.evaluations
        ]
        for k, evaluation in enumerate(run.evaluations):
            holds = met[k] and met[-1] and sum(met[k:]) >= 0.9 * len(met[k:])
            if holds and run.end.cost >= self.hold * evaluation.cost:
                return evaluation.cost
        return None


@dataclasses.dataclass
class Run:
    budget: float
    evaluations: list[Evaluation]
    reached: float | None = None  # the cost to reach the goal

    @property
    def end(self) -> Evaluation:
        return self.evaluations[-1]

    @property
    def cost(self) -> float:
        """The cost to reach the goal; a run that fails counts as the full budget."""
        return self.budget if self.reached is None else self.reached

    def at(self, cost: float) -> Evaluation:
        """The last evaluation up to a cost."""
        return [one for one in self.evaluations if one.cost <= cost][-1]

    def stored(self, curve: bool = True) -> dict[str, Any]:
        """As JSON, with what tables and figures need: of the curve, cost and reward, 50 % apart."""
        whole, rows = [self.evaluations[0], self.end, *[self.at(self.cost)] * curve], []
        for one in self.evaluations:
            if one in whole or (curve and one.cost >= 1.5 * rows[-1][0]):
                rows.append(one if one in whole else one[:2])
        return {"budget": self.budget, "reached": self.reached, "evaluations": rows}

    @classmethod
    def load(cls, stored: dict[str, Any]) -> Run:
        return cls(**stored | {"evaluations": [Evaluation(*row) for row in stored["evaluations"]]})


class Diverged(Exception):
    """Samples, rewards or a gradient are no longer finite."""


def follow(
    costs: Iterator[int],
    goal: Goal,
    budget: float,
    evaluate: Callable,
    due: Callable,
    end: Callable,
) -> Run:
    """A training run, evaluated on the way. One that diverges ends there, and fails.

    costs: yields 0, and after each step of the training what it has cost so far. evaluate: cost ->
    Evaluation. due: cost -> the cost at which the next evaluation is due. end: Run -> the cost at
    which the run stops, if its budget is not spent first.
    """
    run, next_due = Run(budget, []), 0.0
    try:
        for cost in costs:
            if cost < min(next_due, budget):
                continue
            run.evaluations.append(evaluate(cost))
            run.reached = goal.cost_to_reach(run)
            next_due = due(cost)
            if cost >= min(end(run), budget):
                break
    except Diverged:
        run.reached = None
    return run


# The search of a method's hyperparameters


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers between two ends: log-uniform, or uniform if low is 0.

    A low end of 0 is a natural limit, so a value near it is not at an edge.
    """

    low: float
    high: float

    def at(self, u: float) -> float:
        """The number at a share u of the range."""
        if self.low == 0:
            return round(u * self.high, 3)
        return float(f"{self.low * (self.high / self.low) ** u:.3g}")

    def share(self, value: float) -> float:
        if self.low == 0:
            return value / self.high
        return math.log(value / self.low) / math.log(self.high / self.low)

    def edge(self, value: float) -> str | None:
        """The outer tenth of the range that a value is in, if any."""
        share = self.share(value)
        if share < 0.1 and self.low > 0:
            return "low"
        return "high" if share > 0.9 else None

    def widened(self, edge: str) -> Range:
        """Triple the range on one side. A range from 0 has values below 1: go halfway to 1."""
        if self.low == 0:
            return Range(0, (1 + self.high) / 2)
        return Range(self.low / 3, self.high) if edge == "low" else Range(self.low, 3 * self.high)


Space = dict[str, Range | tuple]  # what each hyperparameter may be: a range, or one of a few

TUNING_SEEDS = tuple(range(100, 112))
PENALTY = 2  # a failed run counts as this many budgets (PAR2), so that reliability is rewarded
NEAR, REDRAWN = 0.15, 0.25  # how far to move, as a share of a range; chance of another choice


@dataclasses.dataclass(frozen=True)
class Plan:
    """How thorough the search is."""

    drawn: int  # settings at random
    around: int  # settings near the best, in each later round
    rounds: int
    most_rounds: int  # if the best is still at an edge
    rungs: tuple[tuple[int, float, int], ...]  # seeds, share of the budget, how many go on
    cheap: dict[str, Any]  # what makes a step cheap: the default is tried with it, too
    works: float | None = None  # the progress at which a setting works; None: it must succeed


def drawn(default: Any, space: Space, n: int) -> list[Any]:
    """n random settings: each hyperparameter's range is cut in n parts, and each is met once.

    A hyperparameter has the same random numbers for every method and world, so that luck is shared.
    """
    columns = {}
    for name, choices in space.items():
        rng = random.Random(f"first {name}")
        shares = [(i + rng.random()) / n for i in rng.sample(range(n), n)]
        is_range = isinstance(choices, Range)
        columns[name] = [
            choices.at(u) if is_range else choices[int(u * len(choices))] for u in shares
        ]
    rows = zip(*columns.values(), strict=True)
    return [dataclasses.replace(default, **dict(zip(columns, row, strict=True))) for row in rows]


def around(best: Any, space: Space, n: int, round_: int) -> list[Any]:
    """n settings near the best, to either side."""
    settings = []
    for i in range(n):
        row = {}
        for name, choices in space.items():
            rng, value = random.Random(f"round {round_} {i} {name}"), getattr(best, name)
            if isinstance(choices, Range):
                share = choices.share(value) + rng.uniform(-NEAR, NEAR)
                row[name] = choices.at(min(max(share, 0.0), 1.0))
            elif rng.random() < REDRAWN:
                row[name] = rng.choice(choices)
        settings.append(dataclasses.replace(best, **row))
    return settings


def at_edges(setting: Any, space: Space) -> dict[str, str]:
    """The hyperparameters in an outer tenth of their range, and which."""
    ranges = {name: choices for name, choices in space.items() if isinstance(choices, Range)}
    edges = {name: choices.edge(getattr(setting, name)) for name, choices in ranges.items()}
    return {name: edge for name, edge in edges.items() if edge}


def score(goal: Goal, runs: list[Run]) -> tuple[float, float]:
    """Lower is better: the mean cost, failures penalised; then the mean distance to the goal."""
    costs = [PENALTY * run.budget if run.reached is None else run.reached for run in runs]
    missing = [
        max(goal.progress - goal.progress_of(run), 0) + max(goal.quality - run.end.quality, 0)
        for run in runs
    ]
    return sum(costs) / len(runs), sum(missing) / len(runs)


def search(
    runs_of: Callable, base: Any, default: Any, space: Space, plan: Plan, goal: Goal, others: list
) -> dict[str, Any]:
    """Successive halving of random settings, then of settings around the best, round by round.

    runs_of: (settings, seeds, share of the budget) -> runs by setting and seed. base: the defaults
    of all methods. default: those of this method, which reach the last rung of every round. others:
    what was chosen elsewhere, to be tried here, too. A range in whose outer tenth the best lies is
    widened before the next round.

    Returns as JSON: best, the fields in which the best setting differs from base; tried, the number
    of settings; works, how many random settings work in the first rung, and of how many; spent, in
    forward passes; widened, which ranges were, in words; edges, the fields of the best at an edge.
    """
    space, widened, spent, finalists = dict(space), [], {}, {}
    cheap = {name: value for name, value in plan.cheap.items() if name in space}
    at_random = drawn(default, space, plan.drawn)
    settings = [default, dataclasses.replace(default, **cheap), *at_random, *others]
    for round_ in range(1, plan.most_rounds + 1):
        entrants = settings
        for number, (seeds, share, go_on) in enumerate(plan.rungs):
            runs = dict(zip(entrants, runs_of(entrants, TUNING_SEEDS[:seeds], share), strict=True))
            for setting, of_setting in runs.items():
                spent |= {(setting, share, i): run.end.cost for i, run in enumerate(of_setting)}
            if (round_, number) == (1, 0):
                first = [runs[setting][0] for setting in at_random]
            scores = {setting: score(goal, of_setting) for setting, of_setting in runs.items()}
            survivors = sorted(scores, key=scores.get)[:go_on]
            entrants = [default, *(setting for setting in survivors if setting != default)]
        # The best of an earlier round stays the best until another beats it on all seeds.
        finalists |= scores
        best = min(finalists, key=finalists.get)
        edges = at_edges(best, space)
        if round_ == plan.most_rounds or (round_ >= plan.rounds and not edges):
            break
        for name, edge in edges.items():
            space[name] = space[name].widened(edge)
            end = space[name].low if edge == "low" else space[name].high
            widened.append(f"{name} to {end:.3g}")
        settings = settings + around(best, space, plan.around, round_)

    if plan.works is None:
        works = sum(run.reached is not None for run in first)
    else:
        works = sum(goal.progress_of(run) >= plan.works for run in first)
    fields = dataclasses.asdict(best)
    return {
        "best": {name: value for name, value in fields.items() if value != getattr(base, name)},
        "tried": len(set(settings)),
        "works": [works, len(first)],
        "spent": sum(spent.values()),
        "widened": widened,
        "edges": list(edges),
    }


# Computing runs, and saving results


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, separators=(",", ":"), default=dataclasses.asdict) + "\n"
    replace_file(path, lambda aside: aside.write_text(text, "utf-8"))


def in_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one


def call(job: tuple[Path, Callable, tuple]) -> None:
    path, function, task = job
    write_json(path, function(*task))


class Computer:
    """Calls functions, one per core, and keeps what each returns in a file, to go on if stopped."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.pool: Pool | None = None

    def __call__(self, title: str, name: str, function: Callable, tasks: list[tuple]) -> list[Any]:
        """What function(*task) returns, as JSON, for each task. name: of a folder for the files."""
        paths = {}
        for task in tasks:
            key = json.dumps([function.__name__, *task], default=dataclasses.asdict)
            paths[task] = self.folder / name / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
        missing = [(path, function, task) for task, path in paths.items() if not path.exists()]
        if missing:
            try:
                list(tqdm(self.map(missing), f"{name}: {title}", len(missing)))
            except BaseException:
                self.pool.terminate()  # rather than let the workers finish their runs
                raise
        return [json.loads(paths[task].read_text("utf-8")) for task in tasks]

    def map(self, jobs: list[tuple[Path, Callable, tuple]]) -> Iterator[None]:
        if self.pool is None:
            self.pool = multiprocessing.get_context("spawn").Pool(initializer=in_worker)
        return self.pool.imap_unordered(call, jobs)


class Results:
    """The saved results, in <folder>/<world>.json, by kind and name."""

    def __init__(self, folder: Path):
        self.folder = folder

    def read(self, world: str) -> dict[str, Any]:
        path = self.folder / f"{world}.json"
        return json.loads(path.read_text("utf-8")) if path.exists() else {}

    def of(self, world: str, kind: str) -> dict[str, Any]:
        return self.read(world).get(kind, {})

    def put(self, world: str, kind: str, name: str, value: Any, origin: str) -> None:
        results = self.read(world) | {"origin": origin}
        results.setdefault(kind, {})[name] = value
        write_json(self.folder / f"{world}.json", results)

    def check_origin(self, world: str, origin: str) -> None:
        """Raise UserError if the results of a world began with another pretrained model."""
        if self.read(world).get("origin", origin) != origin:
            raise UserError(
                f"the saved results of {world} began with another pretrained pipeline; to start "
                "anew with this one, give a new folder as --results"
            )


# Intervals

# The 97.5 % point of Student's t, by the number of values.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 10: 2.262}
CLEAR = 4.0  # a ratio is shown if the ends of its interval differ by less than this factor ...
ENOUGH = 0.8  # ... and this share of both methods' runs succeed


def resampled_means(values: list[float], n: int, seed: int = 0) -> Tensor:
    """The means of 4000 samples of n, drawn from the values with replacement."""
    x, generator = torch.tensor(values, dtype=torch.float64), torch.Generator().manual_seed(seed)
    return x[torch.randint(len(x), (4000, n), generator=generator)].mean(1)


def ends_of(means: Tensor, n: int) -> list[float]:
    """The 95 % interval of resampled means of n values: the expanded percentile bootstrap.

    The percentiles lie further out than 2.5 and 97.5, as far as Student's interval is wider than
    the resampled means would be if all were normal (Hesterberg, arXiv:1411.5279, section 5). With
    four seeds, these are about the least and the greatest.
    """
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * STUDENT[n])
    return means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()


def interval(values: list[float]) -> tuple[float, float, float]:
    """The mean, and the ends of its 95 % interval."""
    n = len(values)
    return (sum(values) / n, *ends_of(resampled_means(values, n), n))


def successes(runs: list[Run]) -> int:
    return sum(run.reached is not None for run in runs)


def ratio(runs: list[Run], other: list[Run]) -> tuple[float, float, float] | None:
    """The other's mean cost over the first's; None where too few succeed, or it is not clear."""
    if any(successes(each) < ENOUGH * len(each) for each in (runs, other)):
        return None
    costs = [[run.cost for run in each] for each in (runs, other)]
    first, second = (resampled_means(each, len(each), seed) for seed, each in enumerate(costs))
    low, high = ends_of(second / first, len(runs))
    first_mean, second_mean = (sum(each) / len(each) for each in costs)
    return (second_mean / first_mean, low, high) if high < CLEAR * low else None


def ratio_of_few(runs: list[Run], other: list[Run], spacing: float) -> str:
    """The other's geometric mean cost over the first's, and Welch's interval, for three seeds.

    spacing: the factor between the costs of evaluations, up to which a cost is known. The interval
    has the fewest degrees of freedom, two. If the other fails on a seed, the ratio is a lower
    bound; if the first does, there is none.
    """
    if successes(runs) < len(runs):
        return "-"
    logs = [torch.tensor([math.log(run.cost) for run in each]) for each in (runs, other)]
    middle = (logs[1].mean() - logs[0].mean()).exp().item()
    if successes(other) < len(other):
        return f"> {middle:.1f}"
    rounding = math.log(spacing) ** 2 / 12
    error = sum((each.var() + rounding) / len(each) for each in logs).sqrt().item()
    low, high = (middle * math.exp(sign * STUDENT[len(runs)] * error) for sign in (-1, 1))
    return f"{middle:.1f} [{low:.1f}, {high:.1f}]"
