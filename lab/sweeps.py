"""What is changed around the chosen settings, one thing at a time."""

from __future__ import annotations

import math
from dataclasses import replace

from lab import worlds
from lab.methods import METHODS, Setting

Chosen = dict[str, Setting]  # by method, what the search has chosen in one world
Changes = dict[str, Setting]  # by what is changed


def ablation(chosen: Chosen) -> Changes:
    best = chosen["Bounded DGPO"]
    changes = {
        "as chosen": {},
        "all of the group (m = 24)": {"train_samples": None},
        "pairs (m = 2)": {"train_samples": 2},
        "no bound": {"bound": 0.0},
        **{f"bound {k:g}": {"bound": k} for k in (1.0, 2.0, 4.0)},
        "bound to the reference": {"anchor": "reference"},
        "one update": {"updates_per_rollout": 1},
        "theta itself evaluated": {"average": None},
        "gate frozen (beta 0.001)": {"beta": 1e-3},
    }
    settings = {name: replace(best, **change) for name, change in changes.items()}
    return {name: one for name, one in settings.items() if name == "as chosen" or one != best}


def one_setting(chosen: Chosen) -> Changes:
    """All methods but Flow-GRPO at one setting: that of bounded DGPO, its number of samples too."""
    best = chosen["Bounded DGPO"]
    bounds = {name: best.bound * (name == "Bounded DGPO") for name in METHODS}
    settings = {name: replace(best, method=name, bound=bound) for name, bound in bounds.items()}
    return {name: one for name, one in settings.items() if name != "Flow-GRPO"}


def extremes(chosen: Chosen) -> Changes:
    """From the two ends of a group to all of it: does a group say more than its pair?"""
    return {
        f"{name}, m = {m}": replace(chosen[name], train_samples=None if m == 24 else m)
        for name in ("DGPO", "Bounded DGPO", "Flow-GRPO")
        for m in (2, 4, 8, 24)
    }


def clip(chosen: Chosen) -> Changes:
    """Fig. 4 of the paper: the timestep clip, on five-step rollouts, which have artefacts."""
    return {
        f"{name}, t_min {t:g}": replace(chosen[name], num_inference_steps=5, t_min=t)
        for name in ("DGPO", "Bounded DGPO")
        for t in (0, 0.1, 0.2, 0.3, 0.5)
    }


def beta(chosen: Chosen) -> Changes:
    """Appendix D, followed for the whole budget, as over-optimization shows late."""
    return {f"beta {b:g}": replace(chosen["DGPO"], beta=b) for b in (0.01, 0.1, 1, 10, 100)}


def variants(chosen: Chosen) -> Changes:
    """Fig. 5, Section 3.2, and what released trainers have."""
    best, flow_grpo = chosen["DGPO"], chosen["Flow-GRPO"]
    other_share = 1.5 - flow_grpo.trained_share
    return {
        "DGPO": best,
        "offline": replace(best, offline=True),
        "SDE rollouts": replace(best, sde_noise=0.7),
        "independent noise": replace(best, shared_noise=False),
        "theta_old = theta": replace(best, ema=None),
        "clip 0.1": replace(best, ema=best.ema or 0.9, clip=0.1),
        "no KL": replace(best, kl=0.0),
        "Flow-GRPO": flow_grpo,
        "Flow-GRPO, no KL": replace(flow_grpo, kl=0.0),
        "Flow-GRPO, all of the group": replace(flow_grpo, train_samples=None),
        "Flow-GRPO, other share of its steps": replace(flow_grpo, trained_share=other_share),
    }


WORLDS = ("ring-2", "blobs")
SWEEPS = {each.__name__: each for each in (ablation, one_setting, extremes, clip, variants, beta)}
# The share of the budget, and how long a run is followed: see worlds.run.
HOW = dict.fromkeys(SWEEPS, (0.5, worlds.FOLLOWED)) | {"beta": (1.0, math.inf)}
