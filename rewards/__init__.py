"""Rewards score images, higher is better. Each file of this folder with a `load` is one.

    reward(images, prompts, metadata) -> scores, or (scores, info)

    images    float tensor (N, 3, H, W) in [0, 1]
    prompts   N strings
    metadata  N dicts: each prompt's whole line of the prompt file, "prompt" included
    scores    N numbers as a tensor, array or list; NaN, infinity and None mean "no score"
    info      a dict whose numbers are logged as means (optional)

Arguments are passed by name where the function names them (images, prompts, and metadata or
prompt_metadata), otherwise by position, so that flow_grpo's functions of images, prompts and
metadata run unchanged. Coroutines are awaited. The trainer loads and calls rewards in one worker
thread, where no signal handler can be set. Name your own reward as path/to/file.py:function or
package.module:function:

    def blueness(images, prompts):
        wanted = images.new_tensor([1.0 if "blue" in text.lower() else -1.0 for text in prompts])
        return wanted * (images[:, 2] - images[:, 0]).mean((1, 2))

To add a reward to this folder, write <name>.py with `load(device, model=None)`, which returns the
reward; `model` replaces its weights. A function `check_prompt(metadata)` beside it may raise
ValueError for a prompt that the reward cannot score.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewards import interface
from rewards.interface import RewardError

Reward = Callable[..., Any]


def names() -> list[str]:
    """List the rewards of this folder."""
    files = Path(__file__).parent.glob("[a-z]*.py")
    return sorted(file.stem for file in files if "\ndef load(" in file.read_text("utf-8"))


def parse(specs: list[str]) -> dict[str, float]:
    """Parse specs "name" or "name=weight" (default weight 1) into weights by name.

    Raises RewardError if one does not exist or has no weight. Nothing is imported.
    """
    weights: dict[str, float] = {}
    for spec in specs:
        name, equals, number = spec.rpartition("=")
        if not equals or ".py:" in number:  # a path may contain "=" as well
            name, number = spec, "1"
        place, _, function = name.rpartition(":")
        if not place and name not in names():
            choices = ", ".join(names())
            raise RewardError(f"no reward {name!r}: {choices}, or path/to/file.py:function")
        if place.endswith(".py"):
            if not Path(place).is_file():
                raise RewardError(f"there is no file {place}")
            if not re.search(rf"\b{function}\b", Path(place).read_text("utf-8")):
                raise RewardError(f"{place} does not define {function!r}")
        elif place and importlib.util.find_spec(place.split(".")[0]) is None:
            raise RewardError(f"there is no package {place}; the name of a file ends in .py")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight) or weight == 0:
            raise RewardError(f"{spec}: the weight must be a number other than 0")
        if name in weights:
            raise RewardError(f"the reward {name} is given twice")
        weights[name] = weight
    return weights


def check_prompts(names: Iterable[str], prompts: list[dict]) -> None:
    """Raise RewardError for the first prompt that a reward of this folder cannot score."""
    for name in names:
        module = None if ":" in name else importlib.import_module(f"rewards.{name}")
        check = getattr(module, "check_prompt", None)
        for number, prompt in enumerate(prompts if check else [], 1):
            try:
                check(prompt)
            except ValueError as error:
                raise RewardError(f"{name} cannot score prompt {number}: {error}") from None


def load(name: str, device: torch.device | str, model: str | None = None) -> Reward:
    """Load a reward, with its weights on `device`; `model` replaces them. Raises RewardError."""
    place, _, function = name.rpartition(":")
    with interface.named_errors(f"cannot load the reward {name}"):
        if not place:
            return importlib.import_module(f"rewards.{name}").load(device, model)
        if model:
            raise RewardError("a reward of your own loads its weights itself")
        return interface.load_own(place, function)


def score(
    name: str, reward: Reward, images: Tensor, prompts: list[dict]
) -> tuple[Tensor, dict[str, float]]:
    """Score images (N, 3, H, W) for N prompt lines; the reward works on copies of both.

    Returns float32 scores (N,) on the CPU, NaN for no score, and the means of the numbers in the
    reward's info. Raises RewardError unless the reward returns N numbers.
    """
    texts = [prompt["prompt"] for prompt in prompts]
    with interface.named_errors(f"the reward {name} failed for the prompt {texts[0]!r}"):
        result = interface.call(reward, images.clone(), list(texts), copy.deepcopy(prompts))
    with interface.named_errors(f"the reward {name} must return {len(images)} numbers"):
        scores, info = interface.split(result)
        if scores.shape != (len(images),):
            raise RewardError(f"got the shape {tuple(scores.shape)}")
    return scores, info


def to_bytes(images: Tensor) -> np.ndarray:
    """Convert images (N, 3, H, W) in [0, 1] to uint8 pixels (N, H, W, 3)."""
    pixels = (images.detach().float() * 255).round().clamp(0, 255).to("cpu", torch.uint8)
    return pixels.permute(0, 2, 3, 1).numpy()
