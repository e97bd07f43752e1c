"""The paper's claims about the method, one test a claim."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

import dgpo
from toy import flow2d

F64 = torch.float64


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def reward_groups(kind, P, G, dtype, seed=0):
    rewards = normal(P, G, seed=seed)
    if kind == "heavy-tailed":
        rewards = rewards / normal(P, G, seed=seed + 1)  # Cauchy
    elif kind == "outlier":
        rewards[:, 0] = 1e3
    elif kind == "ties":
        rewards = rewards.round()
    elif kind == "far from zero":
        rewards = rewards + 1e4
    return rewards.to(dtype)


KINDS = ("normal", "heavy-tailed", "outlier", "ties", "far from zero")


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("std", ["group", "batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_both_sides_are_equal(kind, std, dtype):
    """Section 3.2: sum_{G+} w = sum_{G-} w, because advantages sum to zero."""
    for G in (2, 3, 8, 24, 256):
        for scale in (1e-6, 1.0, 1e6):
            rewards = reward_groups(kind, 5, G, dtype, seed=G) * scale
            advantages = dgpo.group_advantages(rewards, std)
            w, positive = dgpo.weights(advantages), dgpo.partition(advantages)
            good, bad = (w * positive).sum(1), (w * ~positive).sum(1)
            rounding = 4 * torch.finfo(dtype).eps * w.sum(1)
            assert ((good - bad).abs() <= rounding).all(), (G, scale, good - bad)


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_are_bounded_and_standardised(kind):
    """Eq. 12 with the population's std: mean 0, std 1, and |A| <= sqrt(G - 1)."""
    for G in (2, 3, 24, 256):
        A = dgpo.group_advantages(reward_groups(kind, 5, G, F64, seed=G))
        unequal = A.abs().sum(1) > 0
        assert (A.abs() <= math.sqrt(G - 1) * (1 + 1e-12)).all()
        assert A[unequal].square().mean(1).numpy() == pytest.approx(1, abs=1e-12)
    lone = torch.zeros(1, 24, dtype=F64)
    lone[0, 3] = 1
    assert dgpo.group_advantages(lone)[0, 3].item() == pytest.approx(math.sqrt(23))


def test_batch_std_divides_all_groups_by_one_number():
    rewards = torch.tensor([[0.0, 2.0], [10.0, 30.0]], dtype=F64)
    spread = math.sqrt((10.5**2 + 8.5**2 + 0.5**2 + 19.5**2) / 4)
    expected = torch.tensor([[-1.0, 1.0], [-10.0, 10.0]], dtype=F64) / spread
    torch.testing.assert_close(dgpo.group_advantages(rewards, "batch"), expected)


def test_eps_is_added_to_the_std():
    rewards = torch.tensor([[0.0, 2.0]], dtype=F64)
    assert dgpo.group_advantages(rewards, eps=3.0).tolist() == [[-0.25, 0.25]]


def test_partition_puts_average_samples_in_the_bad_set():
    """Eq. 13: A = 0 belongs to G-."""
    A = torch.tensor([[1.5, 0.0, -1.5, 1e-30]])
    assert dgpo.partition(A).tolist() == [[True, False, False, True]]
    assert dgpo.weights(A).tolist() == [[1.5, 0.0, 1.5, pytest.approx(1e-30)]]
    assert not dgpo.partition(dgpo.group_advantages(torch.full((2, 5), 0.3))).any()


def test_z_cancels_under_balanced_weights_only():
    """Eq. 11: the loss does not see beta log Z(c) iff sum_{G+} w = sum_{G-} w."""
    implicit, A = normal(7, 24), dgpo.group_advantages(normal(7, 24, seed=1))
    beta_log_z = 30 * normal(7, 1, seed=2)
    positive = dgpo.partition(A)

    def loss(implicit_reward, w):
        return -F.logsigmoid(dgpo.group_gap(implicit_reward, w, positive))

    w = dgpo.weights(A)
    torch.testing.assert_close(loss(implicit + beta_log_z, w), loss(implicit, w))

    for w in (torch.ones_like(A), A.square()):
        unbalanced = (w * positive).sum(1) - (w * ~positive).sum(1)
        assert unbalanced.abs().max() > 1
        predicted = dgpo.group_gap(implicit, w, positive) + unbalanced * beta_log_z[:, 0]
        torch.testing.assert_close(loss(implicit + beta_log_z, w), -F.logsigmoid(predicted))
        assert not torch.allclose(loss(implicit + beta_log_z, w), loss(implicit, w))


