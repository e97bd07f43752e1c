"""The family: how the rewards of a group enter the gradient of a flow, a few lines a method.

Shapes, times and signs are those of dgpo.py: (P, G, ...), t = 1 is noise, v* = eps - x0, A is the
advantage and L = ||v - v*||^2 the denoising loss. A network is a function (x_t (B, ...), t (B,),
p (B,)) -> v, where p is a sample's row in P, so that the same code trains a network of the 2-D
worlds (worlds.py) and the transformer of the tiny SD3.5 (tiny.py).

How the methods differ, in one line. Let e = v_old - v* be the error of theta_old, and d = v - v_old
how far theta has moved. Up to a constant, the loss of one sample is

    2 A e.d + c ||d||^2   with   c = A                     AWM, and DGPO inside its gate
                                 c = A + bound max(-A, 0)  bounded DGPO, inside its gate
                                 c = clip * b              DiffusionNFT, before a division (see nft)

The first term is common to all, and the only one at theta = theta_old. The second decides what
happens to a bad sample, A < 0, once theta moves. With c < 0 the loss is a concave parabola and
falls without end; with c > 0 it is convex, and its minimum is a finite target. A gate, -log sigmoid
of beta times the gap, also ends the fall, but late: the loss of a pair's bad sample can still fall
by 4 log(2) / beta. DGPO has one gate for a group, Diffusion-DPO and GPO one for each pair.
Linear-DPO's gate is a line, and ThermoDPO's has a third term, the winner's own loss, which takes
over when it is the largest. CRD and PAR fit the change in a sample's loss to its advantage: the
gradient is zero where the residual is. Flow-GRPO and V-GRPO have A rho, where rho = p_theta / p_old
is positive: a bad sample stops counting once it has become unlikely. lab/results/family.png draws
them all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import dgpo
from lab.protocol import Range
from sd35 import gradient


@dataclasses.dataclass(frozen=True)
class Setting:
    """A method and its hyperparameters, by the trainer's names; defaults as in toy/run_2d.py."""

    method: str = "DGPO"  # a key of METHODS
    learning_rate: float = 1.5e-3
    decay: float | None = None  # cost at which the learning rate has halved
    average: float | None = None  # decay of the averaged weights that are evaluated
    beta: float = 1.0  # as published; for DiffusionNFT its b
    kl: float = 0.01  # weight of ||v - v_ref||^2; for Flow-GRPO of the KL of a step in nats
    t_min: float = 0.2
    ema: float | None = None  # decay of theta_old; None means theta_old = theta
    group_size: int = 24
    train_samples: int | None = None  # m: train on the m/2 worst and the m/2 best of each group
    prompts_per_step: int = 16
    train_timesteps: int = 2  # K: timesteps per group
    num_inference_steps: int = 10  # of a rollout
    updates_per_rollout: int = 1  # optimizer steps for each rollout
    bound: float = 0.0  # DGPO's
    anchor: str = "theta_old"  # or "reference": what v_old is
    clip: float | None = None  # PPO's
    advantage_clip: float = 5.0  # DiffusionNFT's
    stratified: bool = False  # draw the timesteps of a sample from equal parts of their range
    sde_noise: float = 0.0  # noise level a of the SDE sampler; 0 is the ODE
    trained_share: float = 1.0  # Flow-GRPO: the part of its steps, the noisiest, that is trained
    shared_noise: bool = True  # one eps for a group
    offline: bool = False  # the reference draws the samples


class Batch(NamedTuple):
    """What a loss sees: P groups of G samples, each group at one time."""

    v: Tensor  # (P, G, ...), as the next three
    v_ref: Tensor
    v_old: Tensor  # v_ref, unless the method's row says that it needs theta_old
    v_star: Tensor
    t: Tensor  # (P, 1)
    rewards: Tensor  # (P, G)
    advantages: Tensor  # (P, G)

    @property
    def loss(self) -> Tensor:
        return dgpo.mean_square(self.v, self.v_star)

    @property
    def loss_ref(self) -> Tensor:
        return dgpo.mean_square(self.v_ref, self.v_star)

    @property
    def loss_old(self) -> Tensor:
        return dgpo.mean_square(self.v_old, self.v_star)


# AWM (Xue et al. 2025, arXiv:2509.25050), advantage-weighted matching: A times the denoising loss.
# DGPO's gradient is beta sigmoid(-beta gap) sum_i A_i grad L_i. As beta goes to 0, the gate freezes
# at 1/2, and DGPO's loss divided by beta becomes half of AWM's: AWM is DGPO without its gate.
#
# With `kl` it is RVM (arXiv:2608.23664), whose update is A (v - v*) + anchor (v - v_ref). With kl =
# 1, and the raw reward R in place of A, it is RAM (arXiv:2605.10759): ||v - sg[v_ref + R (v* -
# v)]||^2.
def awm(batch: Batch, setting: Setting) -> Tensor:
    return (batch.advantages * batch.loss).mean()


