"""The family on the worlds of SD3.5's own classes: `python toy/compare_sd35.py`.

Figs. 3, 4 and 5 of the paper, by the trainer of train_sd35.py: the same pipeline, LoRA, rollouts,
rewards and optimiser, and randomness by (seed, what for, step, prompt, sample). Only the noise of a
rollout and the gradient differ by method, see `Family`; DGPO is the trainer's own step.

Every method is searched for alike, on one seed: so many settings for an eighth of the budget, the
best of these for longer, and what is best runs on fresh seeds, which alone are reported. --full
goes through PASSES, a search of few settings and then one of more, and keeps every finished run in
toy/results/<world>-family.json: stop it with Ctrl-C whenever you like, call it again to go on, and
--table shows what there is. Without flags, what was chosen runs again for an eighth of the budget.

No two machines pretrain the same pipeline to the bit. A search goes on with any; reports are kept
by the pipeline that they began with, so that methods are compared on one, and a second is a check.
"""

# ruff: noqa: E402 (a wrong argument is answered before the libraries are loaded)

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])  # also for `python -m` and links
import cli
from cli import Fault, first_line, option

TITLE = "# The family on SD3.5's own classes"  # of the page that is written


@dataclasses.dataclass
class Arguments:
    """Compares DGPO with its family on SD3.5's own classes; see toy/results/sd35.md."""

    full: bool = option(
        False,
        "Search and report, in both worlds: up to six hours on two cores if nothing is kept. Stop "
        "it at any time: what is finished is kept, and the next call goes on.",
    )
    table: bool = option(False, "Compute nothing: the table and the figure of all that is kept.")
    worlds: list[str] = option(
        ["words", "shapes"], "The worlds to run in.", choices=("words", "shapes")
    )
    out: str = option(
        str(Path(__file__).parent / "results"), "The results' folder.", shown="toy/results"
    )


def parse_args(argv: list[str] | None = None) -> Arguments:
    args = cli.parse(Arguments, sys.argv[1:] if argv is None else argv)
    args.worlds = list(dict.fromkeys(args.worlds))
    if args.table and args.worlds != Arguments().worlds:
        raise Fault("argument --worlds: goes without --table, which has them all")
    page = cli.make_folder(args.out, "out") / "sd35.md"
    if args.full or args.table:
        cli.check_own(page, TITLE, "out")
    return args


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # no window, and whatever the environment asks for
    cli.run("compare_sd35.py", parse_args)

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or it speaks of parts not used here

import figures
import matplotlib.pyplot as plt
from family_sd35 import ROOT, WORLDS, Evaluation, Run, Setting, run_setting
from kept import LOST, end_with_parent
from report_sd35 import SEEDS, WORKS, Report, Search, Tried, page
from search import Dial, Range

from rewards import RewardError

VERSION = 2  # of what a run means
FRESH_SEEDS, TUNING_SEED, CHECK_SEED = tuple(range(SEEDS)), 100, 20
# How many settings are tried, and the rungs: share of the budget, how many go on.
PASSES = {
    2: ((1 / 8, 1),),
    6: ((1 / 8, 2), (1 / 2, 1)),
    12: ((1 / 8, 4), (1 / 2, 2), (1, 1)),
}


# What is tried.


class Method(NamedTuple):
    fixed: Setting  # the default
    dials: dict[str, Dial]


