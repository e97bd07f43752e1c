"""Is it better, and at what price? A row of the paper's Table 2 for the base model and for a LoRA.

    python evaluate.py --lora runs/dgpo --reward ocr          # on the task's test prompts
    python evaluate.py --lora runs/dgpo --prompts drawbench

Both draw every prompt from the same noise. What is drawn or scored already is not done again.
Each line of the prompts is drawn --seeds times, each time from noise of its own. GenEval's list has
every prompt four times and DrawBench's five times, so that one seed is what the paper draws.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

import prompts as prompt_sets
import rewards
from cli import Fault, check, first_line, make_folder, option, pairs, parse, replace_file, run
from rewards.ocr import QUOTED
from sd35 import LORA_FILE, decode, load_lora, load_pipeline

VARIANTS = ("base", "lora")
ROWS = ("base", "LoRA", "difference")
RESAMPLES = 10_000  # of the bootstrap
GRID = 4  # prompts with the best gain, and as many with the worst loss
OF_THE_RUN = {  # what is taken from the run that trained the LoRA, and its value without one
    "pretrained_model_name_or_path": "stabilityai/stable-diffusion-3.5-medium",
    "guidance_scale": 4.5,
    "resolution": 512,
    "max_sequence_length": 128,
}

Asked = dict[str, dict]  # the prompt of each picture's key, "<number of its line>_<seed>"
Scores = dict[str, float]  # by "<variant> <key> <metric>"; NaN is an answer without a score
Interval = tuple[float, float, float]  # mean, and the ends of its 95 % interval
Rows = dict[str, dict[str, Interval | None]]  # by one of ROWS and metric; None: no score at all

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

    lora: str = option("", f"folder of the LoRA, with its {LORA_FILE}")
    prompts: str = option("", ".txt or .jsonl file, or a list by name: drawbench, ocr_test, ...")
    reward: str | None = option(
        None, "the task's metric; geneval, ocr and pickscore bring their test prompts"
    )
    metrics: list[str] = option(
        [],
        "rewards to score by, names or file.py:function; their weights are downloaded",
        shown="those of Table 2 whose weights are on this machine",
    )
    reward_model: list[str] = option([], "other weights for some of them: name=path ...")
    pretrained_model_name_or_path: str | None = option(
        None, "base model, by name or folder", "--model", shown="the run's"
    )
    output_dir: str = option("", "folder to write to", shown="evaluation in the LoRA's folder")
    seeds: int = option(1, "pictures of each line of the prompts", at_least=1, at_most=1000)
    num_inference_steps: int = option(40, "steps of the sampler", at_least=1, at_most=1000)
    guidance_scale: float | None = option(
        None, "classifier-free guidance; 1 is none", at_least=1, shown="the run's"
    )
    resolution: int | None = option(
        None, "pixels, a multiple of 16", at_least=16, at_most=4096, shown="the run's"
    )
    max_sequence_length: int | None = option(
        None, "tokens that T5 reads of a prompt", at_least=1, at_most=512, shown="the run's"
    )
    batch_size: int = option(4, "pictures at once", at_least=1, at_most=1024)


def parse_args(argv: list[str] | None = None) -> Arguments:
    """The arguments, checked as far as can be without loading a model. Raises Fault."""
    args = parse(Arguments, sys.argv[1:] if argv is None else argv)
    if f"{args.reward}_test" in prompt_sets.LISTS:
        args.prompts = args.prompts or f"{args.reward}_test"
    if args.reward == "geneval":
        args.reward = "geneval_official"
    for name in ("lora", "prompts"):
        if not getattr(args, name):
            raise Fault(f"argument --{name}: is needed; --help says what for")
    if not (Path(args.lora) / LORA_FILE).is_file():
        raise Fault(f"argument --lora: there is no {Path(args.lora) / LORA_FILE}")
    own, flag = [args.reward] if args.reward else [], "prompts"
    try:
        read = prompt_sets.load(args.prompts)
        for name in own + args.metrics:
            flag = "reward" if name in own else "metrics"
            if rewards.parse(name)[0] != name:
                raise ValueError(f"a metric has no weight, got {name}")
    except ValueError as error:
        raise Fault(f"argument --{flag}: {error}") from None
    bare = next((i for i, prompt in enumerate(read, 1) if "include" not in prompt), None)
    if bare and any(name.startswith("geneval") for name in own + args.metrics):
        raise Fault(f"argument --prompts: prompt {bare} has no GenEval metadata, as geneval needs")
    args.output_dir = args.output_dir or str(Path(args.lora) / "evaluation")
    pairs(args.reward_model)
    return args


def read_json(path: Path) -> dict[str, Any]:
    """What an object in a file holds; nothing if there is no file. Raises Fault."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Fault(f"cannot read {path} ({first_line(error)}); mend or delete it") from None
    if not isinstance(found, dict):
        raise Fault(f"cannot read {path} (it holds no JSON object); mend or delete it")
    return found


