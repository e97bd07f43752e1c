"""The 2-D worlds, and a training run of any method in them.

The worlds are the ring of toy/flow2d.py, in D dimensions, and images of a blob. A world is its
data, a reward to train on, and a judge that no method trains on. Conditions are flow2d's; samples
are flat, (N, D).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import dgpo
from lab import methods
from lab.methods import Setting
from lab.protocol import Diverged, Evaluation, Goal, Plan, Run, follow
from sd35 import gradient
from toy import flow2d

AMBIENT_STD = 0.02
SIDE, BLOB_WIDTH, MARGIN = 8, 1.0, 0.5  # of an image, in pixels
OBEYED = 0.4  # share of images in the data that are in the quadrant that was asked for
SUCCESS = {"progress": 0.9, "quality": 0.8}  # the goal: progress, and the share of correct samples


@dataclasses.dataclass(frozen=True)
class World:
    dims: int
    network: Callable[[], nn.Module]
    sample_data: Callable[[Tensor, torch.Generator], Tensor]  # c (N,) -> x0 (N, D)
    reward: Callable[[Tensor, Tensor], Tensor]  # c (...), x (..., D) -> (...)
    # c (N,), x (N, D) -> whether it is correct (N,), position (N, 2)
    judge: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    goal: Goal  # its best: the most that a ring's reward can be, and the mean over the best blobs
    spread: float  # std of the positions of these under one condition
    budget: int = 1_500_000  # forward passes of a run that is reported


class SkipNet(flow2d.VelocityNet):
    """flow2d's network plus s(t) x, where s is a learned function of t.

    Where the data has no width, v is about x / t, a large multiple of all D coordinates. The skip
    provides it, so that the MLP has to learn only the rest.
    """

    def __init__(self, width: int, dims: int):
        super().__init__(width, dims)
        self.skip = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 1))

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """x (B, dims), t (B,), c (B,) -> v (B, dims)."""
        t_features = torch.stack([t, (t + 0.02).log(), 1 / (t + 0.1)], 1)
        return super().forward(x, t, c) + self.skip(t_features) * x


def ring(dims: int) -> World:
    """flow2d's ring in a plane of R^D, turned at random, with a little noise off the plane.

    The reward sees only the plane. A sample is correct within 3 std of a mode and within 2.1 std (a
    root mean square) of the plane.
    """
    turn, _ = torch.linalg.qr(torch.randn(dims, dims, generator=torch.Generator().manual_seed(0)))
    turn = torch.eye(2) if dims == 2 else turn

    def sample_data(c: Tensor, generator: torch.Generator) -> Tensor:
        off_plane = AMBIENT_STD * torch.randn(len(c), dims - 2, generator=generator)
        return torch.cat([flow2d.sample_ref(c, generator), off_plane], 1) @ turn.T

    def reward(c: Tensor, x: Tensor) -> Tensor:
        return flow2d.reward(c, x @ turn[:, :2])

    def judge(c: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x @ turn
        distance = torch.cdist(x[:, :2], flow2d.mode_centers()).amin(1) / flow2d.STD / math.sqrt(2)
        if dims > 2:
            off_plane = x[:, 2:].square().mean(1).sqrt() / AMBIENT_STD
            distance = torch.maximum(distance, off_plane)
        return distance < 3 / math.sqrt(2), x[:, :2]

    def network() -> nn.Module:
        return flow2d.VelocityNet() if dims == 2 else SkipNet(64, dims)

    goal = Goal(best=0.0, **SUCCESS)
    return World(dims, network, sample_data, reward, judge, goal, flow2d.STD)


def blobs() -> World:
    """Images of 8 x 8 pixels with one bright blob, 40 % of them in the quadrant that c asks for.

    The reward is the quadrant's mean brightness, which an image without a blob can have, too. An
    image is correct if it is a blob in that quadrant: the nearest of a grid of blobs gives its
    position, and the distance to that blob says whether it is one.
    """
    pixel = torch.arange(SIDE) - (SIDE - 1) / 2
    limit = SIDE / 2 - 0.5 - MARGIN
    quadrants = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]])

    def draw(position: Tensor) -> Tensor:
        """Blobs at positions (N, 2), as images (N, SIDE * SIDE) of brightness 0 to 1."""
        squared = (position[:, :, None] - pixel) ** 2  # (N, 2, SIDE)
        profile = (-squared / (2 * BLOB_WIDTH**2)).exp()
        return (profile[:, 1, :, None] * profile[:, 0, None, :]).flatten(1)

    def sample_data(c: Tensor, generator: torch.Generator) -> Tensor:
        obeyed = torch.rand(len(c), generator=generator) < OBEYED
        other = (c + torch.randint(1, 4, (len(c),), generator=generator)) % flow2d.CONDITIONS
        inside = limit * torch.rand(len(c), 2, generator=generator)
        return draw(inside * quadrants[torch.where(obeyed, c, other)])

    inside = (torch.cartesian_prod(pixel, pixel).flip(1)[None] * quadrants[:, None] > 0).all(2)
    mask = inside.float() / inside.sum(1, keepdim=True)  # (CONDITIONS, SIDE * SIDE)

    def reward(c: Tensor, x: Tensor) -> Tensor:
        return (mask[c] * x).sum(-1)

    steps = torch.linspace(-limit, limit, 24)  # an even number: none is on the border
    places = torch.cartesian_prod(steps, steps)
    templates = draw(places)

    def judge(c: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        distance, nearest = torch.cdist(x, templates).min(1)
        distance = distance / templates[nearest].norm(dim=1)
        position = places[nearest]
        in_quadrant = (position * quadrants[c] > 0).all(1)
        return in_quadrant & (distance < 0.35), position

    ideal = (torch.cartesian_prod(*[torch.linspace(0, limit, 50)] * 2)) * quadrants[0]
    best = reward(torch.zeros(len(ideal), dtype=torch.long), draw(ideal)).mean().item()
    goal, spread = Goal(best, **SUCCESS), limit / math.sqrt(12)
    return World(SIDE**2, lambda: SkipNet(128, SIDE**2), sample_data, reward, judge, goal, spread)


@functools.cache
def make(name: str) -> World:
    """The world "ring-D", for a D of at least 2, or "blobs"."""
    return blobs() if name == "blobs" else ring(int(name.removeprefix("ring-")))


# The loop, the same for all methods.


def learn(
    model: nn.Module, world: World, setting: Setting, generator: torch.Generator
) -> Iterator[int]:
    """Train `model` in place, without end; yield what it has cost after every iteration."""
    P, G, flow_grpo = setting.prompts_per_step, setting.group_size, setting.method == "Flow-GRPO"
    reference = copy.deepcopy(model).requires_grad_(False)
    old = model if setting.ema is None else copy.deepcopy(reference)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, setting.learning_rate, weight_decay=0.0, fused=True)
    K, cost = setting.train_timesteps, 0
    if flow_grpo:
        K = math.ceil(setting.trained_share * setting.num_inference_steps)
    while True:
        if setting.decay is not None:
            rate = setting.learning_rate / (1 + cost / setting.decay)
            optimizer.param_groups[0]["lr"] = rate
        sampler = reference if setting.offline else old
        c, rewards, trajectory, times = draw(sampler, world, setting, generator)
        if (m := methods.trained_samples(setting)) < G:
            rows, chosen = torch.arange(P)[:, None], gradient.extremes(rewards, m)
            rewards, trajectory = rewards[rows, chosen], trajectory[:, rows, chosen]
        advantages, x0, log_prob_old = dgpo.group_advantages(rewards), trajectory[-1], None
        networks = tuple(at_rows(network, c.repeat(K)) for network in (model, reference, old))

        for _ in range(setting.updates_per_rollout):
            optimizer.zero_grad()
            if flow_grpo:
                steps = trajectory[: K + 1], times[: K + 1]
                log_prob_old = methods.backward_flow_grpo(
                    networks, setting, *steps, advantages, log_prob_old
                )
            else:
                t = dgpo.sample_timesteps((K * P, 1), setting.t_min, generator)
                if setting.stratified:  # each row's own of K equal parts of [t_min, 1]
                    part = torch.arange(K).repeat_interleave(P)[:, None]
                    t = setting.t_min + ((1 - setting.t_min) * part + t - setting.t_min) / K
                each = 1 if setting.shared_noise else x0.shape[1]
                eps = torch.randn(K * P, each, world.dims, generator=generator)
                groups = torch.cat([x0] * K), eps, t, rewards.repeat(K, 1), advantages.repeat(K, 1)
                methods.backward(networks, setting, *groups)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

        if setting.ema is not None:
            dgpo.ema_update(old.parameters(), parameters, setting.ema)
        cost += methods.step_cost(setting, K)
        yield cost


def at_rows(network: nn.Module, c: Tensor) -> gradient.Velocity:
    """The network as methods.py sees it, under the conditions c of the rows."""
    return lambda x, t, rows: network(x, t, c[rows])


def draw(
    network: nn.Module, world: World, setting: Setting, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Conditions c (P,), rewards (P, G), and a trajectory (steps + 1, P, G, D) at its times.

    By the ODE, the trajectory is x0 alone, (1, P, G, D).
    """
    P, G, steps = setting.prompts_per_step, setting.group_size, setting.num_inference_steps
    c = flow2d.sample_conditions(P, generator)
    noise = torch.randn(P * G, world.dims, generator=generator)
    each_c, times = c.repeat_interleave(G), torch.linspace(1, 0, steps + 1)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return network(x, t.expand(len(x)), each_c)

    def fresh_noise(step: int) -> Tensor:
        return torch.randn(noise.shape, generator=generator)

    if setting.sde_noise:
        trajectory = methods.sample_sde(velocity, noise, times, fresh_noise, setting.sde_noise)
    else:
        trajectory = dgpo.sample_ode(velocity, noise, steps)[None]
    trajectory = trajectory.view(-1, P, G, world.dims)
    rewards = world.reward(c[:, None], trajectory[-1])
    if not rewards.isfinite().all():
        raise Diverged
    return c, rewards, trajectory, times


