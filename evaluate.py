"""Is it better, and at what price? A row of the paper's Table 2 for the base model and for a LoRA.

    python evaluate.py --lora runs/dgpo --reward ocr          # on the task's test prompts
    python evaluate.py --lora runs/dgpo --prompts drawbench

Both draw every prompt from the same noise. What is drawn or scored already is not done again.
The lists have GenEval's prompts four times and DrawBench's five times, as often as the paper draws
them; each time is from noise of its own.
"""

# ruff: noqa: E402 (a wrong argument is answered before the libraries are loaded)

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import math
import os
import sys
from collections import defaultdict
from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # also for `python -I`

import cli
import prompts as prompt_sets
from cli import Fault, first_line, make_folder, option, parse, read_json, replace_file
from recipes import MEDIUM

LORA_FILE = "pytorch_lora_weights.safetensors"
VARIANTS = ("base", "lora")
ROWS = ("base", "LoRA", "difference")
MOST = 1_000_000  # pictures by each model
GRID = 4  # prompts with the best gain, and as many with the worst loss
OF_THE_RUN = "pretrained_model_name_or_path guidance_scale resolution max_sequence_length".split()

# For comparison. The first three are of the task, the last five on DrawBench.
PAPER = """\
| paper, Table 2 | GenEval | OCR | PickScore | Aesthetic | DeQA | ImgRwd | PickScore | UniRwd |
|---|---|---|---|---|---|---|---|---|
| SD3.5-M | 0.63 | 0.59 | 21.72 | 5.39 | 4.07 | 0.87 | 22.34 | 3.33 |
| Flow-GRPO, GenEval | 0.95 | | | 5.25 | 4.01 | 1.03 | 22.37 | 3.51 |
| DGPO, GenEval | 0.97 | | | 5.31 | 4.03 | 1.08 | 22.41 | 3.60 |
| Flow-GRPO, OCR | | 0.92 | | 5.32 | 4.06 | 0.95 | 22.44 | 3.42 |
| DGPO, OCR | | 0.96 | | 5.37 | 4.09 | 1.02 | 22.52 | 3.48 |
| Flow-GRPO, PickScore | | | 23.31 | 5.92 | 4.22 | 1.28 | 23.53 | 3.66 |
| DGPO, PickScore | | | 23.89 | 6.08 | 4.40 | 1.32 | 23.91 | 3.74 |
"""


@dataclass
class Arguments:
    """Compare a LoRA with its base model on prompts and metrics."""

    lora: str = option("", f"The folder of the LoRA, which holds {LORA_FILE}.")
    prompts: str = option(
        "",
        "What to draw: a .txt or .jsonl file, or a published list, as drawbench or ocr_test.",
        shown="the test prompts of --reward",
    )
    reward: list[str] = option([], "What the LoRA was trained on. These metrics come first.")
    metrics: list[str] = option(
        [],
        "What to score by: rewards by name, or file.py:function. Their weights are downloaded.",
        shown="those of Table 2 whose weights are on this machine",
    )
    reward_model: list[str] = option([], "Other weights for a metric, as name=path.")
    output_dir: str = option("", "The folder to write to.", shown="evaluation in the run's")
    seeds: int = option(1, "Pictures of each line of the prompts.", at_least=1, at_most=1000)
    num_inference_steps: int = option(40, "Steps of the sampler.", at_least=1, at_most=1000)
    batch_size: int = option(4, "Pictures at once. Lower it if memory is short.", at_least=1)
    pretrained_model_name_or_path: str = option(
        MEDIUM, "The base model, by name or folder.", "--model", shown=f"the run's, or {MEDIUM}"
    )
    guidance_scale: float = option(
        4.5, "Classifier-free guidance; 1 is none.", at_least=1, shown="the run's, or 4.5"
    )
    resolution: int = option(
        512, "A picture's side in pixels, a multiple of 16.", at_least=16, shown="the run's, or 512"
    )
    max_sequence_length: int = option(
        128, "Most tokens that T5 reads.", at_least=1, at_most=512, shown="the run's, or 128"
    )


def run_file(lora: str) -> Path:
    """Where the run that trained a LoRA keeps its arguments. A checkpoint's run is a folder up."""
    folder = Path(lora).absolute()
    return (folder.parent if folder.name.startswith("checkpoint-") else folder) / "arguments.json"


