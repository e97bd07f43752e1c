"""DGPO and its family, compared: `python -m lab.compare`.

Every method of methods.py runs in one loop, with the same networks, rewards and optimizer. A search
of the same size chooses each method's hyperparameters, which then run on fresh seeds; only these
are reported. --full computes what lab/results lacks, and writes lab/results/README.md; stop it
whenever you like, and call it again to continue. Without flags, the chosen settings run again
on seeds that no search and no report has seen, beside what was reported: a minute or two.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean as mean
from types import ModuleType
from typing import Any, Literal

from lab import figures, protocol, sweeps, tiny, worlds
from lab.methods import METHODS, Setting
from lab.protocol import Computer, Results, Run, successes
from sd35.run import replace_file, run_script
from sd35.settings import UserError, parse

MOST = ("DGPO", "Bounded DGPO", "Flow-GRPO", "DiffusionNFT", "Diffusion-DPO")
NEW = ("Linear-DPO", "ThermoDPO", "CRD", "PAR", "V-GRPO")  # the methods of 2026
ALL = (*MOST, *NEW)
COMPARED = {"ring-2": (*ALL, "AWM", "GPO"), "blobs": ALL, "ring-32": ALL}
IN_2D = tuple(COMPARED)
MAIN = ("DGPO", "Bounded DGPO", "Flow-GRPO")  # the methods of the sweeps and of the check

BEST = ("ThermoDPO", "V-GRPO")  # of 2026, in 2-D
COMPARED |= {
    "words": (*MOST, *BEST),
    "words-2": (*MAIN, "Diffusion-DPO"),
    "words-3": ("DGPO", "Flow-GRPO", "Diffusion-DPO", *BEST),
    "shapes": MOST,
}
EXPERIMENTS = ("methods", *sweeps.SWEEPS)


@dataclass
class Arguments:
    """Compare DGPO with its family; see lab/results/README.md."""

    # Run the search, the reports and the sweeps, and write the page. Saved results are not computed
    # again. About six hours on two cores in 2-D. Without it, the chosen settings run again.
    full: bool = False
    table: bool = False  # With --full: only write the page, from the saved results.
    only: Literal[EXPERIMENTS] | None = None  # With --full: compute for one experiment alone.
    # Where to compute: ring-2, blobs, ring-32; or, on a tiny SD3.5, words, words-2, words-3 and
    # shapes, which need its pipeline. Default: ring-2 and blobs; with --full all 2-D worlds.
    worlds: list[str] = field(default_factory=list)
    # The methods to compute. Default: DGPO, Bounded DGPO and Flow-GRPO; with --full all.
    methods: list[str] = field(default_factory=list)
    seed: int = 20  # Without --full: the first of the three seeds.
    results: str = "lab/results"  # The folder of the saved results, the page and its figures.
    out: str = "lab/out"  # The folder of finished runs, so that a stopped search can continue.

    def __post_init__(self) -> None:
        for flag, known in (("worlds", COMPARED), ("methods", METHODS)):
            for name in getattr(self, flag):
                if name not in known:
                    raise UserError(f"--{flag}: there is no {name}, only {', '.join(known)}")
        if (self.table or self.only) and not self.full:
            raise UserError("--table and --only go with --full")


def searched_in(world: str) -> str:
    """The world whose search chose the settings: words, for all of its pretrainings."""
    return "words" if world.startswith("words") else world


def module_of(world: str) -> ModuleType:
    """The module that runs the world: worlds.py or tiny.py, with one interface."""
    return tiny if world in tiny.WORLDS else worlds


class Comparison:
    """The saved results, and how they are computed."""

    def __init__(self, results: Results, computer: Computer):
        self.results, self.computer = results, computer

    def jobs(self) -> list[tuple[str, str, str, str, Callable[[str, str], Any]]]:
        """All results to compute, as (experiment, world, kind, name, function), in order.

        function(world, name) computes the result, and may use the results before it.
        """
        jobs = []
        for world, names in COMPARED.items():
            for name in names:
                if searched_in(world) == world:
                    jobs.append(("methods", world, "searches", name, self.search))
                jobs.append(("methods", world, "reports", name, self.report))
        for name in sweeps.SWEEPS:
            jobs += [(name, world, "sweeps", name, self.sweep) for world in sweeps.WORLDS]
        return jobs

    def searched(self, world: str, name: str) -> dict[str, Any]:
        """The result of a search. Raises UserError if there is none."""
        searches = self.results.of(searched_in(world), "searches")
        if name not in searches:
            raise UserError(f"no search of {name} in {world} is finished; run --full first")
        return searches[name]

    def setting(self, world: str, name: str) -> Setting:
        """The setting that the search has chosen."""
        base = module_of(world).base_setting(world)
        return replace(base, method=name, **self.searched(world, name)["best"])

    def runs(
        self, title: str, world: str, settings: list[Setting], seeds: tuple, share: float, *how: Any
    ) -> list[list[Run]]:
        """Run each setting on each seed with a share of the world's budget: [setting][seed]."""
        module = module_of(world)
        budget = share * module.make(world).budget
        tasks = [(world, seed, setting, budget, *how) for setting in settings for seed in seeds]
        stored = self.computer(title, world + module.origin(world), module.run, tasks)
        runs = list(map(Run.load, stored))
        return [runs[i : i + len(seeds)] for i in range(0, len(runs), len(seeds))]

    def search(self, world: str, name: str) -> dict[str, Any]:
        module, method = module_of(world), METHODS[name]
        space = {key: module.SPACE.get(key, choices) for key, choices in method.space.items()}
        space = {key: choices for key, choices in space.items() if choices}
        base = replace(module.base_setting(world), method=name)
        default = replace(base, **{k: v for k, v in method.defaults.items() if k in space})
        # What was chosen before: in other worlds, and for plain DGPO.
        before = IN_2D[: IN_2D.index(world)] if world in IN_2D else ()
        others = [self.setting(other, name) for other in before if name in COMPARED[other]]
        if name == "Bounded DGPO":
            plain = self.setting(world, "DGPO")
            others.append(replace(plain, method=name, bound=2.0, ema=plain.ema or 0.9))
        runs_of, goal = partial(self.runs, f"search, {name}", world), module.make(world).goal
        return protocol.search(runs_of, base, default, space, module.PLAN, goal, others)

    def report(self, world: str, name: str) -> list[dict[str, Any]]:
        """A method at its chosen setting, on seeds that no search has seen."""
        settings, seeds = [self.setting(world, name)], module_of(world).SEEDS
        (runs,) = self.runs(f"report, {name}", world, settings, seeds, 1.0)
        return [run.stored() for run in runs]

    def sweep(self, world: str, name: str) -> dict[str, list[dict[str, Any]]]:
        """One thing changed at a time around the chosen settings, on four of the reports' seeds."""
        chosen = {name: self.setting(world, name) for name in MAIN}
        changes = sweeps.SWEEPS[name](chosen)
        runs = self.runs(name, world, list(changes.values()), (0, 1, 2, 3), *sweeps.HOW[name])
        stored = [[run.stored(curve=False) for run in each] for each in runs]
        return dict(zip(changes, stored, strict=True))

    # Tables of the saved results

    def reports(self, among: tuple[str, ...]) -> figures.Reports:
        reports = {}
        for world in among:
            for name, stored in self.results.of(world, "reports").items():
                reports.setdefault(world, {})[name] = list(map(Run.load, stored))
        return reports

    def tables(self) -> dict[str, str]:
        """The tables of page.md, by placeholder."""
        in_2d, on_tiny = self.reports(IN_2D), self.reports(tuple(tiny.WORLDS))
        missing = [
            f"{name} in {world} ({kind})"
            for _, world, kind, name, _ in self.jobs()
            if name not in self.results.of(world, kind)
        ]
        tables = {
            "missing": ", ".join(missing) or "nothing",
            "family": table(FAMILY_HEADER, self.family_rows(in_2d)),
            "methods": table(METHODS_HEADER, self.method_rows(in_2d)),
            "chosen": table(CHOSEN_HEADER, self.chosen_rows(in_2d)),
            "tiny": table(TINY_HEADER, self.tiny_rows(on_tiny)),
            "tiny chosen": table(CHOSEN_HEADER, self.chosen_rows(on_tiny)),
        }
        for name in sweeps.SWEEPS:
            rows = [
                [world, changed, *run_cells(world, list(map(Run.load, stored)))]
                for world in sweeps.WORLDS
                for changed, stored in self.results.of(world, "sweeps").get(name, {}).items()
            ]
            tables[name] = table(["world", "changed", *RUN_HEADER], rows)
        return tables

    def draw(self) -> None:
        folder = self.results.folder
        figures.plot_family(folder / "family.png")
        curves, on_tiny = [], []
        gates = {name for name, method in METHODS.items() if method.enters.startswith("gate")}
        for part in ("gates", "others"):
            for world, by_method in self.reports(IN_2D).items():
                runs = {n: r for n, r in by_method.items() if (n in gates) == (part == "gates")}
                curves += [(f"{world}, {part}", worlds.make(world).goal, runs)] if runs else []
        for world, by_method in self.reports(tuple(tiny.WORLDS)).items():
            on_tiny.append((world, tiny.make(world).goal, by_method))
        for name, plotted in (("curves", curves), ("tiny", on_tiny)):
            if plotted:
                figures.plot_curves(folder / f"{name}.png", plotted)

    def family_rows(self, reports: figures.Reports) -> list[list[str]]:
        """A row a method, by how the reward enters its gradient."""
        rows = []
        for name, method in METHODS.items():
            cells, works = [], []
            for world in IN_2D:
                runs = reports.get(world, {}).get(name)
                cells += run_cells(world, runs)[:2] if runs else ["", ""]
                works += [self.searched(world, name)["works"]] if runs else []
            share = "{} of {}".format(*map(sum, zip(*works, strict=True))) if works else ""
            rows.append([method.enters, name, *cells, share])
        return [row for row in rows if any(row[2:])]

    def method_rows(self, reports: figures.Reports) -> list[list[str]]:
        rows = []
        for world, name, runs, by_method in each(reports):
            search = self.searched(world, name)
            ratio = protocol.ratio(by_method["DGPO"], runs) if "DGPO" in by_method else None
            shown = "{:.1f} [{:.1f}, {:.1f}]".format(*ratio) if ratio else "-"
            works, spent = "{} of {}".format(*search["works"]), f"{search['spent'] / 1e6:.0f}"
            rows.append([world, name, *run_cells(world, runs), shown, works, spent])
        return rows

    def chosen_rows(self, reports: figures.Reports) -> list[list[str]]:
        rows = []
        for world, name, _, _ in each(reports):
            if searched_in(world) != world:
                continue
            search = self.searched(world, name)
            chosen = ", ".join(f"{k} {v}" for k, v in search["best"].items())
            notes = [", ".join(search[key]) or "-" for key in ("widened", "edges")]
            rows.append([world, name, chosen, *notes])
        return rows

    def tiny_rows(self, reports: figures.Reports) -> list[list[str]]:
        rows = []
        for world, name, runs, by_method in each(reports):
            goal, search = tiny.make(world).lower, self.searched(world, name)
            lower = {
                other: [replace(run, reached=goal.cost_to_reach(run)) for run in by_method[other]]
                for other in by_method
            }
            tried = [str(search["tried"]), "{} of {}".format(*search["works"])]
            cells = [*cost_cells(runs), tiny_ratio(name, by_method)]
            cells += [*cost_cells(lower[name]), tiny_ratio(name, lower)]
            cells.append(f"{mean(run.end.reward for run in runs):.3f}")
            base, end = runs[0].evaluations[0].quality, mean(run.end.quality for run in runs)
            rows.append([world, name, *tried, *cells, f"{base:.4f}, {end:.4f}"])
        return rows

    def check(self, world: str, names: list[str], seed: int) -> str:
        """The chosen settings on three other seeds, beside what was reported. Nothing is saved."""
        reports = self.reports((world,)).get(world, {})
        names = [name for name in reports if name in names]
        settings, seeds = [self.setting(world, name) for name in names], (seed, seed + 1, seed + 2)
        rows = []
        for name, now in zip(names, self.runs("", world, settings, seeds, 1.0), strict=True):
            for when, runs in (("reported", reports[name]), ("now", now)):
                cells = run_cells(world, runs) if world in IN_2D else cost_cells(runs)
                rows.append([world, name, when, *cells])
        return table(["world", "method", "runs", *RUN_HEADER], rows)


