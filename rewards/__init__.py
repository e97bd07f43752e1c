"""Images and prompts to scores: the interface, the names, and weighted sums.

A reward is a function (images, prompts) -> scores, higher is better:
    images: float (N, 3, H, W) in [0, 1]. prompts: N dicts, each with "prompt" and what else the
    prompt file says of it. Returns N numbers, as a tensor, an array or a list.

A file rewards/<name>.py makes the name <name> known. It has one public function,
`load(device, model=None) -> reward`, that loads what the reward needs; `model` stands in for the
file's own weights. Nothing is imported before it is asked for. Rewards of one's own are named
path/to/file.py:function or package.module:function.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Reward = Callable[[Tensor, list[dict]], object]


class RewardError(RuntimeError):
    """A reward failed; the message names it, and the prompt it failed on."""


def to_bytes(images: Tensor) -> np.ndarray:
    """Images (N, 3, H, W) in [0, 1] as bytes (N, H, W, 3), the form that picture files have."""
    pixels = (images.detach().float() * 255).round().clamp(0, 255).to("cpu", torch.uint8)
    return pixels.permute(0, 2, 3, 1).numpy()


def names() -> list[str]:
    """Of the rewards in this folder."""
    return sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))


def parse(spec: str) -> tuple[str, float]:
    """ "name" or "name=weight" -> (name, weight), the weight 1 if there is none.

    Raises ValueError if there is no such reward. A file of one's own is read for that, not run.
    """
    name, equals, number = spec.rpartition("=")
    try:
        name, weight = (name, float(number)) if equals else (spec, 1.0)
    except ValueError:
        raise ValueError(f"{spec!r}: the weight must be a number, got {number!r}") from None
    place, colon, function = name.rpartition(":")
    if not colon:
        if name not in names():
            own = "path/to/file.py:function"
            raise ValueError(f"no reward {name!r}: give {', '.join(names())}, or {own}")
    elif place.endswith(".py"):
        if not Path(place).is_file():
            raise ValueError(f"{name!r}: there is no file {place}")
        tree = ast.parse(Path(place).read_text())
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if function not in defined:
            raise ValueError(f"{name!r}: {place} defines no function {function}")
    elif importlib.util.find_spec(place.split(".")[0]) is None:
        raise ValueError(f"{name!r}: there is no package {place.split('.')[0]}")
    return name, weight


def load(name: str, device: torch.device | str, model: str | None = None) -> Reward:
    """The reward of a name that `parse` has passed, with its weights on `device`."""
    place, colon, function = name.rpartition(":")
    if not colon:
        return importlib.import_module(f"rewards.{name}").load(device, model)
    if not place.endswith(".py"):
        return getattr(importlib.import_module(place), function)
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(place).resolve().parent))  # for what the file imports beside it
    spec.loader.exec_module(module)
    return getattr(module, function)


def score(name: str, reward: Reward, images: Tensor, prompts: list[dict]) -> Tensor:
    """What a reward says of images (N, 3, H, W), as float32 (N,) on the CPU.

    Raises RewardError when the reward raises, or does not return a number for each image.
    """
    about = f"of prompt {prompts[0]['prompt']!r}"
    try:
        scores = torch.as_tensor(reward(images, prompts), dtype=torch.float32).detach().cpu()
    except Exception as error:
        kind = type(error).__name__
        raise RewardError(f"reward {name} failed on images {about}: {kind}: {error}") from error
    if tuple(scores.shape) != (len(images),):
        shape = tuple(scores.shape)
        raise RewardError(f"reward {name} must return {len(images)} scores, got {shape}, {about}")
    return scores