def read_arguments(argv: list[str]) -> Arguments:
    """The arguments, checked as far as no library is needed. Raises Fault."""
    args = parse(Arguments, argv)
    cli.check_ranks()
    if not os.path.isfile(Path(args.lora) / LORA_FILE):
        raise Fault(f"argument --lora: must be a folder with {LORA_FILE}, got {args.lora!r}")
    trained = read_json(run_file(args.lora))
    line = [f"--{name}={trained[name]}" for name in OF_THE_RUN if name in trained]
    try:
        args = parse(Arguments, [*line, *argv])  # what comes last wins
    except Fault as fault:
        raise Fault(f"cannot use {run_file(args.lora)} ({fault}); mend or delete it") from None
    if args.resolution % 16:
        raise Fault(f"argument --resolution: must be a multiple of 16, got {args.resolution}")
    for name in args.reward:
        if f"{name}_test" in prompt_sets.LISTS:
            args.prompts = args.prompts or f"{name}_test"
    if not args.prompts:
        raise Fault("argument --prompts: is needed; --help says what for")
    args.reward = ["geneval_official" if name == "geneval" else name for name in args.reward]
    # Not in a checkpoint, which its run may delete.
    folder, run = Path(args.lora).absolute(), run_file(args.lora).parent
    name = "evaluation" if folder == run else f"evaluation-{folder.name}"
    args.output_dir = args.output_dir or os.path.relpath(run / name)
    return args


if __name__ == "__main__":
    cli.run("evaluate.py", lambda: read_arguments(sys.argv[1:]))

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or it speaks of parts not used here
os.environ["MPLBACKEND"] = "agg"  # no window, and whatever the environment asks for

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import rewards
from checkpoints import check_lora, lock_folder
from records import sheet
from rewards.ocr import QUOTED
from sd35 import decode, load_lora, load_pipeline

TABLE_2 = ["aesthetic", "deqa", "imagereward", "pickscore", "unifiedreward"]
Asked = dict[Path, dict]  # each picture's prompt: all of the base model, and then all of the LoRA
Scores = dict[str, float]  # by `score_name`; NaN is an answer without a score
Rows = dict[str, tuple[float, float, float] | None]  # by ROWS: mean and its 95 % interval, or none


def parse_args(argv: list[str]) -> Arguments:
    """The arguments, checked as far as can be without loading a model. Raises Fault."""
    args, flag = read_arguments(argv), "prompts"
    try:
        read = prompt_sets.load(args.prompts)
        for flag in ("reward", "metrics"):
            specs = getattr(args, flag)
            for spec, name in zip(specs, rewards.parse_all(specs), strict=True):
                if spec != name:
                    raise ValueError(f"a metric has no weight, got {spec}; give {name}")
        flag, default = "reward_model", [*TABLE_2, "geneval_official", "ocr"]
        used = args.reward + (args.metrics or default)
        rewards.check_models(cli.pairs(args.reward_model), used)
    except ValueError as error:
        raise Fault(f"argument --{flag}: {error}") from None
    if len(read) * args.seeds > MOST:
        n = len(read) * args.seeds
        raise Fault(f"argument --seeds: {len(read)} prompts of each are {n} pictures, over {MOST}")
    try:
        rewards.check_prompts(args.reward + args.metrics, read)
    except rewards.RewardError as error:
        raise Fault(f"argument --prompts: {error}") from None
    return args


def metrics_at_hand(args: Arguments, prompts: list[dict], device: torch.device) -> list[str]:
    """Of Table 2's metrics that fit the prompts, those that load with what is on this machine.

    Tried one by one, before the pipeline takes its place on the device. Raises Fault if none does.
    """
    wanted = list(TABLE_2)
    if all("include" in prompt for prompt in prompts):
        wanted.insert(0, "geneval_official")
    elif all(QUOTED.search(prompt["prompt"]) for prompt in prompts):
        wanted.insert(0, "ocr")
    models, found = cli.pairs(args.reward_model), []
    for metric in wanted:
        try:
            rewards.load(metric, device, models.get(metric), fetch=False)
            found.append(metric)
        except rewards.RewardError as error:
            if PartialState().is_main_process:
                tqdm.write(f"without {metric}: {error}")
    if not found and not args.reward:
        raise Fault(f"argument --metrics: none is at hand; name one to fetch: {', '.join(wanted)}")
    return found