COMMON: dict[str, Dial] = {
    "learning_rate": Range(5e-4, 5e-3),
    "kl": Range(0.01, 0.3),
    "prompts_per_step": (4, 8),
    "num_inference_steps": (5, 10),
    "updates_per_rollout": (1, 2, 4),
}
DENOISING: dict[str, Dial] = {**COMMON, "t_min": (0.2, 0.6), "train_timesteps": (1, 2, 4)}
EXTREMES: dict[str, Dial] = {"train_samples": (2, 4, None)}
BETA: dict[str, Dial] = {"beta": Range(1, 100)}
CHEAP = {"num_inference_steps": 5, "updates_per_rollout": 2}
CHEAP |= {"train_timesteps": 2, "train_samples": 4}
NOISE = {"sde_noise": Range(0.3, 1.0), "trained_share": (0.5, 1.0), "clip": (0.2, 1.0)}
METHODS = {
    "DGPO": Method({}, DENOISING | BETA),
    "DGPO with dials": Method(
        {"train_samples": 4, "bound": 2.0, "updates_per_rollout": 2},
        DENOISING | BETA | EXTREMES | {"bound": (1.0, 2.0, 4.0)},
    ),
    "Flow-GRPO": Method(
        {"method": "Flow-GRPO", "sde_noise": 0.7, "kl": 0.01, "clip": 0.2},
        COMMON | EXTREMES | NOISE | {"kl": Range(1e-3, 0.1)},
    ),
    "DiffusionNFT": Method(
        {"method": "NFT", "beta": 1.0}, DENOISING | EXTREMES | {"beta": Range(0.1, 10)}
    ),
    "Diffusion-DPO": Method({"train_samples": 2}, DENOISING | BETA),
}
VARIANTS = {  # of the setting that was chosen for another method
    "DGPO offline": ("DGPO", {"offline": True}),
    "DGPO, SDE rollouts": ("DGPO", {"sde_noise": 0.7}),
    "DGPO, t_min 0": ("DGPO", {"t_min": 0.0}),
    "DGPO, bounded pairs": ("Diffusion-DPO", {"bound": 1.0}),
}
MAIN = ("DGPO with dials", "Flow-GRPO", "DGPO", "DiffusionNFT")
ORDER = [("words", name) for name in MAIN] + [("shapes", name) for name in MAIN]
PAIRS = ("Diffusion-DPO", "DGPO, bounded pairs")
ORDER += [(world, name) for world in ("words", "shapes") for name in PAIRS]
ORDER += [("words", name) for name in VARIANTS if name not in PAIRS]


# Near Flow-GRPO's choice in words, and those of compare.py's worlds. In words they were tried after
# the report, to see whether its verdict holds, and choose nothing; in shapes the search has three.
FLOW: Setting = {"method": "Flow-GRPO", "num_inference_steps": 5, "updates_per_rollout": 2}
FLOW |= {"sde_noise": 0.397, "kl": 0.00423, "clip": 0.2, "learning_rate": 0.0025}
FEW: Setting = {"prompts_per_step": 4, "train_samples": 4}
NEAR_FLOW = [
    FLOW | {"train_samples": 2},
    FLOW | FEW,
    FLOW | FEW | {"learning_rate": 0.004, "num_inference_steps": 10},
    FLOW | {"train_samples": 2, "updates_per_rollout": 4, "clip": 0.05},
    FLOW | {"train_samples": 2, "learning_rate": 0.004, "sde_noise": 0.7, "kl": 0.03, "clip": 0.05},
    FLOW | FEW | {"learning_rate": 0.005},
    FLOW | FEW | {"learning_rate": 0.004, "updates_per_rollout": 4},
    FLOW | FEW | {"train_samples": 8},
    FLOW | FEW | {"learning_rate": 0.004, "sde_noise": 0.7},
    FLOW | FEW | {"learning_rate": 0.004, "kl": 0.02, "clip": 1.0},
]
# Diffusion-DPO's choice in words, bounded: what a search of one method finds, another's tries, too.
BOUNDED_PAIR: Setting = {"train_samples": 2, "updates_per_rollout": 2, "learning_rate": 0.00389}
BOUNDED_PAIR |= {"kl": 0.0373, "prompts_per_step": 4, "num_inference_steps": 5, "t_min": 0.6}
BOUNDED_PAIR |= {"train_timesteps": 4, "beta": 1.22}
BOUNDED = [BOUNDED_PAIR | {"bound": bound} for bound in (1.0, 2.0)]
MORE: dict[tuple[str, str], list[Setting]] = {("shapes", "Flow-GRPO"): NEAR_FLOW[:3]}
MORE |= {(world, "DGPO with dials"): BOUNDED for world in ("words", "shapes")}
# The best of the first twelve, by its place, where its beta is at the low edge of the range: the
# search has it with lower ones, too, until the gate of Eq. 17 hardly closes and beta is no matter.
LOWEST = {("words", "DGPO"): 9, ("words", "DGPO with dials"): 9, ("words", "Diffusion-DPO"): 4}
LOWEST |= {("shapes", "DGPO"): 4, ("shapes", "DGPO with dials"): 4}
LOWER_BETAS = (0.4, 0.12)
AFTERWARDS: dict[tuple[str, str], list[Setting]] = {("words", "Flow-GRPO"): NEAR_FLOW}


