"""The methods are what their papers say, and meet DGPO where they should."""

import math
from typing import NamedTuple

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


def pairs(P):
    """A batch of pairs, the loser first."""
    return batch(P, 2, rewards=torch.tensor([0.0, 1.0], dtype=F64).expand(P, 2))


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


def test_the_clip_of_nft_does_what_its_b_does():
    b, undivided = batch(), {"eps": 1e6}
    narrow = methods.nft(b, Setting(beta=2.0, advantage_clip=3.0), **undivided)
    wide = methods.nft(b, Setting(beta=1.0, advantage_clip=6.0), **undivided)
    torch.testing.assert_close(grad(narrow, b.v), grad(wide, b.v))
    cut = b._replace(advantages=b.advantages.clamp(-0.5, 0.5))
    clipped, of_cut = (
        methods.nft(each, Setting(advantage_clip=clip), **undivided)
        for each, clip in ((b, 0.5), (cut, 0.5))
    )
    torch.testing.assert_close(grad(clipped, b.v), grad(of_cut, b.v))


def test_rvm_is_awm_with_a_kl_and_ram_is_it_at_one_with_the_raw_reward():
    """RVM: A (v - v*) + anchor (v - v_ref). RAM: v regressed on v_ref + R (v* - v)."""
    b, anchor = batch(), 0.3
    kl = anchor * dgpo.mean_square(b.v, b.v_ref).mean()
    of_each = b.advantages[..., None] * (b.v - b.v_star) + anchor * (b.v - b.v_ref)
    ours = grad(methods.awm(b, Setting()) + kl, b.v)
    torch.testing.assert_close(ours, 2 / b.v.numel() * of_each)

    goal = (b.v_ref + b.rewards[..., None] * (b.v_star - b.v)).detach()
    raw = methods.awm(b._replace(advantages=b.rewards), Setting())
    ours = grad(raw + dgpo.mean_square(b.v, b.v_ref).mean(), b.v)
    torch.testing.assert_close(ours, grad((b.v - goal).square().mean(), b.v))


@pytest.mark.parametrize("method", ["CRD", "PAR", "V-GRPO"])
def test_at_theta_old_it_is_awm(method):
    """Before the first update, the reward enters all of them as A grad L."""
    b = batch()
    b = b._replace(v_old=b.v.detach().clone())
    ours = grad(methods.METHODS[method].loss(b, Setting(beta=3.0, clip=0.2)), b.v)
    torch.testing.assert_close(ours, grad(methods.awm(b, Setting()), b.v))


def moved(scale, x):
    """A pair at 1e-4 from theta_old, and what Diffusion-DPO does with it at scale * beta."""
    b = pairs(50)
    v_old = b.v.detach() + x * normal(50, 2, 3, seed=7)
    b = b._replace(v_old=v_old, v_ref=v_old)
    k, _ = dgpo.group_gradient(b.loss, b.loss_ref, b.advantages, scale * 2.0 / 2)
    return b, grad((k * b.loss).mean(), b.v)


@pytest.mark.parametrize(("method", "size", "scale"), [("CRD", 2, 2), ("Linear-DPO", 1, 1.6)])
def test_the_residual_and_the_line_are_diffusion_dpo_to_first_order(method, size, scale):
    """On a pair, at 2 and 1.6 times its beta: the difference is of third order, as in a sigmoid."""
    errors = []
    for x in (1e-2, 1e-3):
        b, theirs = moved(scale, x)
        ours = grad(methods.METHODS[method].loss(b, Setting(beta=2.0)), b.v) / size
        errors.append((ours - theirs).abs().max().item())
    assert errors[0] < 1e-4 and errors[1] < 2e-3 * errors[0]
    b, theirs = moved(scale / 2, 1e-2)  # another beta is not the same
    ours = grad(methods.METHODS[method].loss(b, Setting(beta=2.0)), b.v) / size
    assert (ours - theirs).abs().max() > 10 * errors[0]


def test_the_gate_of_linear_dpo_closes_and_opens_fully():
    b = pairs(3)
    for beta in (1e6, -1e6):  # far away on either side
        fell_behind = ((b.loss - b.loss_old) @ torch.tensor([-1.0, 1.0], dtype=F64)) * beta > 0
        gate = fell_behind.double()[:, None] * torch.tensor([-1.0, 1.0], dtype=F64)
        ours = grad(methods.linear_dpo(b, Setting(beta=beta)), b.v)
        torch.testing.assert_close(ours, grad((gate * b.loss).mean(), b.v))


class Losses(NamedTuple):
    """What CRD, PAR and V-GRPO see of a batch."""

    loss: torch.Tensor
    loss_old: torch.Tensor
    advantages: torch.Tensor


def by_loss(method, losses, **setting):
    """The gradient by each sample's loss, times the number of samples: what multiplies grad L."""
    loss = losses.loss.detach().requires_grad_()
    value = methods.METHODS[method].loss(losses._replace(loss=loss), Setting(beta=2.0, **setting))
    return grad(value, loss) * loss.numel()


@pytest.fixture
def losses():
    b = batch()
    return Losses(b.loss.detach(), b.loss_old, b.advantages)


