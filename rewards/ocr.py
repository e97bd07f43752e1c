"""Text rendering (Appendix E of the paper): is the text written that the prompt puts in quotes?"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from rewards import to_bytes

# Double, typographic and single quotation marks. A single one opens only after a space or at the
# start, and closes only before a space, punctuation or the end, so that don't has none.
QUOTED = re.compile(
    r'"([^"]+)"|“([^”]+)”|‘([^’]+(?:’\w[^’]*)*)’|(?<![^\s(])\'((?:[^\']|\'(?=\w))+)\'(?!\w)'
)


def target_text(prompt: str) -> str:
    """What stands in quotation marks, several parts joined by a space.

    Raises ValueError, naming the prompt, if nothing does.
    """
    parts = ["".join(groups).strip() for groups in QUOTED.findall(prompt)]
    text = " ".join(part for part in parts if part)
    if not text:
        raise ValueError(f"no text in quotation marks in the prompt {prompt!r}")
    return text


def similarity(read: str, target: str) -> float:
    """r = max(1 - N_e / N_ref, 0) of Appendix E, without regard to case and spaces.

    N_e is the least edit distance between what is read and the target, or 0 where the target is
    found in it whole, as in the released code; N_ref is the target's length.
    """
    from rapidfuzz.distance import Levenshtein

    read, target = ("".join(text.lower().split()) for text in (read, target))
    distance = 0 if target in read else Levenshtein.distance(read, target)
    return max(1 - distance / len(target), 0.0)


def load(device: torch.device | str, model: str | None = None):
    """The paper's OCR reward, 0 to 1, by RapidOCR on the CPU.

    4.8 images of 512 px a second on two cores. It uses all cores by itself: two processes made 4.0,
    and 4.6 with a core each. Its PP-OCR models (Apache-2.0) come with the package. `device` and
    `model` play no part.
    """
    try:
        import rapidfuzz  # noqa: F401
        from rapidocr import RapidOCR
    except ImportError:
        needed = "pip install rapidocr onnxruntime rapidfuzz"
        raise ImportError(f"the reward ocr needs `{needed}`") from None
    engine = RapidOCR(params={"Global.log_level": "error"})

    def ocr(images: Tensor, prompts: list[dict]) -> list[float]:
        targets = [target_text(prompt["prompt"]) for prompt in prompts]
        scores = []
        for picture, target in zip(to_bytes(images), targets, strict=True):
            # All three, as the engine remembers what it was last told. It expects BGR.
            found = engine(picture[:, :, ::-1].copy(), use_det=True, use_cls=True, use_rec=True)
            scores.append(similarity(" ".join(found.txts or ()), target))
        return scores

    return ocr
