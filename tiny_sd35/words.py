"""A world of written words that a real OCR network reads, and a tiny SD3.5 that writes them.

    python -m tiny_sd35.words                       pretrains it: tiny_sd35/out/words
    python train_sd35.py --config tiny_sd35/words.yaml --output_dir runs/words
    python -m tiny_sd35.words --lora runs/words     what it has learned

The reward is the paper's for text rendering (Appendix E), by rewards/ocr.py: a pretrained network
that knows nothing of this world. The tokenizers spell the word letter by letter. As in shapes.py,
many captions in pretraining belong to another image.
"""

from __future__ import annotations

import functools
import random
import sys
from importlib.util import find_spec

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import pad

from rewards import Reward, ocr, to_bytes
from sd35.run import run_script
from tiny_sd35 import pipeline

# F G H I N Q T are left out. At this size, the OCR often reads F as E, G as 6, H as K and T as I,
# for example, and such a reward would teach the model to write something else.
ALPHABET = "ABCDEJKLMOPRSUVWXYZ"
GLYPHS = ALPHABET + " "
LENGTH = 4  # letters of a word, each in a cell
SIDE, CELL = 64, 16  # sides of an image and of a cell, in pixels
ROW = slice(CELL, 2 * CELL)  # the rows of pixels with the word
LINE = slice(CELL // 2, 5 * CELL // 2)  # what the OCR sees of them: the word with a margin
TOKENS = LENGTH + 4  # of a prompt: two quotation marks, a start and an end
TRAINING, TEST = 4096, 96  # numbers of words
# Steps of pretraining, and the share of wrong captions. They were chosen so that the base scores
# about 0.55 on the test words, before any training with rewards.
STEPS, WRONG = 3000, 0.4
TITLE = "OCR score"


@functools.cache
def prompt_list() -> list[dict]:
    """All prompts: {"prompt", "task", "word"}. No training sees those of the task "test"."""
    rng, words = random.Random(0), {}  # a dictionary has an order, and each word once
    while len(words) < TRAINING + TEST:
        words["".join(rng.choices(ALPHABET, k=LENGTH))] = None
    tasks = ["test"] * TEST + ["training"] * TRAINING
    pairs = zip(words, tasks, strict=True)
    return [{"prompt": f'"{word}"', "task": task, "word": word} for word, task in pairs]


@functools.cache
def of_task(task: str) -> list[dict]:
    return [prompt for prompt in prompt_list() if prompt["task"] == task]


@functools.cache
def glyphs() -> Tensor:
    """GLYPHS in Pillow's bitmap font at twice its size: (20, CELL, CELL), black 0 and white 1."""
    font, cells = ImageFont.load_default_imagefont(), []
    for letter in GLYPHS:
        picture = Image.new("1", (CELL // 2, CELL // 2), 1)
        ImageDraw.Draw(picture).text((1, -2), letter, fill=0, font=font)
        cells.append(torch.from_numpy(np.array(picture.resize((CELL, CELL)))).float())
    return torch.stack(cells)


def paint(words: list[str]) -> Tensor:
    """Images (N, 3, SIDE, SIDE) in [0, 1] of the words, black on white."""
    images = torch.ones(len(words), 3, SIDE, SIDE)
    for image, word in zip(images, words, strict=True):
        image[:, ROW] = torch.cat([glyphs()[GLYPHS.index(letter)] for letter in word], 1)
    return images


@functools.cache
def reader(width: int) -> Reward:
    """The OCR reward for images of one line, read at a width of this many pixels."""
    return ocr.load("cpu", line=width)


def written(images: Tensor, metadata: list[dict]) -> list[float]:
    """The paper's text-rendering reward, 0 to 1: how much of the word is read."""
    return reader(96)(images[..., LINE, :], [line["prompt"] for line in metadata])


def exact(images: Tensor, metadata: list[dict]) -> list[float]:
    """1 where the OCR reads exactly the word, else 0."""
    return [float(score == 1) for score in written(images, metadata)]


def shuffled(images: Tensor, metadata: list[dict]) -> list[float]:
    """The control: the group's rewards in another order, from which nothing can be learned."""
    rewards = written(images, metadata)
    random.Random(images.sum().item()).shuffle(rewards)
    return rewards


def reread(images: Tensor, metadata: list[dict]) -> list[float]:
    """The reward from another view, which no run is trained on: white on black, small and wide."""
    negative = pad(1 - images[..., LINE, :], (24, 24, 4, 4))
    return reader(160)(negative, [line["prompt"] for line in metadata])


@functools.cache
def captcha_reader():
    """The OCR network of the package ddddocr."""
    from ddddocr import DdddOcr

    return DdddOcr(show_ad=False)


def reread_elsewhere(images: Tensor, metadata: list[dict]) -> list[float]:
    """The second judge: the reward by a network with other weights and other training data.

    It was trained on captchas. As it often reads O as zero, drawings of the test words score 0.974.
    """
    lines = pad(images[..., LINE, :], (8, 8), value=1.0)  # as much margin as above and below
    texts = [captcha_reader().classification(Image.fromarray(line)) for line in to_bytes(lines)]
    return [ocr.similarity(text, line["word"]) for text, line in zip(texts, metadata, strict=True)]


def read(images: Tensor) -> tuple[list[str], Tensor]:
    """The words in images (N, 3, SIDE, SIDE) by the nearest glyphs, and their distances, (N,).

    The distance is the root mean square error against a drawing of the word.
    """
    images = images.float().clamp(0, 1).cpu()
    cells = images[:, :, ROW].mean(1).unfold(2, CELL, CELL)  # (N, CELL, LENGTH, CELL)
    nearest = torch.cdist(cells.transpose(1, 2).flatten(2), glyphs().flatten(1)[None]).argmin(2)
    words = ["".join(GLYPHS[k] for k in row) for row in nearest.tolist()]
    return words, (images - paint(words)).square().mean((1, 2, 3)).sqrt()


def letters(images: Tensor, metadata: list[dict]) -> list[float]:
    """The share of letters with the right shape, which no run is trained on."""
    pairs = zip(read(images)[0], metadata, strict=True)
    return [sum(map(str.__eq__, word, line["word"])) / LENGTH for word, line in pairs]


def cleanness(images: Tensor, metadata: list[dict]) -> list[float]:
    """A quality that no run is trained on: minus the distance from a drawing."""
    return (-read(images)[1]).tolist()


# What pipeline.py needs of a world


def build(width: int = 128, layers: int = 2) -> pipeline.Pipeline:
    """An untrained pipeline with two text encoders. A cell is a token of the transformer.

    A random T5 would tell a word's letters but not their order, and the transformer relied on it
    for thousands of steps. With three channels, a token would have more numbers than the width.
    """
    texts = [f'"{letter}{letter}"' for letter in ALPHABET]  # every letter, first and not first
    vae = pipeline.exact_vae(SIDE, channels=1, scale=0.6)
    torch.manual_seed(0)
    clip = pipeline.clip_tokenizer(texts, TOKENS, spelt=True)
    return pipeline.build(clip, None, vae, CELL, width, layers, gain=1.0)


def draw_prompt(rng: random.Random) -> dict:
    return rng.choice(of_task("training"))


@functools.cache
def latents(pipe: pipeline.Pipeline, word: str) -> Tensor:
    """Those of a drawing (1, C, h, w), computed once for all steps, as the VAE is slow."""
    return pipeline.to_latents(pipe, paint([word]))


def draw_latents(pipe: pipeline.Pipeline, prompts: list[dict], rng: random.Random) -> Tensor:
    return torch.cat([latents(pipe, prompt["word"]) for prompt in prompts])


def prompt_lists() -> dict[str, list[dict]]:
    return {"prompts": of_task("training"), "held_out": of_task("test")[:48]}


def table_prompts(n: int) -> list[dict]:
    """n prompts of each task, at most all test words."""
    return [prompt for task in ("training", "test") for prompt in of_task(task)[: min(n, TEST)]]


def drawn(prompts: list[dict]) -> Tensor:
    """Drawings of the words, for the table's first row: the best possible scores."""
    return paint([prompt["word"] for prompt in prompts])


def columns() -> dict:
    """See shapes.py. Raises RewardError if the packages of the reward are missing."""
    reader(96)
    table = {f"{task} words": (written, task, 3) for task in ("training", "test")}
    table |= {"exact": (exact, "test", 3), "other view": (reread, "test", 3)}
    if find_spec("ddddocr"):
        table["other network"] = (reread_elsewhere, "test", 3)
    else:
        print("without the column 'other network': it needs `pip install ddddocr`", flush=True)
    return table | {"letters": (letters, "test", 3), "cleanness": (cleanness, "test", 4)}


if __name__ == "__main__":
    run_script(lambda: pipeline.main(sys.modules[__name__]))
