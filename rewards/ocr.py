"""Text rendering (Appendix E of the paper): is the text written that the prompt puts in quotes?

Scores by this file and the paper's are not quite the same number. The paper's come from PaddleOCR
2.9, these from RapidOCR, another engine for models of the same family (PP-OCR), of a later version.
The formula is that of the released code, flow_grpo/ocr.py of Luo-Yihong/DGPO and of Flow-GRPO, but
for what that code does not define well:

- A prompt with several texts in double quotes asks for all of them here, joined. There, only the
  first counts, and whatever else a prompt asks for is never learnt.
- Single and typographic quotation marks count here where there are no double ones. There, such a
  prompt ends the run.
- A failure of the engine ends the run here. There, it is printed and the picture scores 0.

None of it matters for the published prompts, all of which have one text in double quotes (looked
at: the 1,018 of its test list).
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from rewards import RewardError, to_bytes

# Double, typographic and single quotation marks. A single one opens only after a space or at the
# start, and closes only before a space, punctuation or the end, so that don't has none.
QUOTED = re.compile(
    r'"([^"]+)"|“([^”]+)”|‘([^’]+(?:’\w[^’]*)*)’|(?<![^\s(])\'((?:[^\']|\'(?=\w))+)\'(?!\w)'
)


def check_prompt(prompt: dict) -> None:
    """Raises RewardError if a prompt asks for no text."""
    target_text(prompt["prompt"])


def target_text(prompt: str) -> str:
    """What stands in quotation marks, several parts joined by a space.

    Where there are straight double ones, the others only set something off ('retro', Joe's).
    Raises RewardError, naming the prompt, if there is no such text.
    """
    parts = [[part.strip() for part in groups] for groups in QUOTED.findall(prompt)]
    double = [groups[0] for groups in parts if groups[0]]
    text = " ".join(double or ["".join(groups) for groups in parts]).strip()
    if not text:
        raise RewardError(f"no text in quotation marks in the prompt {prompt!r}")
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


def load(device: torch.device | str, model: str | None = None, line: int | None = None):
    """The paper's OCR reward, 0 to 1, by RapidOCR on the CPU.

    line: where each picture is one line of text and nothing else, the least width in pixels at
    which the recogniser sees it, 48 high. Text is then not looked for, only read, in one thread:
    about 200 pictures a second at a width of 96. The released code always looks for text.

    Text that stands on its head is not turned before it is read, as in the released code, where
    the classifier of orientations is off. About 5 images of 512 px a second on two cores; it uses
    all cores by itself. Its PP-OCR models (Apache-2.0) come with the package. `device` plays no
    part. Raises RewardError if a model is given, too.
    """
    if model:
        raise RewardError(f"its models come with the package; leave out {model!r}")
    try:
        import rapidfuzz  # noqa: F401
        from rapidocr import RapidOCR
    except ImportError:
        needed = "pip install rapidocr onnxruntime rapidfuzz"
        raise RewardError(f"it needs `{needed}`") from None
    settings = {"Global.log_level": "error"}
    if line:
        settings["Rec.rec_img_shape"] = [3, 48, line]
        settings["EngineConfig.onnxruntime.intra_op_num_threads"] = 1
    engine = RapidOCR(params=settings)

    def ocr(images: Tensor, prompts: list[dict]) -> list[float]:
        targets = [target_text(prompt["prompt"]) for prompt in prompts]
        scores = []
        for picture, target in zip(to_bytes(images), targets, strict=True):
            # All three, as the engine remembers what it was last told. It expects BGR.
            bgr = picture[:, :, ::-1].copy()
            found = engine(bgr, use_det=not line, use_cls=False, use_rec=True)
            scores.append(similarity(" ".join(found.txts or ()), target))
        return scores

    return ocr
