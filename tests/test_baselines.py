"""The baselines are what their papers say, and meet DGPO where they should."""

import math

import baselines
import pytest
import torch
import torch.nn.functional as F

import dgpo

F64 = torch.float64
M, S = 1.5, 0.5  # data N(M, S^2), whose velocity field and marginals are known


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def velocity(x, t):
    variance = (1 - t) ** 2 * S**2 + t**2
    return -M + (t - (1 - t) * S**2) / variance * (x - (1 - t) * M)


@pytest.mark.parametrize("a", [0.3, 0.7, 1.0])
def test_the_sde_keeps_the_marginals_of_the_ode(a):
    """At every t, x_t is N((1 - t) M, (1 - t)^2 S^2 + t^2), however much noise is stirred in."""
    n, steps = 20_000, 400
    trajectory, times = baselines.sample_sde(
        velocity, normal(n), steps, torch.Generator().manual_seed(1), a
    )
    for i in range(0, steps + 1, 50):
        t = times[i].item()
        assert trajectory[i].mean().item() == pytest.approx((1 - t) * M, abs=0.03)
        std = math.sqrt((1 - t) ** 2 * S**2 + t**2)
        assert trajectory[i].std().item() == pytest.approx(std, rel=0.03)
    # The noise is real: the end hardly remembers the start, which for the ODE determines it.
    memory = torch.corrcoef(torch.stack([trajectory[0], trajectory[-1]]))[0, 1].item()
    assert abs(memory) < 0.95


def test_without_noise_the_sde_is_an_euler_step_of_the_ode():
    noise = normal(64)
    trajectory, times = baselines.sample_sde(velocity, noise, 10, torch.Generator(), a=0.0)
    x = noise
    for t, s in zip(times[:-1], times[1:], strict=True):
        x = x + (s - t) * velocity(x, t)
    torch.testing.assert_close(trajectory[-1], x)


def test_a_step_by_hand():
    """t = 0.5, s = 0.4, x = 2, v = 1, a = 0.6: g^2 = 0.36, mean 2 - 0.1 (1 + 0.36 / 1 * 2.5)."""
    x, t, s = (torch.tensor(value, dtype=F64) for value in (2.0, 0.5, 0.4))
    mean, std = baselines.sde_step(lambda x, t: torch.ones_like(x), x, t, s, a=0.6)
    assert mean.item() == pytest.approx(2 - 0.1 * (1 + 0.36 * 2.5))
    assert std.item() == pytest.approx(math.sqrt(0.36 * 0.1))
    # At t = 1, s stands in for t in the denominator: g^2 = a^2 / (1 - 0.9).
    _, std = baselines.sde_step(lambda x, t: x, x, torch.tensor(1.0), torch.tensor(0.9), a=0.6)
    assert std.item() == pytest.approx(0.6)


def test_the_log_prob_is_the_gaussians():
    x, mean, std = normal(3, 4, 2, 5), normal(3, 4, 2, 5, seed=1), torch.tensor(0.3, dtype=F64)
    expected = torch.distributions.Normal(mean, std).log_prob(x).sum((2, 3))
    torch.testing.assert_close(baselines.gaussian_log_prob(x, mean, std), expected)


def test_flow_grpo_starts_as_reinforce():
    """At theta = theta_old, rho is 1 and the gradient that of -A log p_theta."""
    log_prob, A = normal(4, 6).requires_grad_(), dgpo.group_advantages(normal(4, 6, seed=1))
    loss = baselines.flow_grpo_loss(log_prob, log_prob.detach(), A, clip=0.2)
    assert loss.item() == pytest.approx(0, abs=1e-12)  # -mean A
    (gradient,) = torch.autograd.grad(loss, log_prob)
    (reinforce,) = torch.autograd.grad(-(A * log_prob).mean(), log_prob)
    torch.testing.assert_close(gradient, reinforce)


def test_flow_grpo_clips_by_hand():
    """A good step stops being pushed up past 1 + clip, a bad one down past 1 - clip."""
    rho = torch.tensor([[1.3, 1.1, 0.5, 0.7, 0.9, 1.5]], dtype=F64)
    A = torch.tensor([[1.0, 1.0, 1.0, -1.0, -1.0, -1.0]], dtype=F64)
    log_prob = rho.log().requires_grad_()
    loss = baselines.flow_grpo_loss(log_prob, torch.zeros_like(rho), A, clip=0.2)
    assert loss.item() == pytest.approx((-1.2 - 1.1 - 0.5 + 0.8 + 0.9 + 1.5) / 6)
    (gradient,) = torch.autograd.grad(loss, log_prob)
    expected = (-A * rho / 6).masked_fill(torch.tensor([[True, False, False] * 2]), 0)
    torch.testing.assert_close(gradient, expected)


def test_diffusion_dpo_is_dgpo_on_the_best_and_the_worst():
    loss_theta, loss_ref, rewards = normal(9, 8), normal(9, 8, seed=1), normal(9, 8, seed=2)
    best, worst = rewards.argmax(1, keepdim=True), rewards.argmin(1, keepdim=True)
    gap = loss_theta - loss_ref
    published = -F.logsigmoid(-3.0 / 2 * (gap.gather(1, best) - gap.gather(1, worst))).mean()

    (theta, pair), (ref, _) = (
        baselines.best_and_worst(loss, rewards) for loss in (loss_theta, loss_ref)
    )
    ours = dgpo.dgpo_loss(theta, ref, dgpo.group_advantages(pair), 3.0 / 2)
    torch.testing.assert_close(ours, published)

    x0 = normal(9, 8, 2, 3, seed=3)
    ends, _ = baselines.best_and_worst(x0, rewards)
    assert torch.equal(ends[4], x0[4, [best[4, 0], worst[4, 0]]])


def test_gpo_on_pairs_is_diffusion_dpo_and_on_groups_the_mean_over_their_pairs():
    loss_theta, loss_ref, rewards = normal(5, 2), normal(5, 2, seed=1), normal(5, 2, seed=2)
    torch.testing.assert_close(
        baselines.gpo_loss(loss_theta, loss_ref, rewards, 3.0),
        dgpo.dgpo_loss(loss_theta, loss_ref, dgpo.group_advantages(rewards), 3.0 / 2),
    )

    loss_theta, loss_ref = normal(2, 4), normal(2, 4, seed=1)
    rewards = torch.tensor([[0.0, 1.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0]], dtype=F64)
    gap = (loss_theta - loss_ref)[0]
    pairs = [(1, 0), (2, 0), (3, 0), (3, 1), (3, 2)]  # a tie is no preference
    by_pair = [-F.logsigmoid(-3.0 / 2 * (gap[w] - gap[lose])) for w, lose in pairs]
    expected = torch.stack(by_pair).mean() / 2  # the second group has no pairs, and counts as 0
    torch.testing.assert_close(baselines.gpo_loss(loss_theta, loss_ref, rewards, 3.0), expected)
