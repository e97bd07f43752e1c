"""A world of drawn shapes with an exact checker, and a tiny pipeline of SD3.5's classes to train.

    python toy/shapes.py                          builds and pretrains it: toy/out/shapes
    python train_sd35.py --config toy/shapes.yaml --output_dir runs/shapes-0
    python toy/shapes.py --lora runs/shapes-0     what it has learnt

The pretraining captions are noisy, as the web's are: a third are those of another picture. So the
model can draw what is asked for and often does not, and that is what reinforcement is for.
"""

# ruff: noqa: E402 (a wrong argument is answered before the libraries are loaded)

from __future__ import annotations

import itertools
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])  # also for `python -m` and links
import tiny_world

import cli
from cli import option


@dataclass
class Arguments(tiny_world.Arguments):
    """A world of drawn shapes, and a tiny pipeline that draws them, to be trained by DGPO."""

    out: str = tiny_world.folder("shapes")
    pretraining: int = option(10_000, "Steps of the pretraining.", at_least=1, at_most=10**9)


def read_arguments(argv: list[str] | None = None) -> tiny_world.Arguments:
    return tiny_world.read_arguments(Arguments, argv, "toy/shapes.py")


if __name__ == "__main__":
    cli.run("shapes.py", read_arguments)

import torch
from torch import Tensor

SIDE, CELL, GRID = 16, 8, 2  # a picture's and a cell's side in pixels, and how many cells that is
COLORS = {"red": (220, 40, 40), "green": (30, 160, 60), "blue": (40, 80, 220)}
SHAPES = {  # the latents are half as large as the picture: a character is two by two pixels
    "square": ("###.", "###.", "###.", "...."),
    "diamond": (".#..", "###.", ".#..", "...."),
}
SIDES = {"left": (0,), "right": (1,)}  # the columns of cells
COUNTS = {"two": 2, "three": 3}
BACKGROUND = (245, 245, 245)
WRONG = 0.35  # share of wrong captions in pretraining
TOKENS = 7  # of a prompt, at most, for each tokenizer
KINDS = list(itertools.product(COLORS, SHAPES))
TASKS = ("single", "position", "count", "two")


# The world. A scene is GRID * GRID cells, each None or (color, shape), row by row.

Scene = list


def prompt_list() -> list[dict]:
    """All prompts, as the trainer reads them: {"prompt", "task", "objects", "side"}."""
    prompts = []
    for color, shape in KINDS:
        one = [[color, shape]]
        prompts.append({"prompt": f"{color} {shape}", "task": "single", "objects": one})
        for side in SIDES:
            text = f"{color} {shape} on the {side}"
            prompts.append({"prompt": text, "task": "position", "objects": one, "side": side})
        for word, n in COUNTS.items():
            text = f"{word} {color} {shape}s"
            prompts.append({"prompt": text, "task": "count", "objects": one * n})
    for (color, shape), (color_2, shape_2) in itertools.permutations(KINDS, 2):
        text = f"{color} {shape} and {color_2} {shape_2}"
        objects = [[color, shape], [color_2, shape_2]]
        prompts.append({"prompt": text, "task": "two", "objects": objects})
    return prompts


def draw_scene(prompt: dict, rng: random.Random) -> Scene:
    """A scene that is as the prompt says, its places at random."""
    columns = SIDES[prompt["side"]] if "side" in prompt else range(GRID)
    free = [GRID * row + column for row in range(GRID) for column in columns]
    scene: Scene = [None] * GRID**2
    for kind, cell in zip(prompt["objects"], rng.sample(free, len(prompt["objects"])), strict=True):
        scene[cell] = tuple(kind)
    return scene


def templates() -> Tensor:
    """What a cell can hold, (1 + kinds, 3, CELL, CELL) in [0, 1]: first nothing, then KINDS."""
    background = torch.tensor(BACKGROUND)[:, None, None] / 255
    cells = [background.expand(3, CELL, CELL)]
    for color, shape in KINDS:
        ink = torch.tensor(COLORS[color])[:, None, None] / 255
        inside = torch.tensor([[character == "#" for character in row] for row in SHAPES[shape]])
        inside = inside.repeat_interleave(2, 0).repeat_interleave(2, 1)
        cells.append(torch.where(inside, ink, background))
    return torch.stack(cells)


TEMPLATES = templates()


def place(cell: int) -> tuple[object, ...]:
    """The pixels of a cell, as an index (..., rows, columns)."""
    row, column = (CELL * i for i in divmod(cell, GRID))
    return ..., slice(row, row + CELL), slice(column, column + CELL)


def paint(scenes: list[Scene]) -> Tensor:
    """Pictures (N, 3, SIDE, SIDE) in [0, 1]."""
    images = (torch.tensor(BACKGROUND) / 255)[:, None, None].repeat(len(scenes), 1, SIDE, SIDE)
    for image, scene in zip(images, scenes, strict=True):
        for cell, kind in enumerate(scene):
            if kind:
                image[place(cell)] = TEMPLATES[1 + KINDS.index(kind)]
    return (images * 255).round() / 255


# The checker


