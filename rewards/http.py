"""A reward that runs elsewhere, behind HTTP. JSON both ways, no pickles.

It is posted {"images": [a PNG file in base64, ...], "prompts": [{"prompt": ...}, ...]} and must
answer {"scores": [a number for each image]}. A server for a function my_reward(images, texts) of
PIL images and strings, with what Python and Pillow have:

    import base64, io, json
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from PIL import Image


    class Server(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            images = [Image.open(io.BytesIO(base64.b64decode(png))) for png in asked["images"]]
            texts = [prompt["prompt"] for prompt in asked["prompts"]]
            answer = json.dumps({"scores": my_reward(images, texts)}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)


    HTTPServer(("", 8000), Server).serve_forever()
"""

from __future__ import annotations

import base64
import io
import json
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from urllib.parse import urlsplit

import torch
from PIL import Image
from torch import Tensor

from rewards import RewardError, to_bytes

TIMEOUT, ATTEMPTS, PAUSE = 60.0, 3, 1.0  # seconds for an answer; tries; seconds after the first


def to_png(images: Tensor) -> list[str]:
    """Images (N, 3, H, W) in [0, 1] as PNG files in base64."""
    files = []
    for picture in to_bytes(images):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        files.append(base64.b64encode(file.getvalue()).decode())
    return files


def checked(url: str | None, example: str) -> str:
    """The address, if it is one. Raises RewardError, with an example, if it is not."""
    try:
        parts = urlsplit(url or "")
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        fine = False
    if not fine:
        given = f", got {url!r}" if url else ""
        raise RewardError(f"it needs its server's address: --reward_model {example}{given}")
    return url


def post(url: str, content: dict, timeout: float | None = None) -> dict:
    """The JSON object that the server answers to a JSON object.

    No answer, or a server's own error (5xx), is tried again, ATTEMPTS times in all. Raises
    RewardError, naming the server, after that, and at once if it refuses or answers no JSON.
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
        except (OSError, HTTPException) as error:  # no connection, no whole answer
            failure = str(error) or type(error).__name__
        except ValueError:
            raise RewardError(f"{url} answered something that is not JSON") from None
        else:
            if not isinstance(answer, dict):
                raise RewardError(f"{url} answered no JSON object")
            return answer
    raise RewardError(f"{url} gave no answer ({failure})")


def load(device: torch.device | str, model: str | None = None):
    """The scores that the server at the URL `model` answers. `device` plays no part."""
    url = checked(model, "http=http://host:port/path")

    def http(images: Tensor, prompts: list[dict]) -> list[float]:
        answer = post(url, {"images": to_png(images), "prompts": prompts})
        if "scores" not in answer:
            raise RewardError(f'{url} answered no "scores", but {sorted(answer)}')
        return answer["scores"]

    return http
