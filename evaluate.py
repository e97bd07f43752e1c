"""Is it better, and at what price? Tables 1 and 2 of the paper, for the base model and a LoRA.

    python evaluate.py --lora runs/dgpo --reward ocr          # on the reward's test prompts
    python evaluate.py --lora runs/dgpo --prompts drawbench

The base model and the LoRA draw each image from the same noise, so the comparison is paired. Run it
again to continue an interrupted evaluation or to add metrics: images and scores are reused.
GenEval's list has each prompt four times and DrawBench's five times, as often as the paper draws
them, each time from other noise. The paper's GenEval is the mean over images, not over tasks.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from tqdm import tqdm

import rewards
from sd35 import prompts as prompt_lists
from sd35.lora import LORA_FILE, PEFT_FILES, check_folder, load_lora
from sd35.model import decode, load_pipeline, place
from sd35.report import sheet
from sd35.run import replace_file, run_script
from sd35.settings import Settings, UserError, parse

VARIANTS = ("base", "lora")
ROWS = ("base", "LoRA", "difference")
OF_THE_RUN = "pretrained_model_name_or_path guidance_scale resolution max_sequence_length".split()
GRID = 4  # prompts with the largest gains in grid.png, and as many with the largest losses

# For comparison. The first three columns are on the task's prompts, the last five on DrawBench.
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

Images = dict[Path, dict]  # each image's prompt: all of the base model, then all of the LoRA


@dataclass
class EvaluationSettings:
    """Compare a LoRA with its base model on prompts and metrics."""

    lora: str = ""  # The LoRA's folder: a run, a checkpoint, or what diffusers or PEFT saves.
    # A .txt or .jsonl file, or a published list, as drawbench. Default: --reward's test prompts.
    prompts: str = ""
    reward: list[str] = field(default_factory=list)  # What the LoRA was trained on; scored first.
    # Rewards by name, or file.py:function. Table 2 also has deqa and unifiedreward.
    metrics: list[str] = field(default_factory=lambda: ["aesthetic", "imagereward", "pickscore"])
    reward_model: list[str] = field(default_factory=list)  # Other weights for a metric: name=path.
    output_dir: str = ""  # Default: "evaluation" in the LoRA's folder, or beside a checkpoint.
    seeds: int = 1  # Images per line of the prompts.
    num_inference_steps: int = 40  # Steps of the sampler.
    batch_size: int = 4  # Images at once. Lower it if memory is short.
    pretrained_model_name_or_path: str | None = None  # The base model. Default: the run's.
    guidance_scale: float | None = None  # Default: the run's; 1 is none.
    resolution: int | None = None  # Side of the images in pixels. Default: the run's.
    max_sequence_length: int | None = None  # Maximum of T5's tokens. Default: the run's.


def resolve(settings: EvaluationSettings) -> None:
    """Fill in what depends on the run that trained the LoRA and on its reward. Raises UserError."""
    lora = Path(settings.lora).absolute()
    check_folder("--lora", lora)
    file = lora / "settings.yaml"  # another trainer's LoRA has none: then our defaults apply
    trained = yaml.safe_load(file.read_text("utf-8")) if file.exists() else {}
    for name in OF_THE_RUN:
        if getattr(settings, name) is None:
            setattr(settings, name, trained.get(name, getattr(Settings, name)))
    if settings.resolution % 16:
        raise UserError(f"--resolution must be a multiple of 16, got {settings.resolution}")

    names = list(rewards.parse(settings.reward))
    lists = [f"{name}_test" for name in names if f"{name}_test" in prompt_lists.LISTS]
    if not settings.prompts and not lists:
        raise UserError("--prompts is needed: a file, or a published list such as drawbench")
    settings.prompts = settings.prompts or lists[0]
    names = ["geneval_official" if name == "geneval" else name for name in names]
    settings.metrics = list(dict.fromkeys(names + list(rewards.parse(settings.metrics))))
    checkpoint = lora.name.startswith("checkpoint-")  # which its run may delete
    out = lora.with_name(f"evaluation-{lora.name}") if checkpoint else lora / "evaluation"
    settings.output_dir = settings.output_dir or str(out)


def claim_folder(settings: EvaluationSettings, prompts: list[dict]) -> None:
    """Write evaluation.json. Raises UserError if the folder has images of another evaluation."""
    out, digest = Path(settings.output_dir), hashlib.sha256()
    for file in (Path(settings.lora) / name for name in (LORA_FILE, *PEFT_FILES)):
        digest.update(file.read_bytes() if file.exists() else b"")
    names = (*OF_THE_RUN, "num_inference_steps", "seeds")
    drawn = {f"--{name}": getattr(settings, name) for name in names}
    drawn |= {"--lora": digest.hexdigest(), "--prompts": [prompt["prompt"] for prompt in prompts]}
    file = out / "evaluation.json"
    before = json.loads(file.read_text("utf-8")) if any(out.glob("images/*/*.png")) else drawn
    for name in drawn:
        if before[name] != drawn[name]:
            raise UserError(f"{out} has images of another {name}; use another --output_dir")
    if PartialState().is_main_process:
        replace_file(file, lambda new: new.write_text(json.dumps(drawn), "utf-8"))


def batches(paths: list[Path], size: int, title: str) -> tqdm:
    return tqdm([paths[i : i + size] for i in range(0, len(paths), size)], title, disable=None)


def draw(settings: EvaluationSettings, device: torch.device, images: Images) -> None:
    """Draw the images that do not exist yet, each from noise that depends on its name alone."""
    missing = [path for path in images if not path.exists()]
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)  # False without a GPU
    dtype = torch.bfloat16 if bf16 else torch.float32
    pipe = load_pipeline(settings.pretrained_model_name_or_path, dtype)
    load_lora(pipe, settings.lora)  # before anything is drawn, as it may not fit
    place(pipe, device)
    for variant, switch in zip(VARIANTS, (pipe.disable_lora, pipe.enable_lora), strict=True):
        switch()
        paths = [path for path in missing if path.parent.name == variant]
        for batch in batches(paths, settings.batch_size, f"drawing, {variant}"):
            seeds = [1000 * int(path.stem[:5]) + int(path.stem[6:]) for path in batch]
            latents = pipe(
                [images[path]["prompt"] for path in batch],
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                height=settings.resolution,
                width=settings.resolution,
                max_sequence_length=settings.max_sequence_length,
                output_type="latent",
            ).images
            if not latents.isfinite().all():
                raise UserError(f"{variant} draws images that are not finite")
            pixels = rewards.to_bytes(decode(pipe.vae, latents))
            for path, image in zip(batch, pixels, strict=True):
                replace_file(path, Image.fromarray(image).save)


def read_image(path: Path) -> torch.Tensor:
    """(3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) / 255


