"""The comparison is fair, counts what it costs, and loses nothing that is finished."""

import copy
import dataclasses
import json
import sys

import compare
import flow2d
import pytest
import torch

import dgpo


def setting(method, **fields):
    return compare.Setting("ring-2", method, t_min=0.2, **fields)


SETTINGS = {
    "DGPO": setting("DGPO"),
    "DGPO with SDE rollouts": setting("DGPO", sde_noise=0.7, ema=0.5),
    "DGPO with an EMA reference": setting("DGPO", ema=0.5, ema_reference=True, updates=2),
    "Diffusion-DPO": setting("Diffusion-DPO", offline=True),
    "GPO": setting("GPO", shared_noise=False, rollout_steps=5),
    "Flow-GRPO": setting("Flow-GRPO", sde_noise=0.7),
    "Flow-GRPO, 5 steps": setting("Flow-GRPO", sde_noise=0.7, trained_steps=5),
    "Flow-GRPO, 4 updates": setting(
        "Flow-GRPO", learning_rate=5e-4, sde_noise=0.7, updates=4, clip=0.05
    ),
}


def seeded():
    return torch.Generator().manual_seed(0)


def short(of, iterations):
    return dataclasses.replace(of, iterations=iterations)


def test_dgpo_here_is_algorithm_1_there(model):
    """The common loop with DGPO in it takes the steps of dgpo.train, to the bit."""
    here, there = copy.deepcopy(model), copy.deepcopy(model)
    for _ in compare.learn(here, short(SETTINGS["DGPO"], 5), seeded()):
        pass
    for _ in dgpo.train(
        there,
        flow2d.reward,
        flow2d.sample_conditions,
        (2,),
        seeded(),
        iterations=5,
        prompts=8,
        group_size=24,
        beta=1.0,
        learning_rate=1.5e-3,
        t_min=0.2,
        rollout_steps=10,
        train_timesteps=4,
        kl=0.01,
    ):
        pass
    for a, b in zip(here.parameters(), there.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", SETTINGS)
def test_cost_is_what_the_network_evaluated(name, model, monkeypatch):
    """A forward counts 1 for each sample, one with a backward to come 3."""
    counted = 0
    original = flow2d.VelocityNet.forward

    def forward(self, x, t, c):
        nonlocal counted
        v = original(self, x, t, c)
        counted += len(x) * (3 if v.requires_grad else 1)
        return v

    monkeypatch.setattr(flow2d.VelocityNet, "forward", forward)
    # GPO asks the reference for a velocity with the graph on, but it has no parameters to train.
    for cost in compare.learn(model, short(SETTINGS[name], 2), seeded()):
        assert cost == counted
        counted = 0


@pytest.mark.parametrize("name", SETTINGS)
def test_every_method_learns(name, model):
    c = torch.arange(4).repeat_interleave(200)
    noise = torch.randn(800, 2, generator=seeded())
    before = flow2d.reward(c, flow2d.sample(model, c, noise)).mean()
    for _ in compare.learn(model, short(SETTINGS[name], 60), seeded()):
        pass
    assert flow2d.reward(c, flow2d.sample(model, c, noise)).mean() > before + 1


def test_several_updates_meet_the_clip(model, monkeypatch):
    """The first update from a rollout is at rho = 1, the later ones are not."""
    ratios = []
    original = compare.baselines.flow_grpo_loss

    def loss(log_prob, log_prob_old, advantages, clip):
        ratios.append((log_prob - log_prob_old).exp().sub(1).abs().max().item())
        return original(log_prob, log_prob_old, advantages, clip)

    monkeypatch.setattr(compare.baselines, "flow_grpo_loss", loss)
    for _ in compare.learn(model, short(SETTINGS["Flow-GRPO, 4 updates"], 2), seeded()):
        pass
    assert ratios[0] == ratios[4] == 0 and min(ratios[1:4] + ratios[5:]) > 0.05


def cell(*evaluations):
    return {"evaluations": [list(map(float, e)) for e in evaluations], "seconds": 1.0}


def test_arrival_asks_for_reward_and_quality_from_then_on_and_at_the_end():
    start, hacked = (0, 0, -8, 0.9, 9, 1), (10, 100, -0.1, 0.5, 1, 1)
    there, lost = (20, 200, -0.5, 0.9, 1, 1), (30, 300, -5, 0.9, 1, 1)
    late = (40, 400, -0.4, 0.9, 1, 1)

    def arrival(*evaluations):
        return compare.arrival(setting("DGPO"), cell(*evaluations))

    assert arrival(start, hacked, there)[1] == 200
    assert arrival(start, there, hacked) is None
    assert arrival(start, there, lost) is None
    assert arrival(start, there, lost, late)[1] == 400
    assert arrival(start, there, *[late] * 8, lost, late)[1] == 200
    assert arrival(start, (5, 5, compare.BLOWN_UP, 0, 1e9, 1e9)) is None


def test_the_cost_ratio_is_paired_and_geometric():
    start = (0, 0, -8, 0.9, 9, 1)
    runs = {
        "DGPO": [cell(start, (10, cost, -0.1, 0.9, 1, 1)) for cost in (100, 400, 300)],
        "other": [cell(start, (10, cost, -0.1, 0.9, 1, 1)) for cost in (200, 800)] + [cell(start)],
    }
    tunings = {name: compare.Tuning(setting("DGPO"), [], []) for name in runs}
    numbers, shown = compare.cost_ratio(tunings, runs, "other")
    assert numbers == pytest.approx((2, 2, 2)) and shown == "2.00 [2.00, 2.00] (2 of 3 seeds)"
    runs["other"] = [cell(start)] * 3
    assert compare.cost_ratio(tunings, runs, "other") == (None, "- (0 of 3 seeds)")


def test_interval_is_students():
    mean, half = compare.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.776 * 1.5811 / 5**0.5, rel=5e-3)