def write(path: Path, text: str) -> None:
    replace_file(path, lambda new: new.write_text(text, encoding="utf-8"))


def settle(args: Arguments) -> str:
    """Gives what was not given the value of the run that trained the LoRA, and says so in a line.

    A checkpoint's run is in the folder above. Raises Fault if a value cannot be.
    """
    folder = Path(args.lora).absolute()
    folder = folder.parent if folder.name.startswith("checkpoint-") else folder
    trained, taken = read_json(folder / "arguments.json"), []
    for name, usual in OF_THE_RUN.items():
        found = trained.get(name, usual)
        if getattr(args, name) is None:
            if not isinstance(found, int | float if name == "guidance_scale" else type(usual)):
                raise Fault(f"{folder}/arguments.json has {name} {found!r}; give --{name}")
            setattr(args, name, found)
            taken.append(f"{name} {found}")
    check(args)
    if args.resolution % 16:
        raise Fault(f"argument --resolution: must be a multiple of 16, got {args.resolution}")
    if not taken:
        return "all settings are given"
    where = "taken from" if trained else "the usual, as there is no"
    return f"{', '.join(taken)}: {where} {folder}/arguments.json"


def read_lora(path: Path) -> dict[str, Tensor]:
    """A LoRA's tensors by their names. Raises Fault if they cannot be read or are not finite."""
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise Fault(f"argument --lora: cannot read {path} ({first_line(error)})") from None
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise Fault(f"argument --lora: {path} holds NaN or infinity in {name}")
    return weights


def check_lora(weights: dict[str, Tensor], transformer: nn.Module) -> None:
    """Raises Fault at the first tensor that has no place in the transformer, or another shape.

    diffusers passes over what fits nothing, and the pictures would be the base model's.
    """
    modules, misfit = dict(transformer.named_modules()), None if weights else "it is empty"
    for name in weights:
        place = name.rpartition(".lora_")[0]
        down, up = (weights.get(f"{place}.lora_{x}.weight") for x in "AB")
        module = modules.get(place.removeprefix("transformer."))
        if not place.startswith("transformer.") or None in (module, down, up):
            misfit = f"the model has no place for {name}"
        elif (*up.shape[:1], *down.shape[1:]) != module.weight.shape or len(down) != up.shape[1]:
            shapes = f"{tuple(down.shape)} and {tuple(up.shape)} for {tuple(module.weight.shape)}"
            misfit = f"{place} has shapes {shapes}"
    if misfit:
        raise Fault(f"argument --lora: does not fit the model ({misfit})")


def metrics_at_hand(args: Arguments, prompts: list[dict], device: torch.device) -> list[str]:
    """Of Table 2's metrics that fit the prompts, those that load with what is on this machine.

    Tried one by one, before the pipeline takes its place on the device. Raises Fault if none does.
    """
    wanted = ["aesthetic", "deqa", "imagereward", "pickscore", "unifiedreward"]
    if all("include" in prompt for prompt in prompts):
        wanted.insert(0, "geneval_official")
    elif all(QUOTED.search(prompt["prompt"]) for prompt in prompts):
        wanted.insert(0, "ocr")
    models, found = pairs(args.reward_model), []
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