def tried(name: str, n: int, world: str = "") -> list[Setting]:
    """The default, the same with what makes a step cheap, others at random, LOWER_BETAS and MORE.

    A dial has the same luck for every method, and the first settings do not depend on n.
    """
    fixed, dials = METHODS[name]
    found = [fixed, fixed | {dial: CHEAP[dial] for dial in CHEAP if dial in dials}]
    for i in range(n - len(found)):
        row = {}
        for dial, among in dials.items():
            u = random.Random(f"{i} {dial}").random()
            row[dial] = among.at(u) if isinstance(among, Range) else among[int(u * len(among))]
        found.append(fixed | row)
    if n < max(PASSES):
        return found
    lowest = [found[LOWEST[world, name]]] if (world, name) in LOWEST else []
    lower = [best | {"beta": beta} for best in lowest for beta in LOWER_BETAS]
    return [*found, *lower, *MORE.get((world, name), [])]


def at_edges(name: str, setting: Setting, settings: list[Setting]) -> list[str]:
    """The dials of a setting in an outer tenth of what was tried, and at which end."""
    edges = []
    for dial, among in METHODS[name].dials.items():
        if isinstance(among, Range) and dial in setting:
            values = [other[dial] for other in settings if dial in other]
            edge = Range(min(among.low, *values), max(among.high, *values)).edge(setting[dial])
            edges += [f"{dial} ({edge})"] if edge else []
    return edges


# Finished runs.


class Missing(Fault):
    """Runs that are not kept, where nothing is to be computed."""


def digest(world: str) -> str:
    """Which pipeline a world's runs began with. Raises Fault if there is none."""
    folder = ROOT / "toy" / "out" / world
    weights = sorted(folder.glob("transformer/*.safetensors"))
    if not weights:
        raise Fault(f"there is no pipeline in {folder}; run `python toy/{world}.py` first")
    return hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()[:16]


def is_whole(kept: dict) -> bool:
    """Whether what a file holds is what Results writes."""
    try:
        for run in kept["runs"].values():
            first, *rows = [Evaluation(*row) for row in run["evaluations"]]
            costs = [row.cost for row in (first, *rows)]
            if run["budget"] <= 0 or costs != sorted(set(costs)):
                return False
            if not math.isfinite(sum(map(sum, rows), run["budget"] + sum(first))):
                return False
        return isinstance(kept["pipelines"], list) and all(map(str.isalnum, kept["pipelines"]))
    except (LookupError, TypeError, ValueError, AttributeError):
        return False


class Results:
    """One JSON file a world, written aside and renamed after every run.

    Runs may be asked for by several threads. They are computed a core each, and one only once.
    """

    def __init__(self, out: Path, compute: bool = True, keep: bool = True):
        self.out, self.compute, self.keep = out, compute, keep
        self.kept: dict[str, dict] = {}
        self.running: dict[str, Future] = {}
        self.lock = threading.RLock()
        about = {"max_workers": cli.cores(), "initializer": end_with_parent}
        self.pool = ProcessPoolExecutor(**about) if compute else None

    def load(self, world: str) -> dict:
        """{"version", "pipelines", "runs"} of a world. Raises Fault at what it cannot go on with.

        Where runs are computed, this machine's pipeline is among the pipelines.
        """
        if world not in self.kept:
            path = self.out / f"{world}-family.json"
            kept = cli.read_json(path) or {"version": VERSION, "pipelines": [], "runs": {}}
            aside = f"move {path} away, or give another --out"
            if kept.get("version") != VERSION:
                raise Fault(f"the runs in {path} are of another version; {aside}")
            if not is_whole(kept):
                raise Fault(f"the runs in {path} are damaged; {aside}")
            if self.compute and digest(world) not in kept["pipelines"]:
                kept["pipelines"].append(digest(world))
            self.kept[world] = kept
        return self.kept[world]

    def base(self, world: str) -> int:
        """This machine's pipeline, by its place among those of a world."""
        return self.load(world)["pipelines"].index(digest(world))

    def run(self, world: str, setting: Setting, seed: int, budget: int, base: int = 0) -> Run:
        """A run of this budget, or the beginning of a longer one. Raises Missing.

        base: the pipeline of a run that is reported; one of a search may be of any.
        """
        of = [base] if base and seed in FRESH_SEEDS else []
        key, goal = json.dumps([setting, seed, *of], sort_keys=True), WORLDS[world].goal
        with self.lock:
            found = self.load(world)["runs"].get(key)
            if found and found["budget"] >= budget:
                seen = [Evaluation(*row) for row in found["evaluations"]]
                return Run(found["budget"], seen).until(budget, goal)
            if self.pool is None:
                raise Missing(f"not finished yet: {world}, {key}")
            name = f"{world} {key} {budget}"
            if name not in self.running:
                self.running[name] = self.pool.submit(run_setting, world, setting, seed, budget)
            future = self.running[name]
        evaluations = future.result()
        with self.lock:
            kept = self.load(world)
            if kept["runs"].get(key, {"budget": 0})["budget"] < budget:
                path = self.out / f"{world}-family.json"
                if self.keep:  # what another comparison has written meanwhile is kept, too
                    kept["runs"] |= cli.read_json(path).get("runs", {})
                kept["runs"][key] = {"budget": budget, "evaluations": evaluations}
                text = json.dumps(kept, separators=(",", ":"))
                if self.keep:
                    cli.replace_file(path, lambda new: new.write_text(text, "utf-8"))
                end = evaluations[-1]
                print(f"{world}: {key}: {end.cost} forwards, {end.accuracy:.3f}", flush=True)
        return Run(budget, evaluations).until(budget, goal)

    def longest(self, world: str, setting: Setting, seed: int) -> Run:
        """What is kept of a run of a search. Raises Missing."""
        kept = self.load(world)["runs"].get(json.dumps([setting, seed], sort_keys=True))
        if kept is None:
            raise Missing(f"not begun yet: {world}, {setting}")
        return Run(kept["budget"], [Evaluation(*row) for row in kept["evaluations"]])

    def runs(
        self, world: str, tasks: list[tuple[Setting, int]], budget: int, base: int = 0
    ) -> list[Run]:
        """Those of several settings and seeds, side by side."""

        def one(task: tuple[Setting, int]) -> Run:
            return self.run(world, *task, budget, base)

        if self.pool is None:
            return list(map(one, tasks))
        with ThreadPoolExecutor(len(tasks)) as threads:
            return list(threads.map(one, tasks))


