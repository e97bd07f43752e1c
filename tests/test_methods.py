"""The methods are what their papers say, and meet DGPO where they should."""

import copy
import itertools
import math

import flow2d
import methods
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
    trajectory, times = methods.sample_sde(
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
    trajectory, times = methods.sample_sde(velocity, noise, 10, torch.Generator(), a=0.0)
    x = noise
    for t, s in zip(times[:-1], times[1:], strict=True):
        x = x + (s - t) * velocity(x, t)
    torch.testing.assert_close(trajectory[-1], x)


def test_a_step_by_hand():
    """t = 0.5, s = 0.4, x = 2, v = 1, a = 0.6: g^2 = 0.36, mean 2 - 0.1 (1 + 0.36 / 1 * 2.5)."""
    x, t, s = (torch.tensor(value, dtype=F64) for value in (2.0, 0.5, 0.4))
    mean, std = methods.sde_step(lambda x, t: torch.ones_like(x), x, t, s, a=0.6)
    assert mean.item() == pytest.approx(2 - 0.1 * (1 + 0.36 * 2.5))
    assert std.item() == pytest.approx(math.sqrt(0.36 * 0.1))
    # At t = 1, s stands in for t in the denominator: g^2 = a^2 / (1 - 0.9).
    _, std = methods.sde_step(lambda x, t: x, x, torch.tensor(1.0), torch.tensor(0.9), a=0.6)
    assert std.item() == pytest.approx(0.6)


def test_the_log_prob_is_the_gaussians():
    x, mean, std = normal(3, 4, 2, 5), normal(3, 4, 2, 5, seed=1), torch.tensor(0.3, dtype=F64)
    expected = torch.distributions.Normal(mean, std).log_prob(x).sum((2, 3))
    torch.testing.assert_close(methods.gaussian_log_prob(x, mean, std), expected)


def test_flow_grpo_starts_as_reinforce():
    """At theta = theta_old, rho is 1 and the gradient that of -A log p_theta."""
    log_prob, A = normal(4, 6).requires_grad_(), dgpo.group_advantages(normal(4, 6, seed=1))
    loss = methods.flow_grpo_loss(log_prob, log_prob.detach(), A, clip=0.2)
    assert loss.item() == pytest.approx(0, abs=1e-12)  # -mean A
    (gradient,) = torch.autograd.grad(loss, log_prob)
    (reinforce,) = torch.autograd.grad(-(A * log_prob).mean(), log_prob)
    torch.testing.assert_close(gradient, reinforce)


def test_flow_grpo_clips_by_hand():
    """A good step stops being pushed up past 1 + clip, a bad one down past 1 - clip."""
    rho = torch.tensor([[1.3, 1.1, 0.5, 0.7, 0.9, 1.5]], dtype=F64)
    A = torch.tensor([[1.0, 1.0, 1.0, -1.0, -1.0, -1.0]], dtype=F64)
    log_prob = rho.log().requires_grad_()
    loss = methods.flow_grpo_loss(log_prob, torch.zeros_like(rho), A, clip=0.2)
    assert loss.item() == pytest.approx((-1.2 - 1.1 - 0.5 + 0.8 + 0.9 + 1.5) / 6)
    (gradient,) = torch.autograd.grad(loss, log_prob)
    expected = (-A * rho / 6).masked_fill(torch.tensor([[True, False, False] * 2]), 0)
    torch.testing.assert_close(gradient, expected)


def test_diffusion_dpo_is_dgpo_on_the_two_extremes():
    """At the same beta, as Eq. 17's gap is then a mean over the group of two."""
    loss_theta, loss_ref, rewards = normal(9, 8), normal(9, 8, seed=1), normal(9, 8, seed=2)
    best, worst = rewards.argmax(1, keepdim=True), rewards.argmin(1, keepdim=True)
    gap = loss_theta - loss_ref
    published = -F.logsigmoid(-3.0 / 2 * (gap.gather(1, best) - gap.gather(1, worst))).mean()

    p, kept = torch.arange(9)[:, None], dgpo.extremes(rewards, 2)
    A = dgpo.group_advantages(rewards[p, kept])
    ours = dgpo.dgpo_loss(loss_theta[p, kept], loss_ref[p, kept], A, 3.0 / 2)
    torch.testing.assert_close(ours, published)


def test_sdpo_is_diffusion_dpo_where_the_loser_does_no_harm_and_else_spares_the_winner():
    v_star, loss_ref, beta = normal(6, 2, 3, seed=1), normal(6, 2, seed=2), 2.0
    v = v_star + normal(6, 2, 3)
    with torch.no_grad():
        v[:3, 0] = v_star[:3, 0] - (v - v_star)[:3, 1]  # errors that point apart
        v[3:5, 0] = v_star[3:5, 0] + 3 * (v - v_star)[3:5, 1]  # a loser's error thrice as large
        v[5, 0] = v_star[5, 0] + 0.1 * (v - v_star)[5, 1]  # and one that is small
    v.requires_grad_()
    (ours,) = torch.autograd.grad(methods.sdpo_loss(v, v_star, loss_ref, beta), v)
    loss, A = (v - v_star).square().mean(2), torch.tensor([-1.0, 1.0], dtype=F64).expand(6, 2)
    published = dgpo.dgpo_loss(loss, loss_ref, A, beta / 2) / beta
    (theirs,) = torch.autograd.grad(published, v)
    torch.testing.assert_close(ours[:3], theirs[:3])
    torch.testing.assert_close(ours[3:, 1], theirs[3:, 1])  # the winner's part is as it was
    # The loser's is as long as 0.9 of the winner's: a step along both still lowers L_w.
    torch.testing.assert_close(ours[3:5, 0].norm(dim=1), 0.9 * ours[3:5, 1].norm(dim=1))
    torch.testing.assert_close(ours[5], theirs[5])


def test_awm_is_dgpo_with_its_gate_frozen():
    """As beta goes to 0, the gate goes to 1/2, and the gradient over beta to half of AWM's."""
    loss_theta, loss_ref = normal(4, 6).requires_grad_(), normal(4, 6, seed=1)
    A, beta = dgpo.group_advantages(normal(4, 6, seed=2)), 1e-9
    gated = dgpo.dgpo_loss(loss_theta, loss_ref, A, beta / 6) / beta
    (awm,) = torch.autograd.grad(methods.awm_loss(loss_theta, A), loss_theta)
    torch.testing.assert_close(torch.autograd.grad(gated, loss_theta)[0], awm / 2)


def test_nft_is_a_linear_term_and_a_bowl_around_theta_old():
    """2 A e.d + 5 b ||d||^2, once each square is no longer divided by its error, and times t^2."""
    v, v_old, v_star = (normal(4, 6, 3, seed=seed) for seed in (0, 1, 2))
    A, t, b = dgpo.group_advantages(normal(4, 6, seed=3)), normal(4, 1, seed=4).sigmoid(), 0.3
    d, e = v - v_old, v_old - v_star
    # An enormous floor under the error makes the division one by a constant.
    loss, at_old = (methods.nft_loss(u, v_old, v_star, t, A, b, eps=1e6) * 1e6 for u in (v, v_old))
    squares = 2 * A * (e * d).mean(2) + 5 * b * d.square().mean(2)
    torch.testing.assert_close(loss - at_old, (t**2 * squares).mean())


def test_nft_at_theta_old_goes_where_awm_goes():
    """There each sample's gradient is AWM's, divided by t^-1 of its mean error."""
    v, v_star = normal(2, 6, 3).requires_grad_(), normal(2, 6, 3, seed=1)
    A, t = dgpo.group_advantages(normal(2, 6, seed=2)), torch.full((2, 1), 0.4, dtype=F64)
    nft = methods.nft_loss(v, v.detach(), v_star, t, A, b=2.0)
    awm = (A * (v - v_star).square().mean(2)).mean()
    error = (v - v_star).detach().abs().mean(2, keepdim=True)
    (ours,), (theirs,) = (torch.autograd.grad(loss, v) for loss in (nft, awm))
    torch.testing.assert_close(ours, 0.4 * theirs / error)


def test_gpo_on_pairs_is_diffusion_dpo_and_on_groups_the_mean_over_their_pairs():
    loss_theta, loss_ref, rewards = normal(5, 2), normal(5, 2, seed=1), normal(5, 2, seed=2)
    torch.testing.assert_close(
        methods.gpo_loss(loss_theta, loss_ref, rewards, 3.0),
        dgpo.dgpo_loss(loss_theta, loss_ref, dgpo.group_advantages(rewards), 3.0 / 2),
    )

    loss_theta, loss_ref = normal(2, 4), normal(2, 4, seed=1)
    rewards = torch.tensor([[0.0, 1.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0]], dtype=F64)
    gap = (loss_theta - loss_ref)[0]
    pairs = [(1, 0), (2, 0), (3, 0), (3, 1), (3, 2)]  # a tie is no preference
    by_pair = [-F.logsigmoid(-3.0 / 2 * (gap[w] - gap[lose])) for w, lose in pairs]
    expected = torch.stack(by_pair).mean() / 2  # the second group has no pairs, and counts as 0
    torch.testing.assert_close(methods.gpo_loss(loss_theta, loss_ref, rewards, 3.0), expected)


SETTINGS = {
    "DGPO": methods.Setting("ring-2", "DGPO", prompts=8, timesteps=4),
    "DGPO with dials": methods.Setting(
        "ring-2", "DGPO", samples=4, bound=2.0, ema=0.5, updates=2, average=0.9, decay=1e5
    ),
    "DGPO, held to the reference": methods.Setting(
        "ring-2", "DGPO", bound=2.0, anchor="reference", ema=0.5
    ),
    "DGPO with SDE rollouts and a clip": methods.Setting(
        "ring-2", "DGPO", sde_noise=0.7, ema=0.5, clip=0.5
    ),
    "AWM": methods.Setting("ring-2", "AWM", learning_rate=5e-4, kl=0.1),
    "DiffusionNFT": methods.Setting("ring-2", "NFT", ema=0.8),
    "Diffusion-DPO": methods.Setting("ring-2", "Diffusion-DPO", offline=True),
    "Diffusion-SDPO": methods.Setting("ring-2", "SDPO"),
    "GPO": methods.Setting("ring-2", "GPO", shared_noise=False, rollout_steps=5, samples=8),
    "Flow-GRPO": methods.Setting("ring-2", "Flow-GRPO", sde_noise=0.7, samples=8),
    "Flow-GRPO, half its steps": methods.Setting(
        "ring-2", "Flow-GRPO", sde_noise=0.7, rollout_steps=5, trained_share=0.5
    ),
    "Flow-GRPO, 4 updates": methods.Setting(
        "ring-2", "Flow-GRPO", learning_rate=5e-4, sde_noise=0.7, updates=4, clip=0.05
    ),
}


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("fields", "arguments"),
    [
        ({}, {}),
        (
            {"ema": 0.5, "samples": 4, "bound": 2.0, "updates": 2, "clip": 0.5},
            {"ema": 0.5, "train_samples": 4, "bound": 2.0, "updates": 2, "clip": 0.5},
        ),
    ],
)
def test_dgpo_here_is_algorithm_1_there(fields, arguments, model):
    """The common loop with DGPO in it takes the steps of dgpo.train, to the bit."""
    here, there = copy.deepcopy(model), copy.deepcopy(model)
    setting = methods.Setting("ring-2", "DGPO", prompts=8, timesteps=4, **fields)
    for _ in itertools.islice(methods.learn(here, setting, seeded()), 5):
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
        **arguments,
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
    for cost in itertools.islice(methods.learn(model, SETTINGS[name], seeded()), 2):
        assert cost == counted


@pytest.mark.parametrize("name", SETTINGS)
def test_every_method_learns(name, model):
    c = torch.arange(4).repeat_interleave(200)
    noise = torch.randn(800, 2, generator=seeded())

    def reward():
        return flow2d.reward(c, flow2d.sample(model, c, noise)).mean().item()

    before = reward()
    for _ in itertools.islice(methods.learn(model, SETTINGS[name], seeded()), 40):
        pass
    assert reward() > before + 1