def claim_folder(args: Arguments, asked: Asked) -> None:
    """Raises Fault if the folder holds pictures of other settings. Metrics may be added later."""
    drawn = {**dataclasses.asdict(args), "texts": [prompt["prompt"] for prompt in asked.values()]}
    for name in ("reward", "metrics", "reward_model", "batch_size", "output_dir", "prompts"):
        drawn.pop(name)
    drawn["LoRA"] = hashlib.sha256((Path(args.lora) / LORA_FILE).read_bytes()).hexdigest()
    kept = Path(args.output_dir) / "settings.json"
    before = read_json(kept)
    for name in drawn if before else ():
        if before.get(name) != drawn[name]:
            where = f"argument --output_dir: {args.output_dir}"
            raise Fault(f"{where} holds pictures of another {name}; give another folder")
    write(kept, json.dumps(drawn))
    for variant in VARIANTS:
        make_folder(f"{args.output_dir}/images/{variant}")


def picture(args: Arguments, variant: str, key: str) -> Path:
    return Path(args.output_dir) / "images" / variant / f"{key}.png"


def is_whole(path: Path, side: int) -> bool:
    """Says so, and is False, if a picture that is there cannot be read or has another size."""
    if not path.exists():
        return False
    with contextlib.suppress(OSError, SyntaxError, ValueError), Image.open(path) as image:
        image.load()
        if image.size == (side, side):
            return True
    tqdm.write(f"{path} is damaged: drawn again")
    return False


@torch.no_grad()
def pixels(args: Arguments, pipe: Any, asked: Asked, keys: list[str]) -> np.ndarray:
    """Pictures (N, H, W, 3) in bytes, from noise that depends on the key alone."""
    side = args.resolution // pipe.vae_scale_factor
    shape = (pipe.transformer.config.in_channels, side, side)
    noise = [
        torch.randn(shape, generator=torch.Generator().manual_seed(1000 * int(line) + int(seed)))
        for line, seed in (key.split("_") for key in keys)
    ]
    latents = pipe(
        [asked[key]["prompt"] for key in keys],
        latents=torch.stack(noise).to(pipe.device, pipe.transformer.dtype),
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        height=args.resolution,
        width=args.resolution,
        max_sequence_length=args.max_sequence_length,
        output_type="latent",
    ).images
    if not latents.isfinite().all():
        raise Fault(f"a picture of {asked[keys[0]]['prompt']!r}, or near it, is not finite")
    return rewards.to_bytes(decode(pipe.vae, latents))


def draw(args: Arguments, device: torch.device, asked: Asked, keys: list[str]) -> None:
    """Draws the pictures of `keys` that are not there yet, by the base model and then the LoRA."""
    missing = {
        variant: [key for key in keys if not is_whole(picture(args, variant, key), args.resolution)]
        for variant in VARIANTS
    }
    if not any(missing.values()):
        return
    weights = read_lora(Path(args.lora) / LORA_FILE)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = load_pipeline(args.pretrained_model_name_or_path, dtype).to(device)
    config = pipe.transformer.config
    most = config.pos_embed_max_size * config.patch_size * pipe.vae_scale_factor
    if args.resolution > most:
        raise Fault(f"argument --resolution: the model has at most {most}, got {args.resolution}")
    check_lora(weights, pipe.transformer)
    for variant, left in missing.items():
        if variant == "lora":
            load_lora(pipe, args.lora)
        for i in tqdm(range(0, len(left), args.batch_size), f"drawing, {variant}", disable=None):
            batch = left[i : i + args.batch_size]
            for key, pixel in zip(batch, pixels(args, pipe, asked, batch), strict=True):
                replace_file(picture(args, variant, key), Image.fromarray(pixel).save)


