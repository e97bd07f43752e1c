"""The paper's comparisons in worlds small enough to measure: `python toy/compare.py`.

Every method of methods.py runs in one loop, on one network, with the same rewards and optimiser.
In each world a search of the same size finds each method's setting, which then runs on fresh seeds,
and only these are reported. Finished runs are kept in toy/results/<world>.json, so that a stopped
comparison continues; --full computes what is missing and writes toy/results/README.md. Without
flags, the settings that were chosen run again, on seeds that no search and no report has seen, and
are shown beside what was reported, and what was to be expected of so few seeds: a minute.
"""

# ruff: noqa: E402 (a wrong argument is answered before the libraries are loaded)

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])  # also for `python -m` and links
import cli

MOST = ("DGPO", "DGPO with dials", "Flow-GRPO", "DiffusionNFT", "Diffusion-DPO")
COMPARED = {"ring-2": (*MOST, "AWM", "GPO"), "blobs": MOST, "ring-32": MOST, "ring-128": MOST[:4]}
MAIN = ("DGPO", "DGPO with dials", "Flow-GRPO")  # what sweeps are around, and the check is of
EXPERIMENTS = ("family", "methods", "transfer", "artefacts", "dials", "extremes", "clip", "beta")
EXPERIMENTS += ("groups", "variants", "noise")
TITLE = "# The family, compared in small worlds"


@dataclasses.dataclass
class Arguments:
    """Compares DGPO with its family in small worlds; see toy/results/README.md."""

    full: bool = cli.option(
        False,
        "Search, report and sweep, in all worlds, and write the tables and figures: five hours on "
        "two cores if nothing is kept. Without it, what was chosen runs again on other seeds.",
    )
    only: str | None = cli.option(
        None, "With --full, one experiment and the searches it needs.", choices=EXPERIMENTS
    )
    table: bool = cli.option(
        False, "With --full, compute nothing: the tables and figures of the kept results."
    )
    worlds: list[str] = cli.option(
        ["ring-2", "blobs"], "Without --full, the worlds to run in.", choices=tuple(COMPARED)
    )
    methods: list[str] = cli.option(
        list(MAIN),
        "Without --full, the methods to run.",
        choices=COMPARED["ring-2"],
    )
    seed: int = cli.option(
        20, "Without --full, the first of the three seeds to run on.", at_least=0, at_most=2**31
    )
    out: str = cli.option(
        str(Path(__file__).parent / "results"),
        "The folder of the results, of the figures and of README.md.",
        shown="toy/results",
    )


def parse_args(argv: list[str] | None = None) -> Arguments:
    args = cli.parse(Arguments, sys.argv[1:] if argv is None else argv)
    args.worlds, args.methods = (list(dict.fromkeys(x)) for x in (args.worlds, args.methods))
    if not args.full and (args.only or args.table):
        raise cli.Fault("arguments --only and --table: go with --full")
    default = Arguments(out=args.out, full=args.full, only=args.only, table=args.table)
    if args.full and args != default:
        raise cli.Fault("arguments --worlds, --methods and --seed: go without --full")
    page = cli.make_folder(args.out, "out") / "README.md"
    if args.full and not args.only:
        cli.check_own(page, TITLE, "out")
    return args


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # no window, and whatever the environment asks for
    cli.run("compare.py", parse_args)

import figures
import matplotlib.pyplot as plt
import sweeps
from kept import Missing, Results, changed_fields
from methods import (
    AT_LEAST,
    BUDGET,
    BUDGETS,
    FOLLOWED,
    RIGHT,
    WAY,
    Run,
    Setting,
)
from search import AROUND, DRAWN, PENALTY, ROUNDS, RUNGS, Search, search

FRESH_SEEDS = tuple(range(10))
SWEEP_SEEDS = FRESH_SEEDS[:4]
LARGE, LIKE = ("ring-128", "ring-512"), "ring-32"  # larger worlds take this one's settings


class Section(NamedTuple):
    """Of toy/results/README.md."""

    title: str
    text: str
    picture: str | None = None


