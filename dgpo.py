"""Direct Group Preference Optimization (DGPO, arXiv:2510.08425): the algorithm and nothing else.

This file follows Sections 2 and 3 and Appendix C of the paper, in their order, with each derivation
above the function that implements it. `train`, at the end, is Algorithm 1.

Tensors are (P, G, ...) = prompts x group members x data axes. Time t runs over [0, 1], where 1 is
pure noise. The schedule is that of rectified flow, alpha_t = 1 - t and sigma_t = t, and a network
predicts the velocity v* = dx_t/dt = eps - x0. The paper's f predicts x0, so f = x_t - t v. theta is
the model in training, the reference what it started from, and theta_old (theta^-) draws samples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

Real = float | Tensor


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
# preferences as a reward model is. The obstacle is Z(c), a sum over all images.
#
# Eq. 1, 2, 7: DPO fits r_theta to pairs, by log sigmoid(r_theta(x_w) - r_theta(x_l)), in which
# log Z(c) cancels. So DPO is tied to pairs, and learns from each only which image is better.
#
# Section 3.1, Eq. 8, 9, 11: DGPO compares two sets by their weighted sums of r_theta. log Z(c) then
# has the coefficient beta (sum_{G+} w - sum_{G-} w), which is zero whenever the weights balance.
# (A misprint: Eq. 11 has Z(c) in the bracket where Eq. 10 has log Z(c). The coefficient is right.)
def group_gap(values: Tensor, w: Tensor, positive: Tensor) -> Tensor:
    """R(G+) - R(G-), Eq. 8, 9: sum of w * values over G+ minus that over G-. (P, G) -> (P,).

    positive: boolean, True in G+. Raises ValueError unless all three have the same shape (P, G).
    """
    _require_groups(values=values, w=w, positive=positive)
    weighted = w * values
    return weighted.where(positive, 0).sum(1) - weighted.where(~positive, 0).sum(1)


# Section 3.2: weights that balance. Advantages sum to zero over a group, so positive and negative
# advantages have the same total weight: w = |A| gives sum_{G+} w = sum_{G-} w, and a sample counts
# more the further it is from the average. Dividing by a std keeps the balance, clipping breaks it.
def group_advantages(
    rewards: Tensor, std: str = "group", eps: float = 0.0, clamp: float | None = None
) -> Tensor:
    """Eq. 12: A_i = (r_i - mean_j r_j) / (std_j r_j + eps). (P, G), G >= 2 -> (P, G).

    The mean is taken over the group. The std, without Bessel's correction, is taken over the group
    (so |A_i| <= sqrt(G - 1)), or with std="batch" over all P * G rewards, as in the released
    trainer for OCR and PickScore. eps (1e-4 there) stops rounding errors from being scaled up to
    advantages. clamp (5 there) limits |A_i|, because with a batch's std one bad sample of 128 can
    have A = -11; the group is then centred again to keep its weights balanced. A group of equal
    rewards gets exact zeros. Raises ValueError on other shapes or std, and on non-finite rewards.
    """
    shape = tuple(rewards.shape)
    _require(len(shape) == 2 and shape[1] >= 2, f"rewards must be (P, G) with G >= 2, got {shape}")
    _require(std in ("group", "batch"), f"std must be 'group' or 'batch', got {std!r}")
    for p, g in (~torch.isfinite(rewards)).nonzero().tolist()[:1]:
        raise ValueError(f"rewards must be finite, got {rewards[p, g]} at prompt {p}, sample {g}")
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    centred = rewards - rewards.mean(1, keepdim=True)
    centred = centred - centred.mean(1, keepdim=True)  # removes the rounding error of a large mean
    values, dim = (centred, 1) if std == "group" else (rewards, (0, 1))
    advantages = centred / (values.std(dim, keepdim=True, correction=0) + eps)
    if clamp is not None:
        advantages = advantages.clamp(-clamp, clamp)
        advantages = advantages - advantages.mean(1, keepdim=True)
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return advantages.masked_fill(equal, 0)


def partition(advantages: Tensor) -> Tensor:
    """Eq. 13: G+ = {A > 0} as a boolean mask (P, G). The rest, A <= 0, is G-."""
    return advantages > 0


def weights(advantages: Tensor) -> Tensor:
    """Eq. 14: w = |A|. (P, G) -> (P, G)."""
    return advantages.abs()


# Eq. 15 -> 16 (Appendix C.1, C.2, Eq. 18-20): from whole paths to one timestep.
# The loss is now -log sigmoid(beta [sum_{G+} w rho - sum_{G-} w rho]) with rho = log p_theta/p_ref
# (Eq. 15). A diffusion model has no tractable p_theta(x0) either, so Eq. 10 uses the path x_{0:T}
# that forward diffusion q draws from x0, whose log-ratio is a sum over T transitions (Eq. 19):
#     rho = E_q sum_t log p_theta(x_{t-1}|x_t)/p_ref(x_{t-1}|x_t) = T E_t E_q log p_theta/p_ref.
# These expectations are inside -log sigmoid, a convex function phi, and phi(E X) <= E phi(X)
# (Jensen, Eq. 18). Moving those over t and x_t outside gives an upper bound of the loss (Eq. 16),
# which one random t and one x_t for each sample estimate without bias.
def sample_timesteps(
    shape: tuple[int, ...], t_min: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """t ~ U[t_min, 1] for 0 <= t_min < 1, Algorithm 1, line 11, on the generator's device.

    t_min > 0 is the Timestep Clip Strategy of Section 3.2: a rollout of few steps has artefacts in
    its fine detail, such as blur, and low noise levels are where a model learns detail.
    """
    _require(0 <= t_min < 1, f"t_min must be in [0, 1), got {t_min}")
    device = generator and generator.device
    return t_min + (1 - t_min) * torch.rand(shape, generator=generator, device=device)


# Below Eq. 16, the paper shares eps within a group "to reduce the variance". Let C_ij be the
# covariance of grad L_i and grad L_j under a shared eps. Then sum_i A_i grad L_i has the variance
# sum_ij A_i A_j C_ij, of which independent eps leave only the terms i = j. Any part common to all
# C_ij cancels, since sum_j A_j = 0; so sharing helps a pair if C_12 > 0. But where similar samples
# (large C_ij) have similar advantages, it raises the variance: 3 to 5 times in the toy at G = 24.
def diffuse(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = alpha_t x0 + sigma_t eps = (1 - t) x0 + t eps, Algorithm 1, line 12.

    x0 and x_t: (P, G, ...). eps: (P, 1, ...) if shared by the group, or (P, G, ...).
    t: (P, 1) or (P, G). Raises ValueError if eps or t has another shape.
    """
    (P, G), shapes = x0.shape[:2], (tuple(x0.shape), (len(x0), 1, *x0.shape[2:]))
    _require(t.shape in ((P, 1), (P, G)), f"t must be {(P, 1)} or {(P, G)}, got {tuple(t.shape)}")
    _require(eps.shape in shapes, f"eps must be one of {shapes}, got {tuple(eps.shape)}")
    t = t.reshape(*t.shape, *[1] * (x0.ndim - 2))
    return (1 - t) * x0 + t * eps


