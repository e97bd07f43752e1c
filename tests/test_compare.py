"""The comparison is fair, says what it found, and loses nothing that is finished."""

import dataclasses
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import compare
import figures
import flow2d
import kept
import methods
import pytest
import search
import sweeps
from methods import BUDGET, Evaluation, Run, Setting

import cli

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "toy" / "results"


def evaluation(cost, reward, right=0.9, spread=1.0, distance=1.0):
    return Evaluation(cost, reward, right, spread, distance)


def run(arrived, right=0.9):
    end = evaluation(BUDGET, -0.1, right)
    return Run(arrived, BUDGET, 1.0, [evaluation(0, -8.0), end])


# Runs.


def test_arrival_needs_reward_and_quality_and_staying():
    start, hacked = evaluation(0, -8.0), evaluation(10, 0.0, right=0.1)
    there, lost, late = evaluation(20, -0.5), evaluation(30, -5.0), evaluation(40, -0.4)

    def arrival(*evaluations):
        return methods.arrival("ring-2", list(evaluations))

    assert arrival(start, hacked, there, late) == 20
    assert arrival(start, hacked, there) is None  # not for long
    assert arrival(start, there, hacked) is None
    assert arrival(start, there, lost) is None
    assert arrival(start, there, lost, late, late._replace(cost=50)) == 40
    assert arrival(start, there, *[late] * 8, lost, late) == 20


def scripted(monkeypatch, rewards, cost=100_000):
    """Makes methods.run_setting meet these rewards, one every `cost` forwards."""
    seen = iter(rewards)
    monkeypatch.setattr(methods, "learn", lambda *_: (cost * (i + 1) for i in range(10_000)))
    world = dataclasses.replace(
        methods.worlds.make("ring-2"), reward=lambda c, x: c * 0.0 + next(seen)
    )
    right = world.judge
    judge = lambda c, x: (right(c, x)[0] | True, *right(c, x)[1:])  # noqa: E731
    world = dataclasses.replace(world, judge=judge)
    monkeypatch.setattr(methods.worlds, "make", lambda name: world)
    reference = flow2d.VelocityNet(), methods.torch.Generator().get_state()
    return methods.run_setting(reference, 0, Setting("ring-2", "DGPO"), BUDGET)


def test_a_run_is_followed_after_it_has_arrived(monkeypatch):
    found = scripted(monkeypatch, [-8.0, -4.0, *[0.0] * 100])
    assert found.arrived == 200_000
    assert found.end.cost == methods.FOLLOWED * 200_000


def test_a_run_that_leaves_goes_on_to_the_end_of_the_budget(monkeypatch):
    found = scripted(monkeypatch, [-8.0, 0.0, 0.0, *[-8.0] * 100])
    assert found.arrived is None and found.end.cost == BUDGET
    assert found.restricted() == BUDGET


def test_a_run_may_come_back_from_afar_but_not_from_nowhere(monkeypatch):
    back = scripted(monkeypatch, [-8.0, -1000.0, *[0.0] * 100])
    assert back.arrived == 200_000
    gone = scripted(monkeypatch, [-8.0, *[0.0] * 3, float("nan"), *[0.0] * 100])
    assert gone.arrived is None and gone.end.cost == 300_000


# The search.


def test_a_dials_parts_are_met_once_and_alike_for_all():
    one = search.drawn("DGPO", "ring-2", search.METHODS["DGPO"].dials, 10)
    among = search.DENOISING["learning_rate"]
    shares = sorted(among.share(setting.learning_rate) for setting in one)
    assert [int(10 * share) for share in shares] == list(range(10))
    other = search.drawn("Flow-GRPO", "blobs", search.METHODS["Flow-GRPO"].dials, 10)
    assert [s.learning_rate for s in one] == [s.learning_rate for s in other]
    assert {s.method for s in other} == {"Flow-GRPO"}