def test_tuning_prefers_what_never_fails_then_what_is_cheap(tmp_path, monkeypatch):
    start = (0, 0, -8, 0.9, 9, 1)
    reliable, cheap, fragile = (
        [cell(start, (10, cost, -0.1, 0.9, 1, 1))] * 3 for cost in (9, 7, 1)
    )
    fragile = [*fragile[:2], cell(start)]
    monkeypatch.setattr(compare.Results, "run", lambda *_: reliable + cheap + fragile)
    settings = [setting("DGPO", learning_rate=rate) for rate in (1.0, 2.0, 3.0)]
    tuning = compare.tune(compare.Results(tmp_path), "DGPO", settings, (0, 1, 2))
    assert tuning.best is settings[1] and tuning.arrived() == 8 / 9


def test_every_method_has_as_many_settings():
    assert {len(grid("blobs")) for grid in compare.METHODS.values()} == {24}
    assert {len(set(grid("blobs"))) for grid in compare.METHODS.values()} == {24}


def test_total_variance_is_the_sum_over_coordinates():
    draws = torch.randn(2000, 3, generator=seeded()) * torch.tensor([1.0, 2.0, 3.0])
    assert compare.total_variance(list(draws)) == pytest.approx(14, rel=0.1)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """main() on one method with two settings and short runs."""
    grid = [short(setting("DGPO", learning_rate=rate), 20) for rate in (1e-3, 2e-3)]
    monkeypatch.setattr(compare, "METHODS", {"DGPO": lambda world: grid})
    monkeypatch.setattr(compare, "PRETRAINING_STEPS", 30)
    monkeypatch.setattr(compare, "BUDGET", 100_000)
    command = ["compare.py", "--full", "--only", "speed", "--worlds", "ring-2", "--seeds", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path)])
    return tmp_path


def test_a_comparison_continues_where_it_was_stopped(small, capsys, monkeypatch):
    compare.main()
    table = capsys.readouterr().out
    assert "| DGPO | " in table
    assert all((small / f"{name}.png").stat().st_size > 10_000 for name in ("speed", "pareto"))
    stored = json.loads((small / "ring-2.json").read_text())
    assert len(stored["cells"]) == 2 * 2 + 2  # settings x tuning seeds, and fresh seeds

    lost = list(stored["cells"])[-1]
    del stored["cells"][lost]
    (small / "ring-2.json").write_text(json.dumps(stored))
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--table"])
    with pytest.raises(SystemExit):
        compare.main()
    assert capsys.readouterr().err == (
        "compare.py: not finished yet: 1 runs of speed in ring-2; run it without --table\n"
    )

    monkeypatch.setattr(sys, "argv", sys.argv[:-1])
    ran = []
    original = compare.Results.add
    monkeypatch.setattr(
        compare.Results,
        "add",
        lambda self, world, key, cell: ran.append(key) or original(self, world, key, cell),
    )
    compare.main()
    assert ran == [lost]
    assert without_seconds(capsys.readouterr().out) == without_seconds(table)


def without_seconds(table):
    """No two runs take the same time."""
    return [line.split("|")[:5] + line.split("|")[6:] for line in table.splitlines()]


@pytest.mark.parametrize(
    ("text", "reason"),
    [('{"version": 2, "cel', "damaged"), ('{"version": 1, "cells": {}}', "of version 1, not 2")],
)
def test_a_damaged_or_old_file_is_moved_aside(text, reason, tmp_path, capsys):
    (tmp_path / "ring-2.json").write_text(text)
    assert compare.Results(tmp_path).load("ring-2") == {}
    assert f"ring-2.json is {reason}: moved to " in capsys.readouterr().out
    (aside,) = tmp_path.iterdir()
    assert aside.read_text() == text and aside.name != "ring-2.json"


def test_two_comparisons_in_one_folder_keep_each_others_cells(tmp_path):
    one, other = compare.Results(tmp_path), compare.Results(tmp_path)
    one.cells["blobs"], other.cells["blobs"] = {}, {}
    one.add("blobs", "a", cell((0, 0, -8, 0.9, 9, 1)))
    other.add("blobs", "b", cell((0, 0, -7, 0.9, 9, 1)))
    assert set(compare.Results(tmp_path).load("blobs")) == {"a", "b"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--seeds 1", "argument --seeds: must be from 2 to 10, got 1"),
        ("--seeds 0", "argument --seeds: must be from 2 to 10, got 0"),
        ("--only magic", "argument --only: invalid choice: 'magic'"),
        ("--worlds magic", "argument --worlds: must be blobs or ring-D with D >= 2, got 'magic'"),
        ("--worlds ring-1", "argument --worlds: must be blobs or ring-D with D >= 2, got 'ring-1'"),
        ("--dims 1", "argument --dims: must be at least 2, got 1"),
        ("--dims 2 --worlds blobs", "argument --dims: not allowed with --worlds"),
        ("--methods magic", "argument --methods: invalid choice: 'magic'"),
        ("--out {}/file/out", "argument --out: cannot write to "),
    ],
)
def test_bad_flags_end_with_one_line(flags, message, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["compare.py", *flags.format(tmp_path).split()])
    with pytest.raises(SystemExit) as stop:
        compare.main()
    printed = capsys.readouterr().err
    assert stop.value.code == 2
    assert printed.startswith(f"compare.py: {message}") and printed.count("\n") == 1