def read_picture(path: Path) -> Tensor:
    """(3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) / 255


def read_scores(path: Path) -> Scores:
    """Raises Fault."""
    scores = read_json(path)
    if not all(isinstance(score, float) for score in scores.values()):
        raise Fault(f"{path} holds what is no score; delete it, and the pictures are scored again")
    return scores


def score(
    args: Arguments, device: torch.device, asked: Asked, keys: list[str], known: Scores
) -> Scores:
    """Scores of the pictures of `keys` by each metric that has them not yet. Raises RewardError."""
    found: Scores = {}
    for metric in args.metrics:
        each = [(variant, key) for variant in VARIANTS for key in keys]
        missing = [one for one in each if " ".join((*one, metric)) not in known]
        if not missing:
            continue
        reward = rewards.load(metric, device, pairs(args.reward_model).get(metric))
        batches = range(0, len(missing), args.batch_size)
        for i in tqdm(batches, f"scoring by {metric}", disable=None):
            batch = missing[i : i + args.batch_size]
            images = torch.stack([read_picture(picture(args, *one)) for one in batch])
            prompts = [asked[key] for _, key in batch]
            values = rewards.score(metric, reward, images.to(device), prompts).tolist()
            found |= {" ".join((*one, metric)): x for one, x in zip(batch, values, strict=True)}
    return found


@functools.cache
def resamples(n: int) -> np.ndarray:
    """How often each of n prompts is in each of the bootstrap's resamples, (RESAMPLES, n)."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(float)


def bootstrap(tasks: list[list[list]]) -> list[Interval | None]:
    """For each column of scores its mean, and the ends of the mean's 95 % interval.

    tasks: for each task, for each prompt, for each picture a row of scores. What is resampled is a
    task's prompts, each with all its pictures, which are alike. A task's mean is over its pictures,
    and several tasks count alike, whatever their size. None if a task has no picture.
    """
    if not all(tasks):
        return [None] * len(ROWS)
    mean, means = 0.0, 0.0
    for prompts in tasks:
        drawn = resamples(len(prompts))
        sums = np.array([np.sum(rows, 0) for rows in prompts])  # (prompts, columns)
        counts = np.array([[len(rows)] for rows in prompts])
        mean = mean + sums.sum(0) / counts.sum() / len(tasks)
        means = means + drawn @ sums / (drawn @ counts) / len(tasks)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return list(zip(mean.tolist(), low.tolist(), high.tolist(), strict=True))


def summarise(scores: Scores, metrics: list[str], asked: Asked, tasks: list[list[str]]) -> Rows:
    """For base, LoRA and their difference, paired by noise: mean and interval of each metric.

    tasks: the keys of each. Prompts are told apart by their text. A pair of pictures of which one
    has no score is left out of all three rows.
    """
    rows: Rows = {row: {} for row in ROWS}
    for metric in metrics:
        grouped = []
        for keys in tasks:
            prompts = defaultdict(list)
            for key in keys:
                base, lora = (scores[f"{variant} {key} {metric}"] for variant in VARIANTS)
                if math.isfinite(base) and math.isfinite(lora):
                    prompts[asked[key]["prompt"]].append((base, lora, lora - base))
            grouped.append(list(prompts.values()))
        for row, interval in zip(ROWS, bootstrap(grouped), strict=True):
            rows[row][metric] = interval
    return rows


def table(title: str, rows: Rows) -> str:
    metrics = list(rows[ROWS[0]])
    lines = [f"| {title} | {' | '.join(metrics)} |", "|---" * (len(metrics) + 1) + "|"]
    for name, cells in rows.items():
        shown = [
            "{:.3f} [{:.3f}, {:.3f}]".format(*cell) if cell else "no score"
            for cell in cells.values()
        ]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def amount(keys: list[str], asked: Asked) -> str:
    n = len({asked[key]["prompt"] for key in keys})
    each, rest = divmod(len(keys), n)
    return f"{n} prompts, {len(keys)} pictures" if rest else f"{n} prompts, {each} each"


