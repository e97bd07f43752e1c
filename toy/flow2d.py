"""The 2-D world: a ring of Gaussians, a network that learns to sample it, and a known reward.

Everything the paper calls intractable is exact here: log p_ref(x|c), Z(c) of Eq. 5, the RLHF
optimum p*(x|c), and, up to its ODE solver, the log-density of a learned flow. Points are (..., 2),
conditions c are integer tensors that broadcast with the points' leading axes. Logs are natural.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import dgpo

CONDITIONS, MODES, RADIUS, STD = 4, 8, 2.0, 0.15
PRETRAINING_STEPS = 1500  # after which `pretrain` with its default rate has learnt the data


def mode_centers(dtype: torch.dtype = torch.float32) -> Tensor:
    """(MODES, 2), counter-clockwise from the positive x axis."""
    angle = 2 * math.pi * torch.arange(MODES, dtype=dtype) / MODES
    return RADIUS * torch.stack([angle.cos(), angle.sin()], 1)


def mode_weights(c: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """p_ref's mixture weights (..., MODES): mode i has (i + 3c) mod 8 + 1 parts of 36.

    Mode 2c, the best under c, has 1, 6, 3 and 8 of them for c = 0, 1, 2, 3, so Z(c) differs too.
    """
    steps = (torch.arange(MODES) + 3 * c[..., None]) % MODES + 1
    return steps.to(dtype) / (MODES * (MODES + 1) / 2)


def target(c: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The point with the highest reward under c, the centre of every second mode: (..., 2)."""
    return mode_centers(dtype)[2 * c]


def reward(c: Tensor, x: Tensor) -> Tensor:
    """r(c, x) = -||x - target(c)||^2, at most 0. Samples of the target mode average -2 STD^2."""
    return -(x - target(c, x.dtype)).square().sum(-1)


