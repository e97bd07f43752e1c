"""GenEval (Ghosh et al. 2023, arXiv:2310.11513): are the objects there that the prompt asks for?

A detector finds objects, CLIP names their colours, and rules judge. A prompt is a line of GenEval's
metadata: "tag" (one of six tasks), "include" (clauses: class, count, perhaps color, perhaps
position: a relation and which clause it is to), perhaps "exclude" (class, count).

`--reward geneval` trains on this file's clean grade, from 0 to 1 and 1 only where all is right, as
the released one rewards a wrong position and lets one overfull picture decide a batch's std. To
reproduce the released runs, train on `geneval_released`.

DGPO's and Flow-GRPO's code hands the detector RGB where mmdet expects BGR, and Flow-GRPO's server
scores JPEG files of quality 75. Neither is copied, for GenEval itself does neither.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rewards import mask2former, to_bytes

DETECTOR = mask2former.URL
CLIP = "openai/clip-vit-large-patch14"
# COCO's classes in their order, by GenEval's names. Detectors have several for some of them.
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
TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # the confidence that a detection must exceed
MOST = 16  # detections of a class
DEAD_ZONE = 0.1  # share of two boxes' sizes together: a smaller offset is none
DIRECTION = 0.5  # least share of an offset that makes a relation
GREY = 0.6  # #999, what surrounds an object when CLIP is asked for its colour


@dataclass
class Found:
    """An object in a picture."""

    box: tuple[float, float, float, float]  # left, top, right, bottom, in pixels
    score: float
    mask: Tensor | None = None  # boolean (H, W)


Objects = dict[str, list[Found]]  # by class, the surest first
NameColors = Callable[[str, list[Found]], list[str]]


# The rules. A clause of the official ones is met by `count` objects of the class, the surest of
# those found, if all have the color and all stand in the relation to all objects of the other
# clause. Too many are no failure, unless "exclude" says so.


def relations(one: Found, other: Found) -> set[str]:
    """How `one` lies to `other`: none, one or two of left of, right of, above, below.

    The offset of the centres counts from where it leaves the dead zone, 0.1 of both boxes' sizes,
    and each coordinate's share of the whole offset must exceed 0.5.
    """
    a, b = np.array(one.box).reshape(2, 2), np.array(other.box).reshape(2, 2)
    offset = a.mean(0) - b.mean(0)
    dead = DEAD_ZONE * ((a[1] - a[0]) + (b[1] - b[0]))
    left = np.sign(offset) * np.maximum(np.abs(offset) - dead, 0)
    if np.all(np.abs(left) < 1e-3):
        return set()
    x, y = left / np.linalg.norm(offset)
    named = {"left of": -x, "right of": x, "above": -y, "below": y}
    return {name for name, share in named.items() if share > DIRECTION}


def judge(prompt: dict, objects: Objects, name_colors: NameColors) -> dict[str, float]:
    """The verdicts on a picture: "graded" (0 to 1), "strict" and "official" (0 or 1).

    graded: the mean over clauses of 1 - |count - found| / count, and over their colors and
    positions of 1 or 0, which is 0 where the count is wrong. strict: all of these are 1, and
    nothing is there that is excluded. official: GenEval's own.
    """
    grades, official, strict_clauses = [], True, True
    met: list[list[Found] | None] = []  # for each clause its objects, if it is met
    for clause in prompt["include"]:
        name, count = clause["class"], clause["count"]
        found = objects.get(name, [])
        chosen, exact, enough = found[:count], len(found) == count, len(found) >= count
        grades.append(max(0.0, 1 - abs(count - len(found)) / count))
        clause_met = enough
        if "color" in clause:
            right = enough and name_colors(name, chosen) == [clause["color"]] * count
            grades.append(float(right and exact))
            clause_met = clause_met and right
        if "position" in clause:
            relation, other = clause["position"]
            others = met[other] if clause_met else None
            right = others is not None and all(
                relation in relations(a, b) for a in chosen for b in others
            )
            grades.append(float(right and exact))
            clause_met = clause_met and right
        met.append(chosen if clause_met else None)
        official = official and clause_met
        strict_clauses = strict_clauses and exact
    excluded = any(
        len(objects.get(clause["class"], [])) >= clause["count"]
        for clause in prompt.get("exclude", [])
    )
    official = official and not excluded
    return {
        "graded": sum(grades) / len(grades),
        "strict": float(official and strict_clauses),
        "official": float(official),
    }


# The models


def segment(network, processor, picture: np.ndarray, threshold: float) -> tuple:
    """As `mask2former.segment`, for a network with a processor of its own."""
    with torch.no_grad():
        inputs = processor(images=Image.fromarray(picture), return_tensors="pt")
        output = network(**inputs.to(network.device))
    (result,) = processor.post_process_instance_segmentation(
        output, threshold=threshold, target_sizes=[picture.shape[:2]], return_binary_maps=True
    )
    segments = result["segments_info"]
    # Without any, transformers gives one map of -1 for the whole picture.
    masks = result["segmentation"][: len(segments)].cpu() > 0.5
    return [each["score"] for each in segments], [each["label_id"] for each in segments], masks


def load_detector(device: torch.device | str, model: str) -> Callable[[Tensor, float], Objects]:
    """(image (3, H, W) in [0, 1], threshold) -> objects, by a Mask2Former from transformers.

    model: what `mask2former.find` takes. mmdet's network sees pictures as it does in mmdet, any
    other one as its own processor has it. Raises ValueError if it does not have COCO's 80 classes.
    """
    from transformers import AutoImageProcessor

    network_class, folder = mask2former.network_class(), mask2former.find(model)
    network = network_class.from_pretrained(folder).eval().to(device)
    if network.config.num_labels != len(CLASSES):
        raise ValueError(f"{model} has {network.config.num_labels} classes, not COCO's 80")
    if getattr(network.config, "mmdet", False):
        seen = partial(mask2former.segment, network)
    else:
        seen = partial(segment, network, AutoImageProcessor.from_pretrained(folder))

    def detect(image: Tensor, threshold: float) -> Objects:
        objects: Objects = {}
        for score, label, mask in zip(*seen(to_bytes(image[None])[0], threshold), strict=True):
            if not mask.any():
                continue
            rows, columns = mask.nonzero().unbind(1)
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            found = Found(tuple(float(edge) for edge in box), float(score), mask)
            objects.setdefault(CLASSES[label], []).append(found)
        return {
            name: sorted(found, key=lambda each: -each.score)[:MOST]
            for name, found in objects.items()
        }

    return detect


def crop(image: Tensor, found: Found) -> Tensor:
    """The object on grey, cut to its box: (3, H, W) in [0, 1] -> (3, h, w)."""
    grey = torch.full_like(image, GREY)
    shown = image if found.mask is None else torch.where(found.mask, image, grey)
    left, top, right, bottom = (int(edge) for edge in found.box)
    return shown[:, top:bottom, left:right]


def load_classifier(
    device: torch.device | str, model: str
) -> Callable[[Tensor, str, list[Found]], list[str]]:
    """(image, class, its objects) -> a color for each, by CLIP without training."""
    from transformers import AutoModel, AutoProcessor

    processor = AutoProcessor.from_pretrained(model)
    clip = AutoModel.from_pretrained(model).eval().to(device)

    @torch.no_grad()
    def name_colors(image: Tensor, name: str, objects: list[Found]) -> list[str]:
        if not objects:
            return []
        texts = [form.format(color, name) for color in COLORS for form in TEMPLATES]
        # As PIL's images: of an array 1, 3 or 4 pixels high the processor takes rows for channels.
        crops = [Image.fromarray(to_bytes(crop(image.cpu(), found)[None])[0]) for found in objects]
        inputs = processor(
            text=texts, images=crops, padding=True, truncation=True, return_tensors="pt"
        )
        output = clip(**inputs.to(device))  # its embeddings are normalised
        words = output.text_embeds.view(len(COLORS), len(TEMPLATES), -1).mean(1)
        words = words / words.norm(dim=1, keepdim=True)
        best = (output.image_embeds @ words.T).argmax(1)
        return [COLORS[i] for i in best.tolist()]

    return name_colors


def graded(prompt: dict, objects: Objects, name_colors: NameColors) -> float:
    """The verdict to train on, 0 to 1: see `judge`."""
    return judge(prompt, objects, name_colors)["graded"]


def check_prompt(prompt: dict) -> None:
    """Raises ValueError if a prompt is not one of GenEval's, which say what must be there."""
    if "include" not in prompt or "tag" not in prompt:
        raise ValueError('the prompt has no GenEval metadata ("tag", "include")')


def load(
    device: torch.device | str,
    model: str | None = None,
    verdict: Callable[[dict, Objects, NameColors], float] = graded,
):
    """GenEval's graded verdict, 0 to 1, or another one on the same objects and colors.

    GenEval's own Mask2Former (0.3 GB, fetched and converted once) and CLIP ViT-L/14 (1.7 GB).
    model: other ones, as "detector", "detector,clip" or ",clip", by name or folder, the detector
    also as mmdet's file (.pth); "facebook/mask2former-swin-small-coco-instance" is one, whose
    numbers are not GenEval's. Prompts must be GenEval's metadata.
    """
    detector, _, clip = (model or "").partition(",")
    detect = load_detector(device, detector or DETECTOR)
    name_colors = load_classifier(device, clip or CLIP)

    def geneval(images: Tensor, prompts: list[dict]) -> list[float]:
        scores = []
        for image, prompt in zip(images, prompts, strict=True):
            check_prompt(prompt)
            counting = prompt["tag"] == "counting"
            objects = detect(image, COUNTING_THRESHOLD if counting else THRESHOLD)
            scores.append(verdict(prompt, objects, partial(name_colors, image)))
        return scores

    return geneval