def test_ranges_and_their_edges():
    rate, t_min = search.Range(1e-3, 1e-1), search.Range(0, 0.6)
    assert rate.at(0.5) == pytest.approx(1e-2) and t_min.at(0.5) == 0.3
    assert [rate.edge(x) for x in (1.5e-3, 2e-3, 5e-2, 7e-2)] == ["low", None, None, "high"]
    assert [t_min.edge(x) for x in (0.0, 0.5, 0.55)] == [None, None, "high"]
    assert rate.widened("low") == search.Range(1e-3 / 3, 1e-1)
    assert rate.widened("high").high == pytest.approx(0.3) and t_min.widened("high").high == 0.8


def searched(cost_of, name="DGPO"):
    """A search in a made-up world, where cost_of(setting, seed) arrives, or None."""
    asked = []

    def runs_of(title, settings, seeds, share):
        asked.append((settings, seeds, share))
        return [[run(cost_of(setting, seed)) for seed in seeds] for setting in settings]

    return search.search(runs_of, "ring-2", name, []), asked


def test_a_search_prefers_what_stays_to_what_is_fast():
    """Half the runs of a fast setting fail, on seeds that only the last rung sees."""
    fast = search.drawn("DGPO", "ring-2", search.METHODS["DGPO"].dials, search.DRAWN)[3]

    def cost(setting, seed):
        if setting == fast:
            return 100_000 if seed < 103 else None
        return 500_000 + 1e5 * abs(setting.beta - 3)

    found, asked = searched(cost)
    assert found.best != fast
    assert asked[2][1:] == (search.TUNING_SEEDS, 1.0) and len(search.TUNING_SEEDS) >= 6
    assert fast in asked[2][0] and asked[0][0][0] in asked[2][0]


def test_the_best_of_a_round_is_not_lost_to_luck_on_two_seeds(monkeypatch):
    """What is drawn around it does better on the first two seeds, and worse on the others."""
    for name, value in {"DRAWN": 1, "CHEAP": {}, "EARLIER": {}}.items():
        monkeypatch.setattr(search, name, value)
    drawn = search.drawn("DGPO", "ring-2", search.METHODS["DGPO"].dials, 1)[0]

    def cost(setting, seed):
        if setting == Setting("ring-2", "DGPO"):
            return 500_000
        return 90_000 if setting == drawn else 80_000 if seed < 102 else 300_000

    assert searched(cost)[0].best == drawn


def test_a_best_at_an_edge_widens_the_range_until_it_is_not(monkeypatch):
    """The best learning rate is three times what the range holds."""
    goal = 3 * search.COMMON["learning_rate"].high

    def cost(setting, seed):
        return 100_000 * (1 + abs(methods.math.log(setting.learning_rate / goal)))

    found, _ = searched(cost)
    assert any(text.startswith("learning_rate to ") for text in found.widened)
    assert found.best.learning_rate > search.COMMON["learning_rate"].high
    # With no round left to look further, it ends at an edge, and says so.
    monkeypatch.setattr(search, "MOST_ROUNDS", 1)
    assert searched(cost)[0].edges == ["learning_rate"]


def test_every_method_is_searched_as_hard(monkeypatch):
    """Where all arrive and nothing is at an edge; but for what an earlier version chose."""
    monkeypatch.setattr(search, "EARLIER", {})
    monkeypatch.setattr(search, "at_edges", lambda *_: {})
    for name in search.METHODS:
        found, asked = searched(lambda s, seed: 1e6 / (1 + s.beta), name)
        assert len(asked) == 3 * search.ROUNDS and len(asked[0][0]) == 2 + search.DRAWN
        assert len(found.tried) == 2 + search.DRAWN + search.AROUND * (search.ROUNDS - 1)


# The numbers that are shown.


def test_the_interval_covers_the_mean_as_often_as_it_says():
    """Of skewed values, too, where the plain percentile bootstrap covers less than nine in ten."""
    rng = random.Random(0)

    def covered(n, draw, mean):
        found = [figures.interval([draw() for _ in range(n)]) for _ in range(400)]
        return sum(low <= mean <= high for _, low, high in found) / len(found)

    assert 0.92 < covered(10, lambda: rng.gauss(3, 1), 3) < 0.98
    assert 0.90 < covered(10, lambda: rng.expovariate(1), 1)
    middle, low, high = figures.interval([1.0, 2.0, 3.0, 5.0])
    assert middle == 2.75 and 1 <= low < 1.3 and 4.4 < high <= 5  # about their range