# Eq. 16 -> 17 (Appendix C.3, Eq. 21, 22): from transitions to the denoising loss.
# The mean of log p_theta/p_ref over q(x_{t-1} | x_t, x0) is KL(q || p_ref) - KL(q || p_theta)
# (Eq. 21). All three are Gaussians with the same std, eta, whose means are the same function of x_t
# and an image: x0 for q, f for p_theta. So each KL is a weighted denoising loss, ||x0 - f||^2.
def lambda_t(alpha_t: Real, sigma_t: Real, alpha_s: Real, sigma_s: Real, eta_s: Real) -> Real:
    """Eq. 22: lambda_t in KL(q || p_theta) = lambda_t ||x0 - f||^2, s < t being the paper's t - 1.

    eta_s is the std of the step, 0 < eta_s <= sigma_s, and sigma_t > 0. Floats or tensors.
    """
    carried_over = (sigma_s**2 - eta_s**2) ** 0.5  # the part of x_s's noise that x_t already has
    return (alpha_s - carried_over * alpha_t / sigma_t) ** 2 / (2 * eta_s**2)


def mean_square(velocity: Tensor, goal: Tensor) -> Tensor:
    """(v - goal)^2, the mean over the data axes: (P, G, ...) -> (P, G).

    With goal = v_ref it is the released trainer's KL penalty: KL(p_ref || p_theta) of one step, up
    to lambda_t t^2 (Eq. 22 with f_ref for x0). Raises ValueError unless the shapes are equal.
    """
    shapes = f"{tuple(velocity.shape)} and {tuple(goal.shape)}"
    _require(velocity.shape == goal.shape, f"velocity and goal need one shape, got {shapes}")
    return (velocity - goal).square().flatten(2).mean(2)


