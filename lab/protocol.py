"""The protocol of the comparison, the same for the 2-D worlds and for the tiny SD3.5.

Runs: cost is counted in forwards of one sample, and a run succeeds if it reaches its goal and holds
it. Search: every method's hyperparameters are chosen alike, on seeds that are never reported.
Results: what is kept. Intervals: how certain a number is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from sd35.run import replace_file

# Runs


class Evaluation(NamedTuple):
    cost: int  # of the training so far, in forwards of one sample; a backward counts two
    reward: float  # the mean of what is trained on
    quality: float | None = None  # by a judge that no run trains on
    spread: float | None = None  # diversity: the std of samples over the data's
    seconds: float | None = None  # CPU time of the training so far


@dataclasses.dataclass(frozen=True)
class Goal:
    """When an evaluation meets the goal of a world, and for how long a run must hold it."""

    best: float  # the reward that counts as a progress of 1; a run's first evaluation has 0
    progress: float = 1.0
    quality: float = -math.inf
    hold: float = 1.2  # a run must go on until this many times the cost at which it got there ...
    held: float = 0.9  # ... and meet the goal in this share of the evaluations, and in the last

    def progress_of(self, run: Run, evaluation: Evaluation | None = None) -> float:
        base = run.evaluations[0].reward
        return ((evaluation or run.end).reward - base) / (self.best - base)

    def cost_to_reach(self, run: Run) -> float | None:
        """The cost from which on a run meets the goal and holds it; None if it does not."""
        met = [
            self.progress_of(run, e) >= self.progress
            and (e.quality is None or e.quality >= self.quality)
            for e in run.evaluations
        ]
        for k, evaluation in enumerate(run.evaluations):
            holds = met[k] and met[-1] and sum(met[k:]) >= self.held * len(met[k:])
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
        """As JSON, with what tables and figures need: of the curve, the cost and the reward."""
        whole = [self.evaluations[0], self.end, *[self.at(self.cost)] * curve]
        rows = [e if e in whole else e[:2] for e in self.evaluations if curve or e in whole]
        return {"budget": self.budget, "reached": self.reached, "evaluations": rows}

    @classmethod
    def load(cls, stored: dict[str, Any]) -> Run:
        return cls(**stored | {"evaluations": [Evaluation(*row) for row in stored["evaluations"]]})


# The search of a method's hyperparameters


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers between two ends, uniform in their logarithm, or uniform if the low end is 0.

    A low end of 0 is a natural limit: a setting there is at no edge.
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
        """Threefold on one side; a range from 0, whose values end at 1, halfway to it."""
        if self.low == 0:
            return Range(0, (1 + self.high) / 2)
        return Range(self.low / 3, self.high) if edge == "low" else Range(self.low, 3 * self.high)


Space = dict[str, Range | tuple]  # what each hyperparameter may be: a range, or one of a few

TUNING_SEEDS = tuple(range(100, 112))
PENALTY = 2  # a failed run counts as this many budgets (PAR2), so that reliability is rewarded
NEAR, REDRAWN = 0.15, 0.25  # of a range, to either side; and the chance of another choice


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


@dataclasses.dataclass
class Search:
    """The result of a search. Settings are what differs from the defaults."""

    best: dict[str, Any]
    tried: int  # settings
    works: tuple[int, int]  # how many settings work in the first rung, and of how many
    ends: list[tuple[float, float]]  # progress and quality of these, in the end of that rung
    spent: float  # in forwards
    widened: list[str]  # the ranges that were widened, in words
    edges: list[str]  # hyperparameters of the best that are still at an edge


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
    """Less is better: the mean cost, failures penalised; if all fail, how far from the goal."""
    costs = [PENALTY * run.budget if run.reached is None else run.reached for run in runs]
    missing = [
        max(goal.progress - goal.progress_of(run), 0) + max(goal.quality - run.end.quality, 0)
        for run in runs
    ]
    return sum(costs) / len(runs), sum(missing) / len(runs)


# settings, seeds, share of the budget -> the runs, by setting and seed
RunsOf = Callable[[list[Any], tuple[int, ...], float], list[list[Run]]]


def search(
    runs_of: RunsOf,
    base: Any,
    default: Any,
    space: Space,
    plan: Plan,
    goal: Goal,
    others: list[Any],
) -> Search:
    """Successive halving of random settings, then of settings around the best, round by round.

    base: the defaults of all methods, from which Search.best is what differs. default: those of
    this method, which reach the last rung of every round. others: what was chosen elsewhere, to be
    tried here, too. A range in whose outer tenth the best lies is widened before the next round.
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

    ends = [(goal.progress_of(run), run.end.quality) for run in first]
    if plan.works is None:
        works = sum(run.reached is not None for run in first)
    else:
        works = sum(progress >= plan.works for progress, _ in ends)
    ends = [(round(progress, 3), quality) for progress, quality in ends]
    chosen, tried, cost = changed_fields(best, base), len(set(settings)), sum(spent.values())
    return Search(chosen, tried, (works, len(first)), ends, cost, widened, list(edges))


