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
import json
import math
import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that `python toy/shapes.py` finds dgpo.py
import cli
from cli import Fault, option

WEIGHTS = "pytorch_lora_weights.safetensors"  # a LoRA's file in a run's folder


@dataclass
class Arguments:
    """A world of drawn shapes, and a tiny pipeline that draws them, to be trained by DGPO."""

    out: str = option(
        str(Path(__file__).parent / "out" / "shapes"),
        "The pipeline's folder.",
        shown="toy/out/shapes",
    )
    pretraining: int = option(10_000, "Steps of the pretraining.", at_least=1, at_most=10**9)
    samples: int = option(96, "Pictures of each task in the table.", at_least=1, at_most=10_000)
    lora: list[str] = option(
        [], "Folders of LoRAs: do not pretrain, but print the table with each of them."
    )
    figure: str | None = option(
        None,
        "The file to draw pictures before and with the first LoRA in, and the rewards of all; "
        f"{', '.join(cli.FIGURES)}.",
    )


def read_arguments(argv: list[str] | None = None) -> Arguments:
    """The command line. Raises Fault, also for what is not there or cannot be written to."""
    args = cli.parse(Arguments, sys.argv[1:] if argv is None else argv)
    for folder in args.lora:
        if not os.path.isfile(f"{folder}/{WEIGHTS}"):
            raise Fault(f"argument --lora: there is no {Path(folder) / WEIGHTS}")
        if args.figure:
            read_rewards(folder)
    if args.lora and not os.path.isfile(f"{args.out}/model_index.json"):
        raise Fault(f"argument --out: {args.out} holds no pipeline; run toy/shapes.py first")
    cli.make_folder(args.out, "out")
    cli.make_place(str(Path(args.out) / "base.png"), "out", cli.FIGURES)
    if args.figure is not None:
        cli.make_place(args.figure, "figure", cli.FIGURES)
    return args


def read_rewards(folder: str) -> list[float]:
    """The mean reward of each step of a run in a folder. Raises Fault."""
    path = Path(folder) / "metrics.jsonl"
    try:
        lines = path.read_text("utf-8").splitlines()
        return [float(json.loads(line)["reward"]) for line in lines or [""]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise Fault(f"argument --lora: cannot read {path} ({cli.first_line(error)})") from None


if __name__ == "__main__":
    cli.run("shapes.py", read_arguments)

import torch
from torch import Tensor, nn
from tqdm import tqdm

import dgpo

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

    prompts, rng = prompt_list(), random.Random(0)
    torch.manual_seed(0)
    by_task = {task: [p for p in prompts if p["task"] == task] for task in TASKS}

    def draw_prompt() -> dict:
        return rng.choice(by_task[rng.choice(TASKS)])

    embeds, pooled = tiny_sd35.encode(pipe, ["", *(prompt["prompt"] for prompt in prompts)])
    index = {prompt["prompt"]: i for i, prompt in enumerate(prompts, 1)}
    optimizer = torch.optim.AdamW(pipe.transformer.parameters(), weight_decay=0.0)
    averaged = [p.detach().clone() for p in pipe.transformer.parameters()]
    pipe.transformer.train()
    for step in range(steps):
        warmup, decay = 50 * step / steps + 0.02, 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, warmup) * decay
        shown, other = ([draw_prompt() for _ in range(batch)] for _ in range(2))
        told = [b if rng.random() < WRONG else a for a, b in zip(shown, other, strict=True)]
        rows = [0 if rng.random() < 0.1 else index[prompt["prompt"]] for prompt in told]
        images = paint([draw_scene(prompt, rng) for prompt in shown])
        x0 = tiny_sd35.to_latents(pipe, images)[:, None]
        u, eps = torch.rand(batch, 1), torch.randn(x0.shape)
        t = 3 * u / (1 + 2 * u)  # the shift of the sampler
        v = pipe.transformer(
            dgpo.diffuse(x0, eps, t)[:, 0],
            encoder_hidden_states=embeds[rows],
            pooled_projections=pooled[rows],
            timestep=1000 * t[:, 0],
            return_dict=False,
        )[0]
        loss = dgpo.dsm_loss(v[:, None], x0, eps).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(pipe.transformer.parameters(), 1.0)
        optimizer.step()
        dgpo.ema_update(averaged, pipe.transformer.parameters(), 0.99)
        yield loss.item()
    with torch.no_grad():
        for parameter, value in zip(pipe.transformer.parameters(), averaged, strict=True):
            parameter.copy_(value)
    pipe.transformer.eval()


