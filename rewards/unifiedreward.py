"""UnifiedReward (Wang et al. 2025, arXiv:2503.05236): a vision-language model that gives points.

It runs in a server with an OpenAI-compatible endpoint. The paper used UnifiedReward-7b-v1.5, a
LLaVA-OneVision, whose architecture SGLang serves and vLLM does not:

    python -m sglang.launch_server --model-path CodeGoat24/UnifiedReward-7b-v1.5 \\
        --served-model-name UnifiedReward --chat-template chatml-llava --port 8000

Later versions are Qwen-VLs and score differently: `vllm serve`, with the same served-model-name.

**The wording of the question decides the number.** QUESTION below is ours; do not compare its
scores with published ones. For those, copy the authors' wording into a file, with real line breaks
and with {prompt} in the place of the prompt:
--reward_model unifiedreward=http://host:8000/v1,template=question.txt
It is in github.com/CodeGoat24/UnifiedReward: `question` in sglang_llava/sglang_inference.py for
UnifiedReward-7b-v1.5 (the same in flow_grpo/rewards.py of Luo-Yihong/DGPO), and "text" in
inference_qwen/image_generation/qwen_point_score_image_generation.py for the Qwen-VLs. It must ask
for a "Final Score:", as the ACS wording of UnifiedReward-2.0 does not.

The released code resizes images to 512 px, divides points by 5 and counts an answer without a
score as 0. Here images keep their size, points are 1 to 5, and such an answer is NaN: no score.
"""

from __future__ import annotations

import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from rewards import Reward, RewardError
from rewards.http import check_address, post, to_png

CONCURRENT = 8  # requests
QUESTION = """\
Judge how well this generated image follows its caption, and how good it is as an image.
End with a line 'Final Score:' and a number from 1 to 5.
Caption: {prompt}"""
SCORE = re.compile(r"Final Score:[^\w-]*([0-9]+(?:\.[0-9]+)?)", re.IGNORECASE)


def read_score(answer: str) -> float:
    """The first number from 1 to 5 behind a 'Final Score:', or NaN if there is none."""
    scores = (float(number) for number in SCORE.findall(answer))
    return next((score for score in scores if 1 <= score <= 5), math.nan)


def load(device: torch.device | str, model: str | None = None) -> Reward:
    """UnifiedReward's points, 1 to 5, or NaN for an answer without a score.

    model: the endpoint, as http://host:port/v1, and ",template=FILE" for another question.
    """
    address, _, file = (model or "").partition(",template=")
    address = check_address(address, "unifiedreward=http://host:port/v1")
    url = address.rstrip("/") + "/chat/completions"
    question = Path(file).read_text("utf-8-sig").removesuffix("\n") if file else QUESTION
    if "{prompt}" not in question:
        raise RewardError(f"the template {file} has no {{prompt}}, where the prompt goes")

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
            raise RewardError(f"{url} did not answer with a chat completion") from None

    def unifiedreward(images: Tensor, prompts: list[str]) -> list[float]:
        with ThreadPoolExecutor(CONCURRENT) as pool:
            return list(pool.map(ask, to_png(images), prompts))

    return unifiedreward
