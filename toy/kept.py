"""Finished runs of compare.py, kept in one JSON file a world, so that nothing is computed twice."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_sharer
from pathlib import Path

from methods import FOLLOWED, Evaluation, Run, Setting, budget_in, pretrained, run_setting
from search import TUNING_SEEDS
from sweeps import STEPS, TIMES
from tqdm import tqdm

import cli

LOST = (
    "a process that computed a run was ended, perhaps as memory was full; what is finished is "
    "kept: call again to go on"
)
VERSION = 4  # of what a run means; results of another version are computed again


def end_with_parent() -> None:
    """Leaves Ctrl-C and a kill to the process that has started this one, and ends when it does."""
    for number in (signal.SIGINT, *cli.ends()):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), cli.leave(1)), daemon=True).start()


class Missing(cli.Fault):
    """Runs that are not kept, where nothing is to be computed."""


class Results:
    """Finished runs, by world and key. A world's file is written anew after every run."""

    def __init__(self, folder: Path, compute: bool = True, keep: bool = True):
        self.folder, self.compute, self.keep = folder, compute, keep
        self.kept: dict[str, dict[str, dict]] = {}
        self.references: dict[tuple[str, int], Future] = {}
        self.pool = ProcessPoolExecutor(cli.cores(), initializer=end_with_parent)

    def load(self, world: str) -> dict[str, dict]:
        path = self.folder / f"{world}.json"
        if not path.exists():
            return {}
        try:
            stored = json.loads(path.read_text("utf-8") if path.is_file() else "")
            if stored["version"] == VERSION:
                for key, found in stored["runs"].items():
                    CHECKS.get(key.removeprefix('["').split('"')[0], dict)(found)
                return stored["runs"]
            reason = f"of version {str(stored['version'])[:20]!r}, not {VERSION}"
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            reason = "damaged"
        if not (self.compute and self.keep):
            raise cli.Fault(f"{path} is {reason}; run --full to compute it again")
        aside = path.with_suffix(f".{time.time_ns()}.json")
        os.replace(path, aside)
        print(f"{path.name} is {reason}: moved to {aside.name}, and computed again")
        return {}

    def add(self, world: str, key: str, found: dict) -> None:
        if not self.keep:
            self.kept[world][key] = found
            return
        # Another comparison may have written to the file since it was read.
        self.kept[world] = {**self.load(world), **self.kept[world], key: found}
        text = json.dumps({"version": VERSION, "runs": self.kept[world]}, separators=(",", ":"))
        cli.replace_file(self.folder / f"{world}.json", lambda path: path.write_text(text, "utf-8"))

    def run(self, title: str, world: str, tasks: list[tuple]) -> list[dict]:
        """What the tasks (function, seed, ...) return. What is missing is computed, a core a task.

        A task is called as function(reference, seed, ...), and returns a dataclass or a dict.
        """
        if world not in self.kept:
            self.kept[world] = self.load(world)
        keys = [json.dumps([task[0].__name__, *task[1:]], default=changed_fields) for task in tasks]
        missing = {k: t for k, t in zip(keys, tasks, strict=True) if k not in self.kept[world]}
        if missing and not self.compute:
            raise Missing(f"not finished yet: {len(missing)} runs of {title} in {world}")
        for seed in sorted({seed for _, seed, *_ in missing.values()}):
            if (world, seed) not in self.references:
                self.references[world, seed] = self.pool.submit(pretrained, world, seed)
        progress = tqdm(desc=f"{world}: {title}", total=len(missing), disable=not missing)
        try:
            futures = {}
            for key, (function, seed, *rest) in missing.items():
                reference = self.references[world, seed].result()
                futures[self.pool.submit(function, reference, seed, *rest)] = key
            for future in as_completed(futures):
                key, found = futures[future], future.result()
                if isinstance(found, Run):
                    if missing[key][1] in TUNING_SEEDS:  # a search looks at the ends alone
                        found.evaluations = [found.evaluations[0], found.end]
                    found = dataclasses.asdict(found)
                self.add(world, key, found)
                progress.update()
        except BaseException as error:
            progress.close()
            resource_sharer.stop(timeout=5)  # or it would complain of those that it gives tensors
            for process in multiprocessing.active_children():
                process.kill()  # or what is computing would be waited for
            self.pool.shutdown(cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise cli.Fault(LOST) from None
            raise
        progress.close()
        return [self.kept[world][key] for key in keys]

    def runs(
        self,
        title: str,
        settings: list[Setting],
        seeds: tuple[int, ...],
        share: float = 1.0,
        followed: float = FOLLOWED,
    ) -> list[list[Run]]:
        """The runs of settings of one world, by setting and seed, for a share of its budget."""
        budget = share * budget_in(settings[0].world)
        how = (budget,) if followed == FOLLOWED else (budget, followed)
        tasks = [(run_setting, seed, setting, *how) for setting in settings for seed in seeds]
        found = [as_run(kept) for kept in self.run(title, settings[0].world, tasks)]
        return [found[i : i + len(seeds)] for i in range(0, len(found), len(seeds))]


def as_run(kept: dict) -> Run:
    """A run as it was before it was kept. Raises TypeError, or a LookupError, if it is none."""
    rows = [Evaluation(*row) for row in kept["evaluations"]]
    run = Run(**kept | {"evaluations": rows})
    sum(map(sum, rows), rows[0].cost)  # numbers all; a measurement that blew up may be NaN
    if not math.isfinite(run.restricted() + run.budget + run.seconds):
        raise ValueError("a cost is not finite")
    return run


def sum_of(found: dict, name: str, rows: int, fields: tuple[str, ...]) -> float:
    """Raises TypeError, or a LookupError, where a measurement lacks one of its numbers."""
    return sum(found[name][row][field] for row in range(rows) for field in fields)


CHECKS: dict[str, Callable[[dict], object]] = {  # by task, what fails where a result is none
    "run_setting": as_run,
    "artefacts": lambda found: sum_of(found, "rollouts", len(STEPS), ("right", "distance")),
    "sharing": lambda found: sum_of(found, "ratios", len(TIMES), ("gap", "gradient")),
    "signal": lambda found: math.isfinite(found["signal"]),
}


def changed_fields(setting: Setting) -> dict:
    """What is not at its default: the name of a setting in the kept results."""
    defaults = dataclasses.asdict(Setting("", ""))
    return {k: v for k, v in dataclasses.asdict(setting).items() if v != defaults[k]}
