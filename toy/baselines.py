"""What DGPO is compared with, in the style of dgpo.py: Flow-GRPO, Diffusion-DPO and GPO.

Shapes, times and signs are those of dgpo.py, and so are all parts that the methods share: the
advantages, the denoising loss, log sigmoid of a preference gap.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from flow2d import dgpo
from torch import Tensor

# Flow-GRPO (Liu et al. 2025, arXiv:2505.05470): GRPO on the steps of a stochastic sampler.
# The ODE dx = v dt has the same marginals p_t as the SDE, run from t = 1 down to 0 with any g(t),
#     dx = [v + g^2 / (2 t) (x + (1 - t) v)] dt + g dw,
# because x + (1 - t) v is E[eps | x] = -t score. A step of it is a Gaussian in x_s given x_t, so a
# trajectory has a likelihood, and GRPO's policy gradient can be had. g(t) = a sqrt(t / (1 - t)).


def sde_step(
    velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, s: Tensor, a: float = 0.7
) -> tuple[Tensor, Tensor]:
    """Mean (of x's shape) and std (of t's) of p_theta(x_s | x_t) for s < t, Flow-GRPO's policy.

    velocity: (x, t) -> v. t, s: () or of a shape that broadcasts to x's. a: how much noise; 0 is an
    Euler step of the ODE. At t = 1, where g is infinite, s takes the place of t in its denominator,
    as in the released code.
    """
    g_squared = a**2 * t / (1 - torch.where(t < 1, t, s))
    v = velocity(x, t)
    mean = x + (v + g_squared / (2 * t) * (x + (1 - t) * v)) * (s - t)
    return mean, (g_squared * (t - s)).sqrt()


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(x; mean, std^2 I), summed over the data axes: (P, G, ...) -> (P, G)."""
    each = -((x - mean) ** 2) / (2 * std**2) - std.log() - math.log(2 * math.pi) / 2
    return each.flatten(2).sum(2)


@torch.no_grad()
def sample_sde(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    steps: int,
    generator: torch.Generator,
    a: float = 0.7,
) -> tuple[Tensor, Tensor]:
    """A trajectory (steps + 1, *noise.shape) from noise at t = 1 to x0, and its times."""
    times = torch.linspace(1, 0, steps + 1, dtype=noise.dtype)
    trajectory = [noise]
    for t, s in zip(times[:-1], times[1:], strict=True):
        mean, std = sde_step(velocity, trajectory[-1], t, s, a)
        fresh = torch.randn(noise.shape, generator=generator, dtype=noise.dtype)
        trajectory.append(mean + std * fresh)
    return torch.stack(trajectory), times


def flow_grpo_loss(
    log_prob: Tensor, log_prob_old: Tensor, advantages: Tensor, clip: float
) -> Tensor:
    """PPO's clipped objective on one step of every trajectory, a scalar.

    All (P, G). rho = p_theta / p_old of the step; max(-A rho, -A clip(rho, 1 - clip, 1 + clip)).
    At theta = theta_old its gradient is REINFORCE's, -A grad log p_theta.
    """
    rho = (log_prob - log_prob_old).exp()
    clipped = rho.clamp(1 - clip, 1 + clip)
    return torch.maximum(-advantages * rho, -advantages * clipped).mean()


# Diffusion-DPO (Wallace et al. 2024, arXiv:2311.12908), in its flow form and on groups: the best
# sample against the worst. A pair is a group of two, whose advantages are +1 and -1, so DGPO's loss
# at half their beta is its loss, -log sigmoid(-beta/2 [(L_w - L_w^ref) - (L_l - L_l^ref)]).


def best_and_worst(x0: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """The two ends of each group: (P, G, ...) and (P, G) -> (P, 2, ...) and (P, 2)."""
    ends = torch.stack([rewards.argmax(1), rewards.argmin(1)], 1)
    return x0[torch.arange(len(x0))[:, None], ends], rewards.gather(1, ends)


# GPO (Chen et al. 2025, arXiv:2505.11070): DPO on all pairs of a group at once.


def gpo_loss(loss_theta: Tensor, loss_ref: Tensor, rewards: Tensor, beta: dgpo.Real) -> Tensor:
    """Diffusion-DPO's loss, the mean over a group's pairs r_i > r_j: (P, G) each -> a scalar."""
    gap = loss_theta - loss_ref
    differences = gap[:, :, None] - gap[:, None, :]  # (P, G, G), winner i against loser j
    wins = rewards[:, :, None] > rewards[:, None, :]
    losses = -F.logsigmoid(-beta / 2 * differences).where(wins, 0)
    return (losses.sum((1, 2)) / wins.sum((1, 2)).clamp(min=1)).mean()
