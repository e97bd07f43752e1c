"""Is it better, and at what price? A row of the paper's Table 2 for the base model and for a LoRA.

    python evaluate.py --lora runs/dgpo --reward ocr          # on the task's test prompts
    python evaluate.py --lora runs/dgpo --prompts drawbench

Both draw every prompt from the same noise. What is drawn or scored already is not done again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import StableDiffusion3Pipeline
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

import prompts as prompt_sets
import rewards
from cli import Fault, make_folder, option, parse
from cli import pairs as other_weights
from rewards.ocr import QUOTED
from sd35 import decode, load_pipeline

VARIANTS = ("base", "lora")
RESAMPLES = 10_000  # of the bootstrap
GRID = 4  # prompts with the best gain, and as many with the worst loss

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

    lora: str | None = option(None, "its folder, with pytorch_lora_weights.safetensors")
    prompts: str | None = option(None, ".txt or .jsonl file, or a list by name: drawbench, ...")
    reward: str | None = option(
        None, "the task's metric; geneval, ocr and pickscore bring their test prompts"
    )
    metrics: list[str] = option(
        [], "rewards to score by: names, or file.py:function; default: those whose weights are here"
    )
    reward_model: list[str] = option([], "other weights for one of them: name=path ...")
    pretrained_model_name_or_path: str = option(
        "stabilityai/stable-diffusion-3.5-medium", "model, by name or folder", "--model"
    )
    output_dir: str | None = option(None, "default: evaluation in the LoRA's folder")
    seeds: int = option(1, "pictures of a prompt")
    num_inference_steps: int = option(40, "of the model's own sampler")
    guidance_scale: float = option(4.5, "of classifier-free guidance; 1 is none")
    resolution: int = option(512, "of the pictures, a multiple of 16")
    max_sequence_length: int = option(128, "of T5's tokens for a prompt")
    batch_size: int = option(4, "pictures at once")


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
    weights = Path(args.lora) / "pytorch_lora_weights.safetensors"
    if not weights.is_file():
        raise Fault(f"argument --lora: there is no {weights}")
    for name in ("seeds", "num_inference_steps", "batch_size"):
        if getattr(args, name) < 1:
            raise Fault(f"argument --{name}: must be at least 1, got {getattr(args, name)}")
    if args.resolution < 16 or args.resolution % 16:
        raise Fault(f"argument --resolution: must be a multiple of 16, got {args.resolution}")
    try:
        flag = "reward"
        if args.reward:
            rewards.parse(args.reward)
        flag = "metrics"
        for metric in args.metrics:
            rewards.parse(metric)
        flag = "prompts"
        read = prompt_sets.load(args.prompts)
    except ValueError as error:
        raise Fault(f"argument --{flag}: {error}") from None
    for i, prompt in enumerate(read, 1):
        asked = [args.reward or "", *args.metrics]
        if any(m.startswith("geneval") for m in asked) and "include" not in prompt:
            raise Fault(f"argument --prompts: prompt {i} has no GenEval metadata, as geneval needs")
    args.output_dir = args.output_dir or str(Path(args.lora) / "evaluation")
    other_weights(args.reward_model)
    make_folder(args.output_dir)
    return args


def load_metric(name: str, device: torch.device | str, model: str | None) -> rewards.Reward:
    """Raises Fault if it cannot be loaded."""
    try:
        return rewards.load(name, device, model)
    except (OSError, ImportError, ValueError, AttributeError, RuntimeError, KeyError) as error:
        line = str(error).strip().splitlines()[0]
        raise Fault(f"argument --metrics: cannot load {name} ({line})") from None


def metrics_at_hand(
    args: Arguments, prompts: list[dict], device: torch.device, say: bool
) -> list[str]:
    """Of Table 2's metrics that fit the prompts, those that load with what is on this machine.

    Tried one by one, before the pipeline takes its place on the device. Raises Fault if none does.
    """
    models = other_weights(args.reward_model)
    wanted = ["aesthetic", "deqa", "imagereward", "pickscore", "unifiedreward"]
    if all("include" in prompt for prompt in prompts):
        wanted.insert(0, "geneval_official")
    elif all(QUOTED.search(prompt["prompt"]) for prompt in prompts):
        wanted.insert(0, "ocr")
    found, fetching = [], huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # weights that are not here stay where they are
    try:
        for metric in wanted:
            try:
                load_metric(metric, device, models.get(metric))
                found.append(metric)
            except Fault as fault:
                if say:
                    tqdm.write(f"without {metric}: {fault}")
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = fetching
    if not found and not args.reward:
        raise Fault(f"argument --metrics: none is at hand; name one to fetch: {', '.join(wanted)}")
    return found


def write(path: Path, text: str) -> None:
    new = path.with_name(f".{os.getpid()}-{path.name}")
    new.write_text(text)
    os.replace(new, path)


def claim_folder(args: Arguments, prompts: list[dict]) -> None:
    """Raises Fault if the folder holds pictures of other settings. Metrics may be added later."""
    drawn = {**dataclasses.asdict(args), "texts": [prompt["prompt"] for prompt in prompts]}
    for name in ("reward", "metrics", "reward_model", "batch_size", "output_dir", "prompts"):
        drawn.pop(name)
    kept = Path(args.output_dir) / "settings.json"
    if kept.exists() and (before := json.loads(kept.read_text())) != drawn:
        changed = next(name for name in drawn if before.get(name) != drawn[name])
        raise Fault(
            f"argument --output_dir: {args.output_dir} holds pictures of another {changed}; "
            "give another folder"
        )
    write(kept, json.dumps(drawn))


def picture(args: Arguments, variant: str, key: str) -> Path:
    """Of a key "<prompt's number>_<seed>"."""
    return Path(args.output_dir) / "images" / variant / f"{key}.png"


def is_whole(path: Path) -> bool:
    """Says so, and is False, if a picture that is there cannot be read."""
    if not path.exists():
        return False
    try:
        with Image.open(path) as image:
            image.load()
        return True
    except OSError:
        tqdm.write(f"{path} is damaged: drawn again")
        return False


@torch.no_grad()
def draw(
    args: Arguments,
    pipe: StableDiffusion3Pipeline,
    variant: str,
    prompts: list[dict],
    keys: list[str],
) -> None:
    """The pictures of `keys` that are not there yet, from noise that hangs on the key alone."""
    missing = [key for key in keys if not is_whole(picture(args, variant, key))]
    side = args.resolution // pipe.vae_scale_factor
    shape = (pipe.transformer.config.in_channels, side, side)
    for i in tqdm(range(0, len(missing), args.batch_size), f"drawing, {variant}", disable=None):
        batch = missing[i : i + args.batch_size]
        noise = [
            torch.randn(shape, generator=torch.Generator().manual_seed(1000 * int(p) + int(seed)))
            for p, seed in (key.split("_") for key in batch)
        ]
        latents = pipe(
            [prompts[int(key.split("_")[0])]["prompt"] for key in batch],
            latents=torch.stack(noise).to(pipe.device, pipe.transformer.dtype),
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            height=args.resolution,
            width=args.resolution,
            max_sequence_length=args.max_sequence_length,
            output_type="latent",
        ).images
        pixels = (decode(pipe.vae, latents) * 255).round().to("cpu", torch.uint8)
        for key, pixel in zip(batch, pixels.permute(0, 2, 3, 1).numpy(), strict=True):
            path = picture(args, variant, key)
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_name(f".{key}.png")
            Image.fromarray(pixel).save(new)
            os.replace(new, path)


def read_picture(path: Path) -> Tensor:
    """(3, H, W) in [0, 1]."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255