def test_clamped_advantages_are_centred_again():
    """A clamp at 5 alone would unbalance the weights, and Z(c) would no longer cancel."""
    rewards = torch.ones(8, 16, dtype=F64)  # one bad sample in 128
    rewards[0, 0] = 0
    A = dgpo.group_advantages(rewards, "batch")
    assert A.min().item() == pytest.approx(-10.6, abs=0.05)
    assert A[0].clamp(-5, 5).sum().abs() > 1

    clamped = dgpo.group_advantages(rewards, "batch", clamp=5.0)
    assert clamped.sum(1).abs().max() < 1e-12
    expected = A[0].clamp(-5, 5) - A[0].clamp(-5, 5).mean()
    torch.testing.assert_close(clamped[0], expected)
    assert (clamped[1:] == 0).all()
    torch.testing.assert_close(dgpo.group_advantages(rewards, "batch", clamp=11.0), A)


def random_step(n, seed):
    """A step t -> s of a random schedule, and x0, f and x_t to take it from."""
    g = torch.Generator().manual_seed(seed)
    alpha_t, sigma_t, alpha_s, sigma_s, share = (
        0.05 + 0.9 * torch.rand(n, generator=g, dtype=F64) for _ in range(5)
    )
    return alpha_t, sigma_t, alpha_s, sigma_s, share * sigma_s


def posterior(x0, x_t, alpha_t, sigma_t, alpha_s, sigma_s, eta_s):
    """q(x_{t-1} | x_t, x0) of Appendix C.3; with f for x0, p_theta(x_{t-1} | x_t)."""
    mean = alpha_s * x0 + (sigma_s**2 - eta_s**2).sqrt() * (x_t - alpha_t * x0) / sigma_t
    return Normal(mean, eta_s)


def test_eq22_the_gaussian_kl_is_lambda_t_times_the_squared_error():
    x0, f, x_t = normal(200, 3), normal(200, 3, seed=1), normal(200, 3, seed=2)
    step = random_step(200, seed=3)
    columns = [value[:, None] for value in step]
    kl = kl_divergence(posterior(x0, x_t, *columns), posterior(f, x_t, *columns)).sum(1)
    torch.testing.assert_close(kl, dgpo.lambda_t(*step) * (x0 - f).square().sum(1))
    assert dgpo.lambda_t(0.5, 0.5, 0.6, 0.4, 0.4) == pytest.approx(0.6**2 / (2 * 0.4**2))


def test_eq21_built_from_gaussian_kls_equals_eq17():
    P, G, D, T, beta = 5, 8, 3, 10, 0.3
    x0, f, f_ref = normal(P, G, D), normal(P, G, D, seed=1), normal(P, G, D, seed=2)
    x_t = normal(P, G, D, seed=3)
    step = random_step(P, seed=4)  # one t a group
    columns = [value[:, None, None] for value in step]
    q, p, p_ref = (posterior(mean, x_t, *columns) for mean in (x0, f, f_ref))
    kl = (kl_divergence(q, p) - kl_divergence(q, p_ref)).sum(2)
    A = dgpo.group_advantages(normal(P, G, seed=5))
    w, positive = A.abs(), A > 0
    eq21 = -F.logsigmoid(
        -beta * T * ((w * kl * positive).sum(1) - (w * kl * ~positive).sum(1))
    ).mean()

    losses = ((x0 - prediction).square().sum(2) for prediction in (f, f_ref))
    eq17 = dgpo.dgpo_loss(*losses, A, beta=beta * T * dgpo.lambda_t(*step))
    torch.testing.assert_close(eq21, eq17)


def test_error_in_x0_is_t_squared_times_error_in_velocity():
    x0, eps, v = normal(4, 6, 5), normal(4, 1, 5, seed=1), normal(4, 6, 5, seed=2)
    t = dgpo.sample_timesteps((4, 1), generator=torch.Generator().manual_seed(0)).double()
    f = dgpo.diffuse(x0, eps, t) - t[..., None] * v
    torch.testing.assert_close((f - x0).square().mean(2), t.square() * dgpo.dsm_loss(v, x0, eps))


