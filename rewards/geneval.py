"""GenEval (Ghosh et al. 2023, arXiv:2310.11513): are the objects there that the prompt asks for?

A detector finds objects, CLIP names their colors, and rules judge. A prompt is a line of GenEval's
metadata: "tag" (one of six tasks), "include" (a list of clauses: "class", "count", and perhaps
"color" and "position", a relation and the index of an earlier clause) and perhaps "exclude"
(clauses, too), as it is or as pandas and datasets write it.

`--reward geneval` is a grade from 0 to 1: 1 if every clause of "include" is met exactly. It ignores
"exclude", which `geneval_official` checks. The released grade rewards a wrong position and has no
lower bound; `geneval_released` reproduces it. Both released trainers give the detector RGB where
mmdet expects BGR, and Flow-GRPO's server scores JPEG files of quality 75; neither is copied,
because GenEval itself does neither.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rewards import Reward, mask2former, to_bytes

CLIP = "openai/clip-vit-large-patch14"
# COCO's classes in their order, under GenEval's names.
CLASSES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe,
backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite,
baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork,
knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake,
chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote,
computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase,
scissors, teddy bear, hair drier, toothbrush
"""
CLASSES = [name.strip() for name in CLASSES.split(",")]
COLORS = "red orange yellow green blue purple pink brown black white".split()
RELATIONS = ["left of", "right of", "above", "below"]
TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # the confidence that a detection must exceed
MAX_DETECTIONS = 16  # of a class
DEAD_ZONE = 0.1  # share of the sum of two boxes' sizes: smaller offsets count as zero
DIRECTION = 0.5  # least share of an offset that makes a relation
GREY = 0.6  # #999, around an object whose color is asked for


def known(kind: str, name: Any, names: list[str]) -> str:
    """Return the name. Raises ValueError, with the nearest ones, if it is not among `names`."""
    if name in names:
        return name
    word = str(name).lower()
    near = [each for each in names if each in word or word in each]
    near = near or difflib.get_close_matches(word, names, cutoff=0.5) or names
    raise ValueError(f"GenEval has no {kind} {name!r}; the nearest are {', '.join(near[:10])}")


def whole(value: Any, allowed: range, sentence: str) -> int:
    """Read 2, 2.0 or "2". Raises ValueError with the sentence if that is not allowed."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not number.is_integer() or int(number) not in allowed or isinstance(value, bool):
        raise ValueError(f"{sentence}, got {value!r}")
    return int(number)


def decoded(value: Any) -> Any:
    """A field's value: None for NaN, and what a JSON string holds. Raises ValueError."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(f"{value!r} is not JSON") from None
    return None if value != value else value  # NaN is how pandas writes what is absent


def read_clause(value: Any, index: int, most: int) -> dict:
    """Read the clause with this index, of at most so many objects. Raises ValueError."""
    fields = decoded(value)
    if not isinstance(fields, dict):
        raise ValueError(f"a clause must be an object with class and count, got {value!r}")
    clause = {key: field for key, field in fields.items() if field is not None and field == field}
    clause["class"] = known("class", clause.get("class"), CLASSES)
    sentence = f"count must be a whole number from 1 to {most}"
    clause["count"] = whole(clause.get("count", 1), range(1, most + 1), sentence)
    if "color" in clause:
        clause["color"] = known("color", clause["color"], COLORS)
    if "position" in clause:
        position = decoded(clause["position"])
        if not isinstance(position, list | tuple) or len(position) != 2:
            raise ValueError(f"a position must be a relation and an index, got {position!r}")
        other = whole(position[1], range(index), "a position must name an earlier clause by index")
        clause["position"] = known("relation", position[0], RELATIONS), other
    return clause


def read_metadata(metadata: dict) -> dict:
    """A prompt's metadata in GenEval's own form. Raises ValueError if it is not valid."""
    include, exclude = (decoded(metadata.get(key)) for key in ("include", "exclude"))
    if include is None or metadata.get("tag") is None:
        raise ValueError('there is no GenEval metadata ("tag", "include")')
    for name, clauses in ("include", include), ("exclude", exclude or []):
        if not isinstance(clauses, list) or name == "include" and not clauses:
            raise ValueError(f"{name} must be a list of clauses, got {clauses!r}")
    return {
        "tag": metadata["tag"],
        "include": [read_clause(each, i, most=MAX_DETECTIONS) for i, each in enumerate(include)],
        "exclude": [read_clause(clause, 0, most=10**6) for clause in exclude or []],
    }


def check_prompt(metadata: dict) -> None:
    """Raise ValueError if a prompt's metadata is not valid."""
    read_metadata(metadata)


@dataclass
class Detection:
    """An object in an image."""

    box: tuple[float, float, float, float]  # left, top, right, bottom, in pixels
    score: float
    mask: Tensor | None = None  # boolean (H, W)


Objects = dict[str, list[Detection]]  # by class, the most confident first
NameColors = Callable[[str, list[Detection]], list[str]]
Verdict = Callable[[dict, Objects, NameColors], float]


def relations(one: Detection, other: Detection) -> set[str]:
    """Where `one` is relative to `other`, by their centers: none, one or two of RELATIONS."""
    a, b = np.array(one.box).reshape(2, 2), np.array(other.box).reshape(2, 2)
    offset = a.mean(0) - b.mean(0)
    dead = DEAD_ZONE * ((a[1] - a[0]) + (b[1] - b[0]))
    beyond = np.sign(offset) * np.maximum(np.abs(offset) - dead, 0)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    x, y = beyond / np.linalg.norm(offset)
    shares = {"left of": -x, "right of": x, "above": -y, "below": y}
    return {name for name, share in shares.items() if share > DIRECTION}


