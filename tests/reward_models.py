"""What tests of rewards share: pixels as CLIP's own code makes them, and random weights."""

import numpy as np
import torch
from PIL import Image

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def pil_pixels(images, side):
    """Images (N, 3, H, W) in [0, 1] -> (N, 3, side, side): resized, cropped and normalised."""
    pixels = []
    for image in images:
        bytes_ = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        picture, scale = Image.fromarray(bytes_), side / min(bytes_.shape[:2])
        size = (int(picture.width * scale), int(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.BICUBIC)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
        pixels.append((np.asarray(picture, np.float32) / 255 - MEAN) / STD)
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


def random_tensors(table, **towers):
    """Tensors by name from lines "name sizes"; # stands for 0 and 1, .* for .weight and .bias.

    towers: prefixes that replace the beginnings of names.
    """
    generator, tensors = torch.Generator().manual_seed(0), {}
    for line in table.split("\n"):
        pattern, *sizes = line.split()
        tower, dot, rest = pattern.partition(".")
        pattern = towers.get(tower, tower) + dot + rest
        for layer in "01" if "#" in pattern else " ":
            for kind in ("weight", "bias") if pattern.endswith("*") else ("",):
                shape = [int(size) for size in (sizes[:1] if kind == "bias" else sizes)]
                values = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
                name = pattern.replace("#", layer).replace("*", kind)
                tensors[name] = values + ("norm" in name.lower() and kind != "bias")
    return tensors