def test_eq17_by_hand():
    """A = (1, -1/2, -1/2), beta = 2: the gap is -(1 * 0.3 - 0.5 * 0.1 + 0.5 * 0.2) = -0.35."""
    loss_theta, loss_ref = torch.tensor([[1.3, 0.6, 0.4]]), torch.tensor([[1.0, 0.5, 0.6]])
    A = torch.tensor([[1.0, -0.5, -0.5]])
    assert dgpo.preference_gap(loss_theta, loss_ref, A).item() == pytest.approx(-0.35)
    loss = dgpo.dgpo_loss(loss_theta, loss_ref, A, beta=2.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(0.7)))
    k, gate = dgpo.group_gradient(loss_theta, loss_ref, A, beta=2.0)
    assert gate.tolist() == [pytest.approx(1 / (1 + math.exp(-0.7)))]
    assert k.tolist() == [pytest.approx([gate.item(), -gate.item() / 2, -gate.item() / 2])]


def test_jensen_eq15_is_at_most_eq16():
    """-log sigmoid of the mean over (t, x_t) is below the mean of -log sigmoid, by Monte Carlo."""
    P, G, draws = 4, 8, 20_000
    x0 = normal(P, G, 2)
    A = dgpo.group_advantages(normal(P, G, seed=1))
    t, eps = torch.rand(draws, P, 1, dtype=F64), normal(draws, P, 1, 2, seed=2)
    x_t = (1 - t[..., None]) * x0 + t[..., None] * eps
    # Two arbitrary denoisers; the inequality holds for any.
    f, f_ref = torch.tanh(2 * x_t - 1), 0.5 * x_t
    ratio = (f_ref - x0).square().sum(-1) - (f - x0).square().sum(-1)
    implicit = (A * ratio).sum(-1)  # (draws, P)
    for beta in (0.1, 1.0, 10.0):
        eq15 = -F.logsigmoid(beta * implicit.mean(0)).mean()
        eq16 = -F.logsigmoid(beta * implicit).mean()
        assert eq15 < eq16


def test_loss_is_log_2_at_the_reference_and_falls_as_the_gap_widens():
    A = dgpo.group_advantages(normal(1, 8))
    loss_ref = normal(1, 8, seed=1).abs()
    assert dgpo.dgpo_loss(loss_ref, loss_ref, A, 5.0).item() == pytest.approx(
        math.log(2), abs=1e-15
    )

    # Moving L by -d A widens the gap by 8 d, as sum A^2 = G = 8.
    widening = torch.linspace(-4, 4, 81, dtype=F64)
    loss = torch.stack([dgpo.dgpo_loss(loss_ref - d * A, loss_ref, A, 1.0) for d in widening])
    assert (loss > 0).all() and (loss.diff() < 0).all()
    assert loss[-1].item() < 1e-13
    assert loss[0].item() == pytest.approx(32, rel=1e-12)  # beta |gap|

    for dtype in (torch.float32, F64):
        extreme = torch.tensor([[1e6, 0.0]], dtype=dtype)
        A = torch.tensor([[1.0, -1.0]], dtype=dtype)
        zero = torch.zeros_like(extreme)
        assert dgpo.dgpo_loss(extreme, zero, A, 100.0).item() == pytest.approx(1e8)
        assert dgpo.dgpo_loss(zero, extreme, A, 100.0).item() == 0


def test_gradient_is_gate_times_advantage_weighted_denoising():
    """grad = beta sigmoid(-beta gap) sum_i A_i grad L_i / P, by autograd and differences."""
    P, G, beta = 3, 6, 1.7
    loss_theta = normal(P, G).abs().requires_grad_()
    loss_ref, A = normal(P, G, seed=1).abs(), dgpo.group_advantages(normal(P, G, seed=2))
    (gradient,) = torch.autograd.grad(dgpo.dgpo_loss(loss_theta, loss_ref, A, beta), loss_theta)
    k, gate = dgpo.group_gradient(loss_theta, loss_ref, A, beta)
    assert not k.requires_grad
    torch.testing.assert_close(gradient, beta * gate[:, None] * A / P)
    torch.testing.assert_close(gradient, beta * k / P)
    assert torch.autograd.gradcheck(lambda x: dgpo.dgpo_loss(x, loss_ref, A, beta), loss_theta)


