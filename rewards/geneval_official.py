"""GenEval's own verdict, 0 or 1, for evaluation; rewards/geneval.py is graded, for training."""

from __future__ import annotations

import torch

from rewards import Reward, geneval

check_prompt = geneval.check_prompt


def official(prompt: dict, objects: geneval.Objects, name_colors: geneval.NameColors) -> float:
    """0 or 1, as GenEval counts: see `geneval.judge`."""
    return geneval.judge(prompt, objects, name_colors)[1]


def load(device: torch.device | str, model: str | None = None) -> Reward:
    """0 or 1, as GenEval counts. Otherwise as `rewards.geneval.load`."""
    return geneval.load(device, model, official)