# DiffusionNFT (Zheng et al. 2025, arXiv:2509.16117): denoise in two directions around theta_old. A
# reward in [0, 1], r = 1/2 + A / (2c) with A clipped at c, 5 as published, says how good a sample
# is. With v+- = v_old +- b (v - v_old), the loss c/b [r ||v+ - v*||^2 + (1 - r) ||v- - v*||^2] is
# c/b [||e||^2 + 2 (2r - 1) b e.d + b^2 ||d||^2] = 2 A e.d + c b ||d||^2 up to a constant: here c
# acts like b, except that it also clips A. The published loss, however, compares x0 = x_t - t v and
# divides each square by its own mean absolute error, detached. For one x0 and eps, the minimum is
# then at v_old - sign(A) e / b, for any c.
def nft(batch: Batch, setting: Setting, eps: float = 1e-5) -> Tensor:
    b, clip = setting.beta, setting.advantage_clip
    r = 0.5 + batch.advantages.clamp(-clip, clip) / (2 * clip)

    def error(direction: float) -> Tensor:
        moved = batch.v_old + direction * b * (batch.v - batch.v_old)
        difference = batch.t[..., None] * (moved - batch.v_star).flatten(2)
        mean_error = difference.detach().abs().mean(2).clamp(min=eps)
        return difference.square().mean(2) / mean_error

    return clip / b * (r * error(1.0) + (1 - r) * error(-1.0)).mean()


# Diffusion-DPO (Wallace et al. 2024, arXiv:2311.12908), in its flow form and on groups: the best
# sample against the worst. A pair is a group of two, whose advantages are +1 and -1; both are 0 if
# the rewards are equal, and then nothing is learned in any method on pairs. So its loss,
# -log sigmoid(-beta/2 [(L_w - L_w^ref) - (L_l - L_l^ref)]), is DGPO's on the two extremes, where a
# mean over the group has the same beta/2.
#
# Diffusion-SDPO (arXiv:2511.03317) scales the loser's part down where it would harm the winner.
# With g_w and g_l the gradients with respect to the output, v - v*, a step along s g_l - g_w lowers
# L_w as long as s < |g_w|^2 / (g_w.g_l). Only the gradient of the value below is meaningful.
def sdpo(batch: Batch, setting: Setting, margin: float = 0.1) -> Tensor:
    loss, sign = batch.loss, batch.advantages.sign()
    k, _ = dgpo.group_gradient(loss, batch.loss_ref, sign, setting.beta / 2)
    g = (batch.v - batch.v_star).flatten(2).detach()
    dot, squares = g.prod(1).sum(1, keepdim=True), g.square().sum(2)
    winner = (squares * (sign > 0)).sum(1, keepdim=True)
    s = torch.where(dot > 0, (1 - margin) * winner / dot, 1.0).clamp(max=1)
    return (k * torch.where(sign < 0, s, 1.0) * loss).mean()


# GPO (Chen et al. 2025, arXiv:2505.11070): the mean of Diffusion-DPO's loss over all pairs
# r_i > r_j of a group. As in DGPO, it is divided by beta, so that beta shapes the gate alone.
def gpo(batch: Batch, setting: Setting) -> Tensor:
    change = batch.loss - batch.loss_ref
    differences = change[:, :, None] - change[:, None, :]  # (P, G, G), winner i against loser j
    wins = batch.rewards[:, :, None] > batch.rewards[:, None, :]
    losses = -F.logsigmoid(-setting.beta / 2 * differences).where(wins, 0)
    return (losses.sum((1, 2)) / wins.sum((1, 2)).clamp(min=1)).mean() / setting.beta


# Linear-DPO (arXiv:2605.21123): let x be how far the winner has fallen behind the loser.
# Diffusion-DPO's gate is sigmoid(beta x / 2), with x measured from the reference. This one is a
# line, 0.2 beta x + 1/2, cut at 0 and 1, with x measured from theta_old, an EMA of theta. To first
# order in x, this gate is Diffusion-DPO's at 1.6 beta.
def linear_dpo(batch: Batch, setting: Setting) -> Tensor:
    x = (batch.advantages.sign() * (batch.loss - batch.loss_old)).sum(1)
    gate = (0.2 * setting.beta * x.detach() + 0.5).clamp(0, 1)
    return (gate * x).mean() / 2