def test_the_kl_by_hand():
    v, v_ref = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]]), torch.tensor([[[0.0, 4.0], [0.0, 3.0]]])
    assert dgpo.mean_square(v, v_ref).tolist() == [[2.5, 4.5]]


def test_groups_of_two_are_diffusion_dpo():
    """Wallace et al.: -log sigmoid(-beta/2 [(L_w - L_w^ref) - (L_l - L_l^ref)]), at 2 beta.

    At G = 2 the advantages are +1 and -1 whatever the rewards: only the factor 1/2 differs.
    """
    loss_theta, loss_ref, rewards = normal(50, 2), normal(50, 2, seed=1), normal(50, 2, seed=2)
    winner = rewards.argmax(1, keepdim=True)
    theta_w, ref_w = loss_theta.gather(1, winner), loss_ref.gather(1, winner)
    theta_l, ref_l = loss_theta.gather(1, 1 - winner), loss_ref.gather(1, 1 - winner)
    beta = 0.8
    dpo = -F.logsigmoid(-2 * beta / 2 * ((theta_w - ref_w) - (theta_l - ref_l))).mean()
    ours = dgpo.dgpo_loss(loss_theta, loss_ref, dgpo.group_advantages(rewards), beta)
    torch.testing.assert_close(ours, dpo)


def variance_ratios(theta, reference, G, t, follow, groups, draws=60):
    """Variance over eps if shared, over that if not: of S, and of sum_i A_i grad L_i.

    Summed over groups. follow: A from the samples' own rewards, else from the same ones shuffled.
    """
    g = torch.Generator().manual_seed(1)
    totals = torch.zeros(2, 2, dtype=F64)  # shared or not x S or gradient
    for _ in range(groups):
        c = flow2d.sample_conditions(1, g)
        each_c, each_t = c.expand(G), torch.full((G,), t)
        x0 = flow2d.sample(reference, each_c, torch.randn(G, 2, generator=g))[None]
        order = slice(None) if follow else torch.randperm(G, generator=g)
        A = dgpo.group_advantages(flow2d.reward(c[:, None], x0)[:, order])
        for row, members in enumerate((1, G)):
            gaps, gradients = [], []
            for _ in range(draws):
                eps = torch.randn(1, members, 2, generator=g)
                x_t = dgpo.diffuse(x0, eps, torch.tensor([[t]]))[0]
                loss, loss_ref = (
                    dgpo.dsm_loss(model(x_t, each_t, each_c)[None], x0, eps)
                    for model in (theta, reference)
                )
                gaps.append(dgpo.preference_gap(loss.detach(), loss_ref, A))
                gradient = torch.autograd.grad((A * loss).sum(), list(theta.parameters()))
                gradients.append(torch.cat([part.flatten() for part in gradient]))
            totals[row] += torch.stack([torch.cat(gaps).var(), torch.stack(gradients).var(0).sum()])
    return (totals[0] / totals[1]).tolist()


TIMES = (0.3, 0.6, 0.9)


@pytest.fixture(scope="module")
def theta(reference):
    """A policy on its way: 40 iterations of DGPO from the reference."""
    model = copy.deepcopy(reference).requires_grad_(True)
    for _ in toy_training(model, iterations=40):
        pass
    return model


def toy_training(model, seed=0, **settings):
    settings = {
        "prompts": 16,
        "group_size": 24,
        "beta": 1.0,
        "learning_rate": 1.5e-3,
        "t_min": 0.2,
        "rollout_steps": 10,
        "train_timesteps": 2,
        **settings,
    }
    generator = torch.Generator().manual_seed(seed)
    return dgpo.train(model, flow2d.reward, flow2d.sample_conditions, (2,), generator, **settings)