class Comparison:
    """The results, what was chosen from them, and the experiments, which give sections."""

    def __init__(self, results: Results, out: Path, draw: bool = True):
        self.results, self.out, self.draw = results, out, draw
        self.searches: dict[tuple[str, str], Search] = {}
        self.missing: list[str] = []

    def search(self, world: str, name: str) -> Search:
        if (world, name) not in self.searches:
            before = itertools.takewhile(lambda earlier: earlier != world, COMPARED)
            elsewhere = [self.search(earlier, name).best for earlier in before]
            if name == "DGPO with dials":
                plain = self.search(world, "DGPO").best
                elsewhere.append(dataclasses.replace(plain, bound=2.0, ema=plain.ema or 0.9))
            self.searches[world, name] = search(self.results.runs, world, name, elsewhere)
        return self.searches[world, name]

    def chosen(self, world: str, names: tuple[str, ...] = MAIN) -> dict[str, Setting]:
        return {name: self.search(world, name).best for name in names}

    def reported(self, world: str, name: str) -> list[Run]:
        """The runs of a method at its chosen setting, on the fresh seeds."""
        chosen = self.chosen(world, (name,))
        return self.changed(f"report, {name}", chosen, FRESH_SEEDS)[name]

    def measured(self, make: Callable[[], Any], what: str) -> Any:
        """What make() gives; None, and noted as missing, if it cannot without computing."""
        try:
            return make()
        except Missing:
            self.missing.append(what)
            return None

    def changed(
        self,
        title: str,
        changes: dict[str, Setting],
        seeds: tuple[int, ...],
        share: float = 1.0,
        followed: float = FOLLOWED,
    ) -> dict[str, list[Run]]:
        found = self.results.runs(title, list(changes.values()), seeds, share, followed)
        return dict(zip(changes, found, strict=True))

    def family(self) -> list[Section]:
        if self.draw:
            figures.plot_family(self.out / "family.png")
        return [Section("The family", FAMILY, "family.png")]

    def methods(self) -> list[Section]:
        """Figs. 1 and 3: what it costs to arrive, how many settings do, and what is kept."""
        found: dict[str, dict[str, list[Run]]] = {}
        for world, names in COMPARED.items():
            for name in names:
                make = functools.partial(self.reported, world, name)
                runs = self.measured(make, f"{name} in {world}")
                if runs:
                    found.setdefault(world, {})[name] = runs
        if not found:
            return []
        drawn = {
            world: {name: self.search(world, name).drawn for name in by_method}
            for world, by_method in found.items()
        }
        rows, chosen = [], []
        for world, by_method in found.items():
            for name, runs in by_method.items():
                about, first = self.search(world, name), drawn[world][name]
                arrive = sum(run.arrived is not None for run in first)
                ratio = figures.ratio_cell(by_method["DGPO"], runs) if "DGPO" in by_method else "-"
                row = [world, name, *figures.run_row(world, runs), ratio]
                rows.append([*row, f"{arrive} of {len(first)}", f"{about.spent / 1e6:.0f}"])
                fields = changed_fields(about.best)
                shown = [f"{k} {v:g}" for k, v in fields.items() if k not in ("world", "method")]
                notes = ["; ".join(about.widened), ", ".join(about.edges)]
                chosen.append([world, name, ", ".join(shown), *(note or "-" for note in notes)])
        if self.draw:
            figures.plot_speed(self.out / "speed.png", found)
            figures.plot_cost(self.out / "cost.png", found)
            figures.plot_search(self.out / "search.png", drawn)
        header = ["world", "method", *figures.RUN_HEADER, "cost, over DGPO"]
        header += ["drawn settings that arrive", "search, millions of forwards"]
        wide = ["world", "method", "chosen, where it is not the default", "widened", "at an edge"]
        return [
            Section("The methods, each at its best", figures.table(header, rows), "cost.png"),
            Section("On the way", ON_THE_WAY, "speed.png"),
            Section("What the searches tried", SEARCHED, "search.png"),
            Section("What they chose", figures.table(wide, chosen)),
        ]

    def transfer(self) -> list[Section]:
        rows = []
        for world in LARGE:
            chosen = self.chosen(LIKE).items()
            changes = {name: dataclasses.replace(one, world=world) for name, one in chosen}
            found = self.changed("transfer", changes, SWEEP_SEEDS)
            rows += [[world, name, *figures.run_row(world, runs)] for name, runs in found.items()]
        text = figures.table(["world", "method", *figures.RUN_HEADER], rows)
        return [Section(f"In more dimensions, at the settings chosen in {LIKE}", text)]

    def changes_of(self, name: str, world: str) -> dict[str, list[Run]]:
        changes, _, _, share, followed = sweeps.SWEEPS[name]
        return self.changed(name, changes(self.chosen(world)), SWEEP_SEEDS, share, followed)

    def sweep(self, name: str) -> list[Section]:
        _, worlds, text, _, _ = sweeps.SWEEPS[name]
        found = {}
        for world in worlds:
            make = functools.partial(self.changes_of, name, world)
            of_world = self.measured(make, f"the sweep {name} in {world}")
            found |= {world: of_world} if of_world else {}
        if not found:
            return []
        rows = [
            [world, change, *figures.run_row(world, runs)]
            for world, by_name in found.items()
            for change, runs in by_name.items()
        ]
        if self.draw and name == "extremes":
            figures.plot_extremes(self.out / f"{name}.png", found, sweeps.CURVES)
        elif self.draw:
            figures.plot_sweep(self.out / f"{name}.png", found)
        shown = figures.table(["world", "changed", *figures.RUN_HEADER], rows)
        return [Section(f"Sweep: {name}", f"{text}\n\n{shown}", f"{name}.png")]

    def artefacts(self) -> list[Section]:
        rows = []
        for world in ("ring-2", "ring-32", "blobs"):
            (found,) = self.results.run("artefacts", world, [(sweeps.artefacts, 0, world)])
            each = found["rollouts"]
            rows.append([world, *(f"{one['right']:.2f}, {one['distance']:.2f}" for one in each)])
        header = ["world", *(f"{steps} steps: right, distance" for steps in sweeps.STEPS)]
        return [Section("The reference's rollouts", figures.table(header, rows))]

    def noise(self) -> list[Section]:
        """Variance ratios over G, t and world, and each gradient's signal-to-noise ratio."""
        found, rows, signals = {}, [], []
        for world in ("ring-2", "blobs"):
            tasks = [(sweeps.sharing, 0, world, G) for G in sweeps.GROUPS]
            measured = self.results.run("noise", world, tasks)
            found[world] = dict(zip(sweeps.GROUPS, measured, strict=True))
            for G, cell in found[world].items():
                columns = [f"{one['gap']:.2f}, {one['gradient']:.2f}" for one in cell["ratios"]]
                rows.append([world, str(G), *columns])
            settings = sweeps.signals(world)
            for iterations in (0, 100):
                tasks = [(sweeps.signal, 0, setting, iterations) for setting in settings.values()]
                cells = self.results.run("signal", world, tasks)
                columns = [f"{cell['signal']:.3g}" for cell in cells]
                signals.append([world, str(iterations), *columns])
        if self.draw:
            figures.plot_noise(self.out / "noise.png", found)
        times = [f"t = {t}: gap, gradient" for t in sweeps.TIMES]
        header = ["world", "iterations of DGPO", *settings]
        text = f"{SHARING}\n\n{figures.table(['world', 'G', *times], rows)}\n\n{SIGNAL}\n\n"
        return [Section("Noise", text + figures.table(header, signals), "noise.png")]

    def sections(self, name: str) -> list[Section]:
        """An experiment by its name. What is missing where nothing is computed is noted."""
        make = (lambda: self.sweep(name)) if name in sweeps.SWEEPS else getattr(self, name)
        return self.measured(make, f"the experiment {name}") or []

    def check(self, names: list[str], worlds: list[str], seeds: tuple[int, ...]) -> str:
        """The chosen settings on other seeds, beside what was reported. Nothing is kept."""
        rows, again = [], Results(self.results.folder, keep=False)
        for world in worlds:
            here = tuple(
                name
                for name in COMPARED[world]
                if name in names
                and self.measured(functools.partial(self.reported, world, name), "")
            )
            if not here:
                raise Missing(
                    f"none of these methods was searched for in {world}; run --full first"
                )
            found = again.runs("check", list(self.chosen(world, here).values()), seeds)
            for name, runs in zip(here, found, strict=True):
                both = self.reported(world, name), runs
                before, now = (figures.run_row(world, each)[:3] for each in both)
                rows.append([world, name, *before, figures.foreseen(both[0], len(seeds)), *now])
        again.pool.shutdown()
        what = ["arrived", "cost, thousands", "right"]
        header = [f"{each}, reported" for each in what]
        header += [f"to be expected of {len(seeds)} seeds", *(f"{each}, now" for each in what)]
        return figures.table(["world", "method", *header], rows)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    out = Path(args.out)
    plt.switch_backend("agg")
    comparison = Comparison(Results(out, compute=args.full and not args.table), out)
    if not args.full:
        print(
            comparison.check(args.methods, args.worlds, (args.seed, args.seed + 1, args.seed + 2))
        )
        return
    sections = []
    for name in [args.only] if args.only else EXPERIMENTS:
        found = comparison.sections(name)
        for title, text, _ in found:
            print(f"\n## {title}\n\n{text}", flush=True)
        sections += found
    comparison.results.pool.shutdown()
    if not args.only:
        text = page(sections, comparison.missing)
        cli.replace_file(out / "README.md", lambda path: path.write_text(text, "utf-8"))