# The search, and the report.


def order(world: str, run: Run) -> tuple[float, float]:
    """Less is better: the cost to arrive, then how far on the way to the goal the run ends."""
    return run.restricted(), -min(way(world, run), 1)


def search(results: Results, world: str, name: str, n: int) -> Search:
    """Successive halving. Raises Missing."""
    settings = tried(name, n, world)
    among, works = settings, None
    for share, go_on in PASSES[n]:
        tasks = [(setting, TUNING_SEED) for setting in settings]
        runs = results.runs(world, tasks, round(share * WORLDS[world].budget))
        if works is None:  # in the first rung
            works = sum(way(world, run) >= WORKS for run in runs)
        ranked = sorted(range(len(runs)), key=lambda i: order(world, runs[i]))  # noqa: B023
        settings = [settings[i] for i in ranked[:go_on]]
    return Search(settings[0], len(among), works, at_edges(name, settings[0], among))


def way(world: str, run: Run) -> float:
    """How far a run came from the base (0) to the goal (1)."""
    base = run.evaluations[0].accuracy
    return (run.end.accuracy - base) / (WORLDS[world].goal - base)


def chosen(results: Results, world: str, name: str, n: int) -> Search:
    """What a search of n settings has found, or for a variant, what it is of with its change."""
    if name in METHODS:
        return search(results, world, name, n)
    of, change = VARIANTS[name]
    found = search(results, world, of, n)
    return found._replace(best=found.best | change, of=of)


def measure(results: Results, world: str, name: str, n: int) -> None:
    """What is reported, on this machine's pipeline.

    Where a search goes on from another pipeline's runs, these are replaced by longer ones of this,
    which may rank otherwise. So it is repeated until it finds the same again.
    """
    best, before = chosen(results, world, name, n).best, None
    while best != before:
        best, before = chosen(results, world, name, n).best, best
    tasks = [(best, seed) for seed in FRESH_SEEDS]
    results.runs(world, tasks, WORLDS[world].budget, results.base(world))


def first_rung(results: Results, world: str) -> list[Tried]:
    """All settings that a search has tried, as far as they are kept."""
    budget, found = round(WORLDS[world].budget / 8), []
    for name in METHODS:
        for setting in tried(name, max(PASSES), world):
            with contextlib.suppress(Missing):
                run = results.run(world, setting, TUNING_SEED, budget)
                found.append(Tried(name, setting, run))
    return found


def tried_afterwards(results: Results, world: str) -> list[tuple[str, Tried]]:
    """Beside the chosen setting, first: each for as long as it has run, but for the first rung."""
    found = []
    for (of, name), settings in AFTERWARDS.items():
        if of == world:
            with contextlib.suppress(Missing):
                best = chosen(results, world, name, max(PASSES)).best
                for setting in (best, *settings):
                    run = results.longest(world, setting, TUNING_SEED)
                    if run.budget > WORLDS[world].budget / 8:
                        found.append((world, Tried(name, setting, run)))
    return found