def test_other_seeds_are_where_they_are_foreseen():
    rng, inside = random.Random(0), 0
    for _ in range(400):
        ten, three = ([rng.gauss(300, 60) for _ in range(n)] for n in (10, 3))
        low, high = map(float, figures.foreseen([run(cost * 1e3) for cost in ten], 3).split(" to "))
        inside += low <= sum(three) / 3 <= high
    assert 0.9 < inside / 400 < 0.98


def test_the_cost_counts_failures():
    row = figures.run_row("ring-2", [run(100_000), run(200_000), run(None)])
    assert row[0:2] == ["2 of 3", "600 [100, 1500]"]
    assert figures.run_row("ring-2", [run(None)] * 3)[1] == "-"


def test_a_ratio_is_shown_only_where_it_is_clear():
    cheap, dear = [run(100_000), run(110_000)] * 5, [run(300_000), run(330_000)] * 5
    assert figures.ratio_cell(cheap, dear).startswith("3.0 [2.")
    assert figures.ratio_cell(cheap, [*dear[:7], *[run(None)] * 3]) == "-"  # too few arrive
    scattered = [run(30_000)] * 8 + [run(1_400_000)] * 2
    assert figures.ratio_cell(scattered, dear) == "-"  # too wide


def test_total_variance_is_the_sum_over_coordinates():
    torch = methods.torch
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2000, 3, generator=generator) * torch.tensor([1.0, 2.0, 3.0])
    assert sweeps.total_variance(list(draws)) == pytest.approx(14, rel=0.1)


def test_a_sweep_changes_one_thing():
    chosen = {name: Setting("ring-2", m.name, **m.fixed) for name, m in search.METHODS.items()}
    for sweep in sweeps.SWEEPS.values():
        for name, setting in sweep.changes(chosen).items():
            fields = kept.changed_fields(setting)
            changed = [
                len(fields.items() ^ kept.changed_fields(c).items()) for c in chosen.values()
            ]
            assert min(changed) <= 4, name  # of both, and of what goes with it


