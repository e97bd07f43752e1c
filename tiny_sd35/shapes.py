"""A world of colored shapes with an exact checker, and a tiny SD3.5 that draws them.

    python -m tiny_sd35.shapes                        pretrains it: tiny_sd35/out/shapes
    python train_sd35.py --config tiny_sd35/shapes.yaml --output_dir runs/shapes
    python -m tiny_sd35.shapes --lora runs/shapes     what it has learned

A third of the captions in pretraining belong to another image. So the model can draw what a
prompt asks for and often does not, which is what reinforcement learning can improve.
"""

from __future__ import annotations

import functools
import random
import sys
from collections import Counter
from itertools import permutations, product

import torch
from torch import Tensor

from sd35.run import run_script
from tiny_sd35 import pipeline

SIDE, CELL, GRID = 16, 8, 2  # sides of an image and of a cell in pixels; cells per side
BACKGROUND = torch.tensor((245, 245, 245))[:, None, None] / 255
COLORS = {"red": (220, 40, 40), "green": (30, 160, 60), "blue": (40, 80, 220)}
SHAPES = {  # a character is 2 x 2 pixels, as the latents have half the image's size
    "square": ("###.", "###.", "###.", "...."),
    "diamond": (".#..", "###.", ".#..", "...."),
}
KINDS = list(product(COLORS, SHAPES))
COLUMNS = {"left": (0,), "right": (1,)}  # of cells
TASKS = ("single", "position", "count", "two")
TOKENS = 7  # of a prompt, at most
STEPS, WRONG = 10_000, 0.35  # of pretraining: its steps, and the share of wrong captions
TITLE = "strict accuracy"


@functools.cache
def prompt_list() -> list[dict]:
    """All prompts: {"prompt", "task", "objects"}, and "side" in the task "position"."""
    prompts = []
    for kind in KINDS:
        text, one = " ".join(kind), [[*kind]]
        prompts.append(dict(prompt=text, task="single", objects=one))
        for side in COLUMNS:
            there = f"{text} on the {side}"
            prompts.append(dict(prompt=there, task="position", objects=one, side=side))
        for word, n in (("two", 2), ("three", 3)):
            prompts.append(dict(prompt=f"{word} {text}s", task="count", objects=one * n))
    for pair in permutations(KINDS, 2):
        text = " and ".join(" ".join(kind) for kind in pair)
        prompts.append(dict(prompt=text, task="two", objects=[[*kind] for kind in pair]))
    return prompts


def of_task(task: str) -> list[dict]:
    return [prompt for prompt in prompt_list() if prompt["task"] == task]


def draw_scene(prompt: dict, rng: random.Random) -> list:
    """Cells, row by row, each None or (color, shape), that fulfill the prompt in random places."""
    columns = COLUMNS[prompt["side"]] if "side" in prompt else range(GRID)
    free = [GRID * row + column for row in range(GRID) for column in columns]
    scene = [None] * GRID**2
    for kind, cell in zip(prompt["objects"], rng.sample(free, len(prompt["objects"])), strict=True):
        scene[cell] = tuple(kind)
    return scene


def draw_cell(color: str, shape: str) -> Tensor:
    """The pixels (3, CELL, CELL) of a cell with an object, in [0, 1]."""
    inside = torch.tensor([[character == "#" for character in row] for row in SHAPES[shape]])
    inside = inside.repeat_interleave(2, 0).repeat_interleave(2, 1)
    return torch.where(inside, torch.tensor(COLORS[color])[:, None, None] / 255, BACKGROUND)


CELLS = {None: BACKGROUND.expand(3, CELL, CELL)} | {kind: draw_cell(*kind) for kind in KINDS}


def paint(scenes: list[list]) -> Tensor:
    """Images (N, 3, SIDE, SIDE) in [0, 1]."""
    cells = torch.stack([CELLS[kind] for scene in scenes for kind in scene])
    grids = cells.view(len(scenes), GRID, GRID, 3, CELL, CELL).permute(0, 3, 1, 4, 2, 5)
    return (grids.reshape(len(scenes), 3, SIDE, SIDE) * 255).round() / 255


