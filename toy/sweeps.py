"""What is changed around the chosen settings, one thing at a time; and how noisy gradients are."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import flow2d
import methods
import torch
import worlds
from methods import FOLLOWED, Reference, Setting, at_conditions, starting_from
from torch import Tensor, nn

import dgpo

Chosen = dict[str, Setting]  # by the name of a method, what a search has chosen in one world
Changes = dict[str, Setting]  # by what is changed


def dials(chosen: Chosen) -> Changes:
    """DGPO with dials, as chosen, each dial moved in turn; and the family in its place."""
    best, change = chosen["DGPO with dials"], dataclasses.replace
    plain = change(best, bound=0.0)
    changes = {
        "as chosen": best,
        "all of the group (m = 24)": change(best, samples=None),
        "pairs (m = 2)": change(best, samples=2),
        "no bound": plain,
        **{f"bound {k:g}": change(best, bound=k) for k in (1.0, 2.0, 4.0)},
        "bound to the reference": change(best, anchor="reference"),
        "one update": change(best, updates=1),
        "theta itself evaluated": change(best, average=None),
        "gate frozen (beta 0.001)": change(best, beta=1e-3),
        "AWM: no gate, no bound": change(plain, method="AWM"),
        "DiffusionNFT, b = 0.1": change(plain, method="NFT", beta=0.1),
        "DiffusionNFT, b = 1": change(plain, method="NFT", beta=1.0),
        "GPO": change(plain, method="GPO"),
        "Diffusion-SDPO": change(plain, method="SDPO", samples=None),
    }
    return {name: one for name, one in changes.items() if name == "as chosen" or one != best}


CURVES = {name: (2, 4, 8, 24) for name in ("DGPO", "DGPO with dials", "Flow-GRPO")}


def extremes(chosen: Chosen) -> Changes:
    """What groups know that pairs do not: from the two ends of a group to all of it."""
    return {
        f"{name}, m = {m}": dataclasses.replace(chosen[name], samples=None if m == 24 else m)
        for name, values in CURVES.items()
        for m in values
    }


def clips(chosen: Chosen) -> Changes:
    """Fig. 4, where rollouts have artefacts: in five steps."""
    return {
        f"{name}, t_min {t:g}": dataclasses.replace(chosen[name], rollout_steps=5, t_min=t)
        for name in ("DGPO", "DGPO with dials")
        for t in (0, 0.1, 0.2, 0.3, 0.5)
    }


def betas(chosen: Chosen) -> Changes:
    """Appendix D, followed for the whole budget, as over-optimisation shows late."""
    best = chosen["DGPO"]
    return {
        f"beta {beta:g}": dataclasses.replace(best, beta=beta) for beta in (0.01, 0.1, 1, 10, 100)
    }


def groups(chosen: Chosen) -> Changes:
    """G at equal samples a rollout."""
    best = chosen["DGPO"]
    samples = best.prompts * best.group_size
    return {
        f"G = {G}": dataclasses.replace(best, group_size=G, prompts=max(1, samples // G))
        for G in (2, 4, 8, 24)
    }


def variants(chosen: Chosen) -> Changes:
    """Fig. 5, Section 3.2, and what released trainers have, around DGPO's chosen setting."""
    best, change = chosen["DGPO"], dataclasses.replace
    flow_grpo = chosen["Flow-GRPO"]
    return {
        "DGPO": best,
        "offline": change(best, offline=True),
        "SDE rollouts": change(best, sde_noise=0.7),
        "independent noise": change(best, shared_noise=False),
        "theta_old = theta": change(best, ema=None),
        "clip 0.1": change(best, ema=best.ema or 0.9, clip=0.1),
        "no KL": change(best, kl=0.0),
        "Flow-GRPO": flow_grpo,
        "Flow-GRPO, no KL": change(flow_grpo, kl=0.0),
        "Flow-GRPO, all of the group": change(flow_grpo, samples=None),
        "Flow-GRPO, other share of its steps": change(
            flow_grpo, trained_share=1.5 - flow_grpo.trained_share
        ),
    }


class Sweep(NamedTuple):
    changes: Callable[[Chosen], Changes]
    worlds: tuple[str, ...]
    text: str
    share: float = 0.5  # of the world's budget
    followed: float = FOLLOWED


SWEEPS = {
    "dials": Sweep(
        dials,
        ("ring-2", "blobs"),
        "DGPO with dials as chosen, each dial moved in turn, and its family in its place, all else "
        "being equal.",
    ),
    "extremes": Sweep(
        extremes,
        ("ring-2", "blobs"),
        "m samples of each group of 24, half from each end. m = 2 is a pair, m = 24 the group.",
    ),
    "clip": Sweep(
        clips,
        ("ring-2", "blobs"),
        "As chosen, but with rollouts of five steps, which have artefacts.",
    ),
    "beta": Sweep(
        betas,
        ("ring-2", "blobs"),
        "DGPO as chosen but for beta, followed to the end of the budget.",
        share=1.0,
        followed=math.inf,
    ),
    "groups": Sweep(
        groups,
        ("ring-2", "blobs"),
        "DGPO as chosen but for the size of a group, at equal samples a rollout.",
    ),
    "variants": Sweep(
        variants,
        ("ring-2", "blobs"),
        "DGPO and Flow-GRPO as chosen, and each with one thing changed.",
    ),
}