def test_shared_noise_steadies_a_pair(theta, reference):
    """Below Eq. 16: sharing eps reduces the variance. At G = 2 it does, of S and the gradient."""
    ratios = [variance_ratios(theta, reference, 2, t, follow=True, groups=8) for t in TIMES]
    assert all(ratio < 1 for pair in ratios for ratio in pair), ratios
    assert max(sum(column) / len(TIMES) for column in zip(*ratios, strict=True)) < 0.75, ratios


def test_shared_noise_unsettles_a_group_whose_advantages_follow_position(theta, reference):
    """Against the paper's remark: at G = 24 sharing raises the variance of both."""
    ratios = [variance_ratios(theta, reference, 24, t, follow=True, groups=6) for t in TIMES]
    assert all(gradient > 1.3 for _, gradient in ratios), ratios
    assert sum(gap for gap, _ in ratios) / len(TIMES) > 1.2, ratios


def test_shared_noise_steadies_a_group_whose_advantages_do_not(theta, reference):
    """The explanation in dgpo.py: the same groups with their rewards shuffled gain by sharing."""
    ratios = [variance_ratios(theta, reference, 24, t, follow=False, groups=6) for t in TIMES]
    assert max(sum(column) / len(TIMES) for column in zip(*ratios, strict=True)) < 0.8, ratios


def test_no_timestep_below_t_min():
    for t_min in (0.0, 0.3, 0.9):
        t = dgpo.sample_timesteps((100_000,), t_min, torch.Generator().manual_seed(0))
        assert t_min <= t.min().item() + 1e-7 and t.max() <= 1
        assert t.mean().item() == pytest.approx((1 + t_min) / 2, abs=0.005 * (1 - t_min))
        assert t.std().item() == pytest.approx((1 - t_min) / math.sqrt(12), rel=0.01)
    assert dgpo.sample_timesteps((2, 1)).shape == (2, 1)


def test_diffuse_shares_noise_within_a_group():
    x0, eps = normal(3, 4, 2), normal(3, 1, 2, seed=1)
    t = torch.tensor([[0.1], [0.5], [1.0]], dtype=F64)
    x_t = dgpo.diffuse(x0, eps, t)
    for p in range(3):
        for g in range(4):
            torch.testing.assert_close(x_t[p, g], (1 - t[p, 0]) * x0[p, g] + t[p, 0] * eps[p, 0])
    each = dgpo.diffuse(x0, eps, t.expand(3, 4))
    torch.testing.assert_close(each, x_t)


def test_the_solver_converges_at_order_2():
    """Halving the step divides the error by about 4.

    Data N(m, s^2): the flow is x_t = (1 - t) m + sqrt((1 - t)^2 s^2 + t^2) x_1, solved exactly. In
    steps of equal t, DPM-Solver++ misses 4 by a factor log(steps), from its long steps in lambda.
    """
    m, s = 1.5, 0.5

    def velocity(x, t):
        variance = (1 - t) ** 2 * s**2 + t**2
        return -m + (t - (1 - t) * s**2) / variance * (x - (1 - t) * m)

    noise = normal(64)
    errors = [
        (dgpo.sample_ode(velocity, noise, steps) - (m + s * noise)).abs().max().item()
        for steps in (80, 160, 320)
    ]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert 3.2 < coarse / fine < 4.1, errors


def test_clip_mask_by_hand():
    """Dropped: a good sample already denoised better by over 5 %, a bad one worse by over 5 %."""
    A = torch.tensor([[1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 0.0, 0.0]])
    ratio = torch.tensor([[1.06, 1.04, 0.5, 0.94, 0.96, 1.5, 0.94, 0.96]])
    loss_old = torch.full_like(ratio, 0.7)
    loss_theta = loss_old - ratio.log()
    expected = [[True, False, False, True, False, False, True, False]]
    assert dgpo.clip_mask(loss_theta, loss_old, A, 0.05).tolist() == expected
    assert not dgpo.clip_mask(loss_old, loss_old, A, 0.0).any()


def test_ema_update_is_the_closed_form():
    """theta^- after n steps towards a fixed theta is theta + mu^n (theta^-_0 - theta)."""
    start, theta, mu = normal(5), normal(5, seed=1), 0.9
    averaged = start.clone()
    for _ in range(7):
        dgpo.ema_update([averaged], [theta], mu)
    torch.testing.assert_close(averaged, theta + mu**7 * (start - theta))
    dgpo.ema_update([averaged], [theta], 0.0)
    assert torch.equal(averaged, theta)
    dgpo.ema_update([averaged], [start], 1.0)
    assert torch.equal(averaged, theta)