def grid(args: Arguments, asked: Asked, scores: Scores) -> None:
    """grid.png: the best gains and the worst losses by the first metric, scores underneath."""
    value = {
        variant: {key: scores[f"{variant} {key} {args.metrics[0]}"] for key in asked}
        for variant in VARIANTS
    }
    gain = {key: value["lora"][key] - value["base"][key] for key in asked}
    ranked = sorted((key for key in asked if math.isfinite(gain[key])), key=lambda key: -gain[key])
    shown = ranked if len(ranked) <= 2 * GRID else ranked[:GRID] + ranked[-GRID:]
    side = max(256, min(args.resolution, 384))
    line, width = 22, 2 * side
    sheet = Image.new("RGB", (width, max(1, len(shown)) * (side + 2 * line)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, key in enumerate(shown):
        y = row * (side + 2 * line)
        text = f"{gain[key]:+.3g}  {asked[key]['prompt']}"
        while pen.textlength(text, font_size=14) > width - 8 and len(text) > 1:
            text = text[:-2] + "…"
        pen.text((4, y + 3), text, fill="black", font_size=14)
        for x, variant in ((0, "base"), (side, "lora")):
            image = Image.open(picture(args, variant, key)).convert("RGB")
            sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (x, y + line))
            place, text = (x + 4, y + line + side + 3), f"{variant}: {value[variant][key]:.3f}"
            pen.text(place, text, fill="black", font_size=14)
    replace_file(Path(args.output_dir) / "grid.png", sheet.save)


def report(args: Arguments, asked: Asked, scores: Scores) -> str:
    """Writes table.md, table.json and grid.png, and returns the tables. Raises Fault."""
    notes = ["Mean and 95 % bootstrap interval over prompts; the difference is paired by noise."]
    for metric in args.metrics:
        answers = [scores[f"{variant} {key} {metric}"] for variant in VARIANTS for key in asked]
        lost = sum(not math.isfinite(answer) for answer in answers)
        if lost == len(answers):
            raise Fault(f"argument --metrics: none of {lost} answers of {metric} had a score")
        if lost:
            notes.append(f"{lost} of {len(answers)} answers of {metric} had no score.")

    tasks: dict[str, list[str]] = {}
    for key, prompt in asked.items():
        tasks.setdefault(str(prompt.get("tag") or prompt.get("task") or ""), []).append(key)
    several = len(tasks) > 1 and "" not in tasks
    title = "mean over images, " * several + amount(list(asked), asked)
    parts = {title: [list(asked)]}
    if several:
        parts[f"mean over {len(tasks)} tasks, each counting alike"] = list(tasks.values())
        parts |= {f"{task}, {amount(keys, asked)}": [keys] for task, keys in tasks.items()}
        if all("include" in prompt for prompt in asked.values()):
            notes.append("The paper's GenEval is a mean over images, GenEval's own one over tasks.")
    found = {title: summarise(scores, args.metrics, asked, keys) for title, keys in parts.items()}
    text = "\n".join([*(table(*each) for each in found.items()), *notes]) + "\n"
    out = Path(args.output_dir)
    write(out / "table.md", f"{text}\n{PAPER}")
    write(out / "table.json", json.dumps(found, indent=1))
    grid(args, asked, scores)
    return text


def evaluate(args: Arguments) -> None:
    """Draws, scores, and writes table.md, table.json, grid.png. Raises Fault and RewardError."""
    taken = settle(args)
    out = make_folder(args.output_dir)
    prompts = prompt_sets.load(args.prompts)
    asked = {f"{i:05d}_{k}": prompt for i, prompt in enumerate(prompts) for k in range(args.seeds)}
    state = PartialState(cpu=not torch.cuda.is_available())
    args.metrics = args.metrics or metrics_at_hand(args, prompts, state.device)
    args.metrics = list(dict.fromkeys(([args.reward] if args.reward else []) + args.metrics))
    if state.is_main_process:
        claim_folder(args, asked)
        steps, where = args.num_inference_steps, f"on {state.device}, results in {out}"
        tqdm.write(f"{amount(list(asked), asked)}, in {steps} steps, by base and {args.lora}")
        tqdm.write(f"{taken}\nscored by {', '.join(args.metrics)}; {where}")
    state.wait_for_everyone()
    mine = list(asked)[state.process_index :: state.num_processes]
    draw(args, state.device, asked, mine)
    state.wait_for_everyone()

    scores = read_scores(out / "scores.json")
    for part in gather_object([score(args, state.device, asked, mine, scores)]):
        scores |= part
    if state.is_main_process:
        write(out / "scores.json", json.dumps(scores))
        tqdm.write(report(args, asked, scores))
        tqdm.write(f"wrote table.md, table.json, grid.png to {out}")


def main() -> None:
    try:
        evaluate(parse_args())
    except rewards.RewardError as error:
        raise Fault(first_line(error)) from None
    except torch.OutOfMemoryError as error:
        raise Fault(f"out of memory ({first_line(error)}); lower --batch_size") from None


if __name__ == "__main__":
    run("evaluate.py", main)
