"""Direct Group Preference Optimization (DGPO, arXiv:2510.08425): the algorithm and nothing else.

The objects of the paper's Sections 2 and 3 and Appendix C, in its order, each under its derivation.

Tensors are (P, G, ...) = prompts x group members x data axes. Time t runs over [0, 1], 1 being pure
noise. The schedule is rectified flow's, alpha_t = 1 - t and sigma_t = t. A network predicts the
velocity v* = dx_t/dt = eps - x0, so the paper's f, which predicts x0, is f = x_t - t v. theta is
the model in training, the reference what it started from, and theta_old (theta^-) draws samples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

Real = float | Tensor
# (x_t (B, ...), t (B,), p (B,)) -> v (B, ...), p being the row in P that a sample belongs to
Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def _require(condition: bool | Tensor, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_groups(**tensors: Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    one, *others = set(shapes.values())
    _require(len(one) == 2 and not others, f"need one shape (P, G), got {shapes}")


# Section 2, Eq. 3 -> 5 -> 6: every policy is the optimum for some reward.
# RLHF maximises E_p[r] - beta KL(p || p_ref) over p. With Z(c) = sum_x p_ref(x|c) exp(r(c, x)/beta)
#     E_p[r] - beta KL(p || p_ref) = beta log Z(c) - beta KL(p || p_ref exp(r/beta) / Z(c)).
# The last KL vanishes at p* = p_ref exp(r/beta) / Z(c) (Eq. 5). Solved for r, this is
# r = beta log p*/p_ref + beta log Z(c) (Eq. 6). Read backwards, p_theta is the optimum for its
# implicit reward r_theta = beta log p_theta/p_ref + beta log Z(c), so a policy can be fitted to
# preferences as a reward model is. What stands in the way is Z(c), a sum over all images.
# Eq. 1, 2, 7: DPO fits r_theta to pairs, by log sigmoid(r_theta(x_w) - r_theta(x_l)), where
# log Z(c) cancels. So DPO needs pairs, and of a pair it sees only which is better.
# Section 3.1, Eq. 8, 9, 11: DGPO compares two sets, by their weighted sums of r_theta. log Z(c)
# then has the coefficient beta (sum_{G+} w - sum_{G-} w), and cancels for all balanced weights.
# (A misprint: Eq. 11 has Z(c) in the bracket where Eq. 10 has log Z(c). The coefficient is right.)
def group_gap(values: Tensor, w: Tensor, positive: Tensor) -> Tensor:
    """R(G+) - R(G-), Eq. 8, 9: sum of w * values over G+ minus that over G-. (P, G) -> (P,).

    positive: boolean, True in G+. Raises ValueError unless all three have one shape (P, G).
    """
    _require_groups(values=values, w=w, positive=positive)
    weighted = w * values
    return weighted.where(positive, 0).sum(1) - weighted.where(~positive, 0).sum(1)


# Section 3.2: weights that balance. Advantages sum to zero over a group, so what is above zero
# weighs as much as what is below: w = |A| has sum_{G+} w = sum_{G-} w, and a sample counts the more
# the further it is from average. Dividing by a std keeps the balance; clipping A would break it.
def group_advantages(
    rewards: Tensor, std: str = "group", eps: float = 0.0, clamp: float | None = None
) -> Tensor:
    """Eq. 12: A_i = (r_i - mean_j r_j) / (std_j r_j + eps). (P, G), G >= 2 -> (P, G).

    The mean is the group's. The std is the population's (divisor G, so that |A_i| <= sqrt(G - 1)),
    of the group, or with std="batch" of all P * G rewards, as in the released trainer for OCR and
    PickScore. eps (there 1e-4) keeps a group from being torn apart over mere rounding. clamp (there
    5) limits |A_i|, as a batch's std lets one bad sample of 128 have A = -11; the group is then
    centred again, so that its weights balance. A group of equal rewards gets exact zeros.
    Raises ValueError on another shape or std, and on a reward that is not finite.
    """
    shape = tuple(rewards.shape)
    _require(len(shape) == 2 and shape[1] >= 2, f"rewards must be (P, G) with G >= 2, got {shape}")
    _require(std in ("group", "batch"), f"std must be 'group' or 'batch', got {std!r}")
    for p, g in (~torch.isfinite(rewards)).nonzero().tolist()[:1]:
        raise ValueError(f"rewards must be finite, got {rewards[p, g]} at prompt {p}, sample {g}")
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    centred = rewards - rewards.mean(1, keepdim=True)
    centred = centred - centred.mean(1, keepdim=True)  # the rounding of a mean far from zero
    same, dim = (centred, 1) if std == "group" else (rewards, (0, 1))
    advantages = centred / (same.std(dim, keepdim=True, correction=0) + eps)
    if clamp is not None:
        advantages = advantages.clamp(-clamp, clamp)
        advantages = advantages - advantages.mean(1, keepdim=True)
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return advantages.masked_fill(equal, 0)


def partition(advantages: Tensor) -> Tensor:
    """Eq. 13: G+ = {A > 0} as a boolean (P, G). The others, A <= 0, are G-."""
    return advantages > 0


def weights(advantages: Tensor) -> Tensor:
    """Eq. 14: w = |A|. (P, G) -> (P, G)."""
    return advantages.abs()


# Eq. 15 -> 16 (Appendix C.1, C.2, Eq. 18-20): from whole paths to one timestep.
# What is left is -log sigmoid(beta [sum_{G+} w rho - sum_{G-} w rho]) with rho = log p_theta/p_ref
# (Eq. 15). A diffusion model cannot tell p_theta(x0) either, so Eq. 10 takes the path x_{0:T} that
# forward diffusion q makes of x0, whose log-ratio is a sum over T transitions (Eq. 19):
#     rho = E_q sum_t log p_theta(x_{t-1}|x_t)/p_ref(x_{t-1}|x_t) = T E_t E_q log p_theta/p_ref.
# These means stand inside -log sigmoid, a convex function phi, and phi(E X) <= E phi(X) (Jensen,
# Eq. 18). Moving those over t and x_t outside gives an upper bound of the loss (Eq. 16), and that
# is what one random t and one x_t for each sample estimate without bias.
def sample_timesteps(
    shape: tuple[int, ...], t_min: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """t ~ U[t_min, 1] for 0 <= t_min < 1, Algorithm 1, line 11, on the generator's device.

    t_min > 0 is the Timestep Clip Strategy of Section 3.2. A rollout of few steps has artefacts
    such as blur in its fine detail, and detail is what the model learns at low noise.
    """
    _require(0 <= t_min < 1, f"t_min must be in [0, 1), got {t_min}")
    device = generator and generator.device
    return t_min + (1 - t_min) * torch.rand(shape, generator=generator, device=device)


# Below Eq. 16, the paper shares eps in a group "to reduce the variance". Let C_ij be the covariance
# of grad L_i and grad L_j under one eps: sum_i A_i grad L_i has the variance
# sum_ij A_i A_j C_ij, of which an eps each leaves the terms i = j. What all C_ij have in common
# cancels, as sum_j A_j = 0: sharing helps a pair if C_12 > 0. Where samples that are alike (large
# C_ij) have like advantages, it hurts: in the toy at G = 24 three to nine times (toy/results).
def diffuse(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = alpha_t x0 + sigma_t eps = (1 - t) x0 + t eps, Algorithm 1, line 12.

    x0, and what is returned: (P, G, ...). eps: (P, 1, ...), shared by the group, or (P, G, ...).
    t: (P, 1) or (P, G). Raises ValueError when eps or t has another shape.
    """
    (P, G), fits = x0.shape[:2], (tuple(x0.shape), (len(x0), 1, *x0.shape[2:]))
    _require(t.shape in ((P, 1), (P, G)), f"t must be {(P, 1)} or {(P, G)}, got {tuple(t.shape)}")
    _require(eps.shape in fits, f"eps must be {fits[0]} or {fits[1]}, got {tuple(eps.shape)}")
    t = t.reshape(*t.shape, *[1] * (x0.ndim - 2))
    return (1 - t) * x0 + t * eps