RUN_HEADER = ["success", "cost, thousands of passes", "quality", "spread", "progress"]
FAMILY_HEADER = ["how the reward enters", "method"]
FAMILY_HEADER += [f"{world}: {what}" for world in IN_2D for what in ("success", "cost")]
FAMILY_HEADER += ["random settings that succeed"]
METHODS_HEADER = ["world", "method", *RUN_HEADER, "cost, over DGPO's"]
METHODS_HEADER += ["random settings that succeed", "search, millions of passes"]
CHOSEN_HEADER = ["world", "method", "chosen, where it is not the default", "widened", "at an edge"]
TINY_HEADER = ["world", "method", "settings tried", "that work", *RUN_HEADER[:2], "ratio"]
TINY_HEADER += [f"lower goal: {what}" for what in ("success", "cost", "ratio")]
TINY_HEADER += ["accuracy at the end", "quality: base, end"]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else "Not measured yet."


def each(reports: figures.Reports) -> Iterator[tuple[str, str, list[Run], figures.ByMethod]]:
    for world, by_method in reports.items():
        yield from ((world, name, runs, by_method) for name, runs in by_method.items())


def run_cells(world: str, runs: list[Run]) -> list[str]:
    """Under RUN_HEADER. Quality, spread and progress are those at the end, of all runs."""
    middle, low, high = (cost / 1000 for cost in protocol.interval([run.cost for run in runs]))
    cost = f"{middle:.0f} [{low:.0f}, {high:.0f}]" if successes(runs) else "-"
    goal = module_of(world).make(world).goal
    ends = [(run.end.quality, run.end.spread, goal.progress_of(run)) for run in runs]
    means = map(mean, zip(*ends, strict=True))
    shown = (f"{value:.2f}" if abs(value) < 1e3 else "diverged" for value in means)
    return [f"{successes(runs)} of {len(runs)}", cost, *shown]