def score_key(path: Path, prompt: dict, metric: str, model: str | None) -> str:
    """The key of a score in scores.json. Another prompt line, weights or code give another key."""
    code = metric.rpartition(":")[0]
    content = Path(code).read_bytes() if code.endswith(".py") else b""
    content += f"{json.dumps(prompt, sort_keys=True)} {model}".encode()
    name = f"{path.parent.name} {path.stem} {metric}"
    return f"{name} {hashlib.sha256(content).hexdigest()[:16]}"


def bootstrap(scores: np.ndarray, lines: list[str], tasks: list[list[int]]) -> dict:
    """Means of base, LoRA and their difference, each with the ends of its 95 % interval.

    scores: (2, N), of base and LoRA from the same noise; a pair with a NaN does not count.
    lines: the N prompts. Images of equal lines are resampled together, as they are correlated.
    tasks: the images of each task. A task's mean is over its images; all tasks have equal weight.
    Returns None for each row if a task has no scores.
    """
    mean, means, values = 0.0, 0.0, np.stack([*scores, scores[1] - scores[0]], 1)  # (N, 3)
    rng = np.random.default_rng(0)
    for task in tasks:
        clusters = defaultdict(list)
        for i in task:
            if np.isfinite(values[i]).all():
                clusters[lines[i]].append(values[i])
        if not clusters:
            return dict.fromkeys(ROWS)
        n = len(clusters)
        drawn = rng.multinomial(n, np.full(n, 1 / n), 10_000)  # resamples
        sums = np.array([np.sum(images, 0) for images in clusters.values()])  # (n, 3)
        counts = np.array([[len(images)] for images in clusters.values()])
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


def amount(lines: list[str]) -> str:
    return f"{len(set(lines))} prompts, {len(lines)} images"


def grid(images: Images, scores: np.ndarray, resolution: int) -> Image.Image:
    """Base and LoRA side by side, for the largest gains and losses. scores: (2, N)."""
    both = np.array(list(images)).reshape(2, -1)
    gains = scores[1] - scores[0]
    ranked = np.argsort(-gains, kind="stable")[: np.isfinite(gains).sum()].tolist()
    rows = []
    for i in ranked if len(ranked) <= 2 * GRID else ranked[:GRID] + ranked[-GRID:]:
        heading = f"{gains[i]:+.3g}  {images[both[0, i]]['prompt']}"
        captions = [f"{name}: {x:.3f}" for name, x in zip(VARIANTS, scores[:, i], strict=True)]
        rows.append((heading, captions, torch.stack([read_image(path) for path in both[:, i]])))
    return sheet(rows, side=max(256, min(resolution, 384)))


