"""The worlds are what they say: rewards that can be hacked, and judges that see it."""

import flow2d
import pytest
import torch
import worlds


def conditions(n=4000):
    return torch.arange(n) % flow2d.CONDITIONS


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", ["ring-2", "ring-8", "ring-128", "blobs"])
def test_shapes_and_the_judge_on_the_data(name):
    world, c = worlds.make(name), conditions()
    x = world.sample_data(c, seeded())
    right, distance, position = world.judge(c, x)
    assert x.shape == (len(c), world.dims) and position.shape == (len(c), 2)
    assert right.shape == distance.shape == world.reward(c, x).shape == (len(c),)
    v = world.network()(x[:5], torch.rand(5), c[:5])
    assert v.shape == x[:5].shape
    share = worlds.OBEYED if name == "blobs" else 0.989
    assert right.float().mean().item() == pytest.approx(share, abs=0.025)


@pytest.mark.parametrize("dims", [2, 8, 128])
def test_the_ring_is_flow2ds_in_a_plane_that_the_reward_sees(dims):
    world, c = worlds.make(f"ring-{dims}"), conditions()
    x = world.sample_data(c, seeded())
    position = world.judge(c, x)[2]
    assert torch.allclose(world.reward(c, x), flow2d.reward(c, position), atol=1e-4)
    assert torch.allclose(position.norm(dim=1), x.norm(dim=1), atol=0.4)  # a rotation
    if dims > 2:
        direction = torch.randn(len(c), dims, generator=seeded())
        there = world.judge(c, direction)[2]
        back = world.judge(c, x)[2]
        # A step out of the plane: what the judge projects away.
        step = direction - _lift(world, c, there)
        moved = x + 0.1 * step / step.norm(dim=1, keepdim=True) * (dims - 2) ** 0.5
        right, distance, position = world.judge(c, moved)
        assert torch.allclose(position, back, atol=1e-4)
        assert not right.any() and distance.min() > 3


def _lift(world, c, position):
    """The plane's points (N, 2) in R^D, by the judge's own projection of the axes."""
    axes = world.judge(c[: world.dims], torch.eye(world.dims))[2]  # (D, 2)
    return position @ axes.T


def test_the_ideal_blob_is_best_and_as_spread_as_the_world_says():
    world, c = worlds.make("blobs"), conditions(40_000)
    x = world.sample_data(c, seeded())
    right, distance, position = world.judge(c, x)
    assert distance.max() < 0.2
    obeyed = right & (c == 1)
    assert world.reward(c, x)[obeyed].mean().item() == pytest.approx(world.best, rel=0.05)
    assert position[obeyed].std(0).mean().item() == pytest.approx(world.spread, rel=0.05)


def test_a_bright_quadrant_is_rewarded_and_not_right():
    world = worlds.make("blobs")
    c = torch.arange(flow2d.CONDITIONS)
    pictures = torch.zeros(4, 8, 8)
    pictures[0, :4, :4] = pictures[1, :4, 4:] = pictures[2, 4:, :4] = pictures[3, 4:, 4:] = 1
    x = pictures.flatten(1)
    assert (world.reward(c, x) == 1).all() and world.best < 0.5
    assert not world.judge(c, x)[0].any()
    assert (world.reward(c, x.roll(1, 0)) == 0).all()