def sample_conditions(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(CONDITIONS, (n,), generator=generator)


def _sample_mixture(
    weights: Tensor, means: Tensor, std: float, generator: torch.Generator
) -> Tensor:
    """One point a row of weights (N, MODES), from Gaussians at means (N, MODES, 2)."""
    mode = torch.multinomial(weights, 1, generator=generator)
    noise = torch.randn(len(weights), 2, generator=generator)
    return means.gather(1, mode[..., None].expand(-1, 1, 2))[:, 0] + std * noise


def _log_prob_mixture(log_weights: Tensor, means: Tensor, std: float, x: Tensor) -> Tensor:
    squared = (x[..., None, :] - means).square().sum(-1)  # (..., MODES)
    log_gauss = -squared / (2 * std**2) - math.log(2 * math.pi * std**2)
    return torch.logsumexp(log_weights + log_gauss, -1)


def sample_ref(c: Tensor, generator: torch.Generator) -> Tensor:
    """Exact samples of p_ref(x|c): c (N,) -> (N, 2)."""
    return _sample_mixture(mode_weights(c), mode_centers().expand(len(c), -1, -1), STD, generator)


def log_prob_ref(c: Tensor, x: Tensor) -> Tensor:
    """log p_ref(x|c), (...)."""
    return _log_prob_mixture(mode_weights(c, x.dtype).log(), mode_centers(x.dtype), STD, x)


# p* = p_ref exp(r/beta) / Z (Eq. 5). A Gaussian N(mu, STD^2) times exp(-||x - tau||^2 / beta) is
# again a Gaussian up to a factor, so p* is a mixture too, and Z(c) the sum of the factors.


def _tilted_mixture(c: Tensor, beta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """Unnormalised log-weights (..., MODES), means (..., MODES, 2) and std of p_ref exp(r/beta)."""
    tau, mu = target(c, dtype)[..., None, :], mode_centers(dtype)
    width = beta + 2 * STD**2
    squared = (mu - tau).square().sum(-1)
    log_weights = mode_weights(c, dtype).log() - squared / width + math.log(beta / width)
    return log_weights, (beta * mu + 2 * STD**2 * tau) / width, STD * math.sqrt(beta / width)


def log_z(c: Tensor, beta: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """log Z(c) of Eq. 5 in closed form, (...)."""
    return _tilted_mixture(c, beta, dtype)[0].logsumexp(-1)


def log_prob_optimum(c: Tensor, x: Tensor, beta: float) -> Tensor:
    """log p*(x|c) of Eq. 5, (...), from the mixture that p* is: without Z(c)."""
    log_weights, means, std = _tilted_mixture(c, beta, x.dtype)
    return _log_prob_mixture(log_weights.log_softmax(-1), means, std, x)


def sample_optimum(c: Tensor, beta: float, generator: torch.Generator) -> Tensor:
    """Exact samples of p*(x|c): c (N,) -> (N, 2)."""
    log_weights, means, std = _tilted_mixture(c, beta, torch.float32)
    return _sample_mixture(log_weights.softmax(-1), means, std, generator)


class VelocityNet(nn.Module):
    """v(x, t, c): an MLP on the point, Fourier features of t, and the condition one-hot."""

    def __init__(self, width: int = 64, dims: int = 2):
        super().__init__()
        self.register_buffer("frequencies", math.pi * torch.arange(1.0, 5.0))
        layers = []
        features = dims + 2 * len(self.frequencies) + CONDITIONS
        for n_in in (features, width, width):
            layers += [nn.Linear(n_in, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, dims))

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """x (B, dims), t (B,), c (B,) -> v (B, dims)."""
        phase = t[:, None] * self.frequencies
        condition = nn.functional.one_hot(c, CONDITIONS).to(x.dtype)
        return self.layers(torch.cat([x, phase.cos(), phase.sin(), condition], 1))


def pretrain(
    model: nn.Module,
    steps: int,
    generator: torch.Generator,
    sample_data: Callable[[Tensor, torch.Generator], Tensor] = sample_ref,
    peak: float = 1e-2,
) -> Iterator[float]:
    """Flow matching: fit `model` in place to the data, and yield the loss after every step.

    sample_data: (c (N,), generator) -> x0 (N, ...). peak: the highest learning rate.
    """
    batch = 1024
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, steps, pct_start=0.1)
    for _ in range(steps):
        c = sample_conditions(batch, generator)
        x0 = sample_data(c, generator)[:, None]  # (P, G, ...) with one sample a group
        eps = torch.randn(x0.shape, generator=generator)
        t = dgpo.sample_timesteps((batch, 1), generator=generator)
        v = model(dgpo.diffuse(x0, eps, t)[:, 0], t[:, 0], c)
        loss = dgpo.dsm_loss(v[:, None], x0, eps).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.item()


def flow_log_prob(model: nn.Module, c: Tensor, x: Tensor, steps: int = 50) -> Tensor:
    """Log-density (N,) of a learned flow at x (N, 2) under c (N,), by Runge-Kutta of order 4.

    Along the flow d log p_t(x_t)/dt = -div v (the continuity equation), so log p_0(x_0) is
    log N(x_1; 0, I) + int_0^1 div v(x_t, t) dt. In 2-D autograd gives the divergence exactly.
    """

    def slope(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            v = model(x, x.new_full((len(x),), t), c)
            dv = [torch.autograd.grad(v[:, i].sum(), x, retain_graph=True)[0] for i in (0, 1)]
        return v.detach(), dv[0][:, 0] + dv[1][:, 1]

    h = 1 / steps
    integral = torch.zeros_like(x[:, 0])
    for i in range(steps):
        t = i * h
        v1, d1 = slope(x, t)
        v2, d2 = slope(x + h / 2 * v1, t + h / 2)
        v3, d3 = slope(x + h / 2 * v2, t + h / 2)
        v4, d4 = slope(x + h * v3, t + h)
        x = x + h / 6 * (v1 + 2 * v2 + 2 * v3 + v4)
        integral = integral + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    return -x.square().sum(1) / 2 - math.log(2 * math.pi) + integral


@torch.no_grad()
def sample(model: nn.Module, c: Tensor, noise: Tensor, steps: int = 10) -> Tensor:
    """Samples (N, 2) of a learned flow from noise (N, 2) under c (N,), by `dgpo.sample_ode`."""
    return dgpo.sample_ode(lambda x, t: model(x, t.expand(len(x)), c), noise, steps)


def on_mode_share(x: Tensor) -> float:
    """Share of points (N, 2) within 3 STD of a mode's centre: 1 - exp(-4.5) = 0.989 of the data."""
    return (torch.cdist(x, mode_centers(x.dtype)).amin(1) < 3 * STD).float().mean().item()


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| from samples (N, 2) of p_X and (M, 2) of p_Y.

    It is 0 if p_X = p_Y, and otherwise positive. No point is paired with itself, so the estimate is
    unbiased, and for equal densities it may be slightly negative.
    """
    between = torch.cdist(x, y).mean()
    within = sum(torch.pdist(z).sum() * 2 / (len(z) * (len(z) - 1)) for z in (x, y))
    return (2 * between - within).item()
