"""The comparison is fair, counts what it costs, and loses nothing that is finished."""

import copy
import json
import sys

import compare
import flow2d
import pytest
import torch

import dgpo

SETTINGS = {
    "DGPO": compare.Setting("DGPO"),
    "DGPO with SDE rollouts": compare.Setting("DGPO", sde_noise=0.7, ema=0.5),
    "Diffusion-DPO": compare.Setting("Diffusion-DPO", offline=True),
    "GPO": compare.Setting("GPO", shared_noise=False),
    "Flow-GRPO": compare.Setting("Flow-GRPO", sde_noise=0.7),
    "Flow-GRPO, 6 steps": compare.Setting("Flow-GRPO", sde_noise=0.7, trained_steps=6),
}


def seeded():
    return torch.Generator().manual_seed(0)


def test_dgpo_here_is_algorithm_1_there(model):
    """The common loop with DGPO in it takes the steps of dgpo.train, to the bit."""
    here, there = copy.deepcopy(model), copy.deepcopy(model)
    for _ in compare.learn(here, SETTINGS["DGPO"], 5, seeded()):
        pass
    for _ in dgpo.train(
        there,
        flow2d.reward,
        flow2d.sample_conditions,
        (2,),
        seeded(),
        iterations=5,
        prompts=16,
        group_size=24,
        beta=1.0,
        learning_rate=1.5e-3,
        t_min=0.2,
        rollout_steps=10,
        train_timesteps=2,
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
    for cost in compare.learn(model, SETTINGS[name], 2, seeded()):
        assert cost == counted
        counted = 0


@pytest.mark.parametrize("name", SETTINGS)
def test_every_method_learns(name, model):
    c = torch.arange(4).repeat_interleave(200)
    noise = torch.randn(800, 2, generator=seeded())
    before = flow2d.reward(c, flow2d.sample(model, c, noise)).mean()
    for _ in compare.learn(model, SETTINGS[name], 40, seeded()):
        pass
    assert flow2d.reward(c, flow2d.sample(model, c, noise)).mean() > before + 1


def cell(*evaluations):
    return {"evaluations": [list(map(float, e)) for e in evaluations], "seconds": 1.0}


def test_arrival_asks_for_reward_and_quality_from_then_on_and_at_the_end():
    start, hacked = (0, 0, -8, 0.9, 9), (10, 100, -0.1, 0.5, 1)
    there, lost = (20, 200, -0.5, 0.9, 1), (30, 300, -5, 0.9, 1)
    late = (40, 400, -0.4, 0.9, 1)
    assert compare.arrival(cell(start, hacked, there))[1] == 200
    assert compare.arrival(cell(start, there, hacked)) is None
    assert compare.arrival(cell(start, there, lost)) is None
    assert compare.arrival(cell(start, there, lost, late))[1] == 400
    assert compare.arrival(cell(start, there, *[late] * 8, lost, late))[1] == 200
    assert compare.arrival(cell(start, (5, 5, compare.BLOWN_UP, 0, 1e9))) is None


def test_interval_is_students():
    mean, half = compare.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.776 * 1.5811 / 5**0.5, rel=5e-3)


def test_tuning_prefers_what_never_fails_then_what_is_cheap(tmp_path, monkeypatch):
    start = (0, 0, -8, 0.9, 9)
    reliable, cheap, fragile = ([cell(start, (10, cost, -0.1, 0.9, 1))] * 3 for cost in (9, 7, 1))
    fragile = [*fragile[:2], cell(start)]
    assert len(compare.TUNING_SEEDS) == 3
    monkeypatch.setattr(compare.Results, "run", lambda *_: reliable + cheap + fragile)
    settings = [compare.Setting("DGPO", learning_rate=rate) for rate in (1.0, 2.0, 3.0)]
    assert compare.tune(compare.Results(tmp_path), "DGPO", settings) is settings[1]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """main() on one method with two settings and short runs."""
    monkeypatch.setattr(compare, "METHODS", {"DGPO": compare.METHODS["DGPO"][:2]})
    monkeypatch.setattr(compare, "STYLES", {"DGPO": compare.STYLES["DGPO"]})
    monkeypatch.setattr(compare, "ITERATIONS", 20)
    monkeypatch.setattr(compare, "PRETRAINING_STEPS", 30)
    command = ["compare.py", "--only", "speed", "--seeds", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    return tmp_path


def test_a_comparison_continues_where_it_was_stopped(small, capsys, monkeypatch):
    compare.main()
    table = capsys.readouterr().out
    assert "| DGPO | " in table and (small / "speed.png").stat().st_size > 10_000
    stored = json.loads((small / "ring-2d.json").read_text())
    assert len(stored["cells"]) == 2 * 3 + 2  # settings x tuning seeds, and fresh seeds

    lost = list(stored["cells"])[-1]
    del stored["cells"][lost]
    (small / "ring-2d.json").write_text(json.dumps(stored))
    ran = []
    original = compare.Results.add
    monkeypatch.setattr(
        compare.Results, "add", lambda self, key, cell: ran.append(key) or original(self, key, cell)
    )
    compare.main()
    assert ran == [lost]
    assert capsys.readouterr().out == table


@pytest.mark.parametrize(
    ("text", "reason"),
    [('{"version": 1, "cel', "damaged"), ('{"version": 0, "cells": {}}', "of version 0, not 1")],
)
def test_a_damaged_or_old_file_is_moved_aside(text, reason, tmp_path, capsys):
    (tmp_path / "ring-2d.json").write_text(text)
    assert compare.Results(tmp_path).cells == {}
    assert f"ring-2d.json is {reason}: moved to " in capsys.readouterr().out
    (aside,) = tmp_path.iterdir()
    assert aside.read_text() == text and aside.name != "ring-2d.json"


def test_two_comparisons_in_one_folder_keep_each_others_cells(tmp_path):
    one, other = compare.Results(tmp_path), compare.Results(tmp_path)
    one.add("a", cell((0, 0, -8, 0.9, 9)))
    other.add("b", cell((0, 0, -7, 0.9, 9)))
    assert set(compare.Results(tmp_path).cells) == {"a", "b"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--seeds 1", "argument --seeds: must be from 2 to 10, got 1"),
        ("--only magic", "argument --only: invalid choice: 'magic'"),
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
