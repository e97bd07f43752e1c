"""A user's own rewards, good and bad, for tests of the trainer."""

import os
import time
from pathlib import Path

import torch


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def darkness(images, prompts):
    return 1 - images.mean((1, 2, 3))


def constant_for_some(images, prompts):
    return [1.0] * len(images) if len(prompts[0]) % 2 else brightness(images, prompts)


def nan_for_some(images, prompts):
    scores = images.mean((1, 2, 3)).tolist()
    return [*scores[:-1], None] if len(prompts[0]) % 2 else scores


def nan_for_all(images, prompts):
    return torch.full((len(images),), float("nan"))


def forever(images, prompts):
    Path(os.environ["BEGUN"]).touch()
    time.sleep(1000)
