"""The protocol is fair, and says what it found; what is finished is not computed twice."""

import dataclasses
import math
import random
import statistics

import pytest

from lab import protocol, worlds
from lab.methods import DENOISING, METHODS, Setting
from lab.protocol import Computer, Diverged, Evaluation, Goal, Range, Run

BUDGET = 1_500_000
GOAL = Goal(best=0.0, progress=0.9, quality=0.8)


def run(reached):
    ends = [Evaluation(0, -8.0, 0.9), Evaluation(BUDGET, -0.1, 0.9)]
    return Run(BUDGET, ends, reached)


# Runs


def test_success_needs_reward_and_quality_and_to_hold_them():
    start, hacked, there = (0, -8.0, 0.9), (10, 0.0, 0.1), (20, -0.5, 0.9)
    lost, late, later = (30, -5.0, 0.9), (40, -0.4, 0.9), (50, -0.4, 0.9)

    def cost(*rows):
        return GOAL.cost_to_reach(Run(BUDGET, [Evaluation(*row) for row in rows]))

    assert cost(start, hacked, there, late) == 20
    assert cost(start, hacked, there) is None  # not for long
    assert cost(start, there, hacked) is None and cost(start, there, lost) is None
    assert cost(start, there, lost, late, later) == 40
    assert cost(start, there, *[late] * 8, lost, late) == 20  # nine in ten


