"""UnifiedReward (Wang et al. 2025, arXiv:2503.05236): a vision-language model that gives points.

It runs in a server of its own with an OpenAI-compatible endpoint. The paper's numbers are of
UnifiedReward-7b-v1.5, a LLaVA-OneVision whose architecture SGLang serves and vLLM does not:

    python -m sglang.launch_server --model-path CodeGoat24/UnifiedReward-7b-v1.5 \\
        --served-model-name UnifiedReward --chat-template chatml-llava --port 8000

Later versions are Qwen-VLs, give other numbers, and are served by vLLM:

    vllm serve CodeGoat24/UnifiedReward-2.0-qwen-7b --served-model-name UnifiedReward --port 8000

**The question's wording decides the number.** QUESTION below is ours, and what it gives must not be
set beside published numbers. For these, write the authors' wording into a file, line breaks and
all, and name it:

    --reward_model unifiedreward=http://host:8000/v1,template=question.txt

It stands in github.com/CodeGoat24/UnifiedReward, as the `question` of
sglang_llava/sglang_inference.py (UnifiedReward-7b-v1.5; flow_grpo/rewards.py of Luo-Yihong/DGPO,
`unifiedreward_score_sglang`, asks the same) and the "text" of
inference_qwen/image_generation/qwen_point_score_image_generation.py (the Qwen-VLs; it asks for more
than a score). In the file, as there, {prompt} is where the prompt goes.

The released code sends pictures resized to 512 px, divides points by 5, and counts an answer
without a score as 0. Here they are sent as drawn, points are from 1 to 5, and such an answer is
NaN, which is no score.
"""

from __future__ import annotations

import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from rewards import RewardError
from rewards.http import checked, post, to_png

AT_ONCE = 8  # requests
QUESTION = """\
Judge how well this generated image follows its caption, and how good it is as an image.
End with a line 'Final Score:' and a number from 1 to 5.
Caption: {prompt}"""
SCORE = re.compile(r"Final Score:[^\w-]*([0-9]+(?:\.[0-9]+)?)", re.IGNORECASE)


def read_score(answer: str) -> float:
    """The first number from 1 to 5 after a 'Final Score:', or NaN if there is none."""
    scores = (float(number) for number in SCORE.findall(answer))
    return next((score for score in scores if 1 <= score <= 5), math.nan)


def read_template(file: str) -> str:
    """The question in a file, without the line break at its end. Raises RewardError."""
    try:
        text = Path(file).read_text("utf-8-sig").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RewardError(f"cannot read the template {file} ({error})") from None
    if "{prompt}" not in text:
        raise RewardError(f"the template {file} has no {{prompt}}, where the prompt goes")
    return text


def load(device: torch.device | str, model: str | None = None):
    """UnifiedReward's points, 1 to 5, NaN for an answer without. `device` plays no part.

    model: the endpoint, as http://host:port/v1, with ",template=FILE" for another question.
    """
    address, _, file = (model or "").partition(",template=")
    address = checked(address, "unifiedreward=http://host:port/v1")
    url = address.rstrip("/") + "/chat/completions"
    question = read_template(file) if file else QUESTION

    def ask(picture: str, prompt: str) -> float:
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
        text = {"type": "text", "text": question.replace("{prompt}", prompt)}
        content = {
            "model": "UnifiedReward",
            "messages": [{"role": "user", "content": [image, text]}],
            "temperature": 0,
            "max_tokens": 512,
        }
        answer = post(url, content)
        try:
            return read_score(answer["choices"][0]["message"]["content"])
        except (KeyError, IndexError, TypeError):
            raise RewardError(f"{url} answered no chat completion") from None

    def unifiedreward(images: Tensor, prompts: list[dict]) -> list[float]:
        texts = [prompt["prompt"] for prompt in prompts]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(ask, to_png(images), texts))

    return unifiedreward