def cost_cells(runs: list[Run]) -> list[str]:
    """Of a few seeds: the mean cost, the least and the most; a lower bound if a run fails."""
    costs, mark = [run.cost / 1000 for run in runs], "" if successes(runs) == len(runs) else "> "
    shown = f"{mark}{mean(costs):.0f} ({min(costs):.0f} to {max(costs):.0f})"
    return [f"{successes(runs)} of {len(runs)}", shown]


def tiny_ratio(name: str, by_method: figures.ByMethod) -> str:
    """The cost over DGPO's, if that has been measured."""
    if name == "DGPO":
        return "1"
    if "DGPO" not in by_method:
        return "-"
    spacing = tiny.GRID[1] / tiny.GRID[0]
    return protocol.ratio_of_few(by_method["DGPO"], by_method[name], spacing)


def page(tables: dict[str, str]) -> str:
    """lab/results/README.md: the words of page.md, with the tables in their places."""
    text = (Path(__file__).parent / "page.md").read_text("utf-8")
    return re.sub("{{(.+?)}}", lambda place: tables[place[1]], text)


def main(argv: list[str] | None = None) -> None:
    args = parse(Arguments, argv)
    results = Results(Path(args.results))
    if not args.full:
        with tempfile.TemporaryDirectory() as folder:
            comparison = Comparison(results, Computer(Path(folder)))
            for world in args.worlds or ("ring-2", "blobs"):
                print(comparison.check(world, args.methods or list(MAIN), args.seed), flush=True)
        return

    comparison = Comparison(results, Computer(Path(args.out)))
    for experiment, world, kind, name, make in comparison.jobs():
        if name in results.of(world, kind):
            continue
        wanted = not args.table and args.only in (None, experiment)
        wanted &= world in (args.worlds or IN_2D)
        if wanted and (not args.methods or name in args.methods):
            origin = module_of(world).origin(world)
            results.check_origin(world, origin)
            results.put(world, kind, name, make(world, name), origin)
    comparison.draw()
    tables = comparison.tables()
    replace_file(results.folder / "README.md", lambda path: path.write_text(page(tables)))
    print("\n\n".join([tables[args.only]] if args.only else tables.values()))


if __name__ == "__main__":
    run_script(main)
