"""The family in one loop: seven ways for the rewards of a group to enter the gradient of a flow.

DGPO, alone and with what is beyond its paper; AWM, DiffusionNFT, Flow-GRPO, Diffusion-DPO and GPO,
and Diffusion-SDPO's scaling of the loser.
Shapes, times and signs are those of dgpo.py, and so is all that the methods share: the rollout, the
advantages A, the denoising loss L = ||v - v*||^2.

How a reward enters, on one line. Let e = v_old - v* be the error at theta_old, and d = v - v_old
how far theta has moved since. Up to a constant, the loss of one sample is

    2 A e.d + c ||d||^2   with   c = A                     AWM, and DGPO within a gate
                                 c = A + bound max(-A, 0)  bounded DGPO, within that gate
                                 c = 5 b                   DiffusionNFT, less a division

The first term is the same for all, and is all there is at theta = theta_old. The second decides
what becomes of a bad sample, A < 0, once theta moves: with c < 0 the loss is a concave parabola and
falls without end; with c > 0 it is convex, and its minimum a finite target. A gate, -log sigmoid of
beta times the gap, ends the fall too, but late: what it can still take away is 2 log(2) / beta. In
DGPO a group shares one gate; in Diffusion-DPO and GPO each pair has its own. Flow-GRPO has A rho,
and rho = p_theta / p_old is an exponential of a quadratic: it cannot fall below zero, so a bad step
stops counting when it has become unlikely. toy/results/family.png draws them all.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import flow2d
import torch
import torch.nn.functional as F
import worlds
from torch import Tensor, nn

import dgpo

EVALUATION_STEPS = 20  # of the ODE solver; rollouts take 10 or fewer, as the paper's do
SAMPLES = 64  # points for each condition in an evaluation
FIRST, APART = 10_000, 1.1  # evaluations are 10,000 forwards apart, and later 10 % of the cost
BUDGETS = {"ring-128": 3_000_000, "ring-512": 3_000_000}  # forwards of a run that is reported, ...
BUDGET = 1_500_000  # ... and in all other worlds
WAY = 0.9  # there: this share of the way from the base reward to the best data's ...
RIGHT = 0.8  # ... with this share of samples right, as the world's judge has it
STAYS = 0.9  # arrived: there at the end, in this share of the evaluations until then, ...
LONG = 1.2  # ... and until this many times the cost at which it got there
FOLLOWED = 4.0  # a run that has arrived ends at this many times that cost ...
AT_LEAST = 0.25  # ... and not before this share of the world's budget


def budget_in(world: str) -> int:
    return BUDGETS.get(world, BUDGET)


PAIRS = ("Diffusion-DPO", "SDPO")  # the methods that train on the two extremes of a group alone


@dataclasses.dataclass(frozen=True)
class Setting:
    """A method and all its dials. The defaults are run_2d.py's, wherever it has the dial."""

    world: str
    method: str  # DGPO, AWM, NFT, Flow-GRPO, Diffusion-DPO, SDPO or GPO
    learning_rate: float = 1.5e-3
    decay: float | None = None  # forwards after which the learning rate has halved
    average: float | None = None  # decay of the averaged weights that are evaluated
    beta: float = 1.0  # as published; NFT: how strongly theta is held to theta_old
    kl: float = 0.01  # a velocity's error; Flow-GRPO: nats of a step
    t_min: float = 0.2
    ema: float | None = None  # decay of theta_old; without it, theta_old = theta
    group_size: int = 24
    samples: int | None = None  # of a group that are trained on, half of them from each end
    prompts: int = 16
    timesteps: int = 2  # at which each group is trained
    rollout_steps: int = 10
    updates: int = 1  # optimiser steps from each rollout
    bound: float = 0.0  # DGPO's
    anchor: str = "theta_old"  # what the bound holds to; the other is "reference"
    clip: float | None = None
    sde_noise: float = 0.0  # the a of the SDE that samples; 0 samples by the ODE
    trained_share: float = 1.0  # Flow-GRPO: of the trajectory's steps, the noisiest
    shared_noise: bool = True
    offline: bool = False