def reports(results: Results, world: str, base: int = 0) -> dict[str, Report]:
    """Of a pipeline, by method, after the largest search that is finished."""
    found = {}
    for name in dict.fromkeys(name for of, name in ORDER if of == world):
        for n in sorted(PASSES, reverse=True):
            try:
                about = chosen(results, world, name, n)
            except Missing:
                continue
            runs = []
            for seed in FRESH_SEEDS:
                with contextlib.suppress(Missing):
                    runs.append(results.run(world, about.best, seed, WORLDS[world].budget, base))
            if runs:
                found[name] = Report(about, runs)
                break
    return found


def unfinished(world: str, found: list[dict[str, Report]]) -> list[str]:
    """What is missing, of reports by pipeline: methods of which not all seeds are on one."""
    most = {
        name: max((len(of[name].runs) for of in found if name in of), default=0)
        for name in dict.fromkeys(name for of, name in ORDER if of == world)
    }
    return [
        f"the other seeds of {name} in {world}" if n else f"{name} in {world}"
        for name, n in most.items()
        if n < len(FRESH_SEEDS)
    ]


def side_by_side(results: Results, calls: list[Callable[[], Any]]) -> list[Any]:
    """What several calls return, as many at a time as there are cores.

    At the first that fails, and at Ctrl-C, nothing computes on.
    """
    with ThreadPoolExecutor(cli.cores()) as threads:
        try:
            found = [done.result() for done in [threads.submit(call) for call in calls]]
            results.pool.shutdown()
            return found
        except BaseException as end:
            threads.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()  # or it would take a kill for its run's end, and begin another
            results.pool.shutdown(cancel_futures=True)
            if isinstance(end, BrokenProcessPool):
                raise Fault(LOST) from None
            if isinstance(end, RewardError):  # a package that it needs is missing
                raise Fault(first_line(end)) from None
            raise


def full(results: Results, worlds: list[str]) -> None:
    """All passes: in each the searches, then the reports."""
    for world in worlds:
        results.load(world)  # raises before anything runs
    mine = [job for job in ORDER if job[0] in worlds]
    jobs = [(work, *job, n) for n in PASSES for work in (chosen, measure) for job in mine]
    side_by_side(results, [functools.partial(work, results, *job) for work, *job in jobs])


def check(results: Results, world: str) -> str:
    """What was chosen, or else the default, on another seed, beside what was reported."""
    budget, rows = WORLDS[world].budget // 8, []
    found = reports(Results(results.out, compute=False), world)
    best = {
        name: found[name].search.best if name in found else METHODS[name].fixed for name in MAIN
    }
    runs = results.runs(world, [(setting, CHECK_SEED) for setting in best.values()], budget)
    for name, run in zip(best, runs, strict=True):
        before = [kept.at(budget).accuracy for kept in found[name].runs] if name in found else []
        shown = f"{sum(before) / len(before):.3f}" if before else "-"
        base = run.evaluations[0].accuracy
        rows.append([name, f"{base:.3f}", f"{run.end.accuracy:.3f}", shown])
    return figures.table([f"in {world}", "base", f"now, at {budget:,} forwards", "reported"], rows)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    out = Path(args.out)
    plt.switch_backend("agg")
    cli.heed([signal.SIGINT], cli.interrupt)  # in the background, too
    if not (args.full or args.table):
        results = Results(out, keep=False)
        checks = [functools.partial(check, results, world) for world in args.worlds]
        print("\n\n".join(side_by_side(results, checks)))
        return
    try:
        if not args.table:
            full(Results(out), args.worlds)
    finally:
        kept = Results(out, compute=False)
        found, rungs, afterwards, missing = {}, {}, [], []
        for world in WORLDS:
            bases = len(kept.load(world)["pipelines"]) or 1
            of_world = [reports(kept, world, base) for base in range(bases)]
            found |= {(world, base): each for base, each in enumerate(of_world) if each}
            missing += unfinished(world, of_world)
            rungs[world] = first_rung(kept, world)
            afterwards += tried_afterwards(kept, world)
        text = page(out, found, rungs, afterwards, missing)
        cli.replace_file(out / "sd35.md", lambda path: path.write_text(text, "utf-8"))
        print(text)


if __name__ == "__main__":
    cli.run("compare_sd35.py", main)
