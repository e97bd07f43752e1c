"""Text rendering (Appendix E of the paper): does the image show the text that its prompt quotes?

The formula is that of the released code (flow_grpo/ocr.py of Luo-Yihong/DGPO), and so is the target
of each of the 1,018 published test prompts, which have one text in straight double quotation marks.
The paper's numbers come from PaddleOCR 2.9, these from RapidOCR, a later model of the same family
(PP-OCR). Further differences: all texts that a prompt quotes count, in any order; text upside down
is not read; both sides are compared in one normal form; a failure of the engine ends the run.

The engine reads a single letter "I" as 1 and "O" as 0.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rewards import Reward, RewardError, to_bytes
from rewards.interface import need

# Quotation marks: an opening one and what closes it. Single ones count only if there are no double.
DOUBLE = ('""', "＂＂", "“”", "„“”", "””", "«»", "»«»", "「」", "『』", "｢｣", "〝〞〟")
SINGLE = ("''", "‘’", "‚‘’", "‹›", "›‹›")
DIGIT = r"[\d¼½¾⅐-⅞]"
ELISION = r"(?i:\d\ds?|n|em|till?|tis|twas|cause|bout|round)\b"  # '90s, 'em: nothing to close
ROCK_N_ROLL = re.compile(r"(?<=\w )['‘’](n|N(?=['’] [A-Z]))['’](?= \w)")

# What the engine writes otherwise than a keyboard does, as far as NFKC leaves it alone.
ALIKE = dict.fromkeys("‘’‚‛′", "'") | dict.fromkeys("“”„‟″", '"') | dict.fromkeys("‐‒–—―−", "-")
ALIKE |= {"•": "·", "⁄": "/", "‹": "<", "›": ">", "æ": "ae", "œ": "oe", "\u0307": "", "¡": ""}

BOTH_WAYS = set("HINOSXZWM01689nosxzwmupdbql ")  # letters that turned by 180 degrees are letters
MARGIN = 0.01  # a box is upside down if its turned reading is more confident by this much
LARGEST = 736  # in larger images, the engine misses small words that it finds in a scaled one
TALL = 1.5  # height / width from which the engine turns a box by 90 degrees before reading it


def quotation(marks: str, single: bool) -> tuple[str, str]:
    """Regular expressions for a quotation, and for a mark that must not be left over."""
    start, end, text = marks[0], f"[{marks[1:]}]", f"[^{marks}]"
    if single:
        start, end = rf"(?<!\w){start}(?=\S)", rf"(?<!\s){end}(?!\w)"
        text += rf"|(?<=\w)[{marks[1:]}](?=\w)"  # don't
        # An apostrophe may be left over: dogs' den, rockin' sign, 6' tall, jack-o'-lantern.
        left = rf"{start}(?!{ELISION})|(?<![s\d]){end}(?<!in.)(?!-)|(?<!\d){end}(?! \w|-)"
        return f"{start}(?:{text})*{end}", left
    left = start
    if start in marks[1:]:  # the same mark opens and closes: see what is around it
        left = rf"(?<!{DIGIT}){start}"  # behind a digit, it is an inch mark: 12"
        start, end = rf"{left}(?!(?<=\S.)\s)", rf"{end}(?!(?<=\s.)\w)"
    return f"{start}(?:{text})*{end}", left


def quoted_texts(prompt: str) -> list[str]:
    """The texts that a prompt quotes, in double marks, else in single ones.

    Raises RewardError if there are none, or if a mark is left over, as in "A 12" pizza".
    """
    plain = re.sub(r"\\([\"'])", r"\1", prompt)
    if re.fullmatch(r'"(?:[^"]|"")*"', plain) and '""' in plain[1:-1]:  # a field of a CSV file
        plain = plain[1:-1].replace('""', '"')
    # Here ‛ stands for an apostrophe that is no quotation mark.
    for kinds, text in ((DOUBLE, plain), (SINGLE, ROCK_N_ROLL.sub(r"‛\1‛", plain))):
        patterns = [quotation(marks, kinds is SINGLE) for marks in kinds]
        whole, left = (re.compile("|".join(each)) for each in zip(*patterns, strict=True))
        texts = [m[0][1:-1].strip().replace("‛", "'") for m in whole.finditer(text)]
        if left.search(whole.sub(" ", text)):
            raise RewardError(
                f"a quotation mark is left over in the prompt {prompt!r}: put the text in « and »"
            )
        if any(texts):
            return [text for text in texts if text]
    raise RewardError(f"no text in quotation marks in the prompt {prompt!r}")


def normal_form(text: str) -> str:
    """Text without what does not count: case, spaces and variants of the same character."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = "".join(ALIKE.get(character, character) for character in text)
    return "".join(text.split()).replace("°°", "°")  # °F is read as °℉