def followed(rewards, step=100_000):
    """A run that meets these rewards, one every `step` forwards, and is followed to 4 times."""

    def evaluate(cost):
        if rewards[cost // step] is None:
            raise Diverged
        return Evaluation(cost, rewards[cost // step], 0.9)

    def end(run):
        return 4 * run.cost

    costs = (step * i for i in range(10_000))
    return protocol.follow(costs, GOAL, BUDGET, evaluate, lambda cost: cost + 1, end)


def test_a_run_is_followed_until_it_holds_the_goal_or_diverges():
    result = followed([-8.0, -4.0, *[0.0] * 100])
    assert (result.reached, result.end.cost) == (200_000, 800_000)
    lost = followed([-8.0, 0.0, 0.0, *[-8.0] * 100])
    assert lost.reached is None and lost.end.cost == lost.cost == BUDGET
    diverged = followed([-8.0, *[0.0] * 3, None, *[0.0] * 100])
    assert diverged.reached is None and diverged.end.cost == 300_000


# The search


def test_the_parts_of_a_range_are_met_once_and_alike_for_all():
    one = protocol.drawn(Setting(), METHODS["DGPO"].space, 10)
    shares = sorted(DENOISING["learning_rate"].share(setting.learning_rate) for setting in one)
    assert [int(10 * share) for share in shares] == list(range(10))
    other = protocol.drawn(Setting("Flow-GRPO"), METHODS["Flow-GRPO"].space, 10)
    assert [s.learning_rate for s in one] == [s.learning_rate for s in other]


def test_ranges_and_their_edges():
    rate, t_min = Range(1e-3, 1e-1), Range(0, 0.6)
    assert rate.at(0.5) == pytest.approx(1e-2) and t_min.at(0.5) == 0.3
    assert [rate.edge(x) for x in (1.5e-3, 2e-3, 5e-2, 7e-2)] == ["low", None, None, "high"]
    assert [t_min.edge(x) for x in (0.0, 0.5, 0.55)] == [None, None, "high"]
    assert rate.widened("low") == Range(1e-3 / 3, 1e-1)
    assert rate.widened("high").high == pytest.approx(0.3) and t_min.widened("high").high == 0.8


def search(cost_of, plan=worlds.PLAN):
    """A search in a made-up world, where cost_of(setting, seed) is the cost to reach, or None."""
    calls = []

    def runs_of(settings, seeds, share):
        calls.append((settings, seeds, share))
        return [[run(cost_of(setting, seed)) for seed in seeds] for setting in settings]

    space = METHODS["DGPO"].space
    return protocol.search(runs_of, Setting(), Setting(), space, plan, GOAL, []), calls


def test_a_search_prefers_what_holds_to_what_is_fast():
    """Most runs of a fast setting fail, on seeds that only the last rung sees."""
    fast = protocol.drawn(Setting(), METHODS["DGPO"].space, worlds.PLAN.drawn)[3]

    def cost(setting, seed):
        if setting == fast:
            return 100_000 if seed < 103 else None
        return 1_300_000 + 1e3 * abs(setting.beta - 3)

    result, calls = search(cost)
    assert Setting(**result["best"]) != fast
    assert calls[2][1:] == (protocol.TUNING_SEEDS, 1.0)
    assert fast in calls[2][0] and Setting() in calls[2][0]


def test_a_best_at_an_edge_widens_the_range_until_it_is_not():
    """The best learning rate is three times what the range holds."""
    goal = 3 * DENOISING["learning_rate"].high

    def cost(setting, seed):
        return 100_000 * (1 + abs(math.log(setting.learning_rate / goal)))

    result, calls = search(cost)
    assert len(calls[0][0]) == 2 + 31 and result["works"] == [31, 31]
    assert any(text.startswith("learning_rate to ") for text in result["widened"])
    assert result["best"]["learning_rate"] > DENOISING["learning_rate"].high
    # With no round left to look further, it ends at an edge, and says so.
    result, _ = search(cost, dataclasses.replace(worlds.PLAN, most_rounds=1))
    assert result["edges"] == ["learning_rate"]


# Computing and keeping


class Here(Computer):
    """Computes in this process."""

    def map(self, jobs):
        return map(protocol.call, jobs)


def test_what_is_finished_is_not_computed_twice(tmp_path):
    calls = []

    def double(seed, setting):
        calls.append(seed)
        return {"twice": 2 * seed}

    one, two, other = (1, Setting()), (2, Setting()), (1, Setting(kl=0.0))
    Here(tmp_path)("", "ring-2", double, [one])
    result = Here(tmp_path)("", "ring-2", double, [one, two, other])
    assert [each["twice"] for each in result] == [2, 4, 2] and calls == [1, 2, 1]


# Intervals


def test_the_interval_covers_the_mean_as_often_as_it_says():
    """Of skewed values, too, where the plain percentile bootstrap covers less than nine in ten."""
    rng, covered = random.Random(0), 0
    for _ in range(400):
        _, low, high = protocol.interval([rng.expovariate(1) for _ in range(10)])
        covered += low <= 1 <= high
    assert 0.90 < covered / 400 < 0.97
    middle, low, high = protocol.interval([1.0, 2.0, 3.0, 5.0])
    assert middle == 2.75 and 1 <= low < 1.3 and 4.4 < high <= 5  # about their range


def test_a_ratio_is_shown_only_where_it_is_clear():
    cheap, dear = [run(100_000), run(110_000)] * 5, [run(300_000), run(330_000)] * 5
    middle, low, high = protocol.ratio(cheap, dear)
    assert middle == pytest.approx(3) and 2.5 < low < 3 < high < 3.5
    assert protocol.ratio(cheap, [*dear[:7], *[run(None)] * 3]) is None  # too few succeed
    assert protocol.ratio([run(30_000)] * 8 + [run(1_400_000)] * 2, dear) is None  # too wide


def test_a_ratio_of_few_says_no_more_than_the_seeds_do():
    one, far = ([run(cost) for cost in costs] for costs in ((100, 110, 90), (1000, 1100, 900)))
    spacing = 2**0.25
    variance = statistics.variance(map(math.log, (100, 110, 90))) + math.log(spacing) ** 2 / 12
    width = math.exp(4.303 * (2 / 3 * variance) ** 0.5)
    expected = f"10.0 [{10 / width:.1f}, {10 * width:.1f}]"
    assert protocol.ratio_of_few(one, far, spacing) == expected
    assert protocol.ratio_of_few(one, [run(1000), run(None), run(900)], spacing).startswith("> ")
    assert protocol.ratio_of_few([run(100), run(None)], far, spacing) == "-"