def read(images: Tensor) -> tuple[list[list], Tensor]:
    """The scenes in images (N, 3, SIDE, SIDE) by the nearest CELLS, and their distances, (N,).

    The distance is the root mean square error against a drawing of the scene.
    """
    images = images.float().clamp(0, 1).cpu()
    cells = images.unfold(2, CELL, CELL).unfold(3, CELL, CELL)  # (N, 3, GRID, GRID, CELL, CELL)
    cells = cells.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    nearest = torch.cdist(cells, torch.stack([*CELLS.values()]).flatten(1)[None]).argmin(2)
    scenes = [[[*CELLS][k] for k in row] for row in nearest.tolist()]
    return scenes, (images - paint(scenes)).square().mean((1, 2, 3)).sqrt()


def grade(scene: list, prompt: dict) -> float:
    """0 to 1: the mean of a grade for each kind's count, one for no surplus, one for the side."""
    seen = Counter(kind for kind in scene if kind)
    wanted = Counter(tuple(kind) for kind in prompt["objects"])
    grades = [max(0.0, 1 - abs(seen[kind] - n) / n) for kind, n in wanted.items()]
    grades.append(1 / (1 + (seen - wanted).total()))
    if "side" in prompt:
        columns = [cell % GRID in COLUMNS[prompt["side"]] for cell in range(GRID**2)]
        sides = [column for column, kind in zip(columns, scene, strict=True) if kind in wanted]
        grades.append(sum(sides) / max(1, len(sides)))
    return sum(grades) / len(grades)


def graded(images: Tensor, metadata: list[dict]) -> list[float]:
    """How much of the prompt is fulfilled, 0 to 1."""
    return [grade(*pair) for pair in zip(read(images)[0], metadata, strict=True)]


def strict(images: Tensor, metadata: list[dict]) -> list[float]:
    """The reward: 1 if the prompt is fulfilled, else 0."""
    return [float(score == 1) for score in graded(images, metadata)]


def shuffled(images: Tensor, metadata: list[dict]) -> list[float]:
    """The control: the group's rewards in another order, from which nothing can be learned."""
    rewards = strict(images, metadata)
    random.Random(images.sum().item()).shuffle(rewards)
    return rewards


def cleanness(images: Tensor, metadata: list[dict]) -> list[float]:
    """A quality that no run is trained on: minus the distance from a drawing."""
    return (-read(images)[1]).tolist()


# What pipeline.py needs of a world


def build(width: int = 128, layers: int = 2) -> pipeline.Pipeline:
    """An untrained pipeline with three text encoders. A cell is a token of the transformer."""
    texts, vae = [prompt["prompt"] for prompt in prompt_list()], pipeline.exact_vae(SIDE)
    torch.manual_seed(0)
    clip, t5 = pipeline.clip_tokenizer(texts, TOKENS), pipeline.t5_tokenizer(texts, TOKENS)
    return pipeline.build(clip, t5, vae, CELL, width, layers, gain=3.0)


def draw_prompt(rng: random.Random) -> dict:
    return rng.choice(of_task(rng.choice(TASKS)))


def draw_latents(pipe: pipeline.Pipeline, prompts: list[dict], rng: random.Random) -> Tensor:
    return pipeline.to_latents(pipe, paint([draw_scene(prompt, rng) for prompt in prompts]))


def table_prompts(n: int) -> list[dict]:
    """n prompts of each task. Training sees all prompts, but not the noise they are tested with."""
    rng = random.Random(1234)
    return [rng.choice(of_task(task)) for task in TASKS for _ in range(n)]


def prompt_lists() -> dict[str, list[dict]]:
    return {"prompts": prompt_list(), "held_out": table_prompts(6)}


def columns() -> dict:
    """The table by heading: a judge, the task whose images it scores (or None), and decimals."""
    tasks = {task: (strict, task, 3) for task in TASKS}
    return {"all": (strict, None, 3), **tasks, "cleanness": (cleanness, None, 4)}


if __name__ == "__main__":
    run_script(lambda: pipeline.main(sys.modules[__name__]))