@pytest.mark.parametrize("std", ["group", "batch"])
def test_a_group_of_equal_rewards_has_advantages_of_exactly_zero(std):
    rewards = normal(3, 4, seed=5)
    rewards[1] = 0.1 + 0.2  # whose mean over 4 is rounded
    A = dgpo.group_advantages(rewards, std)
    assert (A[1] == 0).all() and (A[[0, 2]] != 0).all() and A.isfinite().all()
    assert (dgpo.group_advantages(torch.full((2, 3), 7.0), std) == 0).all()


class Linear(torch.nn.Module):
    """A velocity with one weight for each condition, in float64."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(3 * normal(4, 2, 3))

    def forward(self, x, t, c):
        inputs = torch.cat([x, t[:, None].to(x.dtype)], 1)
        return (self.weight[c] @ inputs[..., None])[..., 0]


def test_an_iteration_of_algorithm_1_by_hand():
    """Lines 3 to 15, written out for one group: the same rollout, loss, gradient and update."""
    P, G, K, beta, rate = 2, 5, 3, 4.0, 1e-2
    model = Linear()
    before = model.weight.detach().clone()
    torch.set_default_dtype(F64)
    try:
        settings = {"prompts": P, "group_size": G, "beta": beta, "learning_rate": rate}
        settings |= {"t_min": 0.3, "rollout_steps": 4, "train_timesteps": K, "iterations": 1}
        (metrics,) = toy_training(model, **settings)

        generator = torch.Generator().manual_seed(0)
        by_hand = Linear()
        c = flow2d.sample_conditions(P, generator)
        noise = torch.randn(P, G, 2, generator=generator)
        x0 = torch.stack([flow2d.sample(by_hand, c[p].expand(G), noise[p], 4) for p in range(P)])
        rewards = flow2d.reward(c[:, None], x0)
        t = 0.3 + 0.7 * torch.rand(K, P, generator=generator)
        eps = torch.randn(K, P, 2, generator=generator)
        losses = []
        for k in range(K):
            for p in range(P):
                A = (rewards[p] - rewards[p].mean()) / rewards[p].std(correction=0)
                x_t = (1 - t[k, p]) * x0[p] + t[k, p] * eps[k, p]
                v_star = eps[k, p] - x0[p]
                rows = x_t, t[k, p].expand(G), c[p].expand(G)
                loss = (by_hand(*rows) - v_star).square().mean(1)
                # theta is the reference here, but only theta's loss has a gradient.
                gap = (A * (loss.detach() - loss)).mean()
                losses.append(-F.logsigmoid(beta * gap))
        mean_loss = torch.stack(losses).mean()
        (mean_loss / beta).backward()
        norm = torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        torch.optim.AdamW(by_hand.parameters(), rate, weight_decay=0.0).step()
    finally:
        torch.set_default_dtype(torch.float32)

    assert not torch.equal(model.weight, before)
    torch.testing.assert_close(model.weight, by_hand.weight, rtol=1e-9, atol=1e-12)
    expected = {
        "reward": rewards.mean(),
        "loss": mean_loss.detach(),
        "gate": 0.5,
        "grad_norm": norm,
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-9)
    assert metrics["gap"] == pytest.approx(0, abs=1e-12)
    assert norm > 1  # so the gradient was clipped


def test_the_loss_gate_and_gap_of_one_group_are_those_of_eq17(model):
    """loss = -log sigmoid(beta gap) = -log(1 - gate), at one timestep, which is the default."""
    settings = {"prompts": 1, "group_size": 8, "beta": 3.0, "iterations": 6}
    settings |= {"learning_rate": 1e-3, "t_min": 0.2, "rollout_steps": 4}
    world = flow2d.reward, flow2d.sample_conditions, (2,), torch.Generator().manual_seed(0)
    *_, last = dgpo.train(model, *world, **settings)
    assert abs(last["gap"]) > 1e-3
    assert last["gate"] == pytest.approx(1 / (1 + math.exp(3 * last["gap"])), rel=1e-5)
    assert last["loss"] == pytest.approx(-math.log(1 - last["gate"]), rel=1e-5)


def test_algorithm_1_samples_from_theta_from_its_ema_or_from_the_reference(model, monkeypatch):
    """Line 4 and 15: with decay 1, or offline, theta^- never moves; else the rollouts improve."""
    rewards = {}
    for name, settings in {
        "online": {},
        "ema": {"ema": 0.9},
        "still": {"ema": 1.0},
        "offline": {"offline": True},
    }.items():
        history = list(toy_training(copy.deepcopy(model), iterations=40, **settings))
        rewards[name] = sum(metrics["reward"] for metrics in history[-5:]) / 5
    base = flow2d.reward(torch.arange(4), flow2d.mode_centers()[:, None]).mean().item()
    assert base == pytest.approx(-8)
    assert rewards["online"] > -5.5 and rewards["ema"] > -6.5, rewards
    assert rewards["still"] == pytest.approx(rewards["offline"], abs=1e-6)
    assert rewards["offline"] < -7, rewards


L = torch.rand(2, 3)
X0, EPS, T = torch.rand(2, 3, 5), torch.rand(2, 1, 5), torch.rand(2, 1)


BAD_INPUT = {
    "rewards G = 1": (
        lambda: dgpo.group_advantages(L[:, :1]),
        r"rewards must be \(P, G\) with G >= 2, got \(2, 1\)",
    ),
    "rewards inf": (
        lambda: dgpo.group_advantages(torch.tensor([[0, -math.inf]])),
        "rewards must be finite, got -inf at prompt 0, sample 1",
    ),
    "std": (lambda: dgpo.group_advantages(L, "sample"), "std must be 'group' or 'batch'.*'sample'"),
    "t_min": (lambda: dgpo.sample_timesteps((2,), 1.0), r"t_min must be in \[0, 1\), got 1.0"),
    "t": (lambda: dgpo.diffuse(X0, EPS, T[:1]), r"t must be \(2, 1\) or \(2, 3\), got \(1, 1\)"),
    "eps": (lambda: dgpo.diffuse(X0, EPS[:, :, :4], T), r"eps must be one of.*got \(2, 1, 4\)"),
    "velocity": (
        lambda: dgpo.dsm_loss(X0[..., :4], X0, EPS),
        r"velocity and goal need one shape, got \(2, 3, 4\) and \(2, 3, 5\)",
    ),
    "loss_ref": (
        lambda: dgpo.dgpo_loss(L, L[:1], L, 1.0),
        r"need one shape \(P, G\), got {'loss_theta': \(2, 3\), 'loss_ref': \(1, 3\)",
    ),
    "loss_old": (lambda: dgpo.clip_mask(L, L[:, :2], L, 0.1), r"'loss_old': \(2, 2\)"),
    "weights": (lambda: dgpo.group_gap(L, L[0], L > 0), r"'w': \(3,\)"),
    "beta": (lambda: dgpo.dgpo_loss(L, L, L, 0.0), "beta must be positive.*got 0.0"),
    "beta of each group": (
        lambda: dgpo.dgpo_loss(L, L, L, torch.ones(3)),
        r"beta must be positive, a float or \(2,\), got \[1.0, 1.0, 1.0\]",
    ),
    "clip": (lambda: dgpo.clip_mask(L, L, L, -0.1), "clip must be at least 0, got -0.1"),
    "decay": (lambda: dgpo.ema_update([L], [L], 1.1), r"decay must be in \[0, 1\], got 1.1"),
    "steps": (lambda: dgpo.sample_ode(lambda x, t: x, L, 0), "steps must be at least 1, got 0"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named_in_one_line(case):
    call, message = BAD_INPUT[case]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.bfloat16])
def test_rewards_of_any_dtype_are_taken(dtype):
    A = dgpo.group_advantages(torch.tensor([[0, 1, 1, 0], [0, 0, 0, 1]], dtype=dtype))
    assert A.dtype == torch.float32
    torch.testing.assert_close(A[0], torch.tensor([-1.0, 1.0, 1.0, -1.0]))
