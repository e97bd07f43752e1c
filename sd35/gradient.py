"""Eq. 17 for a group that does not fit in memory, and what the released trainer adds to it.

`dgpo.train` back-propagates Eq. 17 through a whole group at once. A group of 24 images of Stable
Diffusion does not fit in memory, and the sigmoid couples its samples: no sample's gradient is known
before the gap, which is a sum over all of them. But the gradient of Eq. 17,

    grad L_DGPO = beta sigmoid(-beta gap) sum_i A_i grad L_i,

needs the gap only as a number, in the gate. So the group is evaluated twice. The first pass keeps
no graph and computes the gap, hence k_i = sigmoid(-beta gap) A_i (`dgpo.group_gradient`). The
second pass back-propagates sum_i k_i L_i, a plain sum over samples, one micro-batch at a time. The
k_i are exactly the factors that autograd would have multiplied grad L_i with, so the accumulated
gradient is that of the whole group, whatever the size of the micro-batches.

Units: published betas (10, 100, 2000) assume a gap averaged over the group and a loss divided by
beta. That is Eq. 17 at beta / G, divided by beta, and its gradient is the mean over the group of
k_i grad L_i. So beta shapes the gate alone, and neither beta nor G sets the size of a step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import dgpo

# (x_t (B, ...), t (B,), p (B,)) -> v (B, ...), p being the row in P that a sample belongs to
Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


# KL and clip are the released trainer's (github.com/Luo-Yihong/DGPO), and not in the paper.
#
# The bound is in neither. A bad sample's term A_i L_i (A_i < 0) is concave in v and falls without
# end. With 2 |A_i| ||v - v_old||^2 added, it is |A_i| ||v - (2 v_old - v*)||^2 up to a constant,
# so that its target is mirrored at theta_old. At theta = theta_old the gradient is still DGPO's.
def backward_group_loss(
    velocity: Velocity,
    velocity_ref: Velocity,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    advantages: Tensor,
    beta: float | Tensor,
    *,
    share: float = 1.0,
    kl: float = 0.0,
    velocity_kl: Velocity | None = None,
    clip: float | None = None,
    bound: float = 0.0,
    velocity_old: Velocity | None = None,
    micro_batch: int | None = None,
) -> dict[str, Tensor]:
    """Add the gradient of share * (Eq. 17 + kl * mean of (v - v_ref)^2) to the parameters' .grad.

    velocity, velocity_ref, velocity_old: theta, the reference and theta_old as functions
        (x_t (B, ...), t (B,), p (B,)) -> v (B, ...), p being a sample's row in P. No dropout.
    x0 (P, G, ...), eps, t: as in `dgpo.diffuse`. For K timesteps, repeat x0 in K * P rows.
    advantages: (P, G). beta: published units, a float or (P,).
    share: what part of the step these groups are. kl: weight of the KL, against velocity_kl if that
        is given, else velocity_ref. clip, bound: against velocity_old; None and 0 are off.
    micro_batch: maximum number of samples per forward and backward; None takes all P * G at once,
        which saves the second forward.

    Each distinct frozen network is evaluated once; if all advantages are zero, only the KL's is.
    Returns detached metrics: loss (), Eq. 17 at beta / G; and gap (a mean over the group), gate, kl
    and clipped (a share of the samples), each (P,). Raises ValueError as the functions of dgpo.py.
    """
    P, G = advantages.shape
    needs_old = clip is not None or bound > 0
    if needs_old and velocity_old is None:
        raise ValueError("clip and bound need velocity_old")
    beta, velocity_kl = beta / G, velocity_kl or velocity_ref  # beta in the units of Eq. 17

    # One sample after another, so that a micro-batch may cut through a group.
    x_t = dgpo.diffuse(x0, eps, t).flatten(0, 1)  # (P * G, ...)
    x0, eps = x0.flatten(0, 1)[None], eps.expand_as(x0).flatten(0, 1)[None]
    t, prompt = t.expand(P, G).flatten(), torch.arange(P, device=x0.device).repeat_interleave(G)
    batches = torch.arange(P * G, device=x0.device).split(micro_batch or P * G)
    one_pass = len(batches) == 1  # then the graph of theta's first forward serves the backward

    def evaluate(network: Velocity, *batches: Tensor) -> Tensor:  # (1, samples, ...)
        return torch.cat([network(x_t[rows], t[rows], prompt[rows]) for rows in batches])[None]

    # The first pass: the losses, the gap, and with them k_i.
    preferred = bool(advantages.any())
    if not preferred:
        velocity_ref = velocity_old = velocity_kl
    with torch.no_grad():
        networks = dict.fromkeys([velocity_ref, velocity_kl, *[velocity_old] * needs_old])
        v = {network: evaluate(network, *batches) for network in networks}
    with torch.set_grad_enabled(one_pass):
        needed = one_pass or preferred
        v_theta = evaluate(velocity, *batches) if needed else v[velocity_kl]

    loss = dgpo.dsm_loss(v_theta.detach(), x0, eps).view(P, G)
    loss_ref = dgpo.dsm_loss(v[velocity_ref], x0, eps).view(P, G)
    k, gate = dgpo.group_gradient(loss, loss_ref, advantages, beta)

    dropped = torch.zeros_like(k, dtype=torch.bool)
    if clip is not None:
        loss_old = dgpo.dsm_loss(v[velocity_old], x0, eps).view(P, G)
        dropped = dgpo.clip_mask(loss, loss_old, advantages, clip)
    k = k.masked_fill(dropped, 0).view(1, P * G)

    # The second pass: the gradient of sum_i k_i L_i, a micro-batch at a time.
    distances = []
    for rows in batches:
        v_now = v_theta if one_pass else evaluate(velocity, rows)
        distance = dgpo.mean_square(v_now, v[velocity_kl][:, rows])
        objective = k[:, rows] * dgpo.dsm_loss(v_now, x0[:, rows], eps[:, rows]) + kl * distance
        if bound:
            bad = -k[:, rows].clamp(max=0)  # gate * |A| of a bad sample, 0 of a good one
            objective += bound * bad * dgpo.mean_square(v_now, v[velocity_old][:, rows])
        (share / (P * G) * objective.sum()).backward()
        distances.append(distance.detach())

    return {
        "loss": dgpo.dgpo_loss(loss, loss_ref, advantages, beta),
        "gap": dgpo.preference_gap(loss, loss_ref, advantages) / G,
        "gate": gate,
        "kl": torch.cat(distances, 1).view(P, G).mean(1),
        "clipped": dropped.float().mean(1),
    }


def extremes(rewards: Tensor, m: int) -> Tensor:
    """Indices (P, m) of the m/2 lowest and the m/2 highest rewards of each group (P, G).

    Beyond the paper: train on these alone, with advantages standardised among them, so that their
    weights balance. m = 2 is Diffusion-DPO's pair, m = G is DGPO. ValueError unless m is even and
    2 to G.
    """
    G = rewards.shape[1]
    if not 2 <= m <= G or m % 2:
        raise ValueError(f"m must be even and from 2 to G = {G}, got {m}")
    order = rewards.argsort(dim=1, stable=True)
    return torch.cat([order[:, : m // 2], order[:, G - m // 2 :]], 1)


def combine_advantages(
    scores: dict[str, tuple[float, Tensor]], std: str, combine: str, samples: Tensor | None = None
) -> Tensor:
    """Advantages (P, G) of one or several rewards, Algorithm 1, line 7.

    scores: a weight and the rewards (P, G) by the reward's name. std: as in `group_advantages`.
    combine: "rewards" standardises the weighted sum; "advantages" standardises each reward and
        takes A = sum_k w_k A_k, which sums to zero over a group as each A_k does.
    samples: indices (P, m) of the samples to train on; the result is then (P, m), among these.

    A group with a score that is not finite gets zeros and does not count in the batch's std. eps
    and clamp are the released trainer's. Raises ValueError if no group has finite scores.
    """
    total = sum(weight * values for weight, values in scores.values())
    finite = total.isfinite().all(1)
    if not finite.any():
        raise ValueError("no group of this step has finite rewards")
    if samples is None:
        samples = torch.arange(total.shape[1]).expand_as(total)

    advantages = torch.zeros(samples.shape)
    for weight, values in [(1.0, total)] if combine == "rewards" else scores.values():
        values = values.gather(1, samples)[finite]
        advantages[finite] += weight * dgpo.group_advantages(values, std, eps=1e-4, clamp=5.0)
    return advantages