def read(images: Tensor) -> tuple[list[Scene], Tensor]:
    """What is seen in pictures (N, 3, SIDE, SIDE), and how far off the drawing is, (N,).

    A cell holds the template nearest to it. The distance is the root mean square error of the
    picture against one drawn of what was seen: 0 for a drawn picture, high for smeared ones.
    """
    images = images.float().clamp(0, 1).cpu()
    cells = torch.stack([images[place(cell)] for cell in range(GRID**2)], 1)
    nearest = torch.cdist(cells.flatten(2), TEMPLATES.flatten(1)[None]).argmin(2)  # (N, cells)
    scenes = [[KINDS[k - 1] if k else None for k in row] for row in nearest.tolist()]
    return scenes, (images - paint(scenes)).square().mean((1, 2, 3)).sqrt()


def clauses(scene: Scene, prompt: dict) -> list[float]:
    """A grade for each clause: is each kind there, as often as asked, nothing else, on the side."""
    seen, wanted = (
        Counter(kind for kind in scene if kind),
        Counter(tuple(kind) for kind in prompt["objects"]),
    )
    grades = [max(0.0, 1 - abs(seen[kind] - n) / n) for kind, n in wanted.items()]
    stray = sum((seen - wanted).values())
    grades.append(1 / (1 + stray))
    if "side" in prompt:
        cells = [cell for cell, kind in enumerate(scene) if kind and kind in wanted]
        columns = SIDES[prompt["side"]]
        grades.append(sum(cell % GRID in columns for cell in cells) / max(1, len(cells)))
    return grades


def graded(images: Tensor, prompts: list[dict]) -> list[float]:
    """The mean over the clauses, 0 to 1."""
    grades = [clauses(*pair) for pair in zip(read(images)[0], prompts, strict=True)]
    return [sum(grade) / len(grade) for grade in grades]


def strict(images: Tensor, prompts: list[dict]) -> list[float]:
    """1 if every clause holds, else 0."""
    grades = [clauses(*pair) for pair in zip(read(images)[0], prompts, strict=True)]
    return [float(min(grade) == 1) for grade in grades]


def shuffled(images: Tensor, prompts: list[dict]) -> list[float]:
    """The same in another order within the group: a control, to learn nothing from."""
    rewards = strict(images, prompts)
    random.Random(images.sum().item()).shuffle(rewards)
    return rewards


def cleanness(images: Tensor, prompts: list[dict]) -> list[float]:
    """A quality nobody trains on: minus the distance from a drawing."""
    return (-read(images)[1]).tolist()


# The pipeline


def build(width: int = 128, layers: int = 2):
    """An untrained pipeline of SD3.5's classes, with three text encoders, VAE and all."""
    import tiny_sd35

    texts = [prompt["prompt"] for prompt in prompt_list()]
    torch.manual_seed(0)
    clip, t5 = tiny_sd35.clip_tokenizer(texts, TOKENS), tiny_sd35.t5_tokenizer(texts, TOKENS)
    sizes = {"side": SIDE, "cell": CELL, "tokens": TOKENS}  # a cell is a token
    return tiny_sd35.build(clip, t5, width=width, layers=layers, **sizes)


def pretrain(pipe, steps: int, batch: int = 32):
    """Flow matching of the transformer on noisy captions. Yields the loss of each step."""
    import tiny_sd35

    prompts = prompt_list()
    by_task = {task: [p for p in prompts if p["task"] == task] for task in TASKS}

    def draw_prompt(rng: random.Random) -> dict:
        return rng.choice(by_task[rng.choice(TASKS)])

    def draw(shown: list[dict], rng: random.Random) -> Tensor:
        return tiny_sd35.to_latents(pipe, paint([draw_scene(prompt, rng) for prompt in shown]))

    sizes = {"wrong": WRONG, "steps": steps, "batch": batch}
    return tiny_sd35.pretrain(pipe, prompts, draw_prompt, draw, **sizes)


def held_out(n: int, seed: int = 1234) -> list[dict]:
    """n prompts of each task, for noise that is not trained on: all prompts are."""
    rng, prompts = random.Random(seed), prompt_list()
    return [
        rng.choice([p for p in prompts if p["task"] == task]) for task in TASKS for _ in range(n)
    ]


def columns(images: Tensor, prompts: list[dict]) -> dict[str, str]:
    """A row of the table: strict accuracy of all and by task, and cleanness."""
    right = torch.tensor(strict(images, prompts))
    tasks = [prompt["task"] for prompt in prompts]
    shares = {"all": right.mean()}
    shares |= {task: right[[task == t for t in tasks]].mean() for task in TASKS}
    clean = torch.tensor(cleanness(images, prompts)).mean()
    return {name: f"{share:.3f}" for name, share in shares.items()} | {"cleanness": f"{clean:.4f}"}


def main() -> None:
    args = read_arguments()
    tiny_world.run(
        args,
        build=build,
        pretrain=pretrain,
        files={"prompts": prompt_list(), "held_out": held_out(6)},
        shown=held_out(args.samples),
        side=SIDE,
        title="strict accuracy",
        columns=columns,
        right=strict,
    )


if __name__ == "__main__":
    cli.run("shapes.py", main)
