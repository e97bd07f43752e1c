"""A reward that runs elsewhere: a scorer of one's own behind HTTP. JSON both ways, no pickles."""

from __future__ import annotations

import base64
import io
import json
import time
import urllib.error
import urllib.request

import torch
from PIL import Image
from torch import Tensor

from rewards import to_bytes

TIMEOUT, ATTEMPTS, PAUSE = 60.0, 3, 1.0  # seconds for an answer; tries; seconds after the first


def to_png(images: Tensor) -> list[str]:
    """Images (N, 3, H, W) in [0, 1] as PNG files in base64."""
    files = []
    for picture in to_bytes(images):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        files.append(base64.b64encode(file.getvalue()).decode())
    return files


def post(url: str, content: dict, timeout: float | None = None) -> dict:
    """The JSON object that the server answers to a JSON object.

    No answer, or a server's own error (5xx), is tried again, ATTEMPTS times in all. Raises
    RuntimeError, naming the server, after that, and at once if it refuses or answers no JSON.
    """
    request = urllib.request.Request(
        url, json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            with urllib.request.urlopen(request, timeout=timeout or TIMEOUT) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            failure = f"{error.code} {error.reason}"
            if error.code < 500:
                break
        except OSError as error:  # no connection, or no answer in time
            failure = str(error)
        except ValueError:
            raise RuntimeError(f"{url} answered something that is not JSON") from None
        else:
            if not isinstance(answer, dict):
                raise RuntimeError(f"{url} answered no JSON object")
            return answer
    raise RuntimeError(f"{url} gave no answer ({failure})")


def load(device: torch.device | str, model: str | None = None):
    """Posts {"images": [PNG in base64, ...], "prompts": [{"prompt": ...}, ...]} to a server.

    It must answer {"scores": [a number for each]}. model: its URL.
    """
    if not model:
        raise ValueError("needs the scorer's address: --reward_model http=http://host:port/path")

    def http(images: Tensor, prompts: list[dict]) -> list[float]:
        answer = post(model, {"images": to_png(images), "prompts": prompts})
        if "scores" not in answer:
            raise RuntimeError(f'{model} answered no "scores", but {sorted(answer)}')
        return answer["scores"]

    return http
