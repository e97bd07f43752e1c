"""The pictures are of what they say."""

import figures
import methods
import pytest
import search
import sweeps
import torch
from methods import BUDGET, Evaluation, Run


def loss(label, v, A):
    (one,) = [f for name, (_, f) in figures.FAMILY.items() if name.startswith(label)]
    return one(torch.full((1, 1, 1), float(v)), torch.full((1, 1), float(A)))


def slope(label, v, A, h=1e-2):
    return (loss(label, v + h, A) - loss(label, v - h, A)).item() / (2 * h)


LABELS = ("AWM", "DGPO, DPO, GPO", "DGPO, bad", "DiffusionNFT", "Flow-GRPO")


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("A", [1.0, -1.0])
def test_the_family_has_one_slope_at_theta_old(label, A):
    """2 A e with e = v_old - v* = -1."""
    assert slope(label, 0.0, A) == pytest.approx(-2 * A, rel=0.02)


def test_what_becomes_of_a_bad_sample():
    def fall(label, v):
        return (loss(label, v, -1) - loss(label, 0, -1)).item()

    assert fall("AWM", -100) < -1e4  # without end
    assert fall("DGPO, DPO, GPO", -100) == pytest.approx(-2 * 0.6931, rel=1e-2)  # 2 log(2) / beta
    assert fall("Flow-GRPO", -100) == pytest.approx(-1, rel=1e-3)  # from A rho = 1 to 0
    assert slope("DGPO, bad", -1, -1) == pytest.approx(0, abs=1e-3)  # the mirror image of v*
    assert fall("DGPO, bad", -100) > 0 and fall("DiffusionNFT", -100) > 0


def runs(cost, n=3):
    """n runs that arrive at a cost and around it."""
    found = []
    for k in range(n):
        evaluations = [Evaluation(0, -8.0, 0.9, 2.0, 1.0)]
        evaluations += [Evaluation(cost * (i + k + 1), -0.1, 0.95, 0.9, 1.0) for i in range(3)]
        found.append(Run(float(cost * (k + 1)), BUDGET, 1.0, evaluations))
    return found


def test_a_run_stays_where_it_ended():
    (one,) = figures.at_costs("ring-2", runs(100_000, 1), torch.tensor([1e4, 1e5, 1e6]))
    assert one[0] == 0 and one[1] == one[2] > methods.WAY


def test_all_pictures_are_drawn(tmp_path):
    by_method = {name: runs(10_000 * (i + 2)) for i, name in enumerate(search.METHODS)}
    found = {"ring-2": by_method, "blobs": by_method}
    points = {f"{name}, m = {m}": runs(50_000) for name, ms in sweeps.CURVES.items() for m in ms}
    ratios = [{"t": t, "gap": 1.0, "gradient": 2.0} for t in sweeps.TIMES]
    figures.plot_family(tmp_path / "family.png")
    figures.plot_speed(tmp_path / "speed.png", found)
    figures.plot_cost(tmp_path / "cost.png", found)
    figures.plot_search(tmp_path / "search.png", found)
    figures.plot_sweep(tmp_path / "sweep.png", found)
    figures.plot_extremes(tmp_path / "extremes.png", {"ring-2": points}, sweeps.CURVES)
    figures.plot_noise(tmp_path / "noise.png", {"ring-2": {2: {"ratios": ratios}}})
    written = list(tmp_path.iterdir())
    assert len(written) == 7 and all(path.stat().st_size > 10_000 for path in written)