Scores = dict[str, dict[str, dict[str, float]]]  # variant, metric, key


def score(
    args: Arguments, device: torch.device, prompts: list[dict], keys: list[str], known: Scores
) -> Scores:
    """Scores of the pictures of `keys` by each metric that has them not yet."""
    models = other_weights(args.reward_model)
    found: Scores = {variant: {} for variant in VARIANTS}
    for metric in args.metrics:
        missing = [
            (variant, key)
            for variant in VARIANTS
            for key in keys
            if key not in known.get(variant, {}).get(metric, {})
        ]
        if not missing:
            continue
        reward = load_metric(metric, device, models.get(metric))
        batches = range(0, len(missing), args.batch_size)
        for i in tqdm(batches, f"scoring by {metric}", disable=None):
            batch = missing[i : i + args.batch_size]
            images = torch.stack([read_picture(picture(args, *each)) for each in batch])
            asked = [prompts[int(key.split("_")[0])] for _, key in batch]
            try:
                values = rewards.score(metric, reward, images.to(device), asked).tolist()
            except rewards.RewardError as error:
                raise Fault(str(error)) from None
            for (variant, key), value in zip(batch, values, strict=True):
                found[variant].setdefault(metric, {})[key] = value
    return found


def merge(*parts: Scores) -> Scores:
    merged: Scores = {variant: {} for variant in VARIANTS}
    for part in parts:
        for variant, metrics in part.items():
            for metric, values in metrics.items():
                merged[variant].setdefault(metric, {}).update(values)
    return merged