# Eq. 16 -> 17 (Appendix C.3, Eq. 21, 22): from transitions to the denoising loss.
# The mean of log p_theta/p_ref over q(x_{t-1} | x_t, x0) is KL(q || p_ref) - KL(q || p_theta)
# (Eq. 21). All three are Gaussians of one std, eta. Their means are one function of x_t and of an
# image: x0 for q, f for p_theta. So the KL is a weight times ||x0 - f||^2, the denoising loss.
def lambda_t(alpha_t: Real, sigma_t: Real, alpha_s: Real, sigma_s: Real, eta_s: Real) -> Real:
    """Eq. 22: lambda_t in KL(q || p_theta) = lambda_t ||x0 - f||^2, s < t being the paper's t - 1.

    eta_s is the step's std, 0 < eta_s <= sigma_s, and sigma_t > 0: floats, or tensors.
    """
    kept = (sigma_s**2 - eta_s**2) ** 0.5  # how much of x_t's noise stays in x_s
    return (alpha_s - kept * alpha_t / sigma_t) ** 2 / (2 * eta_s**2)


def mean_square(velocity: Tensor, goal: Tensor) -> Tensor:
    """(v - goal)^2, the mean over data axes: (P, G, ...) -> (P, G). ValueError on other shapes.

    With goal = v_ref it is the released trainer's KL penalty: KL(p_ref || p_theta) of one step up
    to lambda_t t^2 (Eq. 22 with f_ref for x0).
    """
    shapes = f"{tuple(velocity.shape)} against {tuple(goal.shape)}"
    _require(velocity.shape == goal.shape, f"velocity must have its goal's shape, got {shapes}")
    return (velocity - goal).square().flatten(2).mean(2)