EVALUATION_STEPS = 20  # of the ODE solver; rollouts take 10 or fewer, as the paper's do
SAMPLES = 64  # for each condition in an evaluation
FIRST, APART = 10_000, 1.1  # evaluations are this cost apart, later 10 % of the cost so far
FOLLOWED = 4.0  # a successful run ends at this many times its cost to reach the goal ...
AT_LEAST = 0.25  # ... and not before this share of the world's budget

RUNGS = ((1, 0.4, 8), (3, 1.0, 3), (12, 1.0, 1))
CHEAP = {"prompts_per_step": 4, "num_inference_steps": 5, "updates_per_rollout": 4}
CHEAP |= {"train_samples": 4, "train_timesteps": 1, "ema": 0.8, "average": 0.9}
PLAN = Plan(drawn=31, around=12, rounds=3, most_rounds=4, rungs=RUNGS, cheap=CHEAP)
SPACE: dict[str, Any] = {}  # where a search has other choices than the methods' rows
SEEDS = tuple(range(10))  # of a report


def base_setting(world: str) -> Setting:
    return Setting()


def origin(world: str) -> str:
    """What runs began with, where that is no function of the seed."""
    return ""


@functools.cache
def pretrained(world: str, seed: int) -> tuple[nn.Module, torch.Generator]:
    """The reference of a seed, and its generator. Not to be trained, or drawn from, in place."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model, sample_data = make(world).network(), make(world).sample_data
    for _ in flow2d.pretrain(model, flow2d.PRETRAINING_STEPS, generator, sample_data):
        pass
    return model, generator


def start(world: str, seed: int) -> tuple[nn.Module, torch.Generator]:
    """A copy of the reference, and the generator that goes on from its pretraining."""
    reference, generator = pretrained(world, seed)
    return copy.deepcopy(reference), generator.clone_state()


def run(name: str, seed: int, setting: Setting, budget: float, followed: float = FOLLOWED) -> Run:
    """A training run. It ends with the budget, or `followed` times its cost to reach the goal."""
    world, (model, generator) = make(name), start(name, seed)
    averaged = copy.deepcopy(model) if setting.average else model
    c = torch.arange(flow2d.CONDITIONS).repeat_interleave(SAMPLES)
    noise = torch.randn(len(c), world.dims, generator=torch.Generator().manual_seed(seed))

    def costs() -> Iterator[int]:
        yield 0
        for cost in learn(model, world, setting, generator):
            if setting.average:
                dgpo.ema_update(averaged.parameters(), model.parameters(), setting.average)
            yield cost

    def evaluate(cost: int) -> Evaluation:
        x = flow2d.sample(averaged, c, noise, EVALUATION_STEPS)
        correct, position = world.judge(c, x)
        spread = position.view(flow2d.CONDITIONS, SAMPLES, 2).std(1).mean() / world.spread
        values = world.reward(c, x).mean(), correct.float().mean(), spread
        if not sum(values).isfinite():
            raise Diverged
        return Evaluation(cost, *(float(f"{value.item():.4g}") for value in values))

    def due(cost: int) -> float:
        return max(cost + FIRST, APART * cost)

    def end(run: Run) -> float:
        return max(followed * run.cost, AT_LEAST * world.budget)

    return follow(costs(), world.goal, budget, evaluate, due, end)