# ThermoDPO (arXiv:2608.20011, its weighted form, tau in proportion to t): let x be (L_w - L_w^ref)
# - (L_l - L_l^ref). Diffusion-DPO's loss is tau / 2 log(1 + exp(x / tau)) with tau = 2 / beta; here
# tau = 2 t / beta. ThermoDPO adds a third term to the sum, exp((1 - t)^2 L_w / tau). Where it is
# the largest, the gradient is that of supervised learning on the winner, and the loser is let go.
def thermo_dpo(batch: Batch, setting: Setting) -> Tensor:
    sign, t = batch.advantages.sign(), batch.t[:, 0]
    x = (sign * (batch.loss - batch.loss_ref)).sum(1)
    tau = 2 * t / setting.beta
    anchor = (1 - t) ** 2 * (batch.loss * (sign > 0)).sum(1)
    rivals = torch.stack([torch.zeros_like(t), x / tau, anchor / tau])
    return (tau / 2 * rivals.logsumexp(0)).mean()


# CRD, centred reward distillation (arXiv:2603.14128): by Eq. 10 of DGPO, beta (L_old - L) is the
# reward up to a constant of the prompt. It is centred over the group, so that Z(c) cancels, and
# regressed on A. The gradient is (A - centred reward) grad L: a residual in place of DGPO's gate.
# As in the released code, no gradient flows through the centre. Its division of each L by its own
# error is left out here.
def crd(batch: Batch, setting: Setting) -> Tensor:
    reward = setting.beta * (batch.loss_old - batch.loss)
    residual = batch.advantages - (reward - reward.detach().mean(1, keepdim=True))
    return residual.square().mean() / (2 * setting.beta)


# PAR, proximal advantage regression (arXiv:2602.04663, known here from its abstract and notes on
# it): the ELBO stands for the likelihood, log rho = beta (L_old - L). With rho held constant, the
# loss is rho (A - log rho)^2 / 2. Its gradient, rho (A - log rho) grad L, is also that of the
# paper's PEPG: the two are one method. The paper's EPG has the gradient rho A grad L, which is that
# of V-GRPO without a clip.
def par(batch: Batch, setting: Setting) -> Tensor:
    log_rho = setting.beta * (batch.loss_old - batch.loss)
    residual = batch.advantages - log_rho
    return (log_rho.detach().exp() * residual.square()).mean() / (2 * setting.beta)


# V-GRPO (arXiv:2604.23380): GRPO's clipped ratio (see Flow-GRPO below) with the same ELBO, a group
# sharing t and eps, and t stratified. The paper's soft clip of A and weights of L are left out.
def v_grpo(batch: Batch, setting: Setting) -> Tensor:
    log_probs = -setting.beta * batch.loss, -setting.beta * batch.loss_old
    return flow_grpo_loss(*log_probs, batch.advantages, setting.clip) / setting.beta


def backward(
    networks: tuple,
    setting: Setting,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    rewards: Tensor,
    advantages: Tensor,
    share: float = 1.0,
) -> None:
    """Add the gradient of share * (a method's loss + its KL) to .grad; Flow-GRPO's is below.

    networks: theta, the reference and theta_old. x0 (P, G, ...), eps (P, 1 or G, ...), t (P, 1): as
    in `dgpo.diffuse`, with K * P rows for K timesteps. rewards, advantages: (P, G).
    """
    method, (P, G) = METHODS[setting.method], rewards.shape
    theta, reference, old = networks
    if setting.anchor == "reference":
        old = reference
    if method.loss is None:
        beyond = {"kl": setting.kl, "clip": setting.clip, "bound": setting.bound}
        beyond |= {"velocity_old": old, "share": share}
        group = x0, eps, t, advantages
        gradient.backward_group_loss(theta, reference, *group, setting.beta, **beyond)
        return

    x_t, rows = dgpo.diffuse(x0, eps, t).flatten(0, 1), torch.arange(P).repeat_interleave(G)
    inputs = x_t, t.expand(P, G).flatten(), rows
    v = theta(*inputs).view_as(x0)
    with torch.no_grad():
        v_ref = reference(*inputs).view_as(x0)
        v_old = old(*inputs).view_as(x0) if method.needs_old else v_ref
    loss = method.loss(Batch(v, v_ref, v_old, eps - x0, t, rewards, advantages), setting)
    (share * (loss + setting.kl * dgpo.mean_square(v, v_ref).mean())).backward()


