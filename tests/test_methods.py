"""The methods are what their papers say, and meet DGPO where they should."""

import math

import pytest
import torch
import torch.nn.functional as F

import dgpo
from lab import figures, methods
from lab.methods import Batch, Setting

F64 = torch.float64
M, S = 1.5, 0.5  # data N(M, S^2), whose velocity field and marginals are known


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def batch(P=4, G=6, D=3, rewards=None):
    """A batch whose velocities are independent, v with a gradient."""
    v, v_ref, v_old, v_star = (normal(P, G, D, seed=seed) for seed in range(4))
    rewards = normal(P, G, seed=4) if rewards is None else rewards
    t, advantages = normal(P, 1, seed=5).sigmoid(), dgpo.group_advantages(rewards)
    return Batch(v.requires_grad_(), v_ref, v_old, v_star, t, rewards, advantages)


def grad(loss, v):
    return torch.autograd.grad(loss, v)[0]


# Losses at one time


def test_awm_is_dgpo_with_its_gate_frozen():
    """As beta goes to 0, the gate goes to 1/2, and the gradient over beta to half of AWM's."""
    b, beta = batch(), 1e-9
    gated = dgpo.dgpo_loss(b.loss, b.loss_ref, b.advantages, beta / 6) / beta
    torch.testing.assert_close(grad(gated, b.v), grad(methods.awm(b, Setting()), b.v) / 2)


def test_nft_is_a_linear_term_and_a_bowl_around_theta_old():
    """2 A e.d + 5 b ||d||^2, once each square is no longer divided by its error, and times t^2."""
    b, setting = batch(), Setting(beta=0.3)
    d, e = b.v - b.v_old, b.v_old - b.v_star
    # A huge floor under the error makes the division one by a constant.
    loss, at_old = (1e6 * methods.nft(b._replace(v=v), setting, eps=1e6) for v in (b.v, b.v_old))
    squares = 2 * b.advantages * (e * d).mean(2) + 5 * 0.3 * d.square().mean(2)
    torch.testing.assert_close(loss - at_old, (b.t**2 * squares).mean())


def test_sdpo_is_diffusion_dpo_that_scales_a_harmful_loser_down():
    b, beta = batch(P=6, G=2), 2.0
    v = b.v.detach().clone()
    winner = (v - b.v_star)[:, 1]
    v[:3, 0] = b.v_star[:3, 0] - winner[:3]  # errors that point apart: the loser does no harm
    v[3:5, 0] = b.v_star[3:5, 0] + 3 * winner[3:5]  # a loser's error thrice as large
    v[5, 0] = b.v_star[5, 0] + 0.1 * winner[5]  # and one that is small
    b = b._replace(v=v.requires_grad_())
    A = torch.tensor([-1.0, 1.0], dtype=F64).expand(6, 2)
    ours = grad(methods.sdpo(b, Setting(beta=beta)), b.v)
    theirs = grad(dgpo.dgpo_loss(b.loss, b.loss_ref, A, beta / 2) / beta, b.v)
    torch.testing.assert_close(ours[:3], theirs[:3])
    torch.testing.assert_close(ours[3:, 1], theirs[3:, 1])  # the winner's part is as it was
    # The loser's is 0.9 times as long as the winner's: a step along both still lowers L_w.
    torch.testing.assert_close(ours[3:5, 0].norm(dim=1), 0.9 * ours[3:5, 1].norm(dim=1))
    torch.testing.assert_close(ours[5], theirs[5])


def test_gpo_is_the_mean_of_diffusion_dpo_over_the_pairs_of_a_group():
    pairs = batch(P=5, G=2)
    expected = dgpo.dgpo_loss(pairs.loss, pairs.loss_ref, pairs.advantages, 3.0 / 2) / 3.0
    torch.testing.assert_close(methods.gpo(pairs, Setting(beta=3.0)), expected)

    rewards = torch.tensor([[0.0, 1.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0]], dtype=F64)
    b = batch(P=2, G=4, rewards=rewards)
    gap = (b.loss - b.loss_ref)[0]
    wins = [(1, 0), (2, 0), (3, 0), (3, 1), (3, 2)]  # a tie is no preference
    by_pair = [-F.logsigmoid(-3.0 / 2 * (gap[w] - gap[lose])) for w, lose in wins]
    expected = torch.stack(by_pair).mean() / 2 / 3.0  # the second group has no pairs, and adds 0
    torch.testing.assert_close(methods.gpo(b, Setting(beta=3.0)), expected)


# Flow-GRPO