@torch.no_grad()
def sample(pipe, prompts: list[dict], seed: int, guidance: float, steps: int) -> Tensor:
    """A picture of each prompt (N, 3, SIDE, SIDE) in [0, 1], with the pipeline's own sampler."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(prompts), 3, SIDE // 2, SIDE // 2, generator=generator)
    images = []
    for i in range(0, len(prompts), 48):
        texts = [prompt["prompt"] for prompt in prompts[i : i + 48]]
        output = pipe(
            texts,
            latents=noise[i : i + 48],
            guidance_scale=guidance,
            num_inference_steps=steps,
            height=SIDE,
            width=SIDE,
            max_sequence_length=TOKENS,
            output_type="pt",
        )
        images.append(output.images)
    return torch.cat(images)


def held_out(n: int, seed: int = 1234) -> list[dict]:
    """n prompts of each task, for noise that is not trained on: all prompts are."""
    rng, prompts = random.Random(seed), prompt_list()
    return [
        rng.choice([p for p in prompts if p["task"] == task]) for task in TASKS for _ in range(n)
    ]


def report(title: str, images: Tensor, prompts: list[dict]) -> str:
    """A row of the table: strict accuracy of all and by task, and cleanness."""
    right = torch.tensor(strict(images, prompts))
    tasks = [prompt["task"] for prompt in prompts]
    by_task = [right[[task == t for t in tasks]].mean().item() for task in TASKS]
    clean = torch.tensor(cleanness(images, prompts)).mean().item()
    columns = " | ".join(f"{value:.3f}" for value in [right.mean().item(), *by_task])
    return f"| {title} | {columns} | {clean:.4f} |"


HEADER = (
    f"| strict accuracy | all | {' | '.join(TASKS)} | cleanness |\n{'|---' * (len(TASKS) + 3)}|"
)
# How pictures are drawn for the table: guidance scale and steps. The first is that of the training.
CONDITIONS = {"": (1.0, 10), ", guidance 2": (2.0, 10), ", 28 steps": (1.0, 28)}


def contact_sheet(images: Tensor, prompts: list[dict], columns: int = 12) -> Tensor:
    """Pictures (H, W, 3) in [0, 1], a task a row, framed in black where all is as asked."""
    frames = 0.8 * (1 - torch.tensor(strict(images, prompts)))
    rows = []
    for task in TASKS:
        chosen = [i for i, prompt in enumerate(prompts) if prompt["task"] == task][:columns]
        pictures = [
            nn.functional.pad(
                nn.functional.pad(images[i], (2, 2, 2, 2), value=frames[i].item()),
                (1, 1, 1, 1),
                value=1.0,
            )
            for i in chosen
        ]
        rows.append(torch.cat(pictures, 2))
    return torch.cat(rows, 1).permute(1, 2, 0)


def plot(path: Path, sheets: dict[str, Tensor], rewards: dict[str, list[float]]) -> None:
    """Contact sheets above, and the rollouts' mean reward in each run, over ten steps, below."""
    os.environ["MPLBACKEND"] = "agg"  # no window, and whatever the environment asks for
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    rows = len(sheets) + bool(rewards)
    figure, axes = plt.subplots(rows, figsize=(8, 2.9 * rows), squeeze=False, layout="constrained")
    for panel, (title, sheet) in zip(axes[:, 0], sheets.items(), strict=False):
        panel.imshow(sheet.numpy(), interpolation="nearest")
        panel.set_title(f"{title} (black frame: as asked)", fontsize=14)
        panel.spines[:].set_visible(False)
        middles = (torch.arange(len(TASKS)) + 0.5) * len(sheet) / len(TASKS)
        panel.set_xticks([])
        panel.set_yticks(middles.tolist(), TASKS, fontsize=12)
    for (name, values), style in zip(rewards.items(), itertools.cycle(("-", "--", "-.", ":"))):
        window = min(10, len(values))
        means = torch.tensor(values).unfold(0, window, window).mean(1)
        steps = window * torch.arange(1, len(means) + 1)
        axes[-1, 0].plot(steps, means, style, color="black", label=name)
    if rewards:
        axes[-1, 0].set_xlabel("optimiser step", fontsize=12)
        axes[-1, 0].set_ylabel("mean reward of the rollouts", fontsize=12)
        axes[-1, 0].set_ylim(0, 1)
        axes[-1, 0].grid(alpha=0.3)
        axes[-1, 0].legend(fontsize=12, ncols=2, loc="center right", bbox_to_anchor=(1, 0.65))
    figure.savefig(path, dpi=90)
    plt.close(figure)


def tried(line: str, work: Callable[..., object], *of: object, **more: object):
    """What work(...) returns. Whatever diffusers raises because of a file is a Fault."""
    try:
        return work(*of, **more)
    except Exception as error:
        raise Fault(f"{line} ({cli.first_line(error)})") from None


def main() -> None:
    args = read_arguments()
    out, loras = Path(args.out), [Path(folder) for folder in args.lora]

    from diffusers import DPMSolverMultistepScheduler, StableDiffusion3Pipeline

    if loras:
        load = StableDiffusion3Pipeline.from_pretrained
        pipe = tried(f"argument --out: cannot use {out}", load, out, dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
    else:
        pipe = build()
        for name, prompts in {"prompts": prompt_list(), "held_out": held_out(6)}.items():
            lines = "".join(json.dumps(prompt) + "\n" for prompt in prompts)
            cli.replace_file(out / f"{name}.jsonl", lambda new, lines=lines: new.write_text(lines))
        progress = tqdm(pretrain(pipe, args.pretraining), "pretraining", total=args.pretraining)
        for loss in progress:
            progress.set_postfix(loss=f"{loss:.3f}")
        tried(f"cannot write {out}", pipe.save_pretrained, out)
        print(f"wrote {out}")
    pipe.scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    prompts, sheets = held_out(args.samples), {}
    print(HEADER)
    for lora in [None, *loras]:
        name = lora.name if lora else "base"
        if lora:
            load, line = pipe.load_lora_weights, f"argument --lora: cannot use {lora}"
            tried(line, load, lora, weight_name=WEIGHTS)
        for condition, (guidance, steps) in CONDITIONS.items():
            images = sample(pipe, prompts, 0, guidance, steps)
            print(report(name + condition, images, prompts), flush=True)
            if not condition:
                sheets[name] = contact_sheet(images, prompts)
        if lora:
            pipe.unload_lora_weights()
    base = {"base": sheets["base"]}
    cli.replace_file(out / "base.png", lambda new: plot(new, base, {}))
    if args.figure:
        first = loras[0].name if loras else "base"
        curves = {folder.name: read_rewards(str(folder)) for folder in loras}
        shown = {name: sheets[name] for name in ("base", first)}
        cli.replace_file(Path(args.figure), lambda new: plot(new, shown, curves))


if __name__ == "__main__":
    cli.run("shapes.py", main)