# Flow-GRPO (Liu et al. 2025, arXiv:2505.05470): GRPO on the steps of a stochastic sampler.
# The ODE dx = v dt has the same marginals p_t as the SDE, run from t = 1 down to 0 with any g(t),
#     dx = [v + g^2 / (2 t) (x + (1 - t) v)] dt + g dw,
# because x + (1 - t) v is E[eps | x] = -t score. A step of the SDE is a Gaussian in x_s given x_t,
# so a trajectory has a likelihood and GRPO's policy gradient exists. g(t) = a sqrt(t / (1 - t)).
def sde_step(
    velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, s: Tensor, a: float = 0.7
) -> tuple[Tensor, Tensor]:
    """Mean (shaped as x) and std (shaped as t) of p_theta(x_s | x_t) for s < t, the policy.

    velocity: (x, t) -> v. t, s: () or of a shape that broadcasts to x's. a: how much noise; 0 is an
    Euler step of the ODE. At t = 1, where g is infinite, s replaces t in its denominator, as in the
    released code.
    """
    g_squared = a**2 * t / (1 - torch.where(t < 1, t, s))
    v = velocity(x, t)
    mean = x + (v + g_squared / (2 * t) * (x + (1 - t) * v)) * (s - t)
    return mean, (g_squared * (t - s)).sqrt()


