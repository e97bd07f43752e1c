"""The 2-D world: closed forms against quadrature, the network against the data it learns."""

import math

import pytest
import torch

from toy import flow2d

C = torch.arange(flow2d.CONDITIONS)


@pytest.fixture(scope="module")
def plane():
    """Midpoints (1, N, 2) of square cells that cover [-4, 4]^2, and the area of a cell."""
    edge = (torch.arange(160, dtype=torch.float64) + 0.5) / 20 - 4
    return torch.cartesian_prod(edge, edge)[None], 1 / 20**2


def test_p_ref_is_a_density_and_its_samples_follow_it(plane):
    points, cell = plane
    density = flow2d.log_prob_ref(C[:, None], points).exp()
    assert (density.sum(1) * cell).tolist() == pytest.approx([1] * 4, abs=1e-9)

    x = flow2d.sample_ref(C.repeat_interleave(20_000), torch.Generator().manual_seed(0))
    mean = (density[..., None] * points).sum(1) * cell
    torch.testing.assert_close(x.view(4, -1, 2).mean(1).double(), mean, rtol=0, atol=0.05)
    assert flow2d.on_mode_share(x) == pytest.approx(1 - math.exp(-4.5), abs=0.003)


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_p_star_is_eq5_and_inverts_to_the_reward_by_eq6(beta, plane):
    """p* integrates to one, so Z(c) in Eq. 6 is that of Eq. 5; it differs between conditions."""
    points, cell = plane
    c = C[:, None]
    log_optimum, log_ref = (
        flow2d.log_prob_optimum(c, points, beta),
        flow2d.log_prob_ref(c, points),
    )
    assert (log_optimum.exp().sum(1) * cell).tolist() == pytest.approx([1] * 4, abs=1e-6)
    implicit = beta * (log_optimum - log_ref) + beta * flow2d.log_z(C, beta)[:, None]
    torch.testing.assert_close(implicit, flow2d.reward(c, points))
    assert flow2d.log_z(C, beta).unique().numel() == 4

    x = flow2d.sample_optimum(C.repeat_interleave(20_000), beta, torch.Generator().manual_seed(0))
    mean = (log_optimum.exp()[..., None] * points).sum(1) * cell
    torch.testing.assert_close(x.view(4, -1, 2).mean(1).double(), mean, rtol=0, atol=0.05)


def test_learned_density_is_exact_for_a_known_flow():
    """For data N(m, s^2 I), both the velocity field and the density are known."""
    m, s = torch.tensor([1.0, -0.5]).double(), 0.6

    def velocity(x, t, c):
        t = t[:, None]
        variance = (1 - t) ** 2 * s**2 + t**2
        return -m + (t - (1 - t) * s**2) / variance * (x - (1 - t) * m)

    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).double()
    expected = torch.distributions.Normal(m, s).log_prob(x).sum(1)
    actual = flow2d.flow_log_prob(velocity, torch.zeros(50).long(), x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_pretrained_network_samples_the_data(reference):
    every = C.repeat_interleave(2000)
    g = torch.Generator().manual_seed(0)
    x = flow2d.sample(reference, every, torch.randn(8000, 2, generator=g), steps=50).view(4, -1, 2)
    data, again = (flow2d.sample_ref(every, g).view(4, -1, 2) for _ in range(2))
    assert flow2d.on_mode_share(x.flatten(0, 1)) > 0.9
    for c in range(4):
        noise_floor = flow2d.energy_distance(data[c], again[c])
        assert flow2d.energy_distance(x[c], data[c]) < noise_floor + 0.02
        assert flow2d.energy_distance(x[c], data[c - 1]) > 0.05  # another condition's data


def test_energy_distance_by_hand():
    """Between {0, 1} and {3, 3}: 2 (3 + 2)/2 - 1 - 0 = 4."""
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    y = torch.tensor([[3.0, 0.0], [3.0, 0.0]])
    assert flow2d.energy_distance(x, y) == pytest.approx(4)


def test_reward_is_best_on_its_own_mode():
    centers = flow2d.mode_centers()
    rewards = flow2d.reward(C[:, None], centers)  # (4, 8)
    assert rewards.argmax(1).tolist() == [0, 2, 4, 6]
    assert rewards.max(1).values.tolist() == [0, 0, 0, 0]
    assert flow2d.mode_weights(C).sum(1).tolist() == pytest.approx([1] * 4)


def test_pretraining_with_its_defaults_keeps_its_numbers():
    """The comparison's results in lab/ were computed with them."""
    torch.manual_seed(0)
    losses = [*flow2d.pretrain(flow2d.VelocityNet(), 50, torch.Generator().manual_seed(0))]
    assert [losses[0], losses[49]] == pytest.approx([3.03418, 2.26283], abs=1e-3)
    assert flow2d.PRETRAINING_STEPS == 1500