def dsm_loss(velocity: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    """L_dsm of Eq. 17 for a flow: (v - (eps - x0))^2, the mean over data axes. -> (P, G).

    velocity, x0: (P, G, ...). eps: (P, 1, ...) or (P, G, ...). The paper has ||f - x0||^2, and that
    is t^2 ||v - (eps - x0)||^2, as f - x0 = x_t - t v - x0 = t (eps - x0 - v). All released code
    takes the velocity's mean square error as it is, so beta absorbs t^2 and the number of elements.
    """
    return mean_square(velocity, eps - x0)


# Eq. 17: the loss, and its gradient in one line.
# With r_theta = beta (L_ref - L_theta) in Eq. 8 and 9, what counts is by how much more than the
# reference a model denoises the good samples better than the bad. |A| over G+ minus |A| over G- is
# A with its sign. So a group's loss is -log sigmoid(beta gap), gap = sum_i A_i (L_i^ref - L_i), and
#     grad L_DGPO = beta sigmoid(-beta gap) sum_i A_i grad L_i.
# That is the whole method: denoise good samples, un-denoise bad ones, each by its advantage; and
# the wider the gap between the two, the smaller the gate sigmoid(-beta gap). Note that G+ is taken
# to win with certainty. So p* of Eq. 5 is no fixed point: like DPO, DGPO widens the gap until the
# gate closes, sooner for a larger beta.
def preference_gap(loss_theta: Tensor, loss_ref: Tensor, advantages: Tensor) -> Tensor:
    """The gap of Eq. 17, R(G+) - R(G-) over beta, (P, G) -> (P,): 0 at the reference.

    It grows as theta tells G+ from G- better. Eq. 17's bracket is -gap. Errors as in `group_gap`.
    """
    _require_groups(loss_theta=loss_theta, loss_ref=loss_ref, advantages=advantages)
    return group_gap(loss_ref - loss_theta, weights(advantages), partition(advantages))


def _logit(loss_theta: Tensor, loss_ref: Tensor, advantages: Tensor, beta: Real) -> Tensor:
    gap = preference_gap(loss_theta, loss_ref, advantages)
    beta = torch.as_tensor(beta, dtype=gap.dtype, device=gap.device)
    fits = beta.shape in ((), gap.shape) and ((beta > 0) & beta.isfinite()).all()
    _require(fits, f"beta must be positive, a float or ({len(gap)},), got {beta.tolist()}")
    return beta * gap


def dgpo_loss(loss_theta: Tensor, loss_ref: Tensor, advantages: Tensor, beta: Real) -> Tensor:
    """Eq. 17 as printed: -log sigmoid(beta gap), the mean over P. Returns a scalar.

    loss_theta, loss_ref: (P, G) from `dsm_loss`. advantages: (P, G). beta > 0 has absorbed lambda_t
    and T: a float, or (P,), one for each group's t. Raises ValueError on other shapes or beta.
    """
    return -nn.functional.logsigmoid(_logit(loss_theta, loss_ref, advantages, beta)).mean()


def group_gradient(
    loss_theta: Tensor, loss_ref: Tensor, advantages: Tensor, beta: Real
) -> tuple[Tensor, Tensor]:
    """k (P, G) and the gate (P,), detached: a group's gradient is beta sum_i k_i grad L_i.

    k_i = sigmoid(-beta gap) A_i, the one line above. Arguments and errors as in `dgpo_loss`.
    """
    gate = torch.sigmoid(-_logit(loss_theta, loss_ref, advantages, beta).detach())
    return gate[:, None] * advantages, gate


# The released trainer (github.com/Luo-Yihong/DGPO) adds this to the paper, as an option.
def clip_mask(loss_theta: Tensor, loss_old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's clip for a model without a likelihood: True (P, G) where the gradient is dropped.

    exp(L_old - L_theta) stands for p_theta / p_old. A good sample (A > 0) has moved far enough once
    the ratio exceeds 1 + clip, a bad one once it is under 1 - clip. Errors as in `dgpo_loss`.
    """
    _require_groups(loss_theta=loss_theta, loss_old=loss_old, advantages=advantages)
    _require(clip >= 0, f"clip must be at least 0, got {clip}")
    ratio = (loss_old - loss_theta).exp()
    return torch.where(partition(advantages), ratio > 1 + clip, ratio < 1 - clip)


@torch.no_grad()
def ema_update(ema_params: Iterable[Tensor], params: Iterable[Tensor], decay: float) -> None:
    """Line 15, in place: theta_old <- mu theta_old + (1 - mu) theta, with mu = decay in [0, 1]."""
    _require(0 <= decay <= 1, f"decay must be in [0, 1], got {decay}")
    for averaged, current in zip(ema_params, params, strict=True):
        averaged.lerp_(current, 1 - decay)


# Section 3.2: no policy gradient, so no likelihood of a trajectory, so no noise in it. Samples come
# from an ODE solver: DPM-Solver++, which the paper cites and the released trainer uses.
@torch.no_grad()
def sample_ode(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int) -> Tensor:
    """Integrate dx/dt = v(x, t) from noise at t = 1 to x0 at t = 0, in equal steps of t.

    velocity: (x, t ()) -> v, all of noise's shape. DPM-Solver++(2M) of Lu et al. 2022b, of order 2
    with one evaluation a step. Raises ValueError on steps < 1.
    """
    _require(steps >= 1, f"steps must be at least 1, got {steps}")
    times = torch.linspace(1, 0, steps + 1, dtype=noise.dtype, device=noise.device)
    log_snr = ((1 - times) / times).log()  # lambda = log(alpha_t / sigma_t), from -inf to inf
    x, f_before = noise, None
    for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        # x_s = (s/t) x_t + (1 - s/t) f is exact for a constant f. Order 2 takes f from half-way in
        # lambda, by a line through the last two; the last step's lambda has no half-way.
        f = f_half = x - t * velocity(x, t)
        if 0 < i < steps - 1:
            ratio = (log_snr[i + 1] - log_snr[i]) / (log_snr[i] - log_snr[i - 1])
            f_half = f + ratio / 2 * (f - f_before)
        x, f_before = s / t * x + (1 - s / t) * f_half, f
    return x


# Eq. 17 for a group that does not fit in memory.
# The sigmoid couples a group: no sample's gradient is known before the gap, a sum over all of them.
# But the gap enters it as a number, the gate. So first the gap, by forwards that keep no graph, and
# then sum_i k_i grad L_i with the k_i of `group_gradient`: exact, a micro-batch at a time.
# Published betas (10, 100, 2000) take the gap as a mean over the group and divide the loss by beta.
# That is Eq. 17 at beta / G, divided by beta, and its gradient is the group's mean of k_i grad L_i:
# beta shapes the gate alone, and neither beta nor G sets the size of a step.
# Beyond the paper, the bound: a bad sample's A_i L_i is concave in v and falls without end. With
# 2 |A_i| ||v - v_old||^2 added, it is |A_i| ||v - (2 v_old - v*)||^2 and a constant: its target is
# mirrored at theta_old. At theta = theta_old the gradient is still DGPO's own.
def backward_group_loss(
    velocity: Velocity,
    velocity_ref: Velocity,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    advantages: Tensor,
    beta: Real,
    *,
    share: float = 1.0,
    kl: float = 0.0,
    velocity_kl: Velocity | None = None,
    clip: float | None = None,
    bound: float = 0.0,
    velocity_old: Velocity | None = None,
    micro_batch: int | None = None,
) -> dict[str, Tensor]:
    """Add the gradient of share * (dgpo_loss at b / beta + kl * mean of (v - v_ref)^2) to .grad.

    b = beta / G: beta is in published units. velocity, velocity_ref, velocity_old: theta, the
    reference and theta_old, without dropout. x0, eps, t: as in `diffuse`; for K timesteps, repeat
    x0 in K * P rows. advantages: (P, G). beta: a float or (P,). share: of these groups in the step.
    velocity_kl: what the KL compares with, else velocity_ref. clip, bound (2, or 0 for none):
    against velocity_old. micro_batch: most samples to a forward and backward, or all; the result is
    the same, for another forward of theta. A network given twice is asked once; where all A are 0,
    only the KL's. Returns, detached: loss (), Eq. 17 at b, and (P,) each: gap, a group's mean,
    gate, kl, and clipped, a share. Raises ValueError on other input.
    """
    P, G = advantages.shape
    _require(min(kl, bound) >= 0, f"kl and bound must be at least 0, got {kl} and {bound}")
    lags = clip is not None or bound > 0
    _require(velocity_old is not None or not lags, "clip and bound need velocity_old")
    beta, velocity_kl = beta / G, velocity_kl or velocity_ref  # in the units of Eq. 17
    x_t = diffuse(x0, eps, t).flatten(0, 1)  # (P * G, ...), one sample after another
    x0, eps = x0.flatten(0, 1)[None], eps.expand_as(x0).flatten(0, 1)[None]
    t, prompt = t.expand(P, G).flatten(), torch.arange(P, device=x0.device).repeat_interleave(G)
    parts = torch.arange(P * G, device=x0.device).split(micro_batch or P * G)
    whole = len(parts) == 1  # then the graph of theta's first forward serves the backward

    def ask(network: Velocity, *parts: Tensor) -> Tensor:  # (1, samples, ...)
        return torch.cat([network(x_t[part], t[part], prompt[part]) for part in parts])[None]

    preferred = bool(advantages.any())
    if not preferred:
        velocity_ref = velocity_old = velocity_kl
    with torch.no_grad():
        asked = dict.fromkeys([velocity_ref, velocity_kl, *[velocity_old] * lags])
        v = {network: ask(network, *parts) for network in asked}
    with torch.set_grad_enabled(whole):
        v_theta = ask(velocity, *parts) if whole or preferred else v[velocity_kl]
    loss = dsm_loss(v_theta.detach(), x0, eps).view(P, G)
    loss_ref = dsm_loss(v[velocity_ref], x0, eps).view(P, G)
    k, gate = group_gradient(loss, loss_ref, advantages, beta)
    dropped = torch.zeros_like(k, dtype=torch.bool)
    if clip is not None:
        loss_old = dsm_loss(v[velocity_old], x0, eps).view(P, G)
        dropped = clip_mask(loss, loss_old, advantages, clip)
    k, distances = k.masked_fill(dropped, 0).view(1, P * G), []
    for part in parts:
        now = v_theta if whole else ask(velocity, part)
        distance = mean_square(now, v[velocity_kl][:, part])
        objective = k[:, part] * dsm_loss(now, x0[:, part], eps[:, part]) + kl * distance
        if bound:
            bad = -k[:, part].clamp(max=0)  # gate * |A| of a bad sample, 0 of a good one
            objective += bound * bad * mean_square(now, v[velocity_old][:, part])
        (share / (P * G) * objective.sum()).backward()
        distances.append(distance.detach())
    return {
        "loss": dgpo_loss(loss, loss_ref, advantages, beta),
        "gap": preference_gap(loss, loss_ref, advantages) / G,
        "gate": gate,
        "kl": torch.cat(distances, 1).view(P, G).mean(1),
        "clipped": dropped.float().mean(1),
    }


def extremes(rewards: Tensor, m: int) -> Tensor:
    """Beyond the paper: which m of each group to train on, the m/2 lowest and m/2 highest rewards.

    (P, G) -> (P, m). Advantages are then standardised among these m, so that their weights balance.
    m = 2 is Diffusion-DPO's pair, m = G is DGPO. Raises ValueError unless m is even and 2 to G.
    """
    G = rewards.shape[1]
    _require(2 <= m <= G and m % 2 == 0, f"m must be even and from 2 to G = {G}, got {m}")
    order = rewards.argsort(dim=1, stable=True)
    return torch.cat([order[:, : m // 2], order[:, G - m // 2 :]], 1)


def train(
    model: nn.Module,
    reward: Callable[[Tensor, Tensor], Tensor],
    sample_conditions: Callable[[int, torch.Generator], Tensor],
    data_shape: tuple[int, ...],
    generator: torch.Generator,
    *,
    iterations: int,
    prompts: int,
    group_size: int,
    beta: float,
    learning_rate: float,
    t_min: float,
    rollout_steps: int,
    train_timesteps: int = 1,
    ema: float | None = None,
    offline: bool = False,
    train_samples: int | None = None,
    updates: int = 1,
    **options: float | None,
) -> Iterator[dict[str, float]]:
    """Algorithm 1. Trains `model` in place; yields the metrics of each iteration when it is done.

    model: (x (B, *data_shape), t (B,), c (B,)) -> v. sample_conditions: (P, generator) -> c (P,).
    reward: (c (P, 1), x0 (P, G, *data_shape)) -> (P, G). generator: all randomness is its.
    beta, options: see `backward_group_loss`. ema: theta_old's decay; None is theta_old = theta.
    offline: the reference draws (Section 4.3). Beyond it: train_samples (`extremes`), updates.
    """
    P, G, K = prompts, group_size, train_timesteps
    reference = copy.deepcopy(model).requires_grad_(False)  # "Require: reference model f_ref"
    theta_old = model if ema is None else copy.deepcopy(reference)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.0)

    def conditioned(network: nn.Module, c: Tensor) -> Velocity:
        return lambda x, t, p=slice(None): network(x, t.expand(len(x)), c[p])

    for _ in range(iterations):  # line 1
        c = sample_conditions(P, generator)  # line 3
        noise = torch.randn(P * G, *data_shape, generator=generator, device=generator.device)
        v = conditioned(reference if offline else theta_old, c.repeat_interleave(G))
        x0 = sample_ode(v, noise, rollout_steps).view(P, G, *data_shape)  # line 4
        rewards = reward(c[:, None], x0)  # line 6
        found = {"reward": rewards.mean()}
        if train_samples is not None:
            chosen = torch.arange(P)[:, None], extremes(rewards, train_samples)
            x0, rewards = x0[chosen], rewards[chosen]
        advantages = group_advantages(rewards)  # line 7
        theta, ref, old = (conditioned(v, c.repeat(K)) for v in (model, reference, theta_old))
        for _ in range(updates):
            # Lines 8 to 13 for K timesteps at once: K * P groups, with one t and one eps for each.
            t = sample_timesteps((K * P, 1), t_min, generator)
            eps = torch.randn(K * P, 1, *data_shape, generator=generator, device=generator.device)
            groups = torch.cat([x0] * K), eps, t, advantages.repeat(K, 1)
            optimizer.zero_grad()
            found |= backward_group_loss(theta, ref, *groups, beta, velocity_old=old, **options)
            found["grad_norm"] = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()  # line 14, by AdamW, of a gradient of norm 1 at most
        if ema is not None:
            ema_update(theta_old.parameters(), model.parameters(), ema)  # line 15
        yield {name: value.mean().item() for name, value in found.items()}