def claim_folder(args: Arguments, texts: list[str]) -> None:
    """Makes the folder this evaluation's, and no other's until this process ends.

    Raises Fault if it holds pictures of other settings, or what is no evaluation's, or if another
    one is at work in it. Metrics may be added later. Every process looks, before they wait for each
    other; the first one locks and writes.
    """
    out = make_folder(args.output_dir)
    drawn = {name: getattr(args, name) for name in (*OF_THE_RUN, "num_inference_steps", "seeds")}
    drawn["texts"] = texts
    drawn["LoRA"] = hashlib.sha256((Path(args.lora) / LORA_FILE).read_bytes()).hexdigest()
    kept = out / "settings.json"
    others = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    if others and not kept.exists():
        where = f"argument --output_dir: {out} holds {others[0]}, and no evaluation"
        raise Fault(f"{where}; give a new folder, or an empty one")
    if cli.is_first_process():
        lock_folder(out)
    found = read_json(kept)
    before = found if any(out.glob("images/*/*.png")) else drawn
    for name in drawn:
        if before.get(name) != drawn[name]:
            where = f"argument --output_dir: {args.output_dir}"
            raise Fault(f"{where} holds pictures of another {name}; give another folder")
    if cli.is_first_process():
        replace_file(kept, lambda new: new.write_text(json.dumps(drawn)))
        for variant in VARIANTS:
            make_folder(f"{out}/images/{variant}")


def read_picture(path: Path) -> Tensor:
    """(3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) / 255


def is_whole(path: Path, side: int) -> bool:
    """Whether a picture can be read and has the right size. Says so if not."""
    with contextlib.suppress(OSError, SyntaxError, ValueError):
        if read_picture(path).shape == (3, side, side):
            return True
    tqdm.write(f"{path} is damaged: drawn again")
    return False


def pixels(args: Arguments, pipe: Any, batch: dict[Path, str]) -> np.ndarray:
    """Pictures (N, H, W, 3) in bytes, each from noise that depends on its file's name alone."""
    numbers = [map(int, path.stem.split("_")) for path in batch]
    latents = pipe(
        list(batch.values()),
        generator=[torch.Generator().manual_seed(1000 * line + seed) for line, seed in numbers],
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        height=args.resolution,
        width=args.resolution,
        max_sequence_length=args.max_sequence_length,
        output_type="latent",
    ).images
    if not latents.isfinite().all():
        about = f"a picture of {[*batch.values()]!r} is not finite"
        raise Fault(f"{about}; give another --lora, or a lower --guidance_scale")
    return rewards.to_bytes(decode(pipe.vae, latents))


def draw(args: Arguments, device: torch.device, asked: Asked) -> None:
    """Draws the pictures that are not there yet, by the base model and then by the LoRA."""
    missing = [x for x in asked if not (x.exists() and is_whole(x, args.resolution))]
    if not missing:
        return
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if bf16 else torch.float32
    pipe = load_pipeline(args.pretrained_model_name_or_path, dtype, (args.resolution, 0)).to(device)
    check_lora(Path(args.lora) / LORA_FILE, pipe.transformer)
    for variant in VARIANTS:
        if variant == "lora":
            load_lora(pipe, args.lora)
        left = [path for path in missing if path.parent.name == variant]
        for i in tqdm(range(0, len(left), args.batch_size), f"drawing, {variant}", disable=None):
            batch = {path: asked[path]["prompt"] for path in left[i : i + args.batch_size]}
            for path, image in zip(batch, pixels(args, pipe, batch), strict=True):
                replace_file(path, Image.fromarray(image).save)


def score_name(args: Arguments, path: Path, metric: str, prompt: dict) -> str:
    """What a picture's score is kept under: with what else the prompt's line asks for.

    A metric of other weights, or code, is another one.
    """
    model = cli.pairs(args.reward_model).get(metric) or content(metric.rpartition(":")[0])
    line = hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()[:8]
    return f"{path.parent.name} {path.stem} {line} {metric}" + (f"={model}" if model else "")


@functools.cache
def content(place: str) -> str:
    """What tells the code of a metric of one's own from what it was; nothing for others.

    Not what it imports: a helper's file is not looked at.
    """
    if not place:
        return ""
    file = place if place.endswith(".py") else importlib.util.find_spec(place).origin or "none"
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:8] if Path(file).exists() else ""