def test_crd_rests_at_the_optimum_and_does_not_see_z(losses):
    """At p_old exp(A / beta) / Z, the residual is zero whatever Z, a shift of a group's losses."""
    z = 5 * normal(4, 1, seed=9)
    optimal = losses._replace(loss_old=losses.loss + losses.advantages / 2.0 + z)
    torch.testing.assert_close(by_loss("CRD", optimal), torch.zeros(4, 6, dtype=F64))
    shifted = losses._replace(loss_old=losses.loss_old + z)
    torch.testing.assert_close(by_loss("CRD", shifted), by_loss("CRD", losses))
    assert not by_loss("PAR", optimal).allclose(torch.zeros(4, 6, dtype=F64))  # which has no centre


def test_par_is_pepg_and_v_grpo_without_a_clip_is_epg(losses):
    """rho (A - log rho) grad L and rho A grad L, with log rho = beta (L_old - L)."""
    log_rho, A = 2.0 * (losses.loss_old - losses.loss), losses.advantages
    torch.testing.assert_close(by_loss("PAR", losses), log_rho.exp() * (A - log_rho))
    torch.testing.assert_close(by_loss("V-GRPO", losses), log_rho.exp() * A)
    clipped = (A > 0) & (log_rho.exp() > 1.2) | (A < 0) & (log_rho.exp() < 0.8)
    assert clipped.any() and not clipped.all()
    expected = (log_rho.exp() * A).masked_fill(clipped, 0)
    torch.testing.assert_close(by_loss("V-GRPO", losses, clip=0.2), expected)


def test_thermo_dpo_is_diffusion_dpo_with_a_third_rival():
    """The paper's Theorems 4.1 and 4.2: its limits, and a term that is never negative."""
    b, beta = pairs(50), 3.0
    tau, anchor = 2 * b.t[:, 0] / beta, (1 - b.t[:, 0]) ** 2 * b.loss[:, 1]
    x = (b.loss - b.loss_ref) @ torch.tensor([-1.0, 1.0], dtype=F64)
    dpo = tau / 2 * F.softplus(x / tau)
    third = tau / 2 * torch.log1p((anchor / tau).exp() / (1 + (x / tau).exp()))
    torch.testing.assert_close(methods.thermo_dpo(b, Setting(beta=beta)), (dpo + third).mean())

    cold = methods.thermo_dpo(b, Setting(beta=1e9))
    hard = torch.maximum(x.clamp(min=0), anchor)
    torch.testing.assert_close(cold, hard.mean() / 2)
    anchored = (anchor > x) & (anchor > 0)
    assert anchored.any() and not anchored.all()
    supervised = torch.where(anchored, anchor, x.clamp(min=0)).mean() / 2
    torch.testing.assert_close(grad(cold, b.v), grad(supervised, b.v))  # the loser is let go


def test_sdpo_is_diffusion_dpo_that_scales_a_harmful_loser_down():
    b, beta = pairs(6), 2.0
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


@pytest.mark.parametrize("method", ["Diffusion-SDPO", "Linear-DPO", "ThermoDPO"])
def test_a_pair_may_come_in_either_order_and_teaches_nothing_if_its_rewards_are_equal(method):
    b, loss = pairs(6), methods.METHODS[method].loss
    swapped = Batch(*(part if part is b.t else part.flip(1) for part in b))
    ours = grad(loss(b, Setting()), b.v)
    torch.testing.assert_close(grad(loss(swapped, Setting()), b.v), ours)
    equal = b._replace(rewards=torch.ones(6, 2), advantages=torch.zeros(6, 2, dtype=F64))
    assert (ours != 0).all() and (grad(loss(equal, Setting()), b.v) == 0).all()


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

LINE = torch.linspace(-100, 3, 103001, dtype=F64)


@pytest.mark.parametrize("method", figures.FAMILY)
@pytest.mark.parametrize("A", [1.0, -1.0])
def test_the_family_has_one_slope_at_theta_old(method, A):
    """2 A e with e = v_old - v* = -1."""
    before, after = figures.loss_of_one(method, torch.tensor([-0.01, 0.01], dtype=F64), A)
    assert (after - before) / 0.02 == pytest.approx(-2 * A, rel=0.03)


def test_a_good_sample_of_awm_is_regressed():
    torch.testing.assert_close(figures.loss_of_one("AWM", LINE, 1.0), (LINE - 1) ** 2 - 1)


def test_what_becomes_of_a_bad_sample():
    curves = {method: figures.loss_of_one(method, LINE, -1.0) for method in figures.FAMILY}
    far = {method: curve[0].item() for method, curve in curves.items()}  # at v = -100
    lowest = {method: LINE[curve[LINE < 1].argmin()].item() for method, curve in curves.items()}
    assert far["AWM"] < -1e4  # falls without end
    assert far["DGPO"] == pytest.approx(-2 * math.log(2), rel=1e-3)  # is let go
    assert far["V-GRPO"] == pytest.approx(-1 / 2, rel=1e-3)  # from A rho / beta to 0
    assert far["Linear-DPO"] == pytest.approx(-0.625, rel=1e-3)  # at x = -1 / (0.4 beta)
    assert far["DiffusionNFT"] > 0 and far["CRD"] > 1e6  # have a target, and lead back to it
    assert lowest["CRD"] == pytest.approx(1 - math.sqrt(2), abs=1e-3)  # where beta / 2 dL = 1
    assert lowest["Bounded DGPO"] == pytest.approx(-1, abs=1e-3)  # v* mirrored at v_old
    assert lowest["PAR"] == pytest.approx(1 - math.sqrt(1.5), abs=1e-3)  # where beta dL = 1 ...
    assert far["PAR"] > curves["PAR"][LINE < 1].min() + 0.1  # ... but it is let go beyond it
