"""A reward that runs elsewhere, behind HTTP, with JSON both ways.

The trainer posts {"images": [PNG files in base64], "prompts": [strings], "metadata": [objects]},
and the server answers {"scores": [a number for each image, or null]}. With Pillow, it reads an
image by Image.open(io.BytesIO(base64.b64decode(png))).
"""

from __future__ import annotations

import base64
import io
import json
import urllib.request
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.parse import urlsplit

import torch
from PIL import Image
from torch import Tensor

from rewards import Reward, RewardError, to_bytes

TIMEOUT = 60  # seconds for an answer


def to_png(images: Tensor) -> list[str]:
    """Encode images (N, 3, H, W) in [0, 1] as PNG files in base64."""
    files = []
    for picture in to_bytes(images):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        files.append(base64.b64encode(file.getvalue()).decode())
    return files


def check_address(url: str | None, example: str) -> str:
    """Return the URL. Raises RewardError, with an example, if it is not a complete one."""
    parts = urlsplit(url or "")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RewardError(f"it needs the address of its server: --reward_model {example}")
    return url


def post(url: str, content: dict) -> dict:
    """Post a JSON object and return the one that the server answers, or raise RewardError."""
    request = urllib.request.Request(
        url, json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            return json.load(response)
    except HTTPError as error:  # the body has the server's reason
        reason = " ".join(error.read().decode(errors="replace").split())[:300]
        raise RewardError(f"{url} answered {error.code} {error.reason} {reason}") from None
    except (OSError, HTTPException, ValueError) as error:
        raise RewardError(f"{url} did not answer with JSON: {error or type(error)}") from None


def load(device: torch.device | str, model: str | None = None) -> Reward:
    """The scores that the server at the URL `model` answers. Raises RewardError without a URL."""
    url = check_address(model, "http=http://host:port/path")

    def http(images: Tensor, prompts: list[str], metadata: list[dict]) -> list[float]:
        answer = post(url, {"images": to_png(images), "prompts": prompts, "metadata": metadata})
        if "scores" not in answer:
            raise RewardError(f'{url} answered without "scores"')
        return answer["scores"]

    return http