def similarity(read: str, *targets: str) -> float:
    """r = max(1 - N_e / N_ref, 0) of Appendix E, in normal form.

    N_e is the edit distance between what is read and the targets, N_ref the targets' length. As in
    the released code, a target that is read whole has distance 0 and other text then costs nothing.
    The rest is compared with the other targets in the best order.
    """
    from rapidfuzz.distance import Levenshtein

    read, missing = normal_form(read), [normal_form(target) for target in targets]
    length = len("".join(missing))
    for target in sorted(missing, key=len, reverse=True):
        if target in read:
            read = read.replace(target, "", 1)
            missing.remove(target)
    orders = itertools.islice(itertools.permutations(missing), 120)  # all orders of five
    distance = min(Levenshtein.distance(read, "".join(order)) for order in orders)
    return 1 - min(distance, len("".join(missing))) / length


def build_engine(**settings):
    """RapidOCR, reading boxes one by one: in a batch a reading depends on its neighbours."""
    packages = "rapidocr", "onnxruntime", "rapidfuzz"
    need(f"pip install {' '.join(packages)}", *packages)
    from rapidocr import RapidOCR

    return RapidOCR(params={"Global.log_level": "error", "Rec.rec_batch_num": 1, **settings})


@functools.cache
def alphabet() -> frozenset[str]:
    """The characters that the engine can output, in normal form."""
    engine = build_engine()
    engine.recognize_txt([np.zeros((48, 48, 3), np.uint8)])  # loads the network
    return frozenset(normal_form("".join(engine.text_rec.postprocess_op.character[1:])))


def check_prompt(metadata: dict) -> None:
    """Raise RewardError unless a prompt quotes text, and only characters that the engine reads."""
    unknown = sorted(set(normal_form("".join(quoted_texts(metadata["prompt"])))) - alphabet())
    if unknown:
        raise RewardError(f"the OCR engine cannot read {unknown[0]!r} in {metadata['prompt']!r}")


def reading_order(boxes: np.ndarray) -> list[int]:
    """The order in which people read boxes (N, 4, 2): lines downwards, each from left to right.

    The corners run clockwise from the top left. A box continues the line whose last box ends
    before its middle and shares at least half of the lower one's height with it.
    """
    lines: list[list[int]] = []
    for i in np.lexsort((boxes[:, 0, 1], boxes[:, 0, 0])):
        best, most = None, 0.5
        for line in lines:
            left, right = boxes[line[-1]], boxes[i]
            bottom, top = min(left[2, 1], right[3, 1]), max(left[1, 1], right[0, 1])
            overlap = (bottom - top) / min(left[2, 1] - left[1, 1], right[3, 1] - right[0, 1])
            if overlap >= most and left[1, 0] < right[:, 0].mean():
                best, most = line, overlap
        if best is None:
            lines.append(best := [])
        best.append(i)
    lines.sort(key=lambda line: boxes[line, :, 1].mean())
    return [i for line in lines for i in line]


def as_it_stands(box: np.ndarray, reading: tuple, turned: tuple) -> str:
    """The text of a box (4, 2), given (text, confidence) of it and of it turned by 180 degrees.

    It is empty if the box is upside down or not read with confidence. Words such as NOON, whose
    letters are letters both ways, are read as they stand. A tall box may run up or down.
    """
    text, confidence = reading
    if turned[1] > confidence + MARGIN and not set(text) <= BOTH_WAYS:
        height, width = np.linalg.norm(box[0] - box[3]), np.linalg.norm(box[0] - box[1])
        text, confidence = turned if height >= TALL * width else ("", 0)
    return text if confidence >= 0.5 else ""


def load(device: torch.device | str, model: str | None = None, line: int | None = None) -> Reward:
    """The paper's OCR reward, 0 to 1, by RapidOCR on the CPU.

    About 4 images of 512 px a second on two cores, all of which it uses. Its PP-OCR models
    (Apache-2.0) are part of the package.

    line: each image is one upright line of text and nothing else, seen 48 pixels high and at least
    `line` wide. Text is then read without being searched for, on one thread: about 200 images a
    second at a width of 96.
    """
    if model:
        raise RewardError("the models are part of the package rapidocr and cannot be replaced")
    threads = "EngineConfig.onnxruntime.intra_op_num_threads"
    settings = {"Rec.rec_img_shape": [3, 48, line], threads: 1} if line else {}
    engine = build_engine(**settings)

    def read(picture: np.ndarray) -> str:
        if max(picture.shape) > LARGEST:
            image = Image.fromarray(picture)
            image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
            picture = np.asarray(image)
        bgr = picture[:, :, ::-1].copy()  # as the engine expects it
        # All three flags each time, because the engine keeps those of the last call.
        if line:
            result = engine(bgr, use_det=False, use_cls=False, use_rec=True)
            return " ".join(result.txts or ())
        boxes = engine(bgr, use_det=True, use_cls=False, use_rec=False).boxes
        if boxes is None:
            return ""
        crops = engine.crop_text_regions(bgr, boxes)
        turned = [np.rot90(crop, 2) for crop in crops]
        result = engine.recognize_txt([*crops, *turned])
        readings = list(zip(result.txts, result.scores, strict=True))
        return " ".join(
            as_it_stands(boxes[i], readings[i], readings[i + len(boxes)])
            for i in reading_order(boxes)
        )

    def ocr(images: Tensor, prompts: list[str]) -> list[float]:
        pairs = zip(to_bytes(images), map(quoted_texts, prompts), strict=True)
        return [similarity(read(picture), *texts) for picture, texts in pairs]

    return ocr
