"""The worlds that compare.py compares in: the ring in D dimensions, and pictures of a blob.

A world is its data, a reward to train on, and a judge that no method trains on. Conditions are
flow2d's; samples are flat, (N, D).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import flow2d
import torch
from torch import Tensor, nn

AMBIENT_STD = 0.02
SIDE, BLOB_WIDTH, MARGIN = 8, 1.0, 0.5  # of a picture, in pixels
OBEYED = 0.4  # share of pictures in the data that are as asked for


@dataclasses.dataclass(frozen=True)
class World:
    dims: int
    network: Callable[[], nn.Module]
    sample_data: Callable[[Tensor, torch.Generator], Tensor]  # c (N,) -> x0 (N, D)
    reward: Callable[[Tensor, Tensor], Tensor]  # c (...), x (..., D) -> (...)
    # c (N,), x (N, D) -> is it right (N,), distance from the data (N,), position (N, 2)
    judge: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    best: float  # mean reward of the best samples that are still data
    spread: float  # std of their positions under one condition


class SkipNet(flow2d.VelocityNet):
    """flow2d's network plus s(t) x, a number learnt for every t.

    Where data is narrow, v is close to x / t there. An MLP of width 64 cannot pass on D > 64
    coordinates, and does not have to.
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

    The reward sees the plane alone. A sample is right within 3 std of a mode and of the plane;
    its distance is the larger of the two in units of the data's, so that the data is at about 1.
    """
    turn, _ = torch.linalg.qr(torch.randn(dims, dims, generator=torch.Generator().manual_seed(0)))
    turn = torch.eye(2) if dims == 2 else turn

    def sample_data(c: Tensor, generator: torch.Generator) -> Tensor:
        off_plane = AMBIENT_STD * torch.randn(len(c), dims - 2, generator=generator)
        return torch.cat([flow2d.sample_ref(c, generator), off_plane], 1) @ turn.T

    def reward(c: Tensor, x: Tensor) -> Tensor:
        return flow2d.reward(c, x @ turn[:, :2])

    def judge(c: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x @ turn
        from_mode = torch.cdist(x[:, :2], flow2d.mode_centers()).amin(1) / flow2d.STD
        distance = from_mode / math.sqrt(2)
        if dims > 2:
            off_plane = x[:, 2:].square().mean(1).sqrt() / AMBIENT_STD
            distance = torch.maximum(distance, off_plane)
        return distance < 3 / math.sqrt(2), distance, x[:, :2]

    def network() -> nn.Module:
        return flow2d.VelocityNet() if dims == 2 else SkipNet(64, dims)

    return World(dims, network, sample_data, reward, judge, 0.0, flow2d.STD)


def blobs() -> World:
    """Pictures of 8 x 8 pixels with one bright blob, in four of ten in the quadrant c asks for.

    The reward is the quadrant's mean brightness, which other pictures than a blob can have, too. A
    picture is right if it is a blob and in the quadrant: the blob of the kind that is nearest to it
    says where it is, and the distance to that one how much of a blob it is.
    """
    pixel = torch.arange(SIDE) - (SIDE - 1) / 2
    limit = SIDE / 2 - 0.5 - MARGIN
    quadrants = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]])

    def draw(position: Tensor) -> Tensor:
        """Blobs at positions (N, 2), as pictures (N, SIDE * SIDE) of brightness 0 to 1."""
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

    def judge(c: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        distance, nearest = torch.cdist(x, templates).min(1)
        distance = distance / templates[nearest].norm(dim=1)
        position = places[nearest]
        in_quadrant = (position * quadrants[c] > 0).all(1)
        return in_quadrant & (distance < 0.35), distance, position

    ideal = (torch.cartesian_prod(*[torch.linspace(0, limit, 50)] * 2)) * quadrants[0]
    best = reward(torch.zeros(len(ideal), dtype=torch.long), draw(ideal)).mean().item()
    spread = limit / math.sqrt(12)
    return World(SIDE**2, lambda: SkipNet(128, SIDE**2), sample_data, reward, judge, best, spread)


@functools.cache
def make(name: str) -> World:
    """ "ring-D" for a D of at least 2, or "blobs"."""
    return blobs() if name == "blobs" else ring(int(name.removeprefix("ring-")))