def report(settings: EvaluationSettings, images: Images, scores: dict[str, np.ndarray]) -> str:
    """Write table.md, table.json and grid.png. Returns what to say. scores: (2, N) by metric."""
    notes = ["Mean and 95 % bootstrap interval over prompts; the difference is paired by noise."]
    for metric, values in scores.items():
        if missing := (~np.isfinite(values)).sum():
            notes.append(f"{missing} of {values.size} images have no score by {metric}.")

    prompts = list(images.values())[: len(images) // 2]
    # Prompts are told apart by their whole line, as one text may have different metadata.
    lines, tasks = [json.dumps(prompt, sort_keys=True) for prompt in prompts], defaultdict(list)
    for i, prompt in enumerate(prompts):
        tasks[str(prompt.get("tag", prompt.get("task", "")))].append(i)
    several = len(tasks) > 1 and "" not in tasks
    parts = {"mean over images, " * several + amount(lines): [range(len(lines))]}
    if several:
        parts[f"mean over {len(tasks)} tasks of equal weight"] = list(tasks.values())
        parts |= {f"{task}, {amount([lines[i] for i in m])}": [m] for task, m in tasks.items()}

    tables = {}
    for title, part in parts.items():
        cells = {metric: bootstrap(values, lines, part) for metric, values in scores.items()}
        tables[title] = {row: {metric: cells[metric][row] for metric in cells} for row in ROWS}
    out = Path(settings.output_dir)
    text = "\n".join([*(table(*each) for each in tables.items()), *notes]) + "\n"
    replace_file(out / "table.md", lambda new: new.write_text(f"{text}\n{PAPER}", "utf-8"))
    replace_file(out / "table.json", lambda new: new.write_text(json.dumps(tables, indent=1)))
    first = next(iter(scores.values()))
    if np.isfinite(first).all(0).any():
        replace_file(out / "grid.png", grid(images, first, settings.resolution).save)
    return f"{text}\nwrote the tables and, if images have scores, grid.png to {out}"


def evaluate(settings: EvaluationSettings) -> None:
    """Draw, score and report. Raises UserError and RewardError."""
    resolve(settings)
    out, prompts = Path(settings.output_dir), prompt_lists.load(settings.prompts)
    rewards.check_prompts(settings.metrics, prompts)
    models = rewards.interface.parse_models(settings.reward_model, settings.metrics)
    # One process may finish hours before another: the default of ten minutes is too short.
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    state = PartialState(cpu=not gpu, timeout=timedelta(days=1))
    claim_folder(settings, prompts)
    images = {
        out / "images" / variant / f"{line:05d}_{seed}.png": prompts[line]
        for variant, line, seed in product(VARIANTS, range(len(prompts)), range(settings.seeds))
    }
    mine = dict(list(images.items())[state.process_index :: state.num_processes])
    if not all(path.exists() for path in mine):
        for metric in settings.metrics:  # so that a missing package shows before hours of drawing
            rewards.load(metric, state.device, models.get(metric))
        draw(settings, state.device, mine)

    file, answers = out / "scores.json", {}
    scores = json.loads(file.read_text()) if file.exists() else {}
    write = partial(replace_file, file, lambda path: path.write_text(json.dumps(scores)))
    save = write if state.is_main_process else lambda: None
    for metric in settings.metrics:
        keys = {path: score_key(path, images[path], metric, models.get(metric)) for path in images}
        todo = [path for path in mine if keys[path] not in scores]
        reward = rewards.load(metric, state.device, models.get(metric)) if todo else None
        try:
            for batch in batches(todo, settings.batch_size, f"scoring by {metric}"):
                pictures = torch.stack([read_image(path) for path in batch]).to(state.device)
                values, _ = rewards.score(metric, reward, pictures, [images[p] for p in batch])
                scores |= dict(zip([keys[p] for p in batch], values.tolist(), strict=True))
        finally:  # if a metric fails, what the main process has scored is not lost
            save()
        for part in gather_object([scores]):
            scores |= part
        save()
        answers[metric] = np.array([scores[key] for key in keys.values()]).reshape(2, -1)
    if state.is_main_process:
        print(report(settings, images, answers))
    state.destroy_process_group()


if __name__ == "__main__":
    run_script(lambda: evaluate(parse(EvaluationSettings)))