STEPS = (3, 5, 10, 20)  # of a rollout


def artefacts(reference: Reference, seed: int, world_name: str) -> dict:
    """What rollouts of few steps leave of the reference's samples.

    "rollouts": for each of STEPS, a dict with the share that is right and the distance from data.
    """
    torch.set_num_threads(1)
    world, found = worlds.make(world_name), []
    c = torch.arange(2000) % flow2d.CONDITIONS
    noise = torch.randn(len(c), world.dims, generator=torch.Generator().manual_seed(seed))
    for steps in STEPS:
        right, distance, _ = world.judge(c, flow2d.sample(reference[0], c, noise, steps))
        means = {"right": right.float().mean().item(), "distance": distance.mean().item()}
        found.append({"steps": steps, **{k: round(v, 3) for k, v in means.items()}})
    return {"rollouts": found}


# How noisy the gradients are.

TIMES = (0.3, 0.5, 0.7, 0.9)
DRAWS = 64  # gradients, from which a variance is taken


GROUPS = (2, 4, 8, 24, 64)  # sizes


def signals(world: str) -> dict[str, Setting]:
    """Gradients of iterations, by methods as they are published; they differ in cost."""
    frozen = {"learning_rate": 0.0, "kl": 0.0, "prompts": 8, "timesteps": 4}
    return {
        "DGPO": Setting(world, "DGPO", **frozen),
        "independent noise": Setting(world, "DGPO", shared_noise=False, **frozen),
        "DGPO, m = 4": Setting(world, "DGPO", samples=4, **frozen),
        "Flow-GRPO": Setting(world, "Flow-GRPO", sde_noise=0.7, **frozen),
        "Flow-GRPO, half its steps": Setting(
            world, "Flow-GRPO", sde_noise=0.7, trained_share=0.5, **frozen
        ),
    }


def partly_trained(reference: Reference, world: str, iterations: int) -> nn.Module:
    """The reference after so many iterations of DGPO, at a setting that is gentle in all worlds."""
    model, generator = starting_from(reference)
    gentle = {"learning_rate": 1e-3, "beta": 10.0, "kl": 0.1, "t_min": 0.1}
    training = methods.learn(model, Setting(world, "DGPO", **gentle), generator)
    for _ in itertools.islice(training, iterations):
        pass
    return model


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def total_variance(draws: list[Tensor]) -> float:
    """The sum over coordinates of the variance, from draws of one shape."""
    return torch.stack(draws).var(0).sum().item()


def sharing(reference: Reference, seed: int, world_name: str, group_size: int) -> dict:
    """Variance over eps with a shared eps over that with one each, of the gap and its gradient.

    "ratios": a dict with t, gap and gradient for each of TIMES, for fixed samples, the mean over
    groups.
    """
    torch.set_num_threads(1)
    world, model = worlds.make(world_name), partly_trained(reference, world_name, 30)
    generator = torch.Generator().manual_seed(seed)
    P, G, ratios = 8, group_size, []
    c = torch.arange(P) % flow2d.CONDITIONS
    noise = torch.randn(P * G, world.dims, generator=generator)
    x0 = dgpo.sample_ode(at_conditions(model, c.repeat_interleave(G)), noise, 10).view(P, G, -1)
    advantages = dgpo.group_advantages(world.reward(c[:, None], x0))
    for time in TIMES:
        t = torch.full((1, 1), time)
        variances = {True: torch.zeros(2), False: torch.zeros(2)}  # shared: gap and gradient
        for p, shared in itertools.product(range(P), (True, False)):
            A, x, gaps, gradients = advantages[p : p + 1], x0[p : p + 1], [], []
            for _ in range(DRAWS):
                eps = torch.randn(1, 1 if shared else G, world.dims, generator=generator)
                x_t = dgpo.diffuse(x, eps, t)[0]
                loss, loss_ref = (
                    dgpo.dsm_loss(at_conditions(m, c[p].expand(G))(x_t, t[0, 0])[None], x, eps)
                    for m in (model, reference[0])
                )
                gap = dgpo.preference_gap(loss, loss_ref, A)
                model.zero_grad()
                gap.sum().backward()
                gaps.append(gap.detach())
                gradients.append(gradient(model))
            variances[shared] += torch.tensor([total_variance(gaps), total_variance(gradients)])
        of_gap, of_gradient = (variances[True] / variances[False]).tolist()
        ratios.append({"t": time, "gap": round(of_gap, 3), "gradient": round(of_gradient, 3)})
    return {"ratios": ratios}


def signal(reference: Reference, seed: int, setting: Setting, iterations: int) -> dict:
    """|E g|^2 over the total variance of an iteration's gradient g, for every million forwards.

    setting: with learning rate 0, so that all gradients are of one model: the reference after
    `iterations` of DGPO.
    """
    torch.set_num_threads(1)
    model = partly_trained(reference, setting.world, iterations)
    generator = torch.Generator().manual_seed(seed)
    training = methods.learn(model, setting, generator)
    draws = [gradient(model) for _ in itertools.islice(training, DRAWS)]
    noise_power = total_variance(draws)
    power = torch.stack(draws).mean(0).square().sum().item() - noise_power / len(draws)
    each = power / noise_power / methods.iteration_cost(setting)
    return {"signal": float(f"{each * 1e6:.4g}")}