# What is kept.


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder, and --full in it with one method, few settings and short runs."""
    monkeypatch.setattr(compare, "COMPARED", {"ring-2": ("DGPO", "DGPO with dials")})
    monkeypatch.setattr(compare, "EXPERIMENTS", ("methods",))
    monkeypatch.setattr(compare, "FRESH_SEEDS", (0, 1))
    monkeypatch.setattr(methods, "BUDGET", 20_000)
    monkeypatch.setattr(flow2d, "PRETRAINING_STEPS", 30)
    for name, value in {
        "DRAWN": 1,
        "AROUND": 1,
        "ROUNDS": 1,
        "MOST_ROUNDS": 1,
        "RUNGS": ((1, 0.5, 1), (2, 1.0, 1)),
    }.items():
        monkeypatch.setattr(search, name, value)
    return tmp_path


def test_a_comparison_continues_where_it_was_stopped(small, capsys, monkeypatch):
    command = ["--full", "--out", str(small)]
    compare.main(command)
    written = (small / "README.md").read_text()
    assert "| ring-2 | DGPO with dials | " in written and written.startswith("# The family")
    assert all((small / f"{name}.png").stat().st_size > 10_000 for name in ("speed", "cost"))

    stored = json.loads((small / "ring-2.json").read_text())
    lost = list(stored["runs"])[-1]
    del stored["runs"][lost]
    (small / "ring-2.json").write_text(json.dumps(stored))
    compare.main([*command, "--table"])
    assert "goes on with: DGPO with dials in ring-2." in (small / "README.md").read_text()
    check = ["--out", str(small), "--worlds", "ring-2", "--methods", "DGPO with dials"]
    with pytest.raises(cli.Fault, match="^none of these methods was searched for in ring-2"):
        compare.main(check)

    ran = []
    original = kept.Results.add
    monkeypatch.setattr(
        kept.Results,
        "add",
        lambda self, world, key, found: ran.append(key) or original(self, world, key, found),
    )
    compare.main(command)
    assert ran == [lost]
    assert (small / "README.md").read_text() == written

    # Without --full, the same settings on other seeds, and nothing is kept.
    before = (small / "ring-2.json").read_text()
    capsys.readouterr()
    compare.main(["--out", str(small), "--worlds", "ring-2", "--seed", "5"])
    assert capsys.readouterr().out.count("of 3 |") == 2
    assert (small / "ring-2.json").read_text() == before


RUN = {"arrived": None, "budget": 9.0, "seconds": 1.0, "evaluations": [[0, 0.5, 0.5, 0.5, 0.5]]}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"version": 4, "ru', "damaged"),
        ('{"version": 2, "cells": {}}', "of version '2', not 4"),
        ('{"version": [4], "runs": {}}', r"of version '\[4\]', not 4"),
        ('{"version": 4, "runs": []}', "damaged"),
        ('{"version": 4, "runs": {"a": 7}}', "damaged"),
        *[
            (json.dumps({"version": 4, "runs": {'["run_setting"]': RUN | changed}}), "damaged")
            for changed in (
                {"evaluations": []},
                {"evaluations": [[0, "0.5", 0.5, 0.5, 0.5]]},
                {"evaluations": [[0, 0.5]]},
                {"seconds": "long"},
                {"seconds": math.inf},
                {"colour": "red"},
            )
        ],
        *[
            (json.dumps({"version": 4, "runs": {f'["{task}", 0]': found}}), "damaged")
            for task, found in (
                ("artefacts", {"rollouts": []}),
                ("artefacts", {"rollouts": [{"right": 1, "distance": "0.5"}] * 9}),
                ("sharing", {"found": 1}),
                ("signal", {"signal": None}),
            )
        ],
    ],
)
def test_a_damaged_or_old_file_is_moved_aside(text, reason, tmp_path, capsys):
    (tmp_path / "ring-2.json").write_text(text)
    with pytest.raises(cli.Fault, match=f"ring-2.json is {reason}; run --full to compute"):
        kept.Results(tmp_path, compute=False).load("ring-2")
    assert kept.Results(tmp_path).load("ring-2") == {}
    assert re.search(f"ring-2.json is {reason}: moved to ", capsys.readouterr().out)
    (aside,) = tmp_path.iterdir()
    assert aside.read_text() == text and aside.name != "ring-2.json"


def test_a_readme_that_is_not_its_own_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(cli.Fault, match="README.md is another's; give a new folder"):
        compare.parse_args(["--full", "--table", "--out", str(tmp_path)])


def unfit(world, seed):
    """In place of a pretrained network."""


def dies(reference, seed):
    os.kill(os.getpid(), signal.SIGKILL)


def waits(reference, seed):
    time.sleep(600)


def test_a_worker_that_dies_is_one_line_and_no_worker_is_waited_for(tmp_path, monkeypatch):
    results = kept.Results(tmp_path)
    monkeypatch.setattr(kept, "pretrained", unfit)
    with pytest.raises(cli.Fault, match="was ended, perhaps as memory was full; .*call again"):
        results.run("a test", "ring-2", [(dies, 0), (waits, 0)])


def interrupted(reference, seed):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(os.getpid(), number)
    return {"pid": os.getpid()}


def test_what_ends_a_script_is_the_parents_alone(tmp_path):
    """A terminal sends it to all: it ends the workers when it has nothing more to say to them."""
    code = f"""if True:
        import os, signal, test_compare
        test_compare.kept.pretrained = test_compare.unfit
        results = test_compare.kept.Results(test_compare.Path({str(tmp_path)!r}))
        print(results.run("", "ring-2", [(test_compare.interrupted, 0)])[0]["pid"], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    path = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", code]
    how = {"env": os.environ | {"PYTHONPATH": path}, "capture_output": True, "timeout": 60}
    ran = subprocess.run(command, **how)  # until no worker has the pipe any more
    assert ran.returncode == -signal.SIGKILL and int(ran.stdout) and b"Traceback" not in ran.stderr


def test_two_comparisons_in_one_folder_keep_each_others_runs(tmp_path):
    one, other = kept.Results(tmp_path), kept.Results(tmp_path)
    one.kept["blobs"], other.kept["blobs"] = {}, {}
    one.add("blobs", "a", {"seconds": 1.0})
    other.add("blobs", "b", {"seconds": 2.0})
    assert set(kept.Results(tmp_path).load("blobs")) == {"a", "b"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--full --only magic", "argument --only: invalid choice: 'magic'"),
        ("--worlds magic", "argument --worlds: invalid choice: 'magic'"),
        ("--methods magic", "argument --methods: invalid choice: 'magic'"),
        ("--table", "arguments --only and --table: go with --full"),
        ("--seed -1", "argument --seed: must be at least 0 and at most 2147483648, got -1"),
        ("--out {}/file/out", "argument --out: cannot write to "),
    ],
)
def test_bad_flags_end_with_one_line(flags, message, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(cli.Fault) as stop:
        compare.main(flags.format(tmp_path).split())
    assert str(stop.value).startswith(message) and "\n" not in str(stop.value)


# The results that are kept in the repository.


@pytest.fixture(scope="module")
def comparison():
    return compare.Comparison(kept.Results(KEPT, compute=False), KEPT, draw=False)


def measured(comparison):
    """The worlds and methods whose search and report are kept; those of the sweeps are."""
    pairs = [(world, name) for world, names in compare.COMPARED.items() for name in names]
    there = [
        pair for pair in pairs if comparison.measured(lambda p=pair: comparison.reported(*p), "")
    ]
    assert {(world, name) for world in ("ring-2", "blobs") for name in compare.MAIN} <= set(there)
    return there


def test_the_tables_are_those_of_the_kept_results(comparison):
    sections = [part for name in compare.EXPERIMENTS for part in comparison.sections(name)]
    assert (KEPT / "README.md").read_text() == compare.page(sections, comparison.missing)
    assert all((KEPT / part.picture).exists() for part in sections if part.picture)


def test_the_scripts_default_is_among_those_tried(comparison):
    """run_2d.py's, as its --help says: no plain setting of this repository was left out."""
    command = [sys.executable, str(ROOT / "toy" / "run_2d.py"), "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = " ".join(text.split("options:")[1].split())
    names = {name: name for name in ("beta", "kl", "t_min", "learning_rate", "group_size")}
    names |= {"rollout_steps": "rollout_steps", "prompts": "prompts"}
    default = {}
    for flag, field in {**names, "train_timesteps": "timesteps"}.items():
        said = re.search(rf"--{flag.replace('_', '[-_]')} [A-Z].*?default: ([\d.e-]+)\)", text)
        default[field] = float(said[1])
    for world, name in measured(comparison):
        tried = comparison.search(world, name).tried
        own = dataclasses.asdict(Setting(world, "", **search.METHODS[name].fixed)) | default
        assert any(
            all(getattr(setting, field) == own[field] for field in default) for setting in tried
        ), (world, name)


def test_a_chosen_setting_is_at_no_edge_or_the_table_says_so(comparison):
    """And the report is of that setting, on ten seeds that no search has seen."""
    page = (KEPT / "README.md").read_text()
    assert (
        not set(compare.FRESH_SEEDS) & set(search.TUNING_SEEDS) and len(compare.FRESH_SEEDS) == 10
    )
    for world, name in measured(comparison):
        found = comparison.search(world, name)
        (line,) = [
            line
            for line in page.split("## What they chose")[1].split("\n## ")[0].splitlines()
            if line.startswith(f"| {world} | {name} | ")
        ]
        edges = line.split(" | ")[-1].removesuffix(" |")
        assert edges == (", ".join(found.edges) or "-")
        assert len(comparison.reported(world, name)) == 10