# AWM (Xue et al. 2025, arXiv:2509.25050), advantage-weighted matching: A times the denoising loss.
# DGPO's gradient is beta sigmoid(-beta gap) sum_i A_i grad L_i. As beta goes to 0, the gate freezes
# at 1/2, and what is left of the loss over beta is half of AWM's. So AWM is DGPO without its gate.


def awm_loss(loss_theta: Tensor, advantages: Tensor) -> Tensor:
    """The mean of A L, a scalar; (P, G) each."""
    return (advantages * loss_theta).mean()


# DiffusionNFT (Zheng et al. 2025, arXiv:2509.16117): denoise in two directions around theta_old.
# A reward in [0, 1], r = 1/2 + A / (2 * 5) with A clipped at 5, says how good a sample is. With
# v+- = v_old +- b (v - v_old), the loss 5/b [r ||v+ - v*||^2 + (1 - r) ||v- - v*||^2] is
# 5/b [||e||^2 + 2 (2r - 1) b e.d + b^2 ||d||^2] = 2 A e.d + 5 b ||d||^2 and a constant. It compares
# images instead, x0 = x_t - t v, and divides each square by its own mean error, held fixed.
ADVANTAGE_CLIP = 5.0


def nft_loss(
    v: Tensor, v_old: Tensor, v_star: Tensor, t: Tensor, advantages: Tensor, b: float, eps=1e-5
) -> Tensor:
    """DiffusionNFT's loss, a scalar. Velocities (P, G, ...), advantages (P, G), t (P, 1)."""
    r = 0.5 + advantages.clamp(-ADVANTAGE_CLIP, ADVANTAGE_CLIP) / (2 * ADVANTAGE_CLIP)

    def error(direction: float) -> Tensor:
        difference = t[..., None] * (v_old + direction * b * (v - v_old) - v_star).flatten(2)
        mean_error = difference.detach().abs().mean(2).clamp(min=eps)
        return difference.square().mean(2) / mean_error

    return ADVANTAGE_CLIP / b * (r * error(1.0) + (1 - r) * error(-1.0)).mean()


# Diffusion-DPO (Wallace et al. 2024, arXiv:2311.12908), in its flow form and on groups: the best
# sample against the worst. A pair is a group of two, whose advantages are +1 and -1, so its loss,
# -log sigmoid(-beta/2 [(L_w - L_w^ref) - (L_l - L_l^ref)]), is DGPO's on the two extremes: a mean
# over the group has the same beta/2.
#
# Diffusion-SDPO (arXiv:2511.03317) is Diffusion-DPO that lets go of the loser where un-denoising it
# would harm the winner: with g_w and g_l the gradients by the output, v - v*, a step along
# s g_l - g_w lowers L_w as long as s < |g_w|^2 / (g_w.g_l).


def sdpo_loss(
    v: Tensor, v_star: Tensor, loss_ref: Tensor, beta: dgpo.Real, margin: float = 0.1
) -> Tensor:
    """Pairs, the loser first: v, v_star (P, 2, ...), loss_ref (P, 2). The loss over beta, a scalar.

    Its value means nothing, but its gradient is Diffusion-DPO's with the loser's part times s.
    """
    error, loss = (v - v_star).flatten(2), (v - v_star).square().flatten(2).mean(2)
    pair = torch.tensor([-1.0, 1.0], dtype=v.dtype).expand_as(loss)
    k, _ = dgpo.group_gradient(loss, loss_ref, pair, beta / 2)
    loser, winner = error.detach().unbind(1)
    dot = (loser * winner).sum(1)
    s = torch.where(dot > 0, (1 - margin) * winner.square().sum(1) / dot, 1.0).clamp(max=1)
    return (k * torch.stack([s, torch.ones_like(s)], 1) * loss).mean()


# GPO (Chen et al. 2025, arXiv:2505.11070): Diffusion-DPO on all pairs of a group at once.