def velocity(x, t):
    variance = (1 - t) ** 2 * S**2 + t**2
    return -M + (t - (1 - t) * S**2) / variance * (x - (1 - t) * M)


@pytest.mark.parametrize("a", [0.3, 1.0])
def test_the_sde_keeps_the_marginals_of_the_ode(a):
    """At every t, x_t is N((1 - t) M, (1 - t)^2 S^2 + t^2), however much noise is stirred in."""
    n, times = 20_000, torch.linspace(1, 0, 401, dtype=F64)
    trajectory = methods.sample_sde(velocity, normal(n), times, lambda i: normal(n, seed=i + 1), a)
    for i in range(0, 401, 50):
        t = times[i].item()
        assert trajectory[i].mean().item() == pytest.approx((1 - t) * M, abs=0.03)
        std = math.sqrt((1 - t) ** 2 * S**2 + t**2)
        assert trajectory[i].std().item() == pytest.approx(std, rel=0.03)
    memory = torch.corrcoef(torch.stack([trajectory[0], trajectory[-1]]))[0, 1].item()
    assert abs(memory) < 0.95  # the noise is real: by the ODE, the start determines the end


def test_a_step_by_hand():
    """t = 0.5, s = 0.4, x = 2, v = 1, a = 0.6: g^2 = 0.36, mean 2 - 0.1 (1 + 0.36 / 1 * 2.5)."""
    x, t, s = (torch.tensor(value, dtype=F64) for value in (2.0, 0.5, 0.4))
    mean, std = methods.sde_step(lambda x, t: torch.ones_like(x), x, t, s, a=0.6)
    assert mean.item() == pytest.approx(2 - 0.1 * (1 + 0.36 * 2.5))
    assert std.item() == pytest.approx(math.sqrt(0.36 * 0.1))
    # At t = 1, s stands in for t: g^2 = a^2 / (1 - 0.9).
    _, std = methods.sde_step(velocity, x, torch.tensor(1.0), torch.tensor(0.9), a=0.6)
    assert std.item() == pytest.approx(0.6)


def test_flow_grpo_clips_by_hand():
    """A good step stops being pushed up past 1 + clip, a bad one down past 1 - clip.

    Elsewhere the gradient is REINFORCE's, times rho.
    """
    rho = torch.tensor([[1.3, 1.1, 0.5, 0.7, 0.9, 1.5]], dtype=F64)
    A = torch.tensor([[1.0, 1.0, 1.0, -1.0, -1.0, -1.0]], dtype=F64)
    mean, std = torch.zeros(1, 1, 6, dtype=F64), torch.tensor(0.3, dtype=F64)
    expected = torch.distributions.Normal(mean, std).log_prob(rho).sum(2)
    torch.testing.assert_close(methods.gaussian_log_prob(rho[None], mean, std), expected)
    log_prob = rho.log().requires_grad_()
    loss = methods.flow_grpo_loss(log_prob, torch.zeros_like(rho), A, clip=0.2)
    assert loss.item() == pytest.approx((-1.2 - 1.1 - 0.5 + 0.8 + 0.9 + 1.5) / 6)
    expected = (-A * rho / 6).masked_fill(torch.tensor([[True, False, False] * 2]), 0)
    torch.testing.assert_close(grad(loss, log_prob), expected)


# One sample's loss, as the figure shows it


def slope(method, v, A, h=1e-2):
    return (figures.loss_of_one(method, v + h, A) - figures.loss_of_one(method, v - h, A)) / 2 / h


@pytest.mark.parametrize("method", figures.FAMILY)
@pytest.mark.parametrize("A", [1.0, -1.0])
def test_the_family_has_one_slope_at_theta_old(method, A):
    """2 A e with e = v_old - v* = -1."""
    assert slope(method, 0.0, A) == pytest.approx(-2 * A, rel=0.02)


def test_what_becomes_of_a_bad_sample():
    fall = {method: figures.loss_of_one(method, -100, -1.0) for method in figures.FAMILY}
    assert fall["AWM"] < -1e4  # without end
    assert fall["DGPO"] == pytest.approx(-2 * math.log(2), rel=1e-2)  # 2 log(2) / beta
    assert fall["Flow-GRPO"] == pytest.approx(-1, rel=1e-3)  # from A rho = -1 to 0
    assert fall["Bounded DGPO"] > 0 and fall["DiffusionNFT"] > 0
    assert slope("Bounded DGPO", -1, -1.0) == pytest.approx(0, abs=1e-3)  # v* mirrored at v_old
