"""What the scripts of the tiny worlds share: their command line, their table and their pictures.

Libraries are imported where they are used, so that a wrong argument is answered at once.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cli
from cli import Fault, option

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline
    from torch import Tensor

WEIGHTS = "pytorch_lora_weights.safetensors"  # a LoRA's file in a run's folder
OWN = {"model_index.json", "prompts.jsonl", "held_out.jsonl"}  # what it has written in the end
# How pictures are drawn for the table: guidance scale and steps. The first is that of the training.
CONDITIONS = {"": (1.0, 10), ", guidance 2": (2.0, 10), ", 28 steps": (1.0, 28)}


@dataclass
class Arguments:
    """To be completed by a world: its folder and how long it is pretrained."""

    out: str
    pretraining: int
    samples: int = option(96, "Pictures of each task in the table.", at_least=1, at_most=10_000)
    lora: list[str] = option(
        [], "Folders of LoRAs: do not pretrain, but print the table with each of them."
    )
    figure: str | None = option(
        None,
        "The file to draw pictures before and with the first LoRA in, and the rewards of all; "
        f"{', '.join(cli.FIGURES)}.",
    )


def folder(world: str) -> str:
    """The option that says where a world's pipeline lies."""
    default = Path(__file__).parent / "out" / world
    return option(str(default), "The pipeline's folder.", shown=f"toy/out/{world}")


def read_arguments(arguments: type, argv: list[str] | None, script: str) -> Arguments:
    """The command line. Raises Fault, also for what is not there or cannot be written to."""
    args = cli.parse(arguments, sys.argv[1:] if argv is None else argv)
    args.lora = [os.path.abspath(lora) for lora in args.lora]  # which ends in a name
    names = ["base", *(Path(lora).name for lora in args.lora)]
    for name in names:
        if names.count(name) > 1:
            raise Fault(f"argument --lora: two rows would be called {name}; rename a folder")
    for lora in args.lora:
        if not os.path.isfile(f"{lora}/{WEIGHTS}"):
            raise Fault(f"argument --lora: there is no {Path(lora) / WEIGHTS}")
        if args.figure:
            read_rewards(lora)
    if args.lora and not os.path.isfile(f"{args.out}/model_index.json"):
        raise Fault(f"argument --out: {args.out} holds no pipeline; run {script} first")
    cli.make_folder(args.out, "out")
    there = {path.name for path in Path(args.out).iterdir() if path.name[0] != "."}
    if there and not (args.lora or there >= OWN):
        where = f"argument --out: {args.out} holds {min(there)}, and no pipeline of a toy"
        raise Fault(f"{where}; give a new folder, or an empty one")
    cli.make_place(str(Path(args.out) / "base.png"), "out", cli.FIGURES)
    if args.figure is not None:
        cli.make_place(args.figure, "figure", cli.FIGURES)
    return args


def read_rewards(folder: str) -> list[float]:
    """The mean reward of each step of a run in a folder. Raises Fault."""
    path = Path(folder) / "metrics.jsonl"
    try:
        lines = path.read_text("utf-8").splitlines()
        rewards = [float(json.loads(line)["reward"]) for line in lines or [""]]
        if not all(map(math.isfinite, rewards)):
            raise ValueError("a reward is NaN or infinite")
        return rewards
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
        found = f"argument --lora: cannot read {path} ({cli.first_line(error)})"
        raise Fault(f"{found}; mend it, or leave --figure out") from None