def gpo_loss(loss_theta: Tensor, loss_ref: Tensor, rewards: Tensor, beta: dgpo.Real) -> Tensor:
    """Diffusion-DPO's loss, the mean over a group's pairs r_i > r_j: (P, G) each -> a scalar."""
    gap = loss_theta - loss_ref
    differences = gap[:, :, None] - gap[:, None, :]  # (P, G, G), winner i against loser j
    wins = rewards[:, :, None] > rewards[:, None, :]
    losses = -F.logsigmoid(-beta / 2 * differences).where(wins, 0)
    return (losses.sum((1, 2)) / wins.sum((1, 2)).clamp(min=1)).mean()


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


# The one loop.


@dataclasses.dataclass
class Networks:
    theta: nn.Module
    reference: nn.Module
    old: nn.Module


@dataclasses.dataclass
class Rollout:
    c: Tensor  # (P,)
    x0: Tensor  # (P, G, D)
    rewards: Tensor  # (P, G)
    trajectory: Tensor | None  # (steps + 1, P, G, D), and its times (steps + 1,), of the SDE
    times: Tensor | None
    log_prob_old: Tensor | None = None  # of the trajectory, from the first update on


def at_conditions(network: nn.Module, c: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The network as a velocity (x (N, D), t ()) -> v for samplers, c (N,) being fixed."""
    return lambda x, t: network(x, t.expand(len(x)), c)


def draw(theta_old: nn.Module, setting: Setting, generator: torch.Generator) -> Rollout:
    """Groups from theta_old, scored, and the extremes of them if no more are wanted."""
    P, G, world = setting.prompts, setting.group_size, worlds.make(setting.world)
    c = flow2d.sample_conditions(P, generator)
    noise = torch.randn(P * G, world.dims, generator=generator)
    velocity, steps = at_conditions(theta_old, c.repeat_interleave(G)), setting.rollout_steps
    trajectory = times = None
    if setting.sde_noise:
        trajectory, times = sample_sde(velocity, noise, steps, generator, setting.sde_noise)
        trajectory = trajectory.view(steps + 1, P, G, -1)
        x0 = trajectory[-1]
    else:
        x0 = dgpo.sample_ode(velocity, noise, steps).view(P, G, -1)
    rewards = world.reward(c[:, None], x0)
    m = 2 if setting.method in PAIRS else setting.samples
    if m is not None:
        p, kept = torch.arange(P)[:, None], dgpo.extremes(rewards, m)
        x0, rewards = x0[p, kept], rewards[p, kept]
        trajectory = None if trajectory is None else trajectory[:, p, kept]
    return Rollout(c, x0, rewards, trajectory, times)


def backward_denoising(
    networks: Networks, setting: Setting, rollout: Rollout, generator: torch.Generator
) -> None:
    """The gradient of all but Flow-GRPO, at K timesteps; of DGPO's kin, divided by beta."""
    K, rewards = setting.timesteps, rollout.rewards.repeat(setting.timesteps, 1)
    c, x0 = rollout.c.repeat(K), torch.cat([rollout.x0] * K)
    (P, G), advantages = rewards.shape, dgpo.group_advantages(rewards)
    t = dgpo.sample_timesteps((P, 1), setting.t_min, generator)
    eps = torch.randn(P, 1 if setting.shared_noise else G, x0.shape[2], generator=generator)

    def velocity(network: nn.Module) -> dgpo.Velocity:
        return lambda x, t, p: network(x, t, c[p])

    reference = velocity(networks.reference)
    old = velocity(networks.old) if setting.anchor == "theta_old" else reference
    if setting.method in ("DGPO", "Diffusion-DPO"):
        dials = {"kl": setting.kl, "clip": setting.clip, "bound": setting.bound}
        if setting.clip is not None or setting.bound:
            dials["velocity_old"] = old
        theta = velocity(networks.theta)
        dgpo.backward_group_loss(theta, reference, x0, eps, t, advantages, setting.beta, **dials)
        return

    x_t, p = dgpo.diffuse(x0, eps, t).flatten(0, 1), torch.arange(P).repeat_interleave(G)
    each_t = t.expand(P, G).flatten()
    v = velocity(networks.theta)(x_t, each_t, p).view_as(x0)
    with torch.no_grad():
        v_ref = reference(x_t, each_t, p).view_as(x0)
        v_old = old(x_t, each_t, p).view_as(x0) if setting.method == "NFT" else v_ref
    loss_theta, loss_ref = dgpo.dsm_loss(v, x0, eps), dgpo.dsm_loss(v_ref, x0, eps)
    if setting.method == "AWM":
        loss = awm_loss(loss_theta, advantages)
    elif setting.method == "NFT":
        loss = nft_loss(v, v_old, eps - x0, t, advantages, setting.beta)
    elif setting.method == "SDPO":
        loss = sdpo_loss(v, eps - x0, loss_ref, setting.beta)
    else:
        loss = gpo_loss(loss_theta, loss_ref, rewards, setting.beta) / setting.beta
    (loss + setting.kl * dgpo.mean_square(v, v_ref).mean()).backward()


def trained_steps(setting: Setting) -> int:
    return math.ceil(setting.trained_share * setting.rollout_steps)


def backward_flow_grpo(networks: Networks, setting: Setting, rollout: Rollout) -> None:
    """Flow-GRPO's gradient, the mean over the trained steps, all of them in one pass."""
    (P, G), K = rollout.rewards.shape, trained_steps(setting)
    parts = rollout.trajectory[:K], rollout.trajectory[1 : K + 1]
    x, x_next = (part.reshape(K * P, G, -1) for part in parts)
    times = rollout.times[:K], rollout.times[1 : K + 1]
    t, s = (part.repeat_interleave(P)[:, None, None] for part in times)
    each_c = rollout.c.repeat_interleave(G).repeat(K)

    def step(network: nn.Module) -> tuple[Tensor, Tensor]:
        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return network(x.flatten(0, 1), t.expand(-1, G, 1).flatten(), each_c).view_as(x)

        return sde_step(velocity, x, t, s, setting.sde_noise)

    mean, std = step(networks.theta)
    with torch.no_grad():
        mean_ref, _ = step(networks.reference)
    log_prob = gaussian_log_prob(x_next, mean, std)
    if rollout.log_prob_old is None:
        rollout.log_prob_old = log_prob.detach()
    advantages = dgpo.group_advantages(rollout.rewards).repeat(K, 1)
    clip = math.inf if setting.clip is None else setting.clip
    loss = flow_grpo_loss(log_prob, rollout.log_prob_old, advantages, clip)
    penalty = ((mean - mean_ref) ** 2 / (2 * std**2)).sum(2).mean()
    (loss + setting.kl * penalty).backward()


def iteration_cost(setting: Setting) -> int:
    """In forwards of one sample: the rollout, and for each trained sample 4, or with theta_old 5.

    These are its forward, its backward, which counts 2, the reference's forward, and theta_old's
    where the loss looks at it.
    """
    P, G = setting.prompts, setting.group_size
    trained = 2 if setting.method in PAIRS else setting.samples or G
    flow_grpo = setting.method == "Flow-GRPO"
    trained *= P * (trained_steps(setting) if flow_grpo else setting.timesteps)
    looks = setting.method == "NFT" or (
        not flow_grpo and (setting.clip is not None or setting.bound > 0)
    )
    looks = looks and setting.anchor == "theta_old"
    return setting.rollout_steps * P * G + setting.updates * (4 + looks) * trained


def learn(model: nn.Module, setting: Setting, generator: torch.Generator) -> Iterator[int]:
    """Train `model` in place, without end; yields what it has cost after every iteration."""
    reference = copy.deepcopy(model).requires_grad_(False)
    old = model if setting.ema is None else copy.deepcopy(reference)
    networks = Networks(model, reference, old)
    optimizer = torch.optim.AdamW(model.parameters(), setting.learning_rate, weight_decay=0.0)
    cost = 0
    while True:
        if setting.decay is not None:
            rate = setting.learning_rate / (1 + cost / setting.decay)
            optimizer.param_groups[0]["lr"] = rate
        rollout = draw(reference if setting.offline else old, setting, generator)
        for _ in range(setting.updates):
            optimizer.zero_grad()
            if setting.method == "Flow-GRPO":
                backward_flow_grpo(networks, setting, rollout)
            else:
                backward_denoising(networks, setting, rollout, generator)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if setting.ema is not None:
            dgpo.ema_update(old.parameters(), model.parameters(), setting.ema)
        cost += iteration_cost(setting)
        yield cost


class Evaluation(NamedTuple):
    cost: int  # in forwards
    reward: float
    right: float  # share of samples
    spread: float  # std of positions, over the data's
    distance: float  # from the data


@dataclasses.dataclass
class Run:
    arrived: float | None  # cost
    budget: float
    seconds: float
    evaluations: list[Evaluation]

    @property
    def end(self) -> Evaluation:
        return self.evaluations[-1]

    def restricted(self) -> float:
        """The cost to arrive, or all of the budget."""
        return self.budget if self.arrived is None else self.arrived


def way(world: str, run: Run, evaluation: Evaluation | None = None) -> float:
    """How far a run came from its base reward (0) to the best data's (1)."""
    base = run.evaluations[0].reward
    return ((evaluation or run.end).reward - base) / (worlds.make(world).best - base)


def arrival(world: str, evaluations: list[Evaluation]) -> float | None:
    """The cost from which on a run is there: at the end, and nine times in ten until then."""
    run = Run(None, 0, 0, evaluations)
    there = [way(world, run, e) >= WAY and e.right >= RIGHT for e in evaluations]
    for k, one in enumerate(evaluations):
        stays = there[k] and there[-1] and sum(there[k:]) >= STAYS * len(there[k:])
        if stays and run.end.cost >= LONG * one.cost:
            return one.cost
    return None


# A run of it, evaluated on the way.

Reference = tuple[nn.Module, Tensor]


def pretrained(world: str, seed: int) -> Reference:
    """The reference of a seed, and the generator's state after it."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = worlds.make(world).network()
    sample_data = worlds.make(world).sample_data
    for _ in flow2d.pretrain(model, flow2d.PRETRAINING_STEPS, generator, sample_data):
        pass
    return model, generator.get_state()


def starting_from(reference: Reference) -> tuple[nn.Module, torch.Generator]:
    generator = torch.Generator()
    generator.set_state(reference[1])
    return copy.deepcopy(reference[0]), generator


def run_setting(
    reference: Reference, seed: int, setting: Setting, budget: float, followed: float = FOLLOWED
) -> Run:
    """One training run: what it cost and what it had reached at every evaluation.

    It ends when the budget is spent, or at `followed` times the cost at which it has arrived.
    """
    torch.set_num_threads(1)
    world = worlds.make(setting.world)
    model, generator = starting_from(reference)
    averaged = copy.deepcopy(model) if setting.average else model
    c = torch.arange(flow2d.CONDITIONS).repeat_interleave(SAMPLES)
    noise = torch.randn(len(c), world.dims, generator=torch.Generator().manual_seed(seed))

    def evaluate(cost: int) -> Evaluation:
        x = flow2d.sample(averaged, c, noise, EVALUATION_STEPS)
        right, distance, position = world.judge(c, x)
        spread = position.view(flow2d.CONDITIONS, SAMPLES, 2).std(1).mean() / world.spread
        values = world.reward(c, x).mean(), right.float().mean(), spread, distance.mean()
        return Evaluation(cost, *(float(f"{float(value):.4g}") for value in values))

    found = Run(None, budget, 0.0, [evaluate(0)])
    start, due = time.perf_counter(), float(FIRST)
    try:
        for cost in learn(model, setting, generator):
            if setting.average:
                dgpo.ema_update(averaged.parameters(), model.parameters(), setting.average)
            if cost < min(due, budget):
                continue
            now, due = evaluate(cost), max(cost + FIRST, APART * cost)
            if not all(map(math.isfinite, now)):
                found.arrived = None
                break
            found.evaluations.append(now)
            found.arrived = arrival(setting.world, found.evaluations)
            end = max(followed * found.restricted(), AT_LEAST * budget_in(setting.world))
            if cost >= min(end, budget):
                break
    except ValueError:  # rewards no longer finite
        found.arrived = None
    found.seconds = round(time.perf_counter() - start, 1)
    return found