def score(
    args: Arguments, device: torch.device, asked: Asked, known: Scores, metric: str
) -> Scores:
    """The scores by a metric of the pictures that have none yet. Raises RewardError."""
    found: Scores = {}
    left = [x for x in asked if score_name(args, x, metric, asked[x]) not in known]
    if not left:
        return found
    reward = rewards.load(metric, device, cli.pairs(args.reward_model).get(metric))
    for i in tqdm(range(0, len(left), args.batch_size), f"scoring by {metric}", disable=None):
        batch = left[i : i + args.batch_size]
        images = torch.stack([read_picture(path) for path in batch]).to(device)
        values = rewards.score(metric, reward, images, [asked[path] for path in batch])
        for path, value in zip(batch, values.tolist(), strict=True):
            found[score_name(args, path, metric, asked[path])] = value
    return found


def bootstrap(scores: np.ndarray, texts: list[str], tasks: list[list[int]]) -> Rows:
    """Means of base, LoRA and their difference, and the ends of each mean's 95 % interval.

    scores: (2, N), by base and LoRA from the same noise; without one of them, neither counts.
    texts: the N prompts, told apart by their text. tasks: the numbers of each task's prompts. What
    is resampled is a task's prompts, each with all its pictures, which are alike. A task's mean is
    over its pictures, and several tasks count alike, whatever their size. None without a score.
    """
    mean, means = 0.0, 0.0
    for task in tasks:
        rows = defaultdict(list)
        for i in task:
            base, lora = scores[:, i]
            if math.isfinite(base) and math.isfinite(lora):
                rows[texts[i]].append((base, lora, lora - base))
        if not rows:
            return dict.fromkeys(ROWS)
        n = len(rows)
        drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), 10_000)  # resamples
        sums = np.array([np.sum(pictures, 0) for pictures in rows.values()])  # (n, 3)
        counts = np.array([[len(pictures)] for pictures in rows.values()])
        mean = mean + sums.sum(0) / counts.sum() / len(tasks)
        means = means + drawn @ sums / (drawn @ counts) / len(tasks)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return dict(zip(ROWS, np.stack([mean, low, high], 1).tolist(), strict=True))


def table(title: str, rows: dict[str, dict[str, list | None]]) -> str:
    lines = [f"| {title} | {' | '.join(rows['base'])} |", "|---" * (len(rows["base"]) + 1) + "|"]
    for name, cells in rows.items():
        shown = ["{:.3f} [{:.3f}, {:.3f}]".format(*x) if x else "no score" for x in cells.values()]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def amount(texts: list[str]) -> str:
    n = len(set(texts))
    each, rest = divmod(len(texts), n)
    return f"{n} prompts, {len(texts)} pictures" if rest else f"{n} prompts, {each} each"


def grid(args: Arguments, asked: Asked, scores: np.ndarray) -> Image.Image:
    """The best gains and the worst losses side by side, with their scores (2, N) underneath."""
    both = np.array(list(asked)).reshape(2, -1)
    gains = scores[1] - scores[0]
    ranked = np.argsort(-gains, kind="stable")[: np.isfinite(gains).sum()].tolist()
    shown = ranked if len(ranked) <= 2 * GRID else ranked[:GRID] + ranked[-GRID:]
    rows = []
    for i in shown:
        heading = f"{gains[i]:+.3g}  {asked[both[0, i]]['prompt']}"
        captions = [f"{name}: {x:.3f}" for name, x in zip(VARIANTS, scores[:, i], strict=True)]
        rows.append((heading, captions, torch.stack([read_picture(path) for path in both[:, i]])))
    return sheet(rows, side=max(256, min(args.resolution, 384)))


