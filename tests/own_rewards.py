"""Rewards of one's own, good and bad, for tests of the trainer."""

import torch


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def darkness(images, prompts):
    return 1 - images.mean((1, 2, 3))


def constant(images, prompts):
    return [1.0] * len(images)


def constant_for_some(images, prompts):
    constant = len(prompts[0]["prompt"]) % 2
    return [1.0] * len(images) if constant else brightness(images, prompts)


def nan_for_some(images, prompts):
    scores = images.mean((1, 2, 3))
    if len(prompts[0]["prompt"]) % 2:
        scores[1] = float("nan")
    return scores


def nan_for_all(images, prompts):
    return torch.full((len(images),), float("inf"))


def raising(images, prompts):
    return 1 / 0


def too_few(images, prompts):
    return images.mean((1, 2, 3))[1:]


def darkening(images, prompts):
    """Works in place, on whatever it is given."""
    images.mul_(-1)
    for prompt in prompts:
        prompt["prompt"] = ""
    prompts.clear()
    return -images.mean((1, 2, 3))


def leaving(images, prompts):
    raise SystemExit(0)


def interrupting(images, prompts):
    raise KeyboardInterrupt