def bootstrap(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and the ends of its 95 % interval; values (N,) are one for each prompt."""
    rng = np.random.default_rng(0)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def summarise(
    scores: Scores, metrics: list[str], keys: list[str]
) -> dict[str, dict[str, tuple[float, float, float]]]:
    """For base, LoRA and their difference, paired by noise: mean and interval of each metric.

    Prompts are what is resampled: a prompt's seeds are averaged first.
    """
    owners = sorted({key.split("_")[0] for key in keys})

    def by_prompt(variant: str, metric: str) -> np.ndarray:
        values = scores[variant][metric]
        return np.array(
            [
                np.mean([values[key] for key in keys if key.split("_")[0] == owner])
                for owner in owners
            ]
        )

    rows = {}
    for metric in metrics:
        base, lora = by_prompt("base", metric), by_prompt("lora", metric)
        for name, values in (("base", base), ("LoRA", lora), ("difference", lora - base)):
            rows.setdefault(name, {})[metric] = bootstrap(values)
    return rows


def table(title: str, rows: dict[str, dict[str, tuple[float, float, float]]]) -> str:
    metrics = list(next(iter(rows.values())))
    lines = [f"| {title} | {' | '.join(metrics)} |", "|---" * (len(metrics) + 1) + "|"]
    for name, cells in rows.items():
        shown = [f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in cells.values()]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def grid(args: Arguments, prompts: list[dict], keys: list[str], scores: Scores) -> None:
    """grid.png: the best gains and the worst losses by the first metric, scores underneath."""
    metric = args.metrics[0]
    gain = {key: scores["lora"][metric][key] - scores["base"][metric][key] for key in keys}
    ranked = sorted(keys, key=lambda key: -gain[key])
    shown = ranked if len(ranked) <= 2 * GRID else ranked[:GRID] + ranked[-GRID:]
    side = max(256, min(args.resolution, 384))
    line, width = 22, 2 * side
    sheet = Image.new("RGB", (width, len(shown) * (side + 2 * line)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, key in enumerate(shown):
        y = row * (side + 2 * line)
        text = f"{gain[key]:+.3g}  {prompts[int(key.split('_')[0])]['prompt']}"
        while pen.textlength(text, font_size=14) > width - 8 and len(text) > 1:
            text = text[:-2] + "…"
        pen.text((4, y + 3), text, fill="black", font_size=14)
        for column, variant in enumerate(VARIANTS):
            image = Image.open(picture(args, variant, key)).convert("RGB")
            resized = image.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(resized, (column * side, y + line))
            value = scores[variant][metric][key]
            place = (column * side + 4, y + line + side + 3)
            pen.text(place, f"{variant}: {value:.3f}", fill="black", font_size=14)
    new = Path(args.output_dir) / f".{os.getpid()}-grid.png"
    sheet.save(new)
    os.replace(new, Path(args.output_dir) / "grid.png")


def evaluate(args: Arguments) -> None:
    """Draws, scores, and writes table.md, table.json, grid.png."""
    prompts = prompt_sets.load(args.prompts)
    keys = [f"{i:05d}_{seed}" for i in range(len(prompts)) for seed in range(args.seeds)]
    state = PartialState(cpu=not torch.cuda.is_available())
    if not args.metrics:
        say = state.is_main_process
        args.metrics = metrics_at_hand(args, prompts, state.device, say)
    if args.reward:
        args.metrics = [args.reward, *(m for m in args.metrics if m != args.reward)]
    if state.is_main_process:
        claim_folder(args, prompts)
    state.wait_for_everyone()
    mine = keys[state.process_index :: state.num_processes]
    out = Path(args.output_dir)
    undrawn = [
        variant
        for variant in VARIANTS
        if not all(is_whole(picture(args, variant, key)) for key in mine)
    ]
    if undrawn:
        dtype = torch.bfloat16 if state.device.type == "cuda" else torch.float32
        pipe = load_pipeline(args.pretrained_model_name_or_path, dtype).to(state.device)
        for variant in undrawn:
            if variant == "lora":
                try:
                    name = "pytorch_lora_weights.safetensors"
                    pipe.load_lora_weights(args.lora, weight_name=name)
                except (RuntimeError, ValueError, KeyError) as error:
                    line = str(error).strip().splitlines()[0]
                    raise Fault(f"argument --lora: does not fit the model ({line})") from None
            draw(args, pipe, variant, prompts, mine)
        del pipe
    state.wait_for_everyone()

    kept = out / "scores.json"
    known = json.loads(kept.read_text()) if kept.exists() else {}
    found = merge(known, *gather_object([score(args, state.device, prompts, mine, known)]))
    if not state.is_main_process:
        return
    write(kept, json.dumps(found))
    bad = [
        f"{metric} of {variant} {key}"
        for variant in VARIANTS
        for metric in args.metrics
        for key in keys
        if not math.isfinite(found[variant][metric][key])
    ]
    if bad:
        raise Fault(f"{len(bad)} scores are not finite, the first is {bad[0]}")
    rows = summarise(found, args.metrics, keys)
    text = table(f"{len(prompts)} prompts, {args.seeds} each", rows)
    tags = [prompt.get("tag") or prompt.get("task") for prompt in prompts]
    by_task = {}
    for tag in dict.fromkeys(tags) if all(tags) else ():
        own = [key for key in keys if tags[int(key.split("_")[0])] == tag]
        by_task[tag] = summarise(found, args.metrics, own)
        text += "\n" + table(f"{tag}, {tags.count(tag)} prompts", by_task[tag])
    text += "\nMean and 95 % bootstrap interval over prompts; the difference is paired by noise.\n"
    write(out / "table.md", f"{text}\n{PAPER}")
    write(out / "table.json", json.dumps({"all": rows, "tasks": by_task}, indent=1))
    grid(args, prompts, keys, found)
    print(text)
    print(f"wrote table.md, table.json, grid.png to {out}")


def main() -> None:
    try:
        evaluate(parse_args())
    except Fault as fault:
        print(f"evaluate.py: {fault}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        line = str(error).splitlines()[0]
        print(f"evaluate.py: out of memory ({line}); lower --batch_size", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