def dsm_loss(velocity: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    """L_dsm of Eq. 17 for a flow: (v - (eps - x0))^2, the mean over the data axes. -> (P, G).

    velocity, x0: (P, G, ...). eps: (P, 1, ...) or (P, G, ...). The paper has ||f - x0||^2, which is
    t^2 ||v - (eps - x0)||^2, as f - x0 = x_t - t v - x0 = t (eps - x0 - v). All released code uses
    the mean square error of the velocity, so beta absorbs t^2 and the number of elements.
    """
    return mean_square(velocity, eps - x0)


# Eq. 17: the loss, and its gradient in one line.
# Put r_theta = beta (L_ref - L_theta) into Eq. 8 and 9. |A| over G+ minus |A| over G- is A with its
# sign. So the loss of a group is -log sigmoid(beta gap) with gap = sum_i A_i (L_i^ref - L_i): how
# much more than the reference the model prefers good samples to bad ones. Its gradient is
#     grad L_DGPO = beta sigmoid(-beta gap) sum_i A_i grad L_i.
# That is the whole method: denoise good samples, un-denoise bad ones, each by its advantage, and
# less as the gap widens and the gate sigmoid(-beta gap) closes. G+ is assumed to win with
# certainty, so p* of Eq. 5 is no fixed point: the gap widens until the gate closes, as in DPO.
def preference_gap(loss_theta: Tensor, loss_ref: Tensor, advantages: Tensor) -> Tensor:
    """The gap of Eq. 17, (R(G+) - R(G-)) / beta: (P, G) -> (P,), 0 at the reference.

    It grows as theta learns to prefer G+ to G-. The bracket of Eq. 17 is -gap. Errors: `group_gap`.
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
    """k (P, G) and the gate (P,), detached: the gradient of a group is beta sum_i k_i grad L_i.

    k_i = sigmoid(-beta gap) A_i, by the gradient above. Arguments and errors as in `dgpo_loss`.
    """
    gate = torch.sigmoid(-_logit(loss_theta, loss_ref, advantages, beta).detach())
    return gate[:, None] * advantages, gate


# Not in the paper: an option of the released trainer (github.com/Luo-Yihong/DGPO).
def clip_mask(loss_theta: Tensor, loss_old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's clip for a model without a likelihood: True (P, G) where the gradient is dropped.

    exp(L_old - L_theta) stands for p_theta / p_old. A good sample (A > 0) is dropped when the ratio
    exceeds 1 + clip, a bad one when it is below 1 - clip. Errors as in `dgpo_loss`.
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


# Section 3.2: without a policy gradient, no trajectory needs a likelihood, so the sampler adds no
# noise. Samples come from an ODE solver: DPM-Solver++, as in the paper and the released trainer.
@torch.no_grad()
def sample_ode(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int) -> Tensor:
    """Integrate dx/dt = v(x, t) from noise at t = 1 to x0 at t = 0, in equal steps of t.

    velocity: (x, t) -> v, with x and v of noise's shape and t (). DPM-Solver++(2M) of Lu et al.
    2022b, of order 2 with one evaluation a step. Raises ValueError on steps < 1.
    """
    _require(steps >= 1, f"steps must be at least 1, got {steps}")
    times = torch.linspace(1, 0, steps + 1, dtype=noise.dtype, device=noise.device)
    log_snr = ((1 - times) / times).log()  # lambda = log(alpha_t / sigma_t), from -inf to inf
    x, f_before = noise, None
    for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        # x_s = (s/t) x_t + (1 - s/t) f is exact for a constant f. Order 2 uses f at the midpoint in
        # lambda, extrapolated from the last two; the last step has none, as its lambda is infinite.
        f = f_half = x - t * velocity(x, t)
        if 0 < i < steps - 1:
            ratio = (log_snr[i + 1] - log_snr[i]) / (log_snr[i] - log_snr[i - 1])
            f_half = f + ratio / 2 * (f - f_before)
        x, f_before = s / t * x + (1 - s / t) * f_half, f
    return x


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
) -> Iterator[dict[str, float]]:
    """Algorithm 1: train `model` in place, and yield the metrics of each iteration.

    model: (x (B, *data_shape), t (B,), c (B,)) -> v. sample_conditions: (P, generator) -> c (P,).
    reward: (c (P, 1), x0 (P, G, *data_shape)) -> (P, G). generator: the only source of randomness.
    beta: in published units (below). train_timesteps: K timesteps for each group. ema: mu of line
    15; None means theta_old = theta. offline: the reference draws samples (Section 4.3).
    """
    P, G, K = prompts, group_size, train_timesteps
    reference = copy.deepcopy(model).requires_grad_(False)  # "Require: Reference model f_ref"
    theta_old = model if ema is None else copy.deepcopy(reference)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.0)

    def velocity(network: nn.Module, c: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """v (P, G, ...) of x (P, G, ...) at t, () or (P, 1), under the conditions c (P,)."""
        t, c = t.expand(x.shape[:2]), c[:, None].expand(x.shape[:2])
        return network(x.flatten(0, 1), t.flatten(), c.flatten()).view_as(x)

    for _ in range(iterations):  # line 1
        c = sample_conditions(P, generator)  # line 3
        noise = torch.randn(P, G, *data_shape, generator=generator, device=generator.device)
        sampler = partial(velocity, reference if offline else theta_old, c)
        x0 = sample_ode(sampler, noise, rollout_steps)  # line 4
        rewards = reward(c[:, None], x0)  # line 6
        advantages = group_advantages(rewards)  # line 7; line 9 is in `preference_gap`

        # Lines 11 to 13 at K timesteps: each group appears K times, with a t and an eps for each.
        c, x0, advantages = torch.cat([c] * K), torch.cat([x0] * K), torch.cat([advantages] * K)
        t = sample_timesteps((K * P, 1), t_min, generator)  # line 11
        eps = torch.randn(K * P, 1, *data_shape, generator=generator, device=generator.device)
        x_t = diffuse(x0, eps, t)  # line 12

        loss_theta = dsm_loss(velocity(model, c, x_t, t), x0, eps)
        with torch.no_grad():
            loss_ref = dsm_loss(velocity(reference, c, x_t, t), x0, eps)

        # Published betas assume a gap averaged over the group and a loss divided by beta, so that
        # beta only shapes the gate, and neither beta nor G sets the size of a step.
        loss = dgpo_loss(loss_theta, loss_ref, advantages, beta / G)  # line 13, Eq. 17
        optimizer.zero_grad()
        (loss / beta).backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()  # line 14, by AdamW
        if ema is not None:
            ema_update(theta_old.parameters(), model.parameters(), ema)  # line 15

        gap = preference_gap(loss_theta.detach(), loss_ref, advantages) / G
        gate = torch.sigmoid(-beta * gap)
        metrics = dict(reward=rewards, loss=loss, gap=gap, gate=gate, grad_norm=grad_norm)
        yield {name: value.mean().item() for name, value in metrics.items()}
