"""The 2-D worlds are what they say; the loop in them is Algorithm 1, and costs what it says."""

import copy
import itertools

import pytest
import torch

import dgpo
from lab import worlds
from lab.methods import Setting
from toy import flow2d


def conditions(n=8000):
    return torch.arange(n) % flow2d.CONDITIONS


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", ["ring-2", "ring-8", "ring-128", "blobs"])
def test_shapes_and_the_judge_on_the_data(name):
    world, c = worlds.make(name), conditions()
    x = world.sample_data(c, seeded())
    right, position = world.judge(c, x)
    assert right.shape == world.reward(c, x).shape == (len(c),)
    assert world.network()(x[:5], torch.rand(5), c[:5]).shape == (5, world.dims)
    share = worlds.OBEYED if name == "blobs" else 0.989
    assert right.float().mean().item() == pytest.approx(share, abs=0.025)
    if name == "blobs":  # the best data are those that are right
        best, spread = world.reward(c, x)[right].mean(), position[right & (c == 1)].std(0).mean()
        assert best.item() == pytest.approx(world.goal.best, rel=0.05)
        assert spread.item() == pytest.approx(world.spread, rel=0.05)


@pytest.mark.parametrize("dims", [2, 8, 128])
def test_the_ring_is_flow2ds_in_a_plane_that_the_reward_sees(dims):
    world, c = worlds.make(f"ring-{dims}"), conditions()
    x = world.sample_data(c, seeded())
    position = world.judge(c, x)[1]
    assert torch.allclose(world.reward(c, x), flow2d.reward(c, position), atol=1e-4)
    assert torch.allclose(position.norm(dim=1), x.norm(dim=1), atol=0.4)  # a rotation
    # A step out of the plane changes neither position nor reward, but the judge sees it.
    if dims > 2:
        axes = world.judge(c[:dims], torch.eye(dims))[1]  # (D, 2)
        step = torch.randn(len(c), dims, generator=seeded())
        step = step - world.judge(c, step)[1] @ axes.T
        moved = x + 0.1 * step / step.norm(dim=1, keepdim=True) * (dims - 2) ** 0.5
        right, there = world.judge(c, moved)
        assert torch.allclose(there, position, atol=1e-4)
        assert not right.any()


def test_a_bright_quadrant_is_rewarded_and_not_right():
    world, c = worlds.make("blobs"), torch.arange(4)
    pictures = torch.zeros(4, 8, 8)
    pictures[0, :4, :4] = pictures[1, :4, 4:] = pictures[2, 4:, :4] = pictures[3, 4:, 4:] = 1
    x = pictures.flatten(1)
    assert (world.reward(c, x) == 1).all() and world.goal.best < 0.5
    assert not world.judge(c, x)[0].any()
    assert (world.reward(c, x.roll(1, 0)) == 0).all()


# The loop

METHODS = {
    "DGPO": {"prompts_per_step": 8, "train_timesteps": 4, "ema": 0.5, "clip": 0.5},
    "Bounded DGPO": {"train_samples": 4, "bound": 2.0, "ema": 0.5, "updates_per_rollout": 2},
    "AWM": {"learning_rate": 5e-4, "kl": 0.1, "sde_noise": 0.7},
    "DiffusionNFT": {"ema": 0.8, "decay": 1e5},
    "Diffusion-DPO": {"offline": True},
    "Diffusion-SDPO": {"bound": 2.0, "anchor": "reference"},
    "GPO": {"shared_noise": False, "num_inference_steps": 5, "train_samples": 8},
    "Flow-GRPO": {"sde_noise": 0.7, "trained_share": 0.5, "updates_per_rollout": 2, "clip": 0.2},
}


def learn(model, setting, iterations):
    steps = worlds.learn(model, worlds.make("ring-2"), setting, seeded())
    return list(itertools.islice(steps, iterations))


def test_dgpo_here_is_algorithm_1_there(model):
    here, there = copy.deepcopy(model), copy.deepcopy(model)
    learn(here, Setting(prompts_per_step=8, train_timesteps=4, kl=0.0, ema=0.5), 5)
    how = {"prompts": 8, "group_size": 24, "beta": 1.0, "learning_rate": 1.5e-3, "t_min": 0.2}
    how |= {"iterations": 5, "rollout_steps": 10, "train_timesteps": 4, "ema": 0.5}
    world = flow2d.reward, flow2d.sample_conditions, (2,)
    list(dgpo.train(there, *world, seeded(), **how))
    for a, b, start in zip(*(m.parameters() for m in (here, there, model)), strict=True):
        assert (a - b).norm() < 1e-3 * (a - start).norm()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_and_costs_what_the_network_evaluated(name, model, monkeypatch):
    """A forward counts 1 for each sample, one with a backward to come 3."""
    counted, setting = [], Setting(name, **METHODS[name])
    original = flow2d.VelocityNet.forward

    def forward(self, x, t, c):
        v = original(self, x, t, c)
        counted.append(len(x) * (3 if v.requires_grad else 1))
        return v

    with monkeypatch.context() as patch:
        patch.setattr(flow2d.VelocityNet, "forward", forward)
        assert learn(copy.deepcopy(model), setting, 2)[-1] == sum(counted)

    c = torch.arange(4).repeat_interleave(200)
    noise = torch.randn(800, 2, generator=seeded())
    before = flow2d.reward(c, flow2d.sample(model, c, noise)).mean()
    learn(model, setting, 30)
    assert flow2d.reward(c, flow2d.sample(model, c, noise)).mean() > before + 1


def test_stratified_timesteps_come_from_equal_parts(monkeypatch):
    """V-GRPO: the k-th timestep of each group from the k-th of K equal parts of [t_min, 1]."""
    seen = []
    monkeypatch.setattr(
        worlds.methods, "backward", lambda networks, setting, x0, eps, t, *_: seen.append(t)
    )
    setting = Setting(
        "V-GRPO", ema=0.9, t_min=0.2, train_timesteps=4, prompts_per_step=50, stratified=True
    )
    model = flow2d.VelocityNet()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    next(worlds.learn(model, worlds.make("ring-2"), setting, seeded()))
    (t,) = seen
    part = t.view(4, 50)
    assert (part >= 0.2 + 0.2 * torch.arange(4)[:, None]).all()
    assert (part <= 0.4 + 0.2 * torch.arange(4)[:, None]).all()
    assert part.std(1).min() > 0.03