# The words of toy/results/README.md.

INTRODUCTION = f"""{TITLE}

Written by `python toy/compare.py --full --table` from the runs kept beside this file; do not edit.

- **Worlds** ([worlds.py](../worlds.py)): ring-D is toy/flow2d.py's ring of eight Gaussians in a
  plane of R^D; blobs are pictures of 8 x 8 pixels with a reward that can be hacked, the brightness
  of a quadrant.
- **Methods** ([methods.py](../methods.py)): all train one network in one loop, on groups of 24.
  "DGPO with dials" is DGPO with what is beyond its paper: it trains on the `samples` = m extremes
  of a group, and its bad samples are bounded. Learning rate, KL, theta_old, average, prompts, steps
  and updates are open to all, the extremes to all but DGPO and Diffusion-DPO, a clip to Flow-GRPO.
- **Cost** is counted in forwards of one sample; a backward counts two.
- **Arrived**: a run is there with {WAY:.0%} of the way from the base reward to the best data's and
  {RIGHT:.0%} of its samples right, which an independent judge says. It has arrived at the first
  cost from which on it is there in nine of ten evaluations, and in the last. It is followed to
  {FOLLOWED:g} times that cost, and at least to {AT_LEAST:.0%} of the budget, unless the budget of
  {BUDGET:,} forwards ({BUDGETS["ring-128"]:,} in ring-128 and ring-512) ends before; then it must
  have been there for a sixth of the run.
- **Cost to arrive** is the restricted mean: the mean over seeds, a run that does not arrive
  counting as the whole budget. In brackets: its 95 % interval, an expanded percentile
  bootstrap over seeds (Hesterberg, arXiv:1411.5279), which for four seeds is their range.
- **Search** ([search.py](../search.py)), alike for every method: the default of this repository's
  scripts, the same with cheaper steps, what an earlier version of this comparison chose, what was
  chosen in the worlds before (for DGPO with dials, also what plain DGPO chose in this world, with a
  bound of 2), {DRAWN} settings drawn at random and {AROUND} around the best in each
  of {ROUNDS - 1} more rounds, halved by the mean cost, a failure counting as {PENALTY} budgets. The
  last rung has {RUNGS[-1][0]} seeds and the budget of a report. A range in whose outer tenth the
  best lies is widened and searched again, as the table says.
- **Report**: seeds 0 to 9, which no search has seen. Sweeps: seeds 0 to 3, and half of the budget,
  which a failure then counts as; that of beta has all of it.

The same family in the trainer itself, on SD3.5's own classes: [sd35.md](sd35.md)."""