def save(pipe: StableDiffusion3Pipeline, out: Path, files: dict[str, list[dict]]) -> None:
    """Writes a pipeline and its prompts aside, and puts them in their place when all is written.

    So a pipeline that was there stays whole if this one cannot be written. Raises Fault.
    """
    aside = out / f".{os.getpid()}-new"
    try:
        pipe.save_pretrained(aside)
        for name, prompts in files.items():
            text = "".join(json.dumps(prompt) + "\n" for prompt in prompts)
            (aside / f"{name}.jsonl").write_text(text, "utf-8")
        for path in sorted(aside.iterdir(), key=Path.is_file):  # model_index.json after the parts
            if (out / path.name).is_symlink():
                (out / path.name).unlink()
            elif path.is_dir():
                shutil.rmtree(out / path.name, ignore_errors=True)
            os.replace(path, out / path.name)
    except Exception as error:  # whatever diffusers makes of a disk that is full
        found = f"cannot write {out} ({cli.first_line(error)})"
        raise Fault(f"{found}; make room, or mend that, and call again") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def run(
    args: Arguments,
    *,
    build: Callable,
    pretrain: Callable[..., Iterable[float]],
    files: dict[str, list[dict]],
    shown: list[dict],
    side: int,
    title: str,
    columns: Callable[[Tensor, list[dict]], dict[str, str]],
    right: Callable[[Tensor, list[dict]], list[float]],
    drawn: Tensor | None = None,
) -> None:
    """Builds, pretrains and saves a pipeline, or loads it and its LoRAs, and prints the table.

    files: the prompts to be written beside it, by name. shown: the prompts, each with its "task",
    whose pictures are in the table. side: theirs, in pixels. columns: a row of the table, whose
    first heading is the title.
    right: 1 for a picture that is framed in black. drawn: pictures of `shown` as they should be,
    for a row that says what can be reached.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or it speaks of parts not used here
    os.environ["MPLBACKEND"] = "agg"  # no window, and whatever the environment asks for
    config = cli.read_json(Path(args.out) / "transformer" / "config.json")
    pixels = 2 * config.get("sample_size", side // 2)
    if pixels != side:
        found = f"it draws pictures of {pixels} pixels, and not of {side}"
        raise Fault(f"argument --out: {args.out} is of another world: {found}; leave --out out")
    for lora in args.lora:  # a run's folder says for what pictures it is, and its weights do not
        folder = Path(lora).absolute()
        of_run = folder.parent if folder.name.startswith("checkpoint-") else folder
        trained = cli.read_json(of_run / "arguments.json").get("resolution", side)
        if trained != side:
            found = f"{lora} was trained on pictures of {trained} pixels, and not of {side}"
            raise Fault(f"argument --lora: {found}; give a run of this world")
    import matplotlib.pyplot as plt
    import tiny_sd35
    import torch
    from diffusers import DPMSolverMultistepScheduler
    from tqdm import tqdm

    import sd35
    from checkpoints import check_lora

    plt.rcParams["text.parse_math"] = False  # a folder's name may have a dollar sign in it
    out, loras = Path(args.out), [Path(lora) for lora in args.lora]
    if loras:
        pipe = sd35.load_pipeline(str(out.absolute()), torch.float32)
        for lora in loras:
            check_lora(lora / WEIGHTS, pipe.transformer)
    else:
        pipe = build()
        progress = tqdm(pretrain(pipe, args.pretraining), "pretraining", total=args.pretraining)
        for loss in progress:
            progress.set_postfix(loss=f"{loss:.3f}")
        save(pipe, out, files)
        print(f"wrote {out}", flush=True)
    pipe.scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    sheets: dict[str, Tensor] = {}

    def print_row(name: str, images: Tensor, first: bool = False) -> None:
        row = columns(images, shown)
        if first:
            print(f"| {title} | {' | '.join(row)} |\n{'|---' * (1 + len(row))}|")
        print(f"| {name} | {' | '.join(row.values())} |", flush=True)

    if drawn is not None:
        print_row("drawn", drawn, first=True)
    for lora in [None, *loras]:
        name = lora.name if lora else "base"
        if lora:
            sd35.load_lora(pipe, lora)
        for condition, (guidance, steps) in CONDITIONS.items():
            images = tiny_sd35.sample(pipe, shown, 0, guidance, steps)
            print_row(name + condition, images, first=drawn is None and not sheets)
            if not condition:
                sheets[name] = contact_sheet(images, shown, right(images, shown))
        if lora:
            pipe.unload_lora_weights()
    tasks = list(dict.fromkeys(prompt["task"] for prompt in shown))
    base = {"base": sheets["base"]}
    cli.replace_file(out / "base.png", lambda new: plot(new, base, tasks, {}))
    if args.figure:
        first = loras[0].name if loras else "base"
        curves = {lora.name: read_rewards(str(lora)) for lora in loras}
        both = {name: sheets[name] for name in ("base", first)}
        cli.replace_file(Path(args.figure), lambda new: plot(new, both, tasks, curves))


def contact_sheet(
    images: Tensor, prompts: list[dict], right: list[float], columns: int = 12
) -> Tensor:
    """Pictures (H, W, 3) in [0, 1], a task a row, framed in black where all is as asked."""
    import torch
    from torch.nn.functional import pad

    rows = []
    for task in dict.fromkeys(prompt["task"] for prompt in prompts):
        chosen = [i for i, prompt in enumerate(prompts) if prompt["task"] == task][:columns]
        pictures = [
            pad(pad(images[i], (2, 2, 2, 2), value=0.8 * (1 - right[i])), (1, 1, 1, 1), value=1.0)
            for i in chosen
        ]
        rows.append(torch.cat(pictures, 2))
    return torch.cat(rows, 1).permute(1, 2, 0)


def plot(
    path: Path, sheets: dict[str, Tensor], tasks: list[str], rewards: dict[str, list[float]]
) -> None:
    """Contact sheets above, and the rollouts' mean reward in each run, over ten steps, below."""
    import matplotlib.pyplot as plt
    import torch

    plt.switch_backend("agg")
    plt.rcdefaults()  # whatever a matplotlibrc says
    heights = [0.4 + 7.2 * len(sheet) / sheet.shape[1] for sheet in sheets.values()]  # inches
    heights += [2.9] if rewards else []
    figure, axes = plt.subplots(
        len(heights),
        figsize=(8, sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for panel, (title, sheet) in zip(axes[:, 0], sheets.items(), strict=False):
        panel.imshow(sheet.numpy(), interpolation="nearest")
        panel.set_title(f"{title} (black frame: as asked)", fontsize=14)
        panel.spines[:].set_visible(False)
        middles = (torch.arange(len(tasks)) + 0.5) * len(sheet) / len(tasks)
        panel.set_xticks([])
        panel.set_yticks(middles.tolist(), tasks, fontsize=12)
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
        axes[-1, 0].legend(fontsize=12, ncols=2, loc="lower right")
    figure.savefig(path, dpi=90)
    plt.close(figure)
