"""GenEval's own verdict, for evaluation; rewards/geneval.py is graded, for training."""

from __future__ import annotations

import torch

from rewards import geneval
from rewards.geneval import check_prompt  # noqa: F401 (asked for by name)


def official(*seen) -> float:
    """0 or 1, as GenEval counts: see `geneval.judge`, which takes the same."""
    return geneval.judge(*seen)["official"]


def load(device: torch.device | str, model: str | None = None):
    """0 or 1, as GenEval counts. Otherwise as `rewards.geneval.load`."""
    return geneval.load(device, model, official)
