"""JPEG compressibility (Black et al. 2024, arXiv:2305.13301): a reward that needs no weights."""

from __future__ import annotations

import io

import torch
from PIL import Image
from torch import Tensor

from rewards import Reward, RewardError, to_bytes


def load(device: torch.device | str, model: str | None = None) -> Reward:
    """Minus the size as a JPEG of quality 95, in kilobytes. Raises RewardError if given a model."""
    if model:
        raise RewardError("compressibility has no weights to replace")

    def compressibility(images: Tensor) -> list[float]:
        sizes = []
        for picture in to_bytes(images):
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "JPEG", quality=95)
            sizes.append(file.tell() / 1000)
        return [-size for size in sizes]

    return compressibility