@torch.no_grad()
def sample_sde(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    times: Tensor,
    fresh_noise: Callable[[int], Tensor],
    a: float = 0.7,
) -> Tensor:
    """A trajectory (steps + 1, *noise.shape) along `times`, from noise to x0.

    fresh_noise: the noise of a step, by its number.
    """
    trajectory = [noise]
    for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        mean, std = sde_step(velocity, trajectory[-1], t, s, a)
        trajectory.append(mean + std * fresh_noise(i))
    return torch.stack(trajectory)


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(x; mean, std^2 I), summed over the data axes: (P, G, ...) -> (P, G)."""
    each = -((x - mean) ** 2) / (2 * std**2) - std.log() - math.log(2 * math.pi) / 2
    return each.flatten(2).sum(2)


def flow_grpo_loss(
    log_prob: Tensor, log_prob_old: Tensor, advantages: Tensor, clip: float | None
) -> Tensor:
    """PPO's clipped objective, max(-A rho, -A clip(rho, 1 - clip, 1 + clip)), the mean of (P, G).

    rho = p_theta / p_old of a step. At theta_old its gradient is REINFORCE's, -A grad log p_theta.
    """
    rho = (log_prob - log_prob_old).exp()
    clipped = rho if clip is None else rho.clamp(1 - clip, 1 + clip)
    return torch.maximum(-advantages * rho, -advantages * clipped).mean()


def backward_flow_grpo(
    networks: tuple,
    setting: Setting,
    trajectory: Tensor,
    times: Tensor,
    advantages: Tensor,
    log_prob_old: Tensor | None,
    share: float = 1.0,
) -> Tensor:
    """Add the gradient of share * (Flow-GRPO's loss + its KL), a mean over steps, to .grad.

    trajectory: the K + 1 states (K + 1, P, G, ...) around the K steps to train. times: (K + 1,).
    advantages: (P, G). The networks see K * P rows. Returns the log-probabilities of the steps
    (K * P, G): log_prob_old of the later updates from the same rollout.
    """
    K, P, G = len(times) - 1, *advantages.shape
    x, x_next = trajectory[:-1].flatten(0, 1), trajectory[1:].flatten(0, 1)  # (K * P, G, ...)
    t, s = (part.repeat_interleave(P) for part in (times[:-1], times[1:]))
    t, s = (part.view(-1, *[1] * (x.ndim - 1)) for part in (t, s))
    rows = torch.arange(K * P).repeat_interleave(G)

    def policy(network: gradient.Velocity) -> tuple[Tensor, Tensor]:
        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return network(x.flatten(0, 1), t.flatten().repeat_interleave(G), rows).view_as(x)

        return sde_step(velocity, x, t, s, setting.sde_noise)

    theta, reference, _ = networks
    mean, std = policy(theta)
    with torch.no_grad():
        mean_ref, _ = policy(reference)
    log_prob = gaussian_log_prob(x_next, mean, std)
    if log_prob_old is None:
        log_prob_old = log_prob.detach()

    loss = flow_grpo_loss(log_prob, log_prob_old, advantages.repeat(K, 1), setting.clip)
    kl = ((mean - mean_ref) ** 2 / (2 * std**2)).flatten(2).sum(2).mean()
    (share * (loss + setting.kl * kl)).backward()
    return log_prob_old


# The methods, a row each. A new one is its loss above, and a row here.

COMMON: dict[str, Range | tuple] = {  # what a search may choose; the units of the KL differ
    "learning_rate": Range(3e-4, 1e-2),
    "decay": (None, 100_000, 300_000, 1_000_000),
    "average": (None, 0.9, 0.97),
    "kl": Range(1e-3, 0.3),
    "ema": (None, 0.5, 0.8, 0.9, 0.95),
    "prompts_per_step": (4, 8, 16),
    "num_inference_steps": (3, 5, 10),
    "updates_per_rollout": (1, 2, 4),
}
DENOISING = {**COMMON, "t_min": Range(0, 0.6), "train_timesteps": (1, 2, 4)}
EXTREMES = {"train_samples": (2, 4, 8, None)}
LAGGING = {"ema": (0.5, 0.7, 0.8, 0.9, 0.95)}
BETA = {"beta": Range(0.1, 100)}
RATIO = {"clip": (None, 0.05, 0.2, 1.0), "stratified": (True,)}
SDE = {"sde_noise": Range(0.3, 1.2), "trained_share": (0.5, 1.0), "clip": (0.05, 0.2, 1.0)}


class Method(NamedTuple):
    """A row of the table below."""

    loss: Callable[..., Tensor] | None  # of a Batch and a Setting; None: DGPO's, see `backward`
    enters: str  # how the reward enters the gradient
    space: dict[str, Range | tuple]  # what a search may choose
    defaults: dict[str, Any] = {}  # where a search starts, if not at the defaults of Setting
    needs_old: bool = False  # the loss uses theta_old's velocity
    pairs: bool = False  # trains on the two extremes of each group


PAIR, RESIDUAL = "gate of each pair", "residual of each sample"
OLD = DENOISING | LAGGING  # the space of methods that compare theta with theta_old
METHODS = {
    "DGPO": Method(None, "gate of a group", DENOISING | BETA),
    "Bounded DGPO": Method(
        None,
        "gate of a group, mirrored target",
        OLD | BETA | EXTREMES | {"bound": (1.0, 2.0, 4.0)},
        {"bound": 2.0, "ema": 0.9, "train_samples": 4},
    ),
    "Diffusion-DPO": Method(None, PAIR, DENOISING | BETA, pairs=True),
    "GPO": Method(gpo, PAIR, DENOISING | BETA | EXTREMES),
    "Diffusion-SDPO": Method(sdpo, PAIR, DENOISING | BETA, pairs=True),
    "Linear-DPO": Method(linear_dpo, PAIR, OLD | BETA, {"ema": 0.9}, needs_old=True, pairs=True),
    "ThermoDPO": Method(thermo_dpo, PAIR, DENOISING | BETA, pairs=True),
    "CRD": Method(crd, RESIDUAL, OLD | BETA | EXTREMES, {"ema": 0.9}, needs_old=True),
    "PAR": Method(par, RESIDUAL, OLD | BETA | EXTREMES, {"ema": 0.9}, needs_old=True),
    "DiffusionNFT": Method(
        nft,
        "mirrored target",
        OLD | EXTREMES | {"beta": Range(0.1, 10), "advantage_clip": (1.0, 2.0, 5.0)},
        {"ema": 0.9, "beta": 1.0},
        needs_old=True,
    ),
    "AWM": Method(awm, "weight of each sample", DENOISING | EXTREMES),
    "V-GRPO": Method(
        v_grpo,
        "ratio of a sample",
        OLD | BETA | EXTREMES | RATIO,
        {"ema": 0.9, "clip": 0.2, "stratified": True},
        needs_old=True,
    ),
    "Flow-GRPO": Method(  # whose loss is of trajectories, see `backward_flow_grpo`
        flow_grpo_loss,
        "ratio of a sampler's step",
        COMMON | EXTREMES | SDE,
        {"sde_noise": 0.7, "clip": 0.2, "kl": 0.01},
    ),
}


def trained_samples(setting: Setting) -> int:
    """m: how many samples of each group are trained on."""
    return 2 if METHODS[setting.method].pairs else setting.train_samples or setting.group_size


def step_cost(setting: Setting, times: int) -> int:
    """The cost of a rollout and its updates, in forward passes of one sample.

    times: at how many timesteps, or steps of a trajectory, each sample is trained. Each costs 4: a
    forward, a backward (which counts 2) and the reference's forward; or 5 with theta_old's.
    """
    method, P = METHODS[setting.method], setting.prompts_per_step
    beyond = method.loss is None and (setting.clip is not None or setting.bound > 0)
    needs_old = (method.needs_old or beyond) and setting.anchor == "theta_old"
    rollout = setting.num_inference_steps * P * setting.group_size
    return (
        rollout
        + setting.updates_per_rollout * (4 + needs_old) * P * trained_samples(setting) * times
    )