FAMILY = """What becomes of one sample as v moves away from v_old, by the functions that train.
With e = v_old - v* and d = v - v_old, the loss is, up to a constant,

| method | loss of a sample with advantage A | bad sample, A < 0 |
| --- | --- | --- |
| AWM | 2 A e.d + A d^2 | concave, falls without end |
| DGPO | the same, in one gate for its group | falls by at most 2 log(2) / beta, then is let go |
| Diffusion-DPO, GPO | the same, in a gate for each pair | the same |
| DGPO, bounded by 2 | 2 A e.d + \\|A\\| d^2, in DGPO's gate | convex, its target is 2 v_old - v* |
| DiffusionNFT | 2 A e.d + 5 b d^2, divided by an error | convex, its target is finite |
| Flow-GRPO | -A p_theta / p_old of a sampler's step | falls to 0, then is let go |"""

ON_THE_WAY = "The median over seeds; shaded are the quartiles. Dashed: where a run counts as there."

SEARCHED = (
    "All settings that were drawn at random, after two fifths of the budget on one seed. Up and to "
    "the right of the dashed lines a run is there."
)

NOT_MEASURED = "`python toy/compare.py --full` goes on with:"

SHARING = (
    "Variance over eps with one eps for a group, over that with an eps for each sample: of the gap "
    "and of its gradient, for fixed samples of a model after 30 iterations. Above 1, sharing hurts."
)

SIGNAL = (
    "Signal-to-noise ratio of the gradient of an iteration, for every million forwards: the square "
    "of its mean over its variance, without bias from 64 draws: where there is hardly a signal, it "
    "may come out below 0."
)


def page(sections: list[Section], missing: list[str]) -> str:
    """toy/results/README.md."""
    parts = [INTRODUCTION]
    for title, text, picture in sections:
        parts.append(f"## {title}")
        parts += [f"![{title}]({picture})"] if picture else []
        parts.append(text)
    if missing:
        parts += ["## Not measured yet", f"{NOT_MEASURED} {', '.join(missing)}."]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    cli.run("compare.py", main)