def report(args: Arguments, asked: Asked, kept: Scores) -> str:
    """Writes table.md, table.json and grid.png, and returns the tables. Raises Fault."""
    notes = ["Mean and 95 % bootstrap interval over prompts; the difference is paired by noise."]
    if args.guidance_scale == 1:
        notes.append(
            "Both without guidance; the base model is meant for 4.5, as in the paper's row."
        )
    scores = {}
    for metric in args.metrics:
        answers = np.array([kept[score_name(args, x, metric, asked[x])] for x in asked])
        lost = answers.size - np.isfinite(answers).sum()
        if lost == answers.size:
            found = f"none of {lost} answers of {metric} had a score; mend it, or leave it out"
            raise Fault(f"argument --metrics: {found}")
        if lost:
            notes.append(f"{lost} of {answers.size} answers of {metric} had no score.")
        scores[metric] = answers.reshape(2, -1)

    prompts = list(asked.values())[: len(asked) // 2]
    texts, tasks = [prompt["prompt"] for prompt in prompts], defaultdict(list)
    for i, prompt in enumerate(prompts):
        tasks[str(prompt.get("tag", prompt.get("task", "")))].append(i)
    several = len(tasks) > 1 and "" not in tasks
    parts = {"mean over images, " * several + amount(texts): [range(len(texts))]}
    if several:
        parts[f"mean over {len(tasks)} tasks, each counting alike"] = list(tasks.values())
        parts |= {f"{task}, {amount([texts[i] for i in m])}": [m] for task, m in tasks.items()}
        if all("include" in prompt for prompt in prompts):
            notes.append("The paper's GenEval is a mean over images, GenEval's own one over tasks.")

    tables = {}
    for title, part in parts.items():
        found = {metric: bootstrap(scores[metric], texts, part) for metric in scores}
        tables[title] = {row: {metric: found[metric][row] for metric in found} for row in ROWS}
    out = Path(args.output_dir)
    text = "\n".join([*(table(*each) for each in tables.items()), *notes]) + "\n"
    replace_file(out / "table.md", lambda new: new.write_text(f"{text}\n{PAPER}", "utf-8"))
    replace_file(out / "table.json", lambda new: new.write_text(json.dumps(tables, indent=1)))
    replace_file(out / "grid.png", grid(args, asked, scores[args.metrics[0]]).save)
    return text


def evaluate(args: Arguments) -> None:
    """Draws, scores, and writes table.md, table.json, grid.png. Raises Fault and RewardError."""
    out = Path(args.output_dir)
    prompts = prompt_sets.load(args.prompts)
    asked = {
        out / "images" / variant / f"{line:05d}_{seed}.png": prompts[line]
        for variant, line, seed in product(VARIANTS, range(len(prompts)), range(args.seeds))
    }
    texts = [prompt["prompt"] for prompt in prompts for _ in range(args.seeds)]
    claim_folder(args, texts)
    with cli.launching():
        # One process may be done hours before another: ten minutes of patience are too few.
        cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
        state = PartialState(cpu=cpu, timeout=timedelta(days=1))
        torch.ones(1, device=state.device).item()  # the environment may name any device
    found = args.metrics or metrics_at_hand(args, prompts, state.device)
    args.metrics = list(dict.fromkeys(args.reward + found))
    if state.is_main_process:
        tqdm.write(f"{amount(texts)}, in {args.num_inference_steps} steps, by base and {args.lora}")
        file = run_file(args.lora)
        others = f"those of {file}" if file.exists() else f"the usual, as there is no {file}"
        settings = ", ".join(f"{name} {getattr(args, name)}" for name in OF_THE_RUN)
        tqdm.write(f"{settings}; those not given are {others}")
        tqdm.write(f"scored by {', '.join(args.metrics)}; on {state.device}, results in {out}")
    state.wait_for_everyone()
    mine = dict(list(asked.items())[state.process_index :: state.num_processes])
    draw(args, state.device, mine)

    scores = read_json(out / "scores.json")
    if not all(isinstance(x, float) and not abs(x) > rewards.LARGEST for x in scores.values()):
        raise Fault(f"{out}/scores.json holds what is no score; delete it to score again")
    for metric in args.metrics:  # what one has scored is kept if the next one fails
        for part in gather_object([score(args, state.device, mine, scores, metric)]):
            scores |= part
        if state.is_main_process:
            write = functools.partial(Path.write_text, data=json.dumps(scores))
            replace_file(out / "scores.json", write)
    if state.is_main_process:
        tqdm.write(report(args, asked, scores))
        tqdm.write(f"wrote table.md, table.json, grid.png to {out}")
    state.destroy_process_group()  # or gloo's threads may abort it as it ends


def main() -> None:
    try:
        evaluate(parse_args(sys.argv[1:]))
    except rewards.RewardError as error:
        raise Fault(first_line(error)) from None
    except torch.OutOfMemoryError as error:
        raise Fault(f"out of memory ({first_line(error)}); lower --batch_size") from None


if __name__ == "__main__":
    cli.run_and_leave("evaluate.py", main)