def changed_fields(setting: Any, base: Any) -> dict[str, Any]:
    """What a setting has other than another one."""
    fields = dataclasses.asdict(setting)
    return {name: value for name, value in fields.items() if value != getattr(base, name)}


# Computing runs, and keeping results


def in_worker() -> None:
    """Leave Ctrl-C to the process that started this one, and end with it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


class Computer:
    """Calls functions, one per core, and logs what they return, so that nothing is computed twice.

    folder: of the logs, or None for none; an entry is a line. workers: 0 computes in this process.
    """

    def __init__(self, folder: Path | None, workers: int):
        self.folder, self.workers = folder, workers
        self.logs: dict[str, dict[str, Any]] = {}
        self.pool: ProcessPoolExecutor | None = None

    def read(self, log: str) -> dict[str, Any]:
        path, entries = Path(self.folder or ".") / f"{log}.jsonl", {}
        if self.folder and path.exists():
            for line in path.read_text("utf-8").splitlines():
                with contextlib.suppress(ValueError):  # the line that a killed process was writing
                    entries |= json.loads(line)
        return entries

    def __call__(self, title: str, log: str, function: Callable, tasks: list[tuple]) -> list[Any]:
        """What function(*task) returns for each task, as JSON: all that is not in the log yet."""
        if log not in self.logs:
            self.logs[log] = self.read(log)
        known, name = self.logs[log], function.__name__
        keys = [json.dumps([name, *task], default=dataclasses.asdict) for task in tasks]
        missing = {key: task for key, task in zip(keys, tasks, strict=True) if key not in known}
        with tqdm(desc=f"{log}: {title}", total=len(missing), disable=not missing) as progress:
            for key, result in self.compute(function, missing):
                known[key] = json.loads(json.dumps(result, default=dataclasses.asdict))
                if self.folder:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    with (self.folder / f"{log}.jsonl").open("a", encoding="utf-8") as file:
                        file.write("\n" + json.dumps({key: known[key]}))
                progress.update()
        return [known[key] for key in keys]

    def compute(self, function: Callable, tasks: dict[str, tuple]) -> Iterator[tuple[str, Any]]:
        if not self.workers:
            for key, task in tasks.items():
                yield key, function(*task)
            return
        if self.pool is None:
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(self.workers, context, in_worker)
        try:
            futures = {self.pool.submit(function, *task): key for key, task in tasks.items()}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            self.pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()  # rather than wait until it has finished its run
            raise

    def runs(
        self, title: str, log: str, function: Callable, tasks: list[list[tuple]]
    ) -> list[list[Run]]:
        """Of a table of tasks that return runs."""
        flat = iter(self(title, log, function, [task for row in tasks for task in row]))
        return [[Run.load(next(flat)) for _ in row] for row in tasks]


class Missing(Exception):
    """A result that is not kept, while nothing is to be computed."""


class Results:
    """What is kept: <folder>/<world>.json, by kind (searches, reports, ...) and name."""

    def __init__(self, folder: Path, compute: bool):
        self.folder, self.compute = folder, compute
        self.worlds: dict[str, dict[str, Any]] = {}

    def of(self, world: str) -> dict[str, Any]:
        if world not in self.worlds:
            path = self.folder / f"{world}.json"
            self.worlds[world] = json.loads(path.read_text("utf-8")) if path.exists() else {}
        return self.worlds[world]

    def get(self, world: str, kind: str, name: str, make: Callable[[], Any]) -> Any:
        """The result that is kept, or make(), which is JSON, and then kept. Raises Missing."""
        results = self.of(world).setdefault(kind, {})
        if name not in results:
            if not self.compute:
                raise Missing(f"{name} ({kind}) in {world}")
            results[name] = make()
            self.folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.worlds[world], separators=(",", ":")) + "\n"
            replace_file(self.folder / f"{world}.json", lambda path: path.write_text(text, "utf-8"))
        return results[name]


# Intervals

# The 97.5 % point of Student's t, by the number of values.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 10: 2.262}
CLEAR = 4.0  # a ratio is shown if the ends of its interval differ by less than this factor ...
ENOUGH = 0.8  # ... and this share of both methods' runs succeed

Interval = tuple[float, float, float]  # a mean, and the ends of its 95 % interval


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


def interval(values: list[float]) -> Interval:
    n = len(values)
    return (sum(values) / n, *ends_of(resampled_means(values, n), n))


def forecast(runs: list[Run], n: int) -> tuple[float, float]:
    """Where the mean cost of n other seeds lies in 19 of 20 cases, if these runs are typical.

    It is wider than the interval: n seeds have a spread, and the mean of these runs an error.
    """
    costs = [run.cost for run in runs]
    means = resampled_means(costs, n) + resampled_means(costs, len(costs), seed=1)
    means = (means - sum(costs) / len(costs)).clamp(0, runs[0].budget)
    low, high = ends_of(means, len(costs))
    return low, high


def successes(runs: list[Run]) -> int:
    return sum(run.reached is not None for run in runs)


def ratio(runs: list[Run], other: list[Run]) -> Interval | None:
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


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
