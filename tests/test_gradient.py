"""The two-pass gradient is exactly that of Eq. 17, whatever the micro-batch."""

import pytest
import torch
import torch.nn.functional as F

import dgpo
from sd35.gradient import backward_group_loss

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Tiny(torch.nn.Module):
    """A velocity for 3-D data with a condition for each prompt, in float64."""

    def __init__(self, seed, P):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
        ).double()
        self.condition = torch.nn.Parameter(normal(P, 3, seed=seed))

    def forward(self, x, t, p):
        return self.layers(torch.cat([x, t[:, None]], 1)) + self.condition[p]

    def gradient(self):
        gradient = torch.cat([parameter.grad.flatten() for parameter in self.parameters()])
        self.zero_grad()
        return gradient


def group_problem(P=3, G=4):
    theta, ref, old = (Tiny(seed, P) for seed in (0, 1, 2))
    x0, eps = normal(P, G, 3), normal(P, 1, 3, seed=1)
    t = torch.tensor([[0.3], [0.6], [0.9]], dtype=F64)[:P]
    return theta, ref, old, x0, eps, t, dgpo.group_advantages(normal(P, G, seed=2))


@pytest.mark.parametrize("bound", [0.0, 2.0])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_micro_batches_give_the_gradient_of_the_whole(kl, clip, bound):
    """backward_group_loss against autograd through Eq. 17, at every size of micro-batch.

    In published units: the gap is a mean over the group, and the loss is divided by beta.
    """
    theta, ref, old, x0, eps, t, A = group_problem()
    P, G = A.shape
    beta, share = torch.tensor([0.5, 2.0, 9.0], dtype=F64), 0.7

    x_t, p = dgpo.diffuse(x0, eps, t).flatten(0, 1), torch.arange(P).repeat_interleave(G)
    v, v_ref, v_old = (
        model(x_t, t.expand(P, G).flatten(), p).view(P, G, 3) for model in (theta, ref, old)
    )
    v_ref, v_old = v_ref.detach(), v_old.detach()
    loss, loss_ref, loss_old = (dgpo.dsm_loss(u, x0, eps) for u in (v, v_ref, v_old))
    dropped = torch.zeros_like(A, dtype=torch.bool)
    learnt = loss
    if clip is not None:  # a dropped sample is a constant in the loss, but stays in the sum
        dropped = dgpo.clip_mask(loss, loss_old, A, clip)
        assert 0 < dropped.sum() < P * G
        learnt = torch.where(dropped, loss.detach(), loss)
    gap = (A * (loss_ref - learnt)).mean(1)
    objective = -(F.logsigmoid(beta * gap) / beta).mean() + kl * (v - v_ref).square().mean()
    gate = torch.sigmoid(-beta * gap.detach())
    away = (A < 0) * A.abs() * (v - v_old).square().mean(2) * ~dropped
    objective = objective + bound * (gate[:, None] * away).mean()
    (share * objective).backward()
    expected = theta.gradient()

    for micro_batch in (None, *range(1, P * G + 1)):
        seen = []
        metrics = backward_group_loss(
            lambda *args, seen=seen: seen.append(len(args[0])) or theta(*args),
            ref,
            x0,
            eps,
            t,
            A,
            beta,
            share=share,
            kl=kl,
            clip=clip,
            bound=bound,
            velocity_old=old,
            micro_batch=micro_batch,
        )
        torch.testing.assert_close(theta.gradient(), expected, rtol=1e-10, atol=1e-13)
        assert max(seen) <= (micro_batch or P * G)
        assert sum(seen) == P * G * (1 if micro_batch in (None, P * G) else 2)
        torch.testing.assert_close(
            metrics["loss"], dgpo.dgpo_loss(loss, loss_ref, A, beta / G).detach()
        )
        torch.testing.assert_close(metrics["gap"], gap.detach())
        torch.testing.assert_close(metrics["gate"], gate)
        torch.testing.assert_close(metrics["kl"], (v - v_ref).square().mean((1, 2)).detach())
        torch.testing.assert_close(metrics["clipped"], dropped.float().mean(1))


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_a_group_of_equal_rewards_evaluates_theta_and_the_kl_reference_only(micro_batch):
    """Without a preference, what is left of the gradient is the KL's."""
    theta, ref, old, x0, eps, t, A = group_problem()
    calls = []

    def named(name, network):
        return lambda *args: calls.extend([name] * len(args[0])) or network(*args)

    metrics = backward_group_loss(
        named("theta", theta),
        named("S", old),
        x0,
        eps,
        t,
        torch.zeros_like(A),
        2.0,
        kl=0.3,
        velocity_kl=named("kl", ref),
        clip=0.1,
        velocity_old=named("old", old),
        micro_batch=micro_batch,
    )
    n = A.numel()
    assert (calls.count("theta"), calls.count("kl"), len(calls)) == (n, n, 2 * n)
    gradient = theta.gradient()
    x_t, p = dgpo.diffuse(x0, eps, t).flatten(0, 1), torch.arange(len(A)).repeat_interleave(4)
    v, v_ref = (network(x_t, t.expand_as(A).flatten(), p) for network in (theta, ref))
    (0.3 * (v - v_ref.detach()).square().mean()).backward()
    torch.testing.assert_close(gradient, theta.gradient())
    assert gradient.abs().max() > 0
    assert metrics["gap"].tolist() == [0, 0, 0] and metrics["gate"].tolist() == [0.5, 0.5, 0.5]
