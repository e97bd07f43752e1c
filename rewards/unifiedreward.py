"""UnifiedReward (Wang et al. 2025, arXiv:2503.05236): a vision-language model that gives points.

It runs in a server of its own with an OpenAI-compatible endpoint, for instance
`vllm serve CodeGoat24/UnifiedReward-7b-v1.5 --served-model-name UnifiedReward`.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from rewards.http import post, to_png

AT_ONCE = 8  # requests
QUESTION = """\
Judge how well this generated image follows its caption, and how good it is as an image.
End with a line 'Final Score:' and a number from 1 to 5.
Caption: {}"""
SCORE = re.compile(r"Final Score:\W*([0-9]+(?:\.[0-9]+)?)(?:\s*/\s*5)?", re.IGNORECASE)


def read_score(answer: str) -> float:
    """The points, 1 to 5, after the one 'Final Score:' of an answer.

    Raises ValueError when there is none, more than one, or it is out of range: nothing is guessed.
    """
    found = SCORE.findall(answer)
    if len(found) != 1 or not 1 <= float(found[0]) <= 5:
        raise ValueError(f"no single score from 1 to 5 in the answer {answer[-120:]!r}")
    return float(found[0])


def load(device: torch.device | str, model: str | None = None):
    """UnifiedReward's points, 1 to 5. model: the endpoint, as http://host:port/v1."""
    if not model:
        raise ValueError("needs its server: --reward_model unifiedreward=http://host:port/v1")
    url = model.rstrip("/") + "/chat/completions"

    def ask(picture: str, prompt: str) -> float:
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
        question = {"type": "text", "text": QUESTION.format(prompt)}
        content = {
            "model": "UnifiedReward",
            "messages": [{"role": "user", "content": [image, question]}],
            "temperature": 0,
            "max_tokens": 512,
        }
        answer = post(url, content)
        try:
            text = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise RuntimeError(f"{url} answered no chat completion") from None
        return read_score(text)

    def unifiedreward(images: Tensor, prompts: list[dict]) -> list[float]:
        texts = [prompt["prompt"] for prompt in prompts]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(ask, to_png(images), texts))

    return unifiedreward