def judge(prompt: dict, objects: Objects, name_colors: NameColors) -> tuple[float, float]:
    """The graded verdict (0 to 1) and the official one (0 or 1) on an image, by checked metadata.

    Graded: the mean over clauses of 1 - |count - number| / count (at least 0), and over their
    colors and positions of 1 or 0, which is 0 if the number is wrong. Official: GenEval's own, by
    the `count` most confident objects of a class; more are a failure only if "exclude" says so.
    """
    grades, official = [], True
    met: list[list[Detection] | None] = []  # the objects of each clause, or None if it is not met
    for clause in prompt["include"]:
        name, count = clause["class"], clause["count"]
        detections = objects.get(name, [])
        chosen, number = detections[:count], len(detections)
        exact, right = number == count, number >= count
        grades.append(max(0.0, 1 - abs(count - number) / count))
        if "color" in clause:
            right = right and name_colors(name, chosen) == [clause["color"]] * count
            grades.append(float(right and exact))
        if "position" in clause:
            relation, other = clause["position"]
            others = met[other] if right else None
            right = others is not None and all(
                relation in relations(a, b) for a in chosen for b in others
            )
            grades.append(float(right and exact))
        met.append(chosen if right else None)
        official = official and right
    for clause in prompt["exclude"]:
        official = official and len(objects.get(clause["class"], [])) < clause["count"]
    return sum(grades) / len(grades), float(official)


# The models


def load_detector(device: torch.device | str, model: str) -> Callable[[Tensor, float], Objects]:
    """(image (3, H, W) in [0, 1], threshold) -> objects, by mmdet's Mask2Former (.pth)."""
    network = mask2former.load_network(model).to(device)

    def detect(image: Tensor, threshold: float) -> Objects:
        objects: Objects = {}
        parts = mask2former.segment(network, to_bytes(image[None])[0], threshold)
        for score, label, mask in zip(*parts, strict=True):
            if mask.any():
                rows, columns = mask.nonzero().unbind(1)
                box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
                detection = Detection(tuple(float(edge) for edge in box), float(score), mask)
                objects.setdefault(CLASSES[label], []).append(detection)
        for detections in objects.values():
            detections.sort(key=lambda one: -one.score)
        return {name: detections[:MAX_DETECTIONS] for name, detections in objects.items()}

    return detect


def crop(image: Tensor, one: Detection) -> Tensor:
    """The object on grey, cut to its box: (3, H, W) in [0, 1] -> (3, h, w)."""
    grey = torch.full_like(image, GREY)
    shown = image if one.mask is None else torch.where(one.mask, image, grey)
    left, top, right, bottom = (int(edge) for edge in one.box)
    return shown[:, top:bottom, left:right]


def load_classifier(device: torch.device | str, model: str) -> Callable[..., list[str]]:
    """(image, class, its objects) -> a color for each, by zero-shot CLIP."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    processor = AutoImageProcessor.from_pretrained(model, backend="pil")
    clip = AutoModel.from_pretrained(model).eval().to(device)

    @torch.no_grad()
    def name_colors(image: Tensor, name: str, objects: list[Detection]) -> list[str]:
        if not objects:
            return []
        texts = [form.format(color, name) for color in COLORS for form in TEMPLATES]
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        # As PIL images: an array 1, 3 or 4 pixels high would be taken for channels-first.
        crops = [Image.fromarray(to_bytes(crop(image.cpu(), each)[None])[0]) for each in objects]
        pixels = processor(crops, return_tensors="pt")
        output = clip(**tokens.to(device), **pixels.to(device))  # its embeddings are normalised
        words = output.text_embeds.view(len(COLORS), len(TEMPLATES), -1).mean(1)
        words = words / words.norm(dim=1, keepdim=True)
        best = (output.image_embeds @ words.T).argmax(1)
        return [COLORS[i] for i in best.tolist()]

    return name_colors


def graded(prompt: dict, objects: Objects, name_colors: NameColors) -> float:
    """The verdict to train on, 0 to 1: see `judge`."""
    return judge(prompt, objects, name_colors)[0]


def load(device: torch.device | str, model: str | None = None, verdict: Verdict = graded) -> Reward:
    """GenEval's graded verdict, 0 to 1, or another verdict on the same objects and colors.

    GenEval's own Mask2Former (0.3 GB, fetched once) and CLIP ViT-L/14 (1.7 GB), with the packages
    scipy and opencv-python-headless (the latter comes with rapidocr). model: replaces them, as
    "detector", "detector,clip" or ",clip": a Mask2Former with a Swin-S as mmdet's checkpoint
    (.pth), a CLIP by name or folder. The reward raises ValueError where `check_prompt` does.
    """
    detector, _, clip = (model or "").partition(",")
    detect = load_detector(device, detector or mask2former.URL)
    name_colors = load_classifier(device, clip or CLIP)

    def geneval(images: Tensor, metadata: list[dict]) -> list[float]:
        scores = []
        for image, prompt in zip(images, map(read_metadata, metadata), strict=True):
            counting = prompt["tag"] == "counting"
            objects = detect(image, COUNTING_THRESHOLD if counting else THRESHOLD)
            scores.append(verdict(prompt, objects, partial(name_colors, image)))
        return scores

    return geneval
